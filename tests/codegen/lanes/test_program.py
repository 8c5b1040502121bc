"""From a model to kernels with activations in lanes: masks made here, zeros found there, what the report says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bitwright as bw
from bitwright.runtime.report import Layer
from tests.codegen.harness import runnable

Array = np.ndarray[Any, Any]
BLOCKS = "nm-mask{pattern=1:4 block=4 shared=4}, int8"
TARGET = "x86-avx512-vnni"
pytestmark = pytest.mark.skipif(not runnable("avx512-vnni"), reason="this machine has no avx512-vnni")


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    first, second = torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.Linear(32, 64)
    return torch.nn.Sequential(first, torch.nn.ReLU(), _Rows(), second).eval()


class _Rows(torch.nn.Module):
    """Pixels as rows of a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def layers(program: bw.Program) -> list[Layer]:
    return [row for row in program.report.layers if row.formats.w]


def prune(model: torch.nn.Module, share: float) -> None:
    for p in model.parameters():
        if p.dim() > 1:
            cut = torch.quantile(p.detach().abs().flatten(), share)
            p.data = torch.where(p.detach().abs() > cut, p.detach(), 0.0)


@pytest.mark.parametrize("recipe", [BLOCKS, "magnitude-mask{sparsity=0.8 block=4}, int8"])
def test_masks_of_blocks_reach_the_kernel(recipe: str) -> None:
    x = torch.randn(2, 16, 6, 6)
    program = bw.compile(network(), example_inputs=(x,), recipe=recipe, calibration=[(x,)], target=TARGET)
    rows = layers(program)
    assert [row.kernel for row in rows] == ["lanes", "lanes"]
    assert all("of blocks of 4" in row.reason for row in rows)
    assert all(row.predicted_seconds for row in rows)


def test_a_model_pruned_elsewhere_runs_as_it_is() -> None:
    model, x = network(), torch.randn(2, 16, 6, 6)
    prune(model, 0.9)
    program = bw.compile(model, example_inputs=(x,), target=TARGET)
    assert [row.kernel for row in layers(program)] == ["lanes", "lanes"]
    np.testing.assert_allclose(program(x.numpy()), model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_too_few_zeros_run_dense() -> None:
    model, x = network(), torch.randn(2, 16, 6, 6)
    prune(model, 0.2)
    program = bw.compile(model, example_inputs=(x,), target=TARGET)
    assert [row.kernel for row in layers(program)] == ["contract", "contract"]


def test_masked_blocks_without_the_rows_say_why_they_are_dense() -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval(), torch.randn(4, 64)
    recipe = "magnitude-mask{sparsity=0.8 block=4}, int8"
    (row,) = layers(bw.compile(model, example_inputs=(x,), recipe=recipe, calibration=[(x,)], target=TARGET))
    assert row.reason.startswith("runs dense")
    assert any("4 rows do not fill the 16 lanes" in note for note in row.notes)
