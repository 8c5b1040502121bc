"""Both products of one packed transposable weight, in the emulator and in machine code."""

import numpy as np
import pytest
import torch

from bitwright.codegen.cuda.emulator import run_guarded
from bitwright.codegen.cuda.machine_code import compile_cuda, sass
from bitwright.codegen.cuda.transposable import Product, column_places
from bitwright.codegen.tvm.cuda.builder import launch_of
from bitwright.codegen.tvm.cuda.source import cuda_source
from bitwright.codegen.tvm.cuda.transposable import emit
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import BF16, F16, F32
from bitwright.ir.weights import Array
from bitwright.passes.sparsity._transposable import transposable_mask
from bitwright.sparse_linear import TransposableWeight

TORCH = {F16: torch.float16, BF16: torch.bfloat16}


def bits(t: torch.Tensor) -> Array:
    return t.contiguous().view(torch.int16).numpy().view(np.uint16)


def run(p: Product, seed: int, order: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(p.outputs, p.inputs, generator=draw)
    kept = transposable_mask(w, 2, 4, "exact") & (torch.rand(w.shape, generator=draw) > 0.1)  # some pairs not full
    w = torch.where(kept, w, 0.0).to(TORCH[p.dtype])
    x = torch.randn(p.tokens, p.depth, generator=draw).to(TORCH[p.dtype])
    bias = torch.randn(p.rows, generator=draw)
    packed = TransposableWeight.pack(w)
    arrays: dict[str, Array] = {
        "values": bits(packed.values),
        "codes": packed.codes.numpy(),
        "metadata": packed.metadata(p.by_columns).numpy(),
        "places": column_places(),
        "x": bits(x),
    }
    if p.bias:
        arrays["bias"] = bias.numpy()
    arrays["y"] = np.full((p.tokens, p.rows), 0x7FFF, np.uint16)
    function = emit(p, "kern")
    out = run_guarded(cuda_source(function), "kern", launch_of(function), arrays, order)["y"]
    got = torch.from_numpy(out.view(np.int16)).view(TORCH[p.dtype]).double()
    want = x.double() @ (w.double() if p.by_columns else w.double().T) + (bias.double() if p.bias else 0.0)
    return got, want


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_products_are_those_of_the_dense_weight(by_columns: bool, dtype: object) -> None:
    tolerance = 2e-3 if dtype == F16 else 2e-2
    for seed, (outputs, inputs, tokens) in enumerate([(128, 128, 128), (136, 72, 130), (8, 200, 3), (264, 8, 40)]):
        p = Product(outputs, inputs, tokens, by_columns, dtype, bias=seed % 2 == 1)  # type: ignore[arg-type]
        got, want = run(p, seed, order=seed)
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_machine_code_is_sparse_and_spills_nothing(by_columns: bool, arch: str) -> None:
    function = emit(Product(4096, 1024, 2048, by_columns), "kern")
    made = compile_cuda(cuda_source(function), arch)
    took = made.resources["kern"]
    assert (took.spill_stores, took.spill_loads, took.stack_bytes) == (0, 0, 0)
    assert took.registers <= 168
    assert launch_of(function)[4] <= 100 << 10  # two blocks share a multiprocessor of 227 KiB
    shown = sass(made.cubin)
    assert shown.count("HMMA.SP.16832.F32") >= 32
    assert "LDGSTS" in shown
    assert "LDL" not in shown


def test_sizes_and_formats_that_do_not_fit() -> None:
    with pytest.raises(InvalidInput, match="both sizes must be multiples of 8"):
        Product(12, 64, 1)
    with pytest.raises(InvalidInput, match="take f16 or bf16, not f32"):
        Product(16, 64, 1, dtype=F32)
