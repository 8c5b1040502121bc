"""The ``.bw`` file: a zip whose members are stored, not deflated, and aligned, so that weights map in place.

Members: manifest.json, graph.bw-ir, report.json, program.so, weights.bin. The zip comment is
``bitwright <container version> <digest>``: the digest covers every byte of the file except the weights, which
have their CRC-32 in the zip directory (15 ms for 100 MB, where a cryptographic hash takes 50 to 75). A program
is machine code: load only files you trust; the checks here find damage, not malice.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.ir.files import whole
from bitwright.runtime.manifest import Manifest, parse_manifest

CONTAINER_VERSION = 1
WEIGHTS = "weights.bin"
MEMBERS = ("manifest.json", "graph.bw-ir", "report.json", "program.so", WEIGHTS)
_ALIGN = {WEIGHTS: 4096}
_ZIP64_FROM = (1 << 32) - (1 << 20)
_PREFIX = b"bitwright "
_COMMENT = struct.Struct("10s3s33s")  # "bitwright ", "001", " " + 32 hexadecimal digits
_END = struct.Struct("<4sHHHHIIH")
_LOCAL = struct.Struct("<4s22xHH")
_DIRECTORY_LIMIT = 1 << 14
_MANIFEST_LIMIT = 1 << 26
_BAD_ZIP = (
    zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, struct.error, ValueError, EOFError,
    OverflowError, IndexError, KeyError,
)  # fmt: skip

Blob = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Contents:
    """A program in memory. ``weights`` is a flat uint8 array: a view of the mapped file after :func:`read`."""

    manifest: Manifest
    graph: str
    library: bytes
    weights: NDArray[np.uint8]
    report: bytes = b"{}"
    path: str = field(default="", compare=False)


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write ``contents`` to ``path``, whole or not at all; the same contents give the same bytes.

    Raises :class:`BitwrightError` when the place cannot be written.
    """
    weights = contents.weights
    if weights.dtype != np.uint8 or weights.ndim != 1 or len(weights) != contents.manifest.weights_bytes:
        raise BitwrightError(f"the weights are not {contents.manifest.weights_bytes} flat bytes")
    manifest = contents.manifest.model_dump_json(indent=1).encode()
    data: tuple[Blob, ...] = (manifest, contents.graph.encode(), contents.report, contents.library, weights.data)
    with whole(path) as temporary:
        _write_zip(temporary, list(zip(MEMBERS, data, strict=True)))


def _write_zip(path: Path, members: Iterable[tuple[str, Blob]]) -> None:
    with path.open("w+b") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = _COMMENT.pack(_PREFIX, b"%03d" % CONTAINER_VERSION, b" " + b"0" * 32)
            for name, data in members:
                big = len(data) >= _ZIP64_FROM
                info = zipfile.ZipInfo(name)  # dated 1980-01-01: equal contents give equal files
                info.create_system, info.external_attr = 3, 0o644 << 16
                info.file_size = len(data)
                info.extra = _filler(file.tell() + 30 + len(name) + 20 * big, _ALIGN.get(name, 64))
                with archive.open(info, "w", force_zip64=big) as out:
                    for start in range(0, len(data), 1 << 24):
                        out.write(data[start : start + (1 << 24)])
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            regions = _regions(view, file)
            digest = _digest(view, regions)
        file.seek(-32, os.SEEK_END)
        file.write(digest.encode())


def _filler(at: int, alignment: int) -> bytes:
    """A zip extra field that moves data which would start at ``at`` to the next multiple of ``alignment``."""
    room = -(at + 4) % alignment
    return struct.pack("<HH", 0xD935, room) + bytes(room)


def read(path: str | os.PathLike[str], *, verify: bool = True) -> Contents:
    """Map the file and check it; ``verify=False`` leaves out the weights' checksum, nothing else.

    Raises :class:`InvalidInput` for anything but an undamaged program of a known version.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise InvalidInput(f"{name} is empty")
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            try:
                return _read(view, file, verify, name)
            except InvalidInput as error:
                raise InvalidInput(f"{name}: {error}") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {name}: {error.strerror or error}") from error


def _read(view: mmap.mmap, file: IO[bytes], verify: bool, path: str) -> Contents:
    if view[:4] != b"PK\x03\x04":
        raise InvalidInput("this is not a bitwright program (a .bw file)")
    regions = _regions(view, file)
    if _digest(view, regions) != view[-32:].decode("ascii", "replace"):
        bad = [name for name, (at, size, crc) in regions.items() if zlib.crc32(view[at : at + size]) != crc]
        where = f"in {', '.join(bad)}" if bad else "outside its members"
        raise InvalidInput(f"the file is damaged {where} (checksum differs); compile or copy it again")
    whole = np.frombuffer(view, np.uint8)
    at, size, crc = regions[WEIGHTS]
    weights = whole[at : at + size]
    if verify and zlib.crc32(weights.data) != crc:
        raise InvalidInput(f"the file is damaged in {WEIGHTS} (checksum differs); compile or copy it again")
    text = {name: view[at : at + size] for name, (at, size, _) in regions.items() if name != WEIGHTS}
    manifest = parse_manifest(text["manifest.json"])
    if manifest.weights_bytes != size:
        raise InvalidInput(f"{WEIGHTS} has {size} bytes, the manifest says {manifest.weights_bytes}")
    try:
        graph = text["graph.bw-ir"].decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"graph.bw-ir is not UTF-8: {error}") from error
    return Contents(manifest, graph, text["program.so"], weights, text["report.json"], path)


def _regions(view: mmap.mmap, file: IO[bytes]) -> dict[str, tuple[int, int, int]]:
    """(first byte, size, CRC-32) of each member, after checking everything about the zip's structure."""
    tail = view[-_END.size - _COMMENT.size :]
    if len(tail) < _END.size + _COMMENT.size or not tail.startswith(b"PK\x05\x06"):
        raise InvalidInput("the file is truncated or is not a bitwright program (its end is missing)")
    *_, entries, directory, _, length = _END.unpack(tail[: _END.size])
    prefix, version, _ = _COMMENT.unpack(tail[_END.size :])
    if length != _COMMENT.size or prefix != _PREFIX or not version.isdigit():
        raise InvalidInput("this is a zip file but not a bitwright program")
    if int(version) > CONTAINER_VERSION:
        raise InvalidInput(f"the file has container version {int(version)}, newer than this bitwright: upgrade")
    if entries != len(MEMBERS) or directory > _DIRECTORY_LIMIT:
        raise InvalidInput(f"the zip directory is wrong: {entries} members in {directory} bytes")
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except _BAD_ZIP as error:
        raise InvalidInput(f"the zip structure is damaged: {error}") from error
    if (names := tuple(i.filename for i in infos)) != MEMBERS:
        raise InvalidInput(f"the members are {', '.join(map(repr, names))}, not {', '.join(MEMBERS)}")
    regions, end = {}, 0
    for info in infos:
        at = _data_offset(view, info)
        if info.header_offset < end or at % _ALIGN.get(info.filename, 64):
            raise InvalidInput(f"{info.filename} overlaps another member or is not aligned (was it zipped anew?)")
        end = at + info.file_size
        regions[info.filename] = (at, info.file_size, info.CRC)
    if end > len(view) - _END.size - _COMMENT.size or regions["manifest.json"][1] > _MANIFEST_LIMIT:
        raise InvalidInput("a member reaches beyond its place")
    return regions


def _data_offset(view: mmap.mmap, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member start."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits or info.compress_size != info.file_size:
        raise InvalidInput(f"{info.filename} is compressed or encrypted; bitwright stores members as they are")
    head: Any = view[info.header_offset : info.header_offset + _LOCAL.size]
    if len(head) < _LOCAL.size or not head.startswith(b"PK\x03\x04"):
        raise InvalidInput(f"{info.filename}: its header is damaged")
    _, name, extra = _LOCAL.unpack(head)
    return int(info.header_offset + _LOCAL.size + name + extra)


def _digest(view: mmap.mmap, regions: dict[str, tuple[int, int, int]]) -> str:
    """Digest (32 hexadecimal digits) of all bytes except the weights and the digest itself."""
    at, size, _ = regions[WEIGHTS]
    digest = hashlib.blake2b(digest_size=16)
    with memoryview(view) as whole:
        for low, high in ((0, at), (at + size, len(whole) - 32)):
            with whole[low:high] as part:
                digest.update(part)
    return digest.hexdigest()
