"""The manager: levels compose, every change is verified, a report row per pass, and a reproducer for a crash."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Level
from bitwright.ir.types import F16
from bitwright.passes import Context, Pass, PassFailed, Pipeline, parse_passes, run_pipeline
from bitwright.passes._instruments import Diff, Dump, Timing, replay

Read = Callable[..., Graph]
TEXT = """
graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
  %w = weight {ref="fc.weight"} : f32[4, 8]
  %one = constant {values=[1.0]} : f32[1]
  %h = linear(%x, %w) : f32[2, 4]
  %y = mul(%h, %one) : f32[2, 4]
}
"""


@dataclass(frozen=True)
class Lower(Pass):
    """Only changes the level."""

    name: ClassVar[str] = "lower"
    gives: ClassVar[Level] = "integer"

    def run(self, graph: Graph, context: Context) -> Graph:
        return replace(graph, level="integer")


@dataclass(frozen=True)
class Crash(Pass):
    """Raises, as a bug would."""

    name: ClassVar[str] = "crash"
    bits: int = 8

    def run(self, graph: Graph, context: Context) -> Graph:
        raise ZeroDivisionError("boom")


@dataclass(frozen=True)
class WrongType(Pass):
    """Breaks a rule of the graph level."""

    name: ClassVar[str] = "wrong-type"

    def run(self, graph: Graph, context: Context) -> Graph:
        last = graph.nodes[-1]
        bad = replace(last, types=(last.type.with_dtype(F16),))
        return replace(graph, nodes=(*graph.nodes[:-1], bad))


def test_a_row_per_pass(read: Read) -> None:
    graph, report = run_pipeline(read(TEXT), parse_passes("simplify, nm-mask{pattern=1:4}, fold-batch-norm"))
    assert [(r.name, r.options, r.nodes_before, r.nodes_after, r.changed) for r in report.rows] == [
        ("simplify", "", 4, 2, True),
        ("nm-mask", "pattern=1:4", 2, 2, True),
        ("fold-batch-norm", "", 2, 2, False),
    ]
    assert report.rows[1].notes == ("output error not measured: no calibration data", "1 remark")
    assert report.remarks[0][:2] == ("nm-mask", "fc")
    assert report.pipeline == "simplify, nm-mask{pattern=1:4}, fold-batch-norm"
    assert report.as_dict()["rows"][0]["name"] == "simplify"
    assert len(graph.nodes) == 2


def test_output_error_of_lossy_passes_is_measured(read: Read) -> None:
    batch = [np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)]
    _, report = run_pipeline(
        read(TEXT), parse_passes("nm-mask, nm-mask{pattern=1:4}, simplify"), Context(calibration=[batch])
    )
    first, second, third = (r.output_error for r in report.rows)
    assert first is not None
    assert second is not None
    assert 0 < first < second < 1
    assert third is None


def test_unchanged_graph_is_the_same_object(read: Read) -> None:
    graph = read(TEXT)
    assert run_pipeline(graph, parse_passes("fold-batch-norm"))[0] is graph


def test_levels_that_do_not_fit_fail_when_built() -> None:
    with pytest.raises(InvalidInput, match="simplify takes a graph of level graph, but lower gives level integer"):
        Pipeline((Lower(), *parse_passes("simplify")))
    with pytest.raises(InvalidInput, match="takes a graph of level graph, but the input gives level kernel"):
        Pipeline(parse_passes("simplify"), "kernel")
    assert Pipeline((Lower(),)).gives == "integer"
    with pytest.raises(InvalidInput, match="lower gives level integer"):
        _ = Pipeline((Lower(),)) + parse_passes("simplify")


def test_facts_that_are_missing_fail_when_built(read: Read) -> None:
    with pytest.raises(InvalidInput, match=r"quantize-int8 needs ranges, .* \(observe-ranges does\)"):
        Pipeline(parse_passes("quantize-int8"))
    run_pipeline(read(TEXT), parse_passes("quantize-int8"), Context(facts={"ranges": {"x": (-1.0, 1.0)}}))


def test_a_graph_of_another_level_is_refused(read: Read) -> None:
    with pytest.raises(InvalidInput, match="level"):
        run_pipeline(replace(read(TEXT), level="integer"), parse_passes("simplify"))


def test_stop_after_and_bisect(read: Read) -> None:
    passes = (*parse_passes("simplify, nm-mask"), Lower())
    by_name, _ = run_pipeline(read(TEXT), passes, stop_after="simplify")
    by_number, report = run_pipeline(read(TEXT), passes, stop_after=1)
    assert not by_name.changed_from(by_number) or by_name.structure == by_number.structure
    assert [r.name for r in report.rows] == ["simplify"]
    limited, report = run_pipeline(read(TEXT), passes, bisect_limit=1)
    assert [(r.name, r.skipped) for r in report.rows] == [("simplify", False), ("nm-mask", True), ("lower", False)]
    assert limited.level == "integer"
    with pytest.raises(InvalidInput, match="cannot stop after 'nope'"):
        run_pipeline(read(TEXT), passes, stop_after="nope")


def test_instruments_watch(read: Read, tmp_path: Path) -> None:
    timing, dump, diff = Timing(), Dump(tmp_path / "dumps"), Diff()
    run_pipeline(read(TEXT), parse_passes("simplify, fold-batch-norm, nm-mask"), instruments=[timing, dump, diff])
    assert [n for n, s in timing.seconds if s >= 0] == ["simplify", "fold-batch-norm", "nm-mask"]
    assert sorted(p.name for p in (tmp_path / "dumps").iterdir()) == [
        "00.input.bw-ir",
        "01.after_simplify.changed.bw-ir",
        "02.after_fold-batch-norm.unchanged.bw-ir",
        "03.after_nm-mask.changed.bw-ir",
    ]
    assert "level=graph" in (tmp_path / "dumps" / "01.after_simplify.changed.bw-ir").read_text()
    assert [name for name, _ in diff.diffs] == ["simplify", "nm-mask"]
    assert "-  %y = mul(%h, %one) : f32[2, 4]\n" in diff.diffs[0][1]


@pytest.mark.parametrize(
    ("bad", "why"), [(Crash(bits=3), "ZeroDivisionError: boom"), (WrongType(), "VerifyError: declared f16")]
)
def test_a_failing_pass_leaves_a_reproducer(read: Read, tmp_path: Path, bad: Pass, why: str) -> None:
    passes = (*parse_passes("simplify"), bad, *parse_passes("nm-mask"))
    with pytest.raises(PassFailed, match=rf"pass {bad.name} \(number 2 of 3\) failed: {why}"):
        run_pipeline(read(TEXT), passes, crash_dir=tmp_path)
    assert "%y = linear" in (tmp_path / "crash.bw-ir").read_text().replace("%h", "%y")
    assert (tmp_path / "crash.pipeline").read_text() == f"{bad}, nm-mask\n"
    assert (tmp_path / "crash.safetensors").exists()


def test_the_reproducer_replays(read: Read, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from bitwright.passes import Pass\nfrom dataclasses import dataclass\n\n@dataclass(frozen=True)\n"
        "class Bug(Pass):\n    name = 'bug'\n    def run(self, graph, context):\n        raise KeyError('x')\n"
    )
    with pytest.raises(PassFailed, match=r"replay: .* -m bitwright"):
        run_pipeline(read(TEXT), parse_passes(f"simplify, {tmp_path}/mine.py:Bug"), crash_dir=tmp_path)
    with pytest.raises(PassFailed, match="KeyError"):
        replay(tmp_path / "crash.bw-ir")
    (tmp_path / "crash.pipeline").write_text("nm-mask")
    command = [sys.executable, "-m", "bitwright.passes", str(tmp_path / "crash.bw-ir")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nm<2:4, axis=1>" in done.stdout


def test_errors_of_the_user_pass_through(read: Read, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="calibration"):
        run_pipeline(read(TEXT), parse_passes("observe-ranges, quantize-int8"), crash_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told(read: Read) -> None:
    seen: list[Any] = []
    run_pipeline(read(TEXT), parse_passes("simplify, nm-mask"), Context(progress=lambda *a: seen.append(a)))
    assert seen == [("simplify", 0.0), ("nm-mask", 0.5)]
