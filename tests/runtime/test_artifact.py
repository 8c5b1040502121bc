"""The .bw file: layout, determinism, damage of every kind, foreign and newer files, speed of loading."""

from __future__ import annotations

import json
import os
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.runtime.artifact import MEMBERS, Contents, read, write
from bitwright.runtime.manifest import Manifest, TensorSpec, parse_manifest
from bitwright.runtime.program import Program

Make = Callable[..., Contents]


@pytest.fixture
def file(make: Make, tmp_path: Path) -> Path:
    write(tmp_path / "model.bw", make())
    return tmp_path / "model.bw"


def test_what_is_written_is_read(make: Make, file: Path) -> None:
    contents, back = make(), read(file)
    assert (back.manifest, back.graph, back.library, back.report) == (
        contents.manifest, contents.graph, contents.library, contents.report,
    )  # fmt: skip
    np.testing.assert_array_equal(back.weights, contents.weights)
    assert back.weights.ctypes.data % 64 == 0
    assert not back.weights.flags.writeable


def test_it_is_an_ordinary_zip_with_aligned_stored_members(file: Path) -> None:
    data = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert tuple(archive.namelist()) == MEMBERS
        for info in archive.infolist():
            content = archive.read(info)
            at = data.index(content, info.header_offset) if content else 0
            assert at % (4096 if info.filename == "weights.bin" else 64) == 0
            assert info.compress_type == zipfile.ZIP_STORED
        assert json.loads(archive.read("manifest.json"))["name"] == "net"


def test_equal_contents_give_equal_files(make: Make, file: Path, tmp_path: Path) -> None:
    write(tmp_path / "again.bw", make())
    assert (tmp_path / "again.bw").read_bytes() == file.read_bytes()


def test_writing_is_atomic(make: Make, file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    wrong = make()
    with pytest.raises(BitwrightError, match="flat bytes"):
        write(file, Contents(wrong.manifest, "", b"", wrong.weights[:-1]))
    with pytest.raises(BitwrightError, match="cannot write"):
        write(tmp_path / "missing" / "model.bw", wrong)
    (tmp_path / "folder").mkdir()
    with pytest.raises(BitwrightError, match="cannot write"):
        write(tmp_path / "folder", wrong)
    assert file.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "model.bw"]


def test_any_flipped_bit_is_found(file: Path, tmp_path: Path) -> None:
    good = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        starts = [i.header_offset for i in archive.infolist()]
        directory = archive.start_dir
    places = {p + i for p in starts for i in range(0, 140, 7)}
    places |= set(range(directory, len(good), 5)) | set(range(0, len(good), 149))
    places |= set(range(len(good) - 80, len(good), 3))
    target = tmp_path / "bad.bw"
    for place in sorted(p for p in places if p < len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        target.write_bytes(bad)
        with pytest.raises(InvalidInput) as caught:
            read(target)
        assert str(target) in str(caught.value)


def test_damaged_members_are_named(file: Path) -> None:
    good = file.read_bytes()
    contents = read(file)
    for name, content in (("program.so", contents.library), ("weights.bin", contents.weights.tobytes())):
        bad = bytearray(good)
        bad[good.rindex(content) + 20] ^= 16
        file.write_bytes(bad)
        with pytest.raises(InvalidInput, match=rf"damaged in {name} \(checksum differs\)"):
            read(file)
    with pytest.raises(InvalidInput, match="weights"):
        Program.load(file)
    assert read(file, verify=False).manifest == contents.manifest  # only the weights are damaged


def test_any_truncation_is_found(file: Path, tmp_path: Path) -> None:
    good = file.read_bytes()
    target = tmp_path / "short.bw"
    for size in [*range(0, 200, 7), *range(0, len(good), 997), *range(len(good) - 90, len(good))]:
        target.write_bytes(good[:size])
        with pytest.raises(InvalidInput):
            read(target)
    target.write_bytes(good + b"x")
    with pytest.raises(InvalidInput, match="end is missing"):
        read(target)
    target.write_bytes(b"x" + good)
    with pytest.raises(InvalidInput, match="not a bitwright program"):
        read(target)


def test_what_is_not_a_program_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "x.bw"
    with pytest.raises(InvalidInput, match=r"cannot read .*No such file"):
        read(path)
    with pytest.raises(InvalidInput, match="cannot read"):
        read(tmp_path)
    for data, message in ((b"", "is empty"), (b"hello", "not a bitwright program"), (b"PK\x03\x04", "truncated")):
        path.write_bytes(data)
        with pytest.raises(InvalidInput, match=message):
            read(path)


def rezip(path: Path, names: list[str], *, deflate: bool = False, comment: bytes | None = None) -> None:
    method = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.comment = b"bitwright 001 " + b"0" * 32 if comment is None else comment
        for name in names:
            archive.writestr(name, bytes(64))


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (list(MEMBERS), {"comment": b""}, "truncated or is not"),
        (list(MEMBERS), {"comment": b"x" * 46}, "zip file but not a bitwright program"),
        (list(MEMBERS), {"comment": b"bitwright 999 " + b"0" * 32}, "container version 999, newer"),
        (list(MEMBERS), {"deflate": True}, "compressed or encrypted"),
        (list(MEMBERS), {}, "not aligned"),
        (["../../etc/passwd", *MEMBERS[1:]], {}, "the members are '../../etc/passwd'"),
        (["/abs", *MEMBERS[1:]], {}, "the members are '/abs'"),
        (list(MEMBERS[:3]), {}, "3 members"),
        ([f"{i}" for i in range(3000)], {}, "3000 members"),
    ],
)
def test_foreign_zips_are_refused(tmp_path: Path, names: list[str], options: Any, message: str) -> None:
    path = tmp_path / "x.bw"
    rezip(path, names, **options)
    with pytest.raises(InvalidInput, match=message):
        read(path)


def test_newer_and_wrong_manifests_are_refused() -> None:
    good = Manifest(inputs=(TensorSpec(name="x", dtype="f32", shape=(2,)),)).model_dump(mode="json")

    def text(**changes: Any) -> bytes:
        return json.dumps(good | changes).encode()

    assert parse_manifest(text()).inputs[0].dtype == "f32"
    tensor = {"name": "x", "dtype": "f32", "shape": [2]}
    for data, message in (
        (text(schema_version=2, versions={"bitwright": "9.1"}), "written by bitwright 9.1 with schema 2.*upgrade"),
        (text(surprise=1), "surprise: Extra inputs"),
        (text(arena_bytes=-1), "arena_bytes"),
        (text(arena_bytes=1 << 60), "arena_bytes"),
        (text(inputs=[tensor, tensor]), "two inputs have the same name"),
        (text(inputs=[tensor | {"dtype": "f99"}]), "'f99' is not a number format"),
        (text(inputs=[tensor | {"shape": [-1]}]), "size -1"),
        (text(inputs=[tensor | {"shape": ["b"]}]), "only the first size may depend on the batch"),
        (text(inputs=[tensor | {"shape": [2, "b"]}], batch="b"), "only the first size"),
        (text(inputs=[tensor | {"shape": [1 << 40, 1 << 40]}]), "too large"),
        (text(batch="b"), "no input has the batch symbol 'b'"),
        (text(chunks=[2]), "do not fit batch symbol"),
        (text(chunks=[]), "are not row counts"),
        (text(input_alignment=3), "power of two"),
        (b"{", "not readable"),
        (b"[]", "manifest"),
        (b"\xff", "not readable"),
        (b"[" * 100_000, "not readable"),
    ):
        with pytest.raises(InvalidInput, match=message):
            parse_manifest(data)


def test_row_sizes_follow_from_the_shape() -> None:
    spec = TensorSpec(name="x", dtype="bf16", shape=("12*b", 4, 3))
    assert (spec.factor, spec.row_bytes, str(spec)) == (12, 288, "bf16[12*b, 4, 3]")
    assert TensorSpec(name="x", dtype="f32", shape=(2, 3)).row_bytes == 0


def test_unzip_accepts_the_file(file: Path) -> None:
    run = subprocess.run(["python3", "-m", "zipfile", "-t", str(file)], capture_output=True, text=True, check=False)
    assert "Done testing" in run.stdout


def test_a_large_model_loads_quickly_and_unread(make: Make, tmp_path: Path) -> None:
    small = make()
    size = 100 << 20
    manifest = small.manifest.model_copy(update={"weights_bytes": size})
    weights = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    weights[: len(small.weights)] = small.weights
    path = tmp_path / "large.bw"
    write(path, Contents(manifest, small.graph, small.library, weights))
    x = np.ones((4, 8), np.float32)
    want = Program(small)(x)[0]
    best = {}
    for verify in (True, False):
        times = []
        for _ in range(5):
            start = time.process_time()
            program = Program.load(path, verify=verify)
            times.append(time.process_time() - start)
            np.testing.assert_array_equal(program(x)[0], want)
        best[verify] = min(times)
    os.unlink(path)
    print(f"100 MB: {best[True] * 1e3:.1f} ms verified, {best[False] * 1e3:.2f} ms unverified")
    assert best[False] < 0.02
    assert best[True] < 0.2
