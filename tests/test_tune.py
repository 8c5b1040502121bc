"""``tune`` from model to tuned program, from Python and from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import bitwright as bw
from bitwright.cli import app
from bitwright.codegen.targets import host
from bitwright.codegen.targets.machine import cpu_name
from bitwright.codegen.targets.x86 import AVX512_VNNI
from bitwright.codegen.tuning.records import Database, Record
from bitwright.codegen.tuning.tasks import tasks_of
from bitwright.codegen.tuning.workload import target_key
from bitwright.codegen.tvm.select import templates, version
from bitwright.codegen.tvm.template import Refused
from bitwright.errors import BitwrightError, InvalidInput
from bitwright.ir.graph import Graph
from bitwright.pipeline import lower
from bitwright.runtime.program import Program

X = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def graph() -> Graph:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 48)).eval()
    return bw.capture(module, (torch.from_numpy(X),))


@pytest.fixture
def records(graph: Graph, tmp_path: Path) -> Path:
    """A database that holds another tile for the first layer."""
    target, path = host(), tmp_path / "tuning.sqlite"
    lowered = lower(graph, "int8", target, [(X,)]).graph
    task = next(t for t in tasks_of(lowered, target) if t.template == "contract" and t.constants)
    point = {**templates()["contract"].space(task.body, task.constants, target).default, "rows": 2, "vectors": 1}
    key = target_key(target, cpu_name())
    with Database(path) as database:
        database.add_workload(task.key, task.text, task.features)
        database.add(Record(task.key, key, version(), "contract", point, "ok", "", 8e-7, 1e-6, 0.8, 9, confirmed=True))
        database.add(Record(task.key, key, version(), "contract", {"rows": 9}, "crash", "the kernel died of SIGSEGV"))
    return path


def test_a_program_says_which_records_it_used_and_computes_the_same(
    graph: Graph, records: Path, tmp_path: Path
) -> None:
    plain = bw.compile(graph, recipe="int8", calibration=[(X,)])
    tuned = bw.compile(graph, recipe="int8", calibration=[(X,)], records=records)
    assert np.array_equal(plain(X), tuned(X))
    tuned.save(tmp_path / "tuned.bw")
    again = Program.load(tmp_path / "tuned.bw")
    used = again.manifest.tuning
    assert len(used) == 1
    label = next(iter(used.values()))
    assert label.startswith("record 1 (")
    assert [r.reason for r in again.report.layers if f"tuned: {label}, 0.80x" in r.reason]
    assert any("1 of" in n and "tuning records" in n for n in again.report.notes)
    assert plain.manifest.tuning == {}


def test_tiles_with_a_long_epilogue_stay_within_the_stack(graph: Graph) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.SiLU(), torch.nn.Linear(96, 48)).eval()
    long = bw.capture(module, (torch.from_numpy(X),))
    target, template, most = AVX512_VNNI, templates()["contract"], list[int]()
    for it in (graph, long):
        task = next(t for t in tasks_of(lower(it, "int8", target, [(X,)]).graph, target) if "quantize" in t.text)
        points = [p for p in template.space(task.body, task.constants, target) if p["vectors"] == 1]
        point = max(points, key=lambda p: int(p["rows"]))
        config = template.at(task.body, task.constants, target, point)
        assert not isinstance(config, Refused)
        template.emit(task.body, config, "largest")
        most.append(int(point["rows"]))
    assert most[0] > most[1] > 8


def test_tuning_measures_and_reports_the_whole_model(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite"
    result = bw.tune(graph, records=path, minutes=0.2, recipe="int8", calibration=[(X,)], jobs=1, seed=1)
    assert result.before > 0
    assert result.after > 0
    assert result.tried > 0
    assert sum(r.measured for r in result.rows) > 0
    assert sum(r.share for r in result.rows) == pytest.approx(1.0)
    with Database(path, write=False) as database:
        assert {r.status for r in database.records()} <= {"ok", "refused"}
        assert len(database.records()) == result.tried


def test_bad_requests(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no tuning database"):
        bw.compile(graph, records=tmp_path / "none.sqlite")
    with pytest.raises(InvalidInput, match="minutes"):
        bw.tune(graph, records=tmp_path / "x.sqlite", minutes=-1)
    with pytest.raises(InvalidInput, match="'local' or 'ray'"):
        bw.tune(graph, records=tmp_path / "x.sqlite", minutes=0.1, workers="slurm")
    with pytest.raises(BitwrightError, match="the time was too short"):
        bw.tune(graph, records=tmp_path / "x.sqlite", minutes=1e-9)


def test_command_line(records: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(app, ["tune", "--show", "--db", str(records)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "0.80x" in shown.output
    assert "1 times crash: the kernel died of SIGSEGV" in shown.output
    merged = run(app, ["tune", "--merge", str(records), "--db", str(tmp_path / "all.sqlite")])
    assert merged.exit_code == 0, merged.output
    assert "2 new records" in merged.output
    nothing = run(app, ["tune", "--db", str(records)])
    assert isinstance(nothing.exception, InvalidInput)


def test_interrupting_says_what_is_kept(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitwright.cli_tune.load", lambda _: graph)
    monkeypatch.setattr("bitwright.tuning.tune", interrupted)
    result = CliRunner().invoke(app, ["tune", "model.onnx", "--db", str(tmp_path / "x.sqlite")])
    assert result.exit_code != 0
    assert "keeps what was measured" in result.output.replace("\n", " ")
