"""explore: the front is one, its designs run as they say, and mistakes are told."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright import cli
from bitwright.codegen.devices import library
from bitwright.codegen.devices.schema import parse_device
from bitwright.explore import Design, explore, front, save
from bitwright.ir.errors import InvalidInput
from tests.test_devices import captured

DEVICE = library.find_device("simd124")


@cache
def found() -> tuple[Design, ...]:
    graph, example = captured("digits")
    return tuple(explore(graph, DEVICE, [example], designs=8))


def test_the_front_trades_error_for_cycles_and_area() -> None:
    designs = found()
    assert len(designs) >= 3
    for a in designs:
        assert not any(b is not a and all(x <= y for x, y in zip(b.figures, a.figures, strict=True)) for b in designs)
    fast, best = min(designs, key=lambda d: d.cycles), min(designs, key=lambda d: d.error)
    assert fast.cycles < 0.7 * best.cycles
    assert fast.error > best.error
    assert all(1 <= len(d.patterns) <= 4 for d in designs)


def test_front_keeps_what_nothing_beats() -> None:
    def design(*figures: float) -> Design:
        return Design(("four",), "", figures[0], figures[1], figures[2], 0.0, 0.0)

    a, b, c, worse = design(1, 5, 5), design(5, 1, 5), design(5, 5, 1), design(5, 5, 5)
    assert set(map(id, front([worse, a, b, c]))) == {id(a), id(b), id(c)}
    assert front([]) == []


def test_designs_that_are_written_run_as_they_say(tmp_path: Path) -> None:
    graph, example = captured("digits")
    designs = found()
    files = save(designs, library.text_of("simd124"), tmp_path)
    assert len(files) == len(designs)
    recipe = files[0].with_suffix(".recipe").read_text().strip()
    done = bw.simulate(graph, str(files[0]), recipe=recipe, calibration=[example])
    assert done.identical
    assert done.schedule.cycles == designs[0].cycles
    assert done.schedule.device.words is not None
    assert done.schedule.device.words.active == designs[0].patterns


def test_mistakes_are_told() -> None:
    graph, example = captured("digits")
    with pytest.raises(InvalidInput, match="npu8 is no family of patterns"):
        explore(graph, library.find_device("npu8"), [example])
    with pytest.raises(InvalidInput, match="explore needs calibration data"):
        explore(graph, DEVICE, [])
    text = library.text_of("simd124").replace("%w: s2", "%w: s3").replace("{ mac2 = 8 }", "{ mac2 = 5 }")
    text = text.replace("mac2 = 4", "mac2 = 2").replace("mac4 = 3, mac2 = 1, mac1 = 2", "mac4 = 3, mac2 = 1")
    with pytest.raises(InvalidInput, match=r"explore searches words of 4, 2 and 1 bits, simd124 has \[1, 3, 4\]"):
        explore(graph, parse_device(text), [example])


def test_the_command_prints_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitwright.ir.text import show

    graph, example = captured("digits")
    (tmp_path / "net.bw-ir").write_text(show(graph))
    graph.weights.save(tmp_path / "net.safetensors")
    named: dict[str, Any] = {graph.inputs[0].name: example[0]}
    np.savez(tmp_path / "x.npz", **named)
    arguments = ["explore", "--family", "simd124", tmp_path / "net.bw-ir", "-c", tmp_path / "x.npz", "--designs", "3",
                 "--plot", tmp_path / "front.png", "-o", tmp_path / "designs"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bitwright", *map(str, arguments)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    told = capsys.readouterr().out
    assert "Designs of simd124 that no other beats" in told
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "designs").glob("*.recipe"))
