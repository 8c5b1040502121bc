"""A content-addressed cache of compiled objects on disk, shared by all processes of a user."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from bitwright.ir.files import beside

_MAGIC = b"bwcache1"
_DIGEST = 16
_SUFFIX = ".entry"
_STALE = 3600.0


def key_of(*parts: object) -> str:
    """A key from values whose ``repr`` says all about them; bytes count as they are.

    >>> key_of("kernel", 1) == key_of("kernel", 1), key_of("a", "b") == key_of("ab")
    (True, False)
    """
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def default_directory() -> Path:
    """$BITWRIGHT_CACHE, else bitwright in $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("BITWRIGHT_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bitwright"


class Cache:
    """Key -> bytes in files of one directory.

    Entries carry a checksum: a damaged one is removed and counts as absent. Writing is atomic, so several
    processes may share the directory. Above ``max_bytes`` the entries used longest ago go. A directory that
    cannot be written is no error: nothing is kept, and ``problem`` says why.
    """

    def __init__(self, directory: Path | str | None = None, *, max_bytes: int = 2 << 30) -> None:
        self.directory = Path(directory) if directory is not None else default_directory()
        self.max_bytes = max_bytes
        self.problem = ""
        self.hits = self.misses = 0
        self._unseen = -1

    def get(self, key: str) -> bytes | None:
        """The bytes stored under ``key``, or None."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            self.misses += 1
            return None
        start = len(_MAGIC) + _DIGEST
        body = data[start:]
        if data[:start] != _MAGIC + _checksum(key, body):
            path.unlink(missing_ok=True)
            self.misses += 1
            return None
        self.hits += 1
        try:
            os.utime(path)
        except OSError:
            pass  # another process evicted it, or the directory is read-only
        return body

    def put(self, key: str, data: bytes) -> None:
        """Store ``data`` under ``key``."""
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside(path) as temporary:
                temporary.write_bytes(_MAGIC + _checksum(key, data) + data)
        except OSError as error:
            self.problem = f"the cache in {self.directory} cannot be written: {error}"
            return
        self._unseen = -1 if self._unseen < 0 else self._unseen + len(data)
        if self._unseen < 0 or self._unseen > self.max_bytes // 16:
            self.evict()

    def get_or_make(self, key: str, make: Callable[[], bytes]) -> bytes:
        """The stored bytes, or those of ``make``, which are then stored."""
        found = self.get(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found

    def evict(self) -> int:
        """Remove the entries used longest ago until nine tenths of ``max_bytes`` are left; returns bytes removed."""
        self._unseen = 0
        entries, total, removed = [], 0, 0
        for path in self.directory.glob("??/*"):
            try:
                stat = path.stat()
                if path.suffix == ".tmp" and time.time() - stat.st_mtime > _STALE:
                    path.unlink()  # left by a process that died
                elif path.suffix == _SUFFIX:
                    entries.append((stat.st_mtime, stat.st_size, path))
                    total += stat.st_size
            except OSError:
                continue  # another process was quicker
        if total <= self.max_bytes:
            return 0
        for _, size, path in sorted(entries):
            if total - removed <= self.max_bytes * 9 // 10:
                break
            path.unlink(missing_ok=True)
            removed += size
        return removed

    def size(self) -> int:
        """Bytes that the entries take."""
        return sum(p.stat().st_size for p in self.directory.glob(f"??/*{_SUFFIX}"))

    def clear(self) -> None:
        """Remove every entry (and nothing else that lies in the directory)."""
        for path in self.directory.glob(f"??/*{_SUFFIX}"):
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        name = key if key.isalnum() and len(key) >= 8 else key_of(key)
        return self.directory / name[:2] / f"{name}{_SUFFIX}"


def _checksum(key: str, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST, key=key.encode()[:64]).digest()
