"""Files that appear whole or not at all: written beside their place, then moved there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitwright.ir.errors import BitwrightError


@contextmanager
def beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name in the folder of ``path`` to write to, which takes its place when the block ends, and goes when it fails.

    Two processes that write the same file at once do not meet. An OSError passes through.
    """
    place = Path(path)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """:func:`beside` for what a user asked for: raises :class:`BitwrightError` when the place cannot be written."""
    try:
        with beside(path) as temporary:
            yield temporary
    except OSError as error:
        raise BitwrightError(f"cannot write {Path(path)}: {error.strerror or error}") from error


def save(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file of bytes or of UTF-8 text; raises :class:`BitwrightError` when the place cannot be written."""
    with whole(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


__all__ = ["beside", "save", "whole"]
