"""Candidates that are compiled here and measured elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitwright as bw
from bitwright import gpu_candidates
from bitwright.codegen.tuning.records import Database
from bitwright.errors import BitwrightError, InvalidInput
from bitwright.ir.graph import Graph
from bitwright.tuning import prepare
from tests import gpu_faults as faults

EMULATED: dict[str, Any] = {"open_driver": faults.Clocked, "device": "emulated", "rounds": 1}
X = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def graph() -> Graph:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 16)).eval()
    return bw.capture(module, (torch.from_numpy(X),))


@pytest.fixture(scope="module")
def folder(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "candidates"
    made = prepare(graph, path, target="cuda-sm80", recipe="int8", calibration=[(X,)], candidates=2, jobs=1)
    about = gpu_candidates.opened(path)
    assert made == sum(len(t.candidates) for t in about.tasks)
    warm = about.model_copy(update={"tasks": tuple(t.model_copy(update={"cold_bytes": 0}) for t in about.tasks)})
    (path / "candidates.json").write_text(warm.model_dump_json())  # an emulated device has no caches to flush
    return path


def test_what_was_prepared_is_measured_elsewhere_and_resumed(folder: Path, tmp_path: Path) -> None:
    about = gpu_candidates.opened(folder)
    assert about.arch == "sm_80"
    total = sum(len(t.candidates) for t in about.tasks)
    with Database(tmp_path / "t.sqlite") as database:
        ran = gpu_candidates.measure(folder, database, 10.0, **EMULATED)
        records = database.records(target=f"{about.fingerprint}/emulated")
        assert ran == total
        assert {r.status for r in records} == {"ok"}
        assert {r.machine for r in records} == {"emulated"}
        assert gpu_candidates.measure(folder, database, 10.0, **EMULATED) == 0


def test_wrong_results_are_found_there_too(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in (copy / "arrays").glob("*.case.npz"):
        with np.load(name) as file:
            held = dict(file)
        values = held["values0"].copy()
        values[:4] ^= 0x40
        np.savez_compressed(name, **held | {"values0": values})
    with (
        Database(tmp_path / "t.sqlite") as database,
        pytest.raises(BitwrightError, match="no candidate could be measured:\n  wrong: inputs 0"),
    ):
        gpu_candidates.measure(copy, database, 10.0, **EMULATED)


def test_folders_and_targets_that_do_not_fit(graph: Graph, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="exists and is not empty"):
        prepare(graph, folder, target="cuda-sm80", recipe="int8", calibration=[(X,)])
    with pytest.raises(InvalidInput, match="target x86-avx2 is none"):
        prepare(graph, tmp_path / "x", target="x86-avx2")
    with pytest.raises(InvalidInput, match="holds no candidates"):
        gpu_candidates.opened(tmp_path)
    (tmp_path / "candidates.json").write_text(json.dumps({"format": 7}))
    with pytest.raises(InvalidInput, match="has format 7, this bitwright reads 1"):
        gpu_candidates.opened(tmp_path)
    (tmp_path / "candidates.json").write_text("{")
    with pytest.raises(InvalidInput, match="is damaged"):
        gpu_candidates.opened(tmp_path)


def test_main_says_what_is_missing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_candidates.main([str(tmp_path), "--db", str(tmp_path / "t.sqlite")]) == 2
    assert "error: " in capsys.readouterr().err
