"""Tuner parts: spaces, the database under faults, workers that hang, crash or run out of memory, measurements."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitwright.codegen.tuning.bench import LocalBench, Trial, alone
from bitwright.codegen.tuning.measure import measured
from bitwright.codegen.tuning.model import Model, columns
from bitwright.codegen.tuning.records import Database, Record
from bitwright.codegen.tuning.space import Knob, Rule, Space
from bitwright.codegen.tuning.worker import Worker
from bitwright.ir.errors import BitwrightError, InvalidInput
from tests.codegen import tuning_faults as faults

ROOT = Path(__file__).resolve().parents[2]
GOOD = Record("w", "t", "c", "contract", {"rows": 4}, "ok", "", 0.5, 1.0, 0.5, 10, confirmed=True)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "tuning.sqlite", wait=0.3) as made:
        yield made


@pytest.fixture(scope="module")
def kernels() -> bytes:
    return faults.library()


# --- spaces and the model ----------------------------------------------------------------------------------------


def test_a_space_lists_what_its_rules_allow_default_first() -> None:
    rules = (Rule("too large", lambda p: int(p["a"]) * int(p["b"]) <= 4),)
    space = Space({"a": 2, "b": 2}, (Knob("a", (1, 2, 4)), Knob("b", (1, 2, 4))), rules)
    points = list(space)
    assert points[0] == {"a": 2, "b": 2}
    assert len(points) == 6
    assert all(space.why_not(p) == "" for p in points)
    assert space.why_not({"a": 4, "b": 4}) == "too large"
    assert "none of" in space.why_not({"a": 3, "b": 1})
    assert "knobs are" in space.why_not({"a": 1})
    with pytest.raises(InvalidInput, match="does not set"):
        Space({"a": 1}, ())


def test_the_model_learns_which_knob_matters_and_transfers_it() -> None:
    rng = random.Random(0)
    rows, ratios = [], []
    for _ in range(80):
        point = {"rows": rng.choice([1, 2, 4, 8]), "prefetch": rng.random() < 0.5}
        rows.append(columns("k", point, {"rows": rng.choice([5.0, 8.0])}))
        ratios.append(4 / int(point["rows"]) * rng.uniform(0.95, 1.05))
    model = Model.fit(rows, ratios)
    new = [columns("k", {"rows": n, "prefetch": True}, {"rows": 7.0}) for n in (1, 2, 4, 8)]
    predicted = list(model.predict(new))
    assert predicted == sorted(predicted, reverse=True)
    assert list(Model.fit([], []).predict(new)) == [0.0] * 4


# --- the database ------------------------------------------------------------------------------------------------


def test_only_confirmed_faster_and_never_failed_candidates_are_chosen(database: Database) -> None:
    database.add(GOOD)
    database.add(replace(GOOD, point={"rows": 8}, ratio=0.3, confirmed=False))
    database.add(replace(GOOD, point={"rows": 9}, ratio=0.99))
    database.add(replace(GOOD, point={"rows": 2}, ratio=0.2))
    database.add(replace(GOOD, point={"rows": 2}, status="wrong", reason="3 integers differ", confirmed=False))
    database.add(replace(GOOD, point={"rows": 6}, ratio=0.7))
    assert [p.point for p in database.best("w", "t", "c")] == [{"rows": 4}, {"rows": 6}]
    assert database.best("w", "t", "other") == []
    assert database.best("w", "other", "c") == []
    assert database.best("w", "t", "c")[0].label.startswith("record 1 (")


def test_merging_adds_each_record_once(database: Database, tmp_path: Path) -> None:
    database.add(GOOD)
    with Database(tmp_path / "other.sqlite") as other:
        other.add_workload("w", "text", {"rows": 3.0})
        other.add(replace(GOOD, point={"rows": 5}, ratio=0.4))
        assert database.merge(other) == 1
        assert database.merge(other) == 0
    assert [r.ratio for r in database.records()] == [0.5, 0.4]
    assert database.workloads() == {"w": ("text", {"rows": 3.0})}


def test_a_lock_of_another_process_is_waited_for_then_told(database: Database) -> None:
    other = sqlite3.connect(database.path, check_same_thread=False, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(BitwrightError, match="another process has kept it locked"):
        database.add(GOOD)
    database.connection.execute("PRAGMA busy_timeout=20000")
    threading.Timer(0.2, lambda: other.execute("COMMIT")).start()
    assert database.add(GOOD).id == 1
    other.close()


def test_a_full_disk_is_told_and_loses_nothing_that_was_stored(database: Database) -> None:
    pages = database.connection.execute("PRAGMA page_count").fetchone()[0]
    database.connection.execute(f"PRAGMA max_page_count={pages + 4}")
    stored: list[str] = []

    def fill() -> None:
        for n in range(1000):
            stored.append(database.add(replace(GOOD, point={"n": n}, reason="x" * 500)).uid)

    with pytest.raises(BitwrightError, match="the disk is full"):
        fill()
    assert stored
    with Database(database.path, write=False) as again:
        assert [r.uid for r in again.records()] == stored


def test_files_that_are_no_tuning_database_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    with pytest.raises(InvalidInput, match="there is no tuning database"):
        Database(path, write=False)
    path.write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(InvalidInput, match="no readable tuning database"):
        Database(path)
    foreign = sqlite3.connect(tmp_path / "y.sqlite")
    foreign.execute("CREATE TABLE t(a)")
    foreign.commit()
    foreign.close()
    with pytest.raises(InvalidInput, match="no tuning database of bitwright"):
        Database(tmp_path / "y.sqlite")
    with Database(tmp_path / "z.sqlite") as made:
        made.connection.execute("PRAGMA user_version=99")
    with pytest.raises(InvalidInput, match="has format 99"):
        Database(tmp_path / "z.sqlite", write=False)
    with pytest.raises(InvalidInput, match="there is no folder"):
        Database(tmp_path / "none" / "z.sqlite")


def test_a_damaged_row_is_named(database: Database) -> None:
    database.add(GOOD)
    database.connection.execute("UPDATE record SET point='{'")
    with pytest.raises(InvalidInput, match="record 1 is damaged"):
        database.records()


# --- workers and measurements ------------------------------------------------------------------------------------


def test_a_worker_survives_everything_its_function_does() -> None:
    worker = Worker(faults.do, memory=1 << 30)
    try:
        first = worker.call("pid", 30)
        assert first.fate == "ok"
        raised = worker.call("raise", 30)
        assert (raised.fate, raised.value) == ("error", "ValueError: as asked")
        assert worker.call("pid", 30).value == first.value
        assert worker.call("memory", 30).out_of_memory
        died = worker.call("die", 30)
        assert died.fate == "crash"
        assert "SIGSEGV" in died.value
        assert worker.call("hang", 0.3).fate == "timeout"
        assert worker.call("pid", 30).value not in ("", first.value)
    finally:
        worker.stop()


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("good", "ok", ""), ("slow", "ok", ""), ("wrong", "wrong", "largest error 1"), ("nan", "wrong", "NaN"),
        ("crash", "crash", "SIGSEGV"), ("leave", "crash", "exit code 3"), ("hang", "timeout", "no result"),
        ("outside", "wrong", "outside its buffers"), ("spoil", "wrong", "changed an input"),
        ("rewrite", "wrong", "changed its weights"),
    ],
)  # fmt: skip
def test_a_kernel_is_checked_before_its_time_counts(kernels: bytes, name: str, status: str, reason: str) -> None:
    outcome = measured(faults.request(kernels, name, seconds=0.5 if name == "hang" else 20.0))
    assert outcome.status == status
    assert reason in outcome.reason
    assert (outcome.ratio > 0) == (status == "ok")


def test_memory_is_limited(kernels: bytes) -> None:
    request = faults.request(kernels, "good")
    greedy = replace(request, candidate=replace(request.candidate, scratch_bytes=1 << 42))
    assert measured(greedy).status == "memory"


def test_other_bytes_are_touched_between_calls(kernels: bytes) -> None:
    assert measured(faults.request(kernels, "good", cold_bytes=1 << 16)).status == "ok"


@pytest.mark.parametrize(("what", "status"), [("raise", "compile"), ("die", "compile"), ("memory", "memory")])
def test_a_failed_compilation_is_an_outcome(what: Any, status: str, kernels: bytes) -> None:
    with LocalBench(1, compile=faults.compile_by_symbol, measure=faults.pretend, memory=1 << 30) as bench:
        trials = [Trial(what, faults.request(kernels, "good")), Trial("pid", faults.request(kernels, "good"))]  # type: ignore[arg-type]
        outcomes = {i: o.status for i, o, _ in bench.run(trials)}
    assert outcomes == {0: status, 1: "ok"}


def test_a_compilation_that_hangs_is_an_outcome(kernels: bytes) -> None:
    with LocalBench(1, compile=faults.compile_by_symbol, measure=faults.pretend, compile_seconds=0.5) as bench:
        made = bench.compile(["hang"])  # type: ignore[list-item]
    assert getattr(made[0], "status", "") == "timeout"


def test_two_tuners_never_measure_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    with alone(), pytest.raises(BitwrightError, match="another tuner has measured"), alone(patience=0.1):
        raise AssertionError("both hold the lock")
    with alone(patience=0.1):
        pass


# --- kill -9 -----------------------------------------------------------------------------------------------------


def killed_runs(folder: Path, times: int) -> None:
    """Kill a tuner at random moments: every record it reported is there, and nothing of it runs on."""
    path, told, moments = folder / "tuning.sqlite", set[str](), random.Random(7)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    environment |= {"BITWRIGHT_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    for _ in range(times):
        command = [sys.executable, "-m", "tests.codegen.tuning_faults", str(path)]
        tuner = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=ROOT, text=True)
        assert tuner.stdout is not None
        first = tuner.stdout.readline()  # it runs: now any moment will do
        children = Path(f"/proc/{tuner.pid}/task/{tuner.pid}/children").read_text().split()
        time.sleep(moments.uniform(0, 0.3))
        tuner.send_signal(signal.SIGKILL)
        told |= {line.strip() for line in [first, *tuner.stdout.read().splitlines()] if len(line.strip()) == 16}
        tuner.wait()
        tuner.stdout.close()
        _wait_until_gone(children)
        with Database(path) as database:
            assert database.connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            records = database.records()
            assert told <= {r.uid for r in records}
            assert {r.status for r in records} == {"ok"}
            assert database.best("w", "t", "c") == []
    assert len(told) >= times


def _wait_until_gone(pids: list[str]) -> None:
    end = time.monotonic() + 10
    while any(Path(f"/proc/{p}").exists() and "\nState:\tZ" not in Path(f"/proc/{p}/status").read_text() for p in pids):
        assert time.monotonic() < end, "a worker outlived its tuner"
        time.sleep(0.02)


def test_kill_loses_no_stored_record_and_leaves_no_worker(tmp_path: Path) -> None:
    killed_runs(tmp_path, 5)


@pytest.mark.nightly
def test_kill_a_hundred_times(tmp_path: Path) -> None:
    killed_runs(tmp_path, 100)
