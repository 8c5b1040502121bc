"""A mask survives to the last byte of the artifact, or the report says why it does not."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitwright as bw
from bitwright.certificates import _unpacked
from bitwright.codegen.cost import weight_bytes
from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.targets.machine import cpu_flags
from bitwright.ir.patterns import violation
from bitwright.ir.target import SparseRate
from bitwright.ir.types import F32, NM, S8, U8, TensorType, parse_encoding
from bitwright.passes.precision._qdq import quantize_weight
from bitwright.passes.sparsity.masks import fixed_count_mask, nm_mask, transposable_mask
from bitwright.runtime.report import Layer

BEST = next(t for t in BUILTIN.values() if {f.replace("avxvnni", "avx_vnni") for f in t.features} <= cpu_flags())
VBMI = "x86-avx512-vnni"
needs_vbmi = pytest.mark.skipif(BEST.isa != "avx512-vnni", reason="indices take fewer than 8 bits on AVX-512 only")


def perceptron(depth: int = 256, width: int = 256) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(depth, width), nn.ReLU(), nn.Linear(width, width)).eval()


def rows(depth: int = 256) -> torch.Tensor:
    return torch.randn(32, depth, generator=torch.Generator().manual_seed(1))


def compiled(module: nn.Module, x: torch.Tensor, recipe: str, target: Any = BEST) -> bw.Program:
    return bw.compile(module, example_inputs=x, recipe=recipe, calibration=[x], target=target)


def weighted(program: bw.Program) -> list[Layer]:
    """The rows of layers with weights."""
    return [x for x in program.report.layers if x.formats.w]


def prune(module: nn.Module, keep: int, group: int) -> nn.Module:
    """Zero all but the largest ``keep`` of every ``group`` inputs of each weight, behind bitwright's back."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            w = m.weight.data.movedim(1, -1)
            if w.shape[-1] % group == 0:
                groups = w.reshape(-1, group)
                left = groups.abs().topk(group - keep, dim=1, largest=False).indices
                m.weight.data = groups.scatter(1, left, 0.0).reshape(w.shape).movedim(-1, 1).contiguous()
    return module


def program_pattern(row: Layer) -> NM:
    keep, group = row.pattern.removeprefix("nm<").split(",")[0].split(":")
    return NM(int(keep), int(group), 1)


def size_in_file(program: bw.Program, path: Path) -> int:
    program.save(path)
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo("weights.bin").file_size


@needs_vbmi
@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.625), ("1:4", 0.32), ("2:16", 0.19), ("1:16", 0.1)])
def test_packed_int8_weights_are_as_small_as_their_pattern(pattern: str, share: float, tmp_path: Path) -> None:
    x, size = rows(), 2 * 256 * 256
    dense = size_in_file(compiled(perceptron(), x, "int8"), tmp_path / "dense.bw")
    program = compiled(perceptron(), x, f"nm-mask{{pattern={pattern}}}, int8")
    sparse = size_in_file(program, tmp_path / "sparse.bw")
    assert size < dense < 1.1 * size
    rest = dense - size  # biases, multipliers
    assert sparse <= share * size + rest
    predicted = sum(weight_bytes(TensorType(S8, (256, 256), program_pattern(row))) for row in weighted(program))
    assert sparse - rest == pytest.approx(predicted, rel=0.01)
    for row in weighted(program):
        assert (row.pattern, row.kernel) == (f"nm<{pattern}, axis=1>", "contract")
        assert row.reason.startswith(f"{pattern} kernel, expected")
        assert row.density == pytest.approx(int(pattern[0]) / int(pattern.split(":")[1]))
        assert (row.formats.x, row.formats.w, row.formats.acc) == ("u8", "s8", "s32")
        assert any("kept_magnitude" in note for note in row.notes)


@pytest.mark.parametrize("target", ["x86-avx512-vnni", "x86-avx-vnni", "x86-avx2"])
def test_float_weights_are_packed_too(target: str, tmp_path: Path) -> None:
    x = rows()
    dense = size_in_file(compiled(perceptron(), x, "float", target), tmp_path / "dense.bw")
    program = compiled(perceptron(), x, "nm-mask{pattern=2:4}", target)
    lanes = {row.kernel for row in weighted(program)} == {"lanes"}  # 16 bits of address a weight, where they are faster
    assert size_in_file(program, tmp_path / "sparse.bw") < (0.77 if lanes else 0.65) * dense
    assert all(row.reason.startswith("50.0% of weights" if lanes else "2:4 kernel") for row in weighted(program))


def test_sparse_results_are_those_of_the_masked_model() -> None:
    module, x = prune(perceptron(), 2, 4), rows()
    want = module(x).detach().numpy()
    masked = compiled(perceptron(), x, "nm-mask{pattern=2:4}")
    np.testing.assert_allclose(masked(x), want, atol=1e-4 * float(np.ptp(want)))
    low = compiled(perceptron(), x, "nm-mask{pattern=2:4}, int8")
    assert np.abs(low(x) - want).max() < 0.02 * np.ptp(want)


@pytest.mark.parametrize("recipe", ["int8", "float"])
def test_weights_that_are_sparse_already_need_no_word(recipe: str, tmp_path: Path) -> None:
    x = rows()
    dense = size_in_file(compiled(perceptron(), x, recipe), tmp_path / "dense.bw")
    program = compiled(prune(perceptron(), 2, 4), x, recipe)
    assert [row.pattern for row in weighted(program)] == ["nm<2:4, axis=1>"] * 2
    assert all(row.reason.startswith("2:4 kernel") for row in weighted(program))
    assert all(any(n.startswith("detect-sparsity: pattern 2:4") for n in row.notes) for row in weighted(program))
    assert program.report.refusals == []
    if recipe == "float" or BEST.isa == "avx512-vnni":
        assert size_in_file(program, tmp_path / "sparse.bw") < 0.68 * dense
    want = prune(perceptron(), 2, 4)(x).detach().numpy()
    assert np.abs(program(x) - want).max() < 0.02 * np.ptp(want)


class Mixed(nn.Module):
    """Layers that take a 2:4 mask and layers that cannot."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.point(F.relu(self.depth(F.relu(self.stem(x))))))
        y: torch.Tensor = self.head(x.mean((2, 3)))
        return y


def test_layers_that_cannot_be_masked_are_listed_with_the_reason() -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    program = compiled(Mixed(), x, "nm-mask{pattern=2:4}, int8")
    refused = {r.place.split(",")[0]: r.reason for r in program.report.refusals if r.pass_name == "nm-mask"}
    assert refused == {
        "stem": "3 input channels are not a multiple of 4",
        "depth": "depthwise convolution has no reduction over channels",
    }
    patterns = {row.origin.split(",")[0]: row.pattern for row in weighted(program)}
    assert patterns == {"stem": "", "depth": "", "point": "nm<2:4, axis=1>", "head": "nm<2:4, axis=1>"}
    assert all(row.reason for row in program.report.layers)


def test_convolutions_are_packed_by_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).eval()
    x = torch.randn(1, 32, 6, 6, generator=torch.Generator().manual_seed(1))
    dense = size_in_file(compiled(module, x, "float"), tmp_path / "dense.bw")
    program = compiled(module, x, "nm-mask{pattern=1:4}")
    assert [row.pattern for row in weighted(program)] == ["nm<1:4, axis=1>"] * 2
    assert size_in_file(program, tmp_path / "sparse.bw") < 0.4 * dense
    want = prune(module, 1, 4)(x).detach().numpy()
    np.testing.assert_allclose(program(x), want, atol=1e-4 * float(np.ptp(want)))


def test_a_pattern_that_does_not_pay_runs_dense_and_says_so() -> None:
    slow = tuple(SparseRate(x, 2, 4, 0.9) for x in (U8, F32))
    target, x = replace(BEST, name="slow-sparse", sparse=slow, lanes=()), rows()
    program = compiled(perceptron(), x, "nm-mask{pattern=2:4}, int8", target)
    for row in weighted(program):
        assert row.pattern == "nm<2:4, axis=1>"
        assert row.reason == "runs dense: 2:4 would gain only 0.90x on slow-sparse"
    (refusal,) = program.report.refusals
    assert (refusal.pass_name, refusal.place) == ("nm-mask", "target slow-sparse")
    assert "2:4 does not pay on this target (0.90x for f32, 0.90x for u8)" in refusal.reason
    want = compiled(perceptron(), x, "nm-mask{pattern=2:4}, int8")(x)
    np.testing.assert_array_equal(program(x), want)


def test_the_portable_level_runs_two_of_four_dense() -> None:
    """Measured there: 0.57 times the speed of dense in int8; float weights run with activations in lanes."""
    program = compiled(perceptron(), rows(), "nm-mask{pattern=2:4}, int8", "x86-portable")
    assert all(row.reason == "runs dense: 2:4 would gain only 0.57x on x86-portable" for row in weighted(program))
    program = compiled(perceptron(), rows(), "nm-mask{pattern=2:4}, float", "x86-portable")
    assert {row.kernel for row in weighted(program)} == {"lanes"}


def test_masks_chosen_by_name() -> None:
    program = compiled(perceptron(), rows(), "nm-mask{pattern=2:4 except=0}, int8")
    assert [row.pattern for row in weighted(program)] == ["", "nm<2:4, axis=1>"]


@pytest.mark.parametrize("recipe", ["nm-mask{pattern=2:4 block=4}, int8", "nm-mask{pattern=2:4 shared=4}, int8"])
def test_masks_of_blocks_and_shared_masks_reach_the_kernels(recipe: str) -> None:
    """Whatever kernel takes them, with the gain it expects; packing checks the values."""
    x = rows()
    program = compiled(perceptron(), x, recipe, VBMI if BEST.isa == "avx512-vnni" else "x86-avx2")
    assert all(", expected 1." in row.reason for row in weighted(program))
    assert bw.verify(program, bw.capture(perceptron(), (x,)), [x.numpy()]).first_bad == ""


KEPT = {
    "nm-mask{pattern=2:4}": lambda w: nm_mask(w, 2, 4),
    "nm-mask{pattern=3:16}": lambda w: nm_mask(w, 3, 16),
    "nm-mask{pattern=1:4 shared=16}": lambda w: nm_mask(w, 1, 4, shared=16),
    "nm-mask{pattern=1:4 block=4}": lambda w: nm_mask(w, 1, 4, block=4),
    "nm-mask{pattern=2:4 shared=4 block=4}": lambda w: nm_mask(w, 2, 4, shared=4, block=4),
    "transposable-mask{pattern=4:8 method=exact}": lambda w: transposable_mask(w, 4, 8, "exact"),
    "fixed-count-mask{count=12 per=64}": lambda w: fixed_count_mask(w, 12, 64),
}


@pytest.mark.parametrize("mask", KEPT)
def test_weights_unpacked_from_the_file_are_zero_where_the_mask_says(mask: str, tmp_path: Path) -> None:
    """The bytes of a saved program, read back and unpacked, against the mask made from the model's weights."""
    module, x = perceptron(64, 128), torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    compiled(module, x, f"{mask}, int8").save(tmp_path / "p.bw")
    program = bw.load(tmp_path / "p.bw")
    certificates = program.manifest.certificates
    layers = [m.weight.detach() for m in module.modules() if isinstance(m, nn.Linear)]
    assert len(certificates) == len(layers) == 2
    for certificate, weight, row in zip(certificates, layers, weighted(program), strict=True):
        assert certificate.stored is not None
        assert certificate.stored.layout == "contract"
        packed = _unpacked(certificate, program.contents, tuple(weight.shape))[0]
        kept = KEPT[mask](weight).numpy()
        assert not packed[~kept].any()
        np.testing.assert_array_equal(packed, quantize_weight(np.where(kept, weight.numpy(), 0))[0])
        assert violation(packed, parse_encoding(row.pattern)) == ""


@pytest.mark.parametrize(("keep", "group", "depth"), [(3, 7, 70), (3, 7, 66), (2, 4, 61), (5, 12, 100), (4, 32, 96)])
@pytest.mark.parametrize("recipe", ["float", "int8"])
def test_any_pattern_of_any_depth_runs(keep: int, group: int, depth: int, recipe: str) -> None:
    """Found without a word, the last group shorter; with a kernel or the reason why not; the values are right."""
    module, x = perceptron(depth, 48), torch.randn(4, depth, generator=torch.Generator().manual_seed(1))
    first = next(module.parameters())
    first.data = torch.where(nm_mask(first.data, keep, group), first.data, 0.0)
    program = compiled(module, x, recipe)
    row = weighted(program)[0]
    assert row.pattern == f"nm<{keep}:{group}, axis=1>"
    assert row.reason.startswith((f"{keep}:{group} kernel", "runs dense: ")) or "which obey both" in row.reason
    want = module(x).detach().numpy()
    assert np.abs(program(x) - want).max() < (1e-5 if recipe == "float" else 0.03) * np.ptp(want)


def test_a_pattern_without_a_fast_kernel_runs_as_a_wider_one_that_holds_too() -> None:
    """No float selection of AVX2 reaches 32 activations, but what is 2:32 is 2:8 as well."""
    module, x = perceptron(64, 64), torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    program = compiled(module, x, "nm-mask{pattern=2:32}", "x86-avx2")
    for row in weighted(program):
        assert row.pattern == "nm<2:32, axis=1>"
        assert row.reason.startswith("2:8 kernel for 2:32 weights, which obey both, expected 2.")
    for w in (p for p in module.parameters() if p.dim() == 2):
        w.data = torch.where(nm_mask(w.data, 2, 32), w.data, 0.0)
    want = module(x).detach().numpy()
    np.testing.assert_allclose(program(x), want, atol=1e-4 * float(np.ptp(want)))


def test_inspect_shows_what_was_found(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from bitwright.cli import app

    compiled(prune(perceptron(64, 64), 1, 4), rows(64), "float").save(tmp_path / "p.bw")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "p.bw")])
    assert shown.exit_code == 0
    assert "1:4" in shown.output
