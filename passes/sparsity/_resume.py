"""Solved layers on disk, one file each, found again by a hash of everything the solution depends on."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.files import beside
from bitwright.ir.weights import Array


class Store:
    """Arrays by layer name in a directory; an empty path stores nothing."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory).expanduser() if directory else None
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise InvalidInput(f"resume={directory} cannot be a directory: {e.strerror}") from e

    def _file(self, layer: str) -> Path:
        assert self.directory is not None
        plain = re.sub(r"[^\w.-]", "_", layer).lstrip(".")[:100]
        if plain != layer:  # two layers never share a file
            plain += "-" + hashlib.blake2b(layer.encode(), digest_size=4).hexdigest()
        return self.directory / f"{plain}.npz"

    def read(self, layer: str, key: str, like: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Any]] | str:
        """Arrays in the shapes and dtypes of ``like``, and facts, saved under this key.

        Else why a file was ignored: empty when there is none, or one with another key.
        """
        if self.directory is None or not self._file(layer).exists():
            return ""
        file = self._file(layer)
        damaged = f"{file.name} is damaged and was ignored"
        try:
            with file.open("rb") as f, np.load(f, allow_pickle=False) as saved:
                if str(saved["key"]) != key:
                    return ""
                facts = json.loads(str(saved["facts"]))
                found = {}
                for name, old in like.items():
                    raw = saved[name]
                    if raw.dtype != np.uint8 or raw.size != old.nbytes:
                        return damaged
                    found[name] = raw.view(old.dtype).reshape(old.shape)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return damaged
        if not all(bool(np.isfinite(a.astype(np.float64)).all()) for a in found.values()):
            return damaged
        return found, dict(facts)

    def write(self, layer: str, key: str, arrays: dict[str, Array], facts: dict[str, Any]) -> None:
        """Save a layer: the file appears whole or not at all. Raises :class:`InvalidInput` when it cannot."""
        if self.directory is None:
            return
        raw = {name: np.ascontiguousarray(a).reshape(-1).view(np.uint8) for name, a in arrays.items()}
        try:
            with beside(self._file(layer)) as temporary, temporary.open("wb") as out:
                np.savez(out, key=np.array(key), facts=np.array(json.dumps(facts)), **raw)  # type: ignore[arg-type]
        except OSError as e:
            raise InvalidInput(f"resume={self.directory} cannot be written: {e.strerror}") from e


def digest(parts: Iterable[str | Array]) -> str:
    """A hash of texts and arrays (dtype, shape and bytes)."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            h.update(f"{len(part)}:{part}".encode())
        else:
            a = np.ascontiguousarray(part)
            h.update(f"{a.dtype}{a.shape}".encode())
            h.update(a.reshape(-1).view(np.uint8).data if a.size else b"")
    return h.hexdigest()
