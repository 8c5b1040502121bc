"""Each example runs as a user runs it; the pass of CONTRIBUTING.md does what its page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitwright.driver import optimize
from bitwright.ir.text import parse
from bitwright.ir.weights import Weights

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run_example(name: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["quickstart.py", "torch_compile.py"])
def test_example_runs(name: str, tmp_path: Path) -> None:
    assert run_example(name, cwd=tmp_path)


def test_sparse_training_ends_in_sparse_kernels_with_the_accuracy_kept(tmp_path: Path) -> None:
    out = run_example("sparse_training.py", cwd=tmp_path)
    accuracy = dict(
        re.findall(r"^(dense|masked without training|sparse|compiled): accuracy ([0-9.]+)", out, re.MULTILINE)
    )
    assert float(accuracy["sparse"]) > float(accuracy["dense"]) - 0.02
    assert float(accuracy["sparse"]) > float(accuracy["masked without training"]) + 0.02
    assert abs(float(accuracy["compiled"]) - float(accuracy["sparse"])) < 0.005
    assert out.count("nm<2:4") == 7


@pytest.mark.nightly
def test_demo_runs(tmp_path: Path) -> None:
    out = run_example("demo.py", cwd=tmp_path)
    assert "bitwright 2:4 int8" in out
    assert "cosine to torch" in out
    assert (tmp_path / "report.html").is_file()


def rounded(bits: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Weights before and after ``round-weights``, and how many things it refused."""
    text = """graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
      %w = weight {ref="fc.weight"} : f32[4, 8]
      %b = weight {ref="fc.bias"} : f32[4]
      %y = linear(%x, %w, %b) : f32[2, 4]
    }"""
    rng = np.random.default_rng(0)
    before = rng.standard_normal((4, 8)).astype(np.float32)
    graph = parse(text, Weights({"fc.weight": before, "fc.bias": np.ones(4, np.float32)}))
    after, report = optimize(graph, f"{EXAMPLES / 'round_weights.py'}:RoundWeights{{bits={bits}}}")
    return before, after.weights["fc.weight"].array, len(report.refusals)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_round_weights_leaves_that_many_values(bits: int) -> None:
    before, after, refused = rounded(bits)
    assert all(len(np.unique(np.abs(row))) <= 2 ** (bits - 1) for row in after)
    step = np.abs(before).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    assert np.all(np.abs(after - before) <= step / 2 * 1.0001)
    assert refused == 1


def test_round_weights_is_idempotent() -> None:
    text = 'graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {\n  %w = weight {ref="w"} : f32[4, 8]\n'
    graph = parse(text + "  %y = linear(%x, %w) : f32[2, 4]\n}\n", Weights({"w": rounded(8)[0]}))
    name = f"{EXAMPLES / 'round_weights.py'}:RoundWeights{{bits=4}}"
    _, report = optimize(graph, f"{name}, {name}")
    assert [row.changed for row in report.rows] == [True, False]


def test_round_weights_is_as_short_as_promised() -> None:
    assert len((EXAMPLES / "round_weights.py").read_text().splitlines()) < 50
