"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.ir.errors import BitwrightError
from bitwright.ir.files import beside, save, whole


def test_text_and_bytes_arrive_and_nothing_stays_beside_them(tmp_path: Path) -> None:
    save(tmp_path / "a.txt", "é\n")
    save(tmp_path / "a.bin", b"\x00\x01")
    save(str(tmp_path / "a.txt"), "again")
    assert (tmp_path / "a.txt").read_bytes() == b"again"
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\x01"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.txt"]


def test_what_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    place = tmp_path / "a"
    place.write_text("old")
    with pytest.raises(ZeroDivisionError), beside(place) as temporary:
        temporary.write_text(str(1 / int(temporary.parent != tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert place.read_text() == "old"


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    place = tmp_path / "none" / "a"
    with pytest.raises(BitwrightError, match=r"cannot write .*none.a: No such file"):
        save(place, "x")
    with pytest.raises(FileNotFoundError), beside(place) as temporary:
        temporary.write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BitwrightError, match=r"cannot write .*folder"), whole(tmp_path / "folder") as temporary:
        temporary.write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
