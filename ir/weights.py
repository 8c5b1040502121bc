"""Weights as handles: a pass moves gigabytes by name; bytes are read when somebody asks for the array."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.ir.errors import InvalidInput

Array = np.ndarray[Any, np.dtype[Any]]


class Handle:
    """One constant tensor, loaded on first use. Immutable: the array is marked read-only."""

    __slots__ = ("_array", "_digest", "_load", "checked")

    def __init__(self, source: Array | Callable[[], Array]) -> None:
        self._array: Array | None = None if callable(source) else _frozen(source)
        self._load = source if callable(source) else None
        self._digest: str | None = None
        self.checked: set[object] = set()
        """What the verifier already proved about these values."""

    @property
    def array(self) -> Array:
        if self._array is None:
            assert self._load is not None
            self._array = _frozen(self._load())
        return self._array

    @property
    def digest(self) -> str:
        """Hash of dtype, shape and bytes."""
        if self._digest is None:
            a = np.ascontiguousarray(self.array)
            head = f"{a.dtype}{a.shape}".encode()
            self._digest = hashlib.blake2b(
                a.view(np.uint8).reshape(-1).data if a.size else b"", key=head[:64], digest_size=16
            ).hexdigest()
        return self._digest


def _frozen(a: Array) -> Array:
    a = np.asarray(a)
    if a.flags.writeable:
        a = a.view()
        a.flags.writeable = False
    return a


class Weights(Mapping[str, Handle]):
    """Immutable key -> handle map; ``with_items`` shares everything it does not replace."""

    def __init__(self, items: Mapping[str, Handle | Array] | None = None) -> None:
        self._items = {k: v if isinstance(v, Handle) else Handle(v) for k, v in (items or {}).items()}

    def __getitem__(self, key: str) -> Handle:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def with_items(self, items: Mapping[str, Handle | Array]) -> Weights:
        """A store with these keys added or replaced."""
        return Weights({**self._items, **items})

    def only(self, keys: set[str]) -> Weights:
        """A store with just these keys."""
        return self if keys == self._items.keys() else Weights({k: h for k, h in self._items.items() if k in keys})

    def fresh_key(self, stem: str, taken: set[str] | None = None) -> str:
        """A key not in the store (nor in ``taken``) that starts with ``stem``."""
        key, n = stem, 0
        while key in self._items or (taken and key in taken):
            n += 1
            key = f"{stem}.{n}"
        return key

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (bf16 kept, keys kept)."""
        from safetensors.numpy import save_file

        save_file({k: np.ascontiguousarray(h.array) for k, h in self._items.items()}, str(path))

    @staticmethod
    def load(path: str | Path) -> Weights:
        """Map a safetensors file; raises :class:`InvalidInput` if it is not one."""
        path = Path(path)
        try:
            raw = np.memmap(path, dtype=np.uint8, mode="r")
            size = int.from_bytes(raw[:8].tobytes(), "little")
            if size > min(len(raw) - 8, 100_000_000):
                raise ValueError("header longer than the file")
            header = json.loads(raw[8 : 8 + size].tobytes())
            return Weights({k: _slice(raw, 8 + size, v) for k, v in header.items() if k != "__metadata__"})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise InvalidInput(f"{path} is not a readable safetensors file: {e}") from e


_SAFETENSORS = {"F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16", "BOOL": "bool"} | {
    f"{a}{n}": f"{b}{n}" for a, b in (("I", "s"), ("U", "u")) for n in (8, 16, 32, 64)
}


def _slice(raw: Array, base: int, entry: dict[str, Any]) -> Array:
    from bitwright.ir.types import parse_dtype

    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(raw) - base:
        raise ValueError("offsets outside the file")
    return raw[base + begin : base + end].view(parse_dtype(_SAFETENSORS[entry["dtype"]]).numpy).reshape(entry["shape"])
