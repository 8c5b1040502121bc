"""Measuring on a device: what is checked before a time counts, and what a bad kernel ends in."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from bitwright.codegen.targets.nvidia import SM80
from bitwright.codegen.tuning.bench import Trial
from bitwright.codegen.tuning.records import Database, Record
from bitwright.codegen.tuning.search import Goal, Search, _order
from bitwright.codegen.tuning.tasks import tasks_of
from bitwright.codegen.tuning.workload import target_key
from bitwright.codegen.tvm.select import choose, version
from bitwright.errors import InvalidInput
from bitwright.gpu_tuning import DeviceBench, device_name, measured_on
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.types import parse_type
from bitwright.tuning import tune
from tests import gpu_faults as faults


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("good", "ok", ""),
        ("wrong", "wrong", "inputs 0: largest error"),
        ("outside", "wrong", "inputs 0: it wrote outside its buffers"),
        ("spoil", "wrong", "inputs 0: it changed an input"),
        ("rewrite", "wrong", "inputs 0: it changed its weights"),
        ("leave", "wrong", "inputs 0: it changed the scratch"),
        ("fault", "crash", "access outside of an array"),
        ("stuck", "crash", "wait for ever"),
    ],
)
def test_a_kernel_is_checked_before_its_time_counts(name: str, status: str, reason: str) -> None:
    outcome = measured_on(faults.Clocked, faults.request(name, tolerance=1e-5))
    assert outcome.status == status
    assert reason in outcome.reason
    assert (outcome.seconds > 0) == (status == "ok")


def test_a_slower_kernel_has_a_larger_ratio() -> None:
    outcome = measured_on(faults.Clocked, faults.request("slow", tolerance=1e-5))
    assert outcome.status == "ok"
    assert outcome.ratio > 1


def test_a_kernel_that_hangs_is_an_outcome() -> None:
    outcome = measured_on(faults.Hanging, faults.request("slow", seconds=3.0))
    assert (outcome.status, outcome.reason) == ("timeout", "no result within 3 s")


def body(rows: int) -> Graph:
    b = Builder("body", level="integer")
    x, w = b.input("x", parse_type(f"s8[{rows}, 64]")), b.input("w", parse_type("s8[48, 64]"))
    return b.finish([b.emit(ops.IntLinear(), x, w)])


def layers() -> Graph:
    b = Builder("model", level="kernel")
    weight = np.random.default_rng(0).integers(-127, 128, (48, 64)).astype(np.int8)
    x = b.input("x", parse_type("s8[24, 64]"))
    return b.finish([b.emit(ops.Region(body(24), "generic"), x, b.weight("w", weight), origin="layer")])


def test_the_search_runs_on_a_device_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "tuning.sqlite"
    goal = Goal(SM80, target_key(SM80, "emulated"), version(), "emulated", 0, rounds=2)
    tasks = tasks_of(layers(), SM80)
    counts = []
    for _ in range(2):
        with Database(path) as database, DeviceBench(faults.Clocked, 1) as bench:
            search = Search(database, bench, goal, tasks)
            state = search.states[0]
            assert search._ready(state)
            trials = [
                Trial(_order(choice), search._request(state, choice))
                for t, p in search._propose(state)[:2]
                if (choice := search._choice(state, t, p)) is not None
            ]
            outcomes = [o for _, o, _ in bench.run(trials)]
            counts.append(search.ran)
            assert all(o.status == "ok" for o in outcomes)
    assert counts[0] >= 1


def test_records_of_two_devices_are_not_mixed(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).integers(-127, 128, (48, 64)).astype(np.int8)
    with Database(tmp_path / "t.sqlite") as database:
        for device in ("H200", "A100"):
            key = target_key(SM80, device)
            database.add(Record("w", key, version(), "cuda_generic", {}, "ok"))
        with pytest.raises(InvalidInput, match="records of A100 and H200: give each device its own file"):
            choose(body(24), {"w": weight}, SM80, database)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a device")
def test_without_a_device_tuning_says_what_is_missing() -> None:
    with pytest.raises(InvalidInput, match="this machine has no NVIDIA"):
        device_name("sm_90a")
    with pytest.raises(InvalidInput, match="this machine has no NVIDIA"):
        tune(layers(), target="cuda-sm90", minutes=0.1)
