"""Sparse tensor-core products against the product of the expanded matrices, and who holds which metadata."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from bitwright.codegen.cuda.emulator import run_guarded
from bitwright.codegen.cuda.fragments import compress, expand, fragments, from_fragments, metadata, places_of
from bitwright.codegen.cuda.machine_code import compile_cuda, sass
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.ir.weights import Array

TYPES: dict[str, tuple[Any, Any, Any]] = {
    "f16": (np.float16, np.float16, np.float32),
    "bf16": (ml_dtypes.bfloat16, ml_dtypes.bfloat16, np.float32),
    "s8": (np.int8, np.int8, np.int32),
    "s8u8": (np.int8, np.uint8, np.int32),
    "u8s8": (np.uint8, np.int8, np.int32),
    "e4m3": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fn, np.float32),
}
"""Formats of a, b and sums."""


def kernel(name: str) -> str:
    """64 x k by k x 8 a block: a in fragments with metadata, b [8, k], c [64, 8]."""
    kind, size = ("float" if TYPES[name][2] == np.float32 else "int"), np.dtype(TYPES[name][0]).itemsize
    k = 64 // size
    words = [f"(d, a, b, meta[{i}]);" if size == 1 else f"_{i % 2}(d, a, b, meta[2 * S + {i // 2}]);" for i in range(4)]
    calls = [f"bw_mma_sp_{name}{word}" for word in words]
    body = "\n".join(
        f"""    {{ {kind} d[4]; unsigned a[4];
      for (int q = 0; q < 4; q++) {{ d[q] = 0; a[q] = A[(((blockIdx.x * 4 + {i}) * {size} + S) * 32 + l) * 4 + q]; }}
      {call}
      for (int q = 0; q < 4; q++)
        C[(blockIdx.x * 64 + {16 * i} + l / 4 + 8 * (q / 2)) * 8 + l % 4 * 2 + q % 2] += d[q]; }}"""
        for i, call in enumerate(calls)
    )
    return f"""extern "C" __global__ void kern(const unsigned* A, const unsigned* M, const unsigned* B, {kind}* C) {{
  int l = threadIdx.x;
  unsigned meta[4];
  for (int q = 0; q < 4; q++) meta[q] = M[(blockIdx.x * 32 + l) * 4 + q];
#pragma unroll
  for (int S = 0; S < {size}; S++) {{
    unsigned b[4];
    const unsigned* row = B + ((blockIdx.x * 8 + l / 4) * {k * size} + S * {k}) * {size} / 4;
    for (int q = 0; q < 4; q++) b[q] = row[4 * q + l % 4];
{body}
  }}
}}"""


def arrays(name: str, weight: Array, x: Array) -> dict[str, Array]:
    size = weight.dtype.itemsize
    kept, places = compress(weight)
    words = metadata(places, size)
    assert (places_of(words, size) == places).all()
    packed = fragments(kept.view(np.uint8))
    assert (from_fragments(packed).view(weight.dtype) == kept).all()
    assert (expand(kept, places) == weight).all()
    c = np.zeros((weight.shape[0], 8), TYPES[name][2])
    return {"a": packed.view(np.uint32), "m": words, "b": np.ascontiguousarray(x).view(np.uint32), "c": c}


def draw(name: str, rng: np.random.Generator, blocks: int) -> tuple[Array, Array]:
    """2:4 weights [64 blocks, 64] of all kinds of groups (none, one, two values, extremes), inputs [8 blocks, 64]."""
    left, right, _ = TYPES[name]
    w: Array = rng.standard_normal((64 * blocks, 64))
    x: Array = rng.standard_normal((8 * blocks, 64))
    if np.issubdtype(left, np.integer):
        lo, hi = np.iinfo(left), np.iinfo(right)
        w = np.asarray(rng.integers(lo.min, lo.max + 1, w.shape))
        x = np.asarray(rng.integers(hi.min, hi.max + 1, x.shape))
        w[:64], x[:8] = lo.min if lo.min else lo.max, hi.min if hi.min else hi.max
    order = rng.permuted(np.broadcast_to(np.arange(4), (w.size // 4, 4)), axis=1)
    keep = order < rng.choice([0, 1, 2, 2, 2], (w.size // 4, 1))
    return (w * keep.reshape(w.shape)).astype(left), x.astype(right)


def product(weight: Array, x: Array) -> Array:
    w, v = (a.astype(np.float64).reshape(-1, n, 64) for a, n in ((weight, 64), (x, 8)))
    sums: Array = np.einsum("bmk,bnk->bmn", w, v).reshape(-1, 8)
    return sums


@pytest.mark.parametrize("share", [50, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", TYPES)
def test_ten_thousand_sparse_tiles(name: str, share: int) -> None:
    rng = np.random.default_rng(3)
    blocks = 10000 // (4 * np.dtype(TYPES[name][0]).itemsize * share)  # 8 or 4 instructions a block
    weight, x = draw(name, rng, blocks)
    out = run_guarded(kernel(name), "kern", (blocks, 1, 1, 32, 0), arrays(name, weight, x))["c"]
    want = product(weight, x)
    if TYPES[name][2] == np.int32:
        assert (out == want).all()
    else:
        assert np.abs(out - want).max() < 1e-5 * np.abs(want).max()


def test_the_first_group_of_a_row_that_is_not_2_4_is_named() -> None:
    weight = np.zeros((16, 64), np.int8)
    weight[3, 9:12] = 1
    with pytest.raises(InvalidInput, match="row 3 has more than two values in elements 8 to 11"):
        compress(weight)


@pytest.mark.parametrize("name", ["f16", "s8"])
def test_equal_or_falling_places_are_refused(name: str) -> None:
    weight, x = draw(name, np.random.default_rng(4), 1)
    for code in (0b0000, 0b1111, 0b0001):
        wrong = arrays(name, weight, x)
        wrong["m"].reshape(-1)[77] = (wrong["m"].reshape(-1)[77] & 0xFFFFFF0F) | code << 4
        with pytest.raises(BitwrightError, match="places of a group that do not ascend"):
            run_guarded(kernel(name), "kern", (1, 1, 1, 32, 0), wrong)


def _cutlass(weight: Array) -> Array:
    """CUTLASS' words of metadata as sm_80 kernels store them (torch's code): one word a lane, 32 a run."""
    _, meta = sparse_semi_structured_from_dense_cutlass(torch.from_numpy(weight))  # type: ignore[no-untyped-call]
    words: Array = meta.reshape(-1).numpy().view(np.uint32)
    return words


@pytest.mark.parametrize("kind", [np.float16, np.int8])
def test_metadata_lies_as_cutlass_stores_it(kind: type[np.generic]) -> None:
    rng = np.random.default_rng(5)
    keep = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]])
    weight = keep[rng.integers(0, 6, (64, 16))].reshape(64, 64).astype(kind)
    size = weight.dtype.itemsize
    mine = metadata(compress(weight)[1], size)[0, 0]  # 32 lanes, 4 words
    # columns first, two words interleaved: [pairs of 16-bit columns (f16) or of words (s8)][rows of words]
    theirs = _cutlass(weight)
    if size == 2:
        columns = theirs.reshape(2, 2, 32)  # s: 32 elements of k; p: 32 rows; lane
        want = np.stack([columns[s, p] for s in range(2) for p in range(2)], 1)
    else:
        want = theirs.reshape(4, 32).T  # fragment, lane
    assert (mine == want).all()


def test_machine_code_has_the_sparse_instructions() -> None:
    meant = {
        "f16": "HMMA.SP.16832.F32 ", "bf16": "HMMA.SP.16832.F32.BF16", "s8": "IMMA.SP.16864.S8.S8",
        "s8u8": "IMMA.SP.16864.S8.U8", "u8s8": "IMMA.SP.16864.U8.S8",
    }  # fmt: skip
    text = "\n".join(kernel(name).replace(" kern(", f" kern_{name}(") for name in meant)
    for arch in ("sm_80", "sm_90a"):
        shown = sass(compile_cuda(text, arch).cubin)
        assert [word for word in meant.values() if word not in shown] == []
    shown = sass(compile_cuda(kernel("e4m3"), "sm_89").cubin)
    assert "QMMA.SP.16864.F32.E4M3.E4M3" in shown
