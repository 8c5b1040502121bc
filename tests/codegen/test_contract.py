"""Contractions against NumPy: integers bit-exact, f32 to 1e-5, on every instruction-set level."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from bitwright.codegen.tvm.adapter import build_object
from bitwright.codegen.tvm.contract import (
    ContractSpec,
    Conv,
    KernelFunc,
    Matrix,
    StoreAcc,
    emit,
    knobs,
    pack,
    pairs_are_safe,
    supports,
    unpack,
)
from bitwright.codegen.tvm.contract.spec import ISAS, Isa
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import NM

Array = NDArray[Any]
GUARD = 64
"""Elements behind the output that a kernel must not touch."""
KEEP_GROUP = [
    (2, 4),
    (4, 8),
    (1, 4),
    (2, 8),
    (4, 16),
    (1, 8),
    (2, 16),
    (1, 16),
    (3, 8),
    (2, 6),
    (5, 9),
    (8, 16),
    (1, 32),
]


def aligned(a: Array) -> Array:
    """A 64-byte aligned copy with 64 readable bytes behind it."""
    raw = np.full(a.nbytes + 192, 0xA5, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    out[...] = a
    return cast(Array, out)


def sparsify(spec: ContractSpec, weight: Array, rng: np.random.Generator) -> Array:
    """Zero all but ``keep`` of every group along the channels; one output has only zeros in its first group."""
    if spec.sparsity is None:
        return weight
    keep, group = spec.sparsity
    last = weight if weight.ndim == 2 else weight.transpose(0, 2, 3, 1)
    groups = -(-last.shape[-1] // group)
    score = rng.random((*last.shape[:-1], groups * group))
    score[..., last.shape[-1] :] = -1
    score = score.reshape(*last.shape[:-1], groups, group)
    kept = score >= np.sort(score, -1)[..., group - keep, None]
    out = last * kept.reshape(*last.shape[:-1], groups * group)[..., : last.shape[-1]]
    out[0, ..., :group] = 0
    return np.ascontiguousarray(out if weight.ndim == 2 else out.transpose(0, 3, 1, 2))


def reference(spec: ContractSpec, x: Array, weight: Array, init: Array | None) -> Array:
    """The accumulators in 64-bit arithmetic."""
    wide = np.int64 if spec.element == "u8s8" else np.float64
    x, weight, g = x.astype(wide), weight.astype(wide), spec.geometry
    if isinstance(g, Matrix):
        out = x.reshape(g.rows, g.depth) @ weight.T
    else:
        out = conv_reference(g, x, weight, spec.pad_value)
    return out if init is None else out + init


def conv_reference(g: Conv, x: Array, weight: Array, pad_value: int) -> Array:
    top, left, bottom, right = g.padding
    pads = ((0, 0), (top, bottom), (left, right), (0, 0))
    image = np.pad(x.reshape(g.batch, g.height, g.width, g.channels), pads, constant_values=pad_value)
    oh, ow = g.output
    out = np.zeros((g.batch, oh, ow, g.groups, g.outputs // g.groups), x.dtype)
    per = g.channels // g.groups
    split = weight.reshape(g.groups, g.outputs // g.groups, per, *g.kernel)
    for ky in range(g.kernel[0]):
        for kx in range(g.kernel[1]):
            ys, xs = ky * g.dilation[0], kx * g.dilation[1]
            part = image[:, ys : ys + (oh - 1) * g.stride[0] + 1 : g.stride[0]]
            part = part[:, :, xs : xs + (ow - 1) * g.stride[1] + 1 : g.stride[1]]
            part = part.reshape(g.batch, oh, ow, g.groups, per)
            out += np.einsum("bhwgc,goc->bhwgo", part, split[..., ky, kx])
    return out.reshape(spec_rows(g), g.outputs)


def spec_rows(g: Conv) -> int:
    return g.batch * g.output[0] * g.output[1]


def compile_one(func: KernelFunc, isa: str, folder: Path) -> Callable[..., None]:
    (folder / "k.o").write_bytes(build_object([func.primfunc], isa))
    subprocess.run(["gcc", "-shared", "-o", folder / "k.so", folder / "k.o"], check=True)
    function = getattr(ctypes.CDLL(str(folder / "k.so")), func.name)
    function.restype = None
    return cast(Callable[..., None], function)


def execute(func: KernelFunc, isa: str, folder: Path, spec: ContractSpec, arrays: list[Array]) -> Array:
    """Run in two task ranges, check the guard behind the output, return the accumulators."""
    kernel = compile_one(func, isa, folder)
    out = aligned(np.full(spec.rows * spec.cols + GUARD, 77, spec.acc_dtype.numpy))
    held = [aligned(a) for a in arrays] + [out]
    if func.scratch_bytes:
        held.append(aligned(np.full(func.scratch_bytes, 0xA5, np.uint8)))
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in held]
    assert len(pointers) == len(func.param_names)
    cut = func.tasks // 3
    kernel(0, cut, *pointers)
    kernel(cut, func.tasks, *pointers)
    assert np.all(out[-GUARD:] == 77), "wrote past the output"
    return out[:-GUARD].reshape(spec.rows, spec.cols)


def check(spec: ContractSpec, isa: Isa, folder: Path, extreme: bool = False, heavy: bool = False) -> None:
    rng = np.random.default_rng(spec.rows * 1000 + spec.cols)
    if spec.element == "u8s8":
        x = rng.integers(0, 256, spec.input_elements).astype(np.uint8)
        weight = rng.integers(-128, 128, spec.weight_shape).astype(np.int8)
        init = rng.integers(-(2**20), 2**20, spec.cols).astype(np.int32)
        if extreme:
            x[:], weight[:] = 255, -128
    else:
        x = rng.standard_normal(spec.input_elements).astype(np.float32)
        weight = rng.standard_normal(spec.weight_shape).astype(np.float32)
        init = rng.standard_normal(spec.cols).astype(np.float32)
    weight = sparsify(spec, weight, rng)
    assert supports(spec, isa) is None
    chosen = knobs(spec, isa, weight)
    arrays = pack(spec, chosen, weight, init=init if spec.init else None)
    back, kept = unpack(spec, chosen, arrays)
    np.testing.assert_array_equal(back, weight)
    if spec.pattern:
        np.testing.assert_array_equal(kept, weight != 0)
    func = emit(spec, chosen, StoreAcc(spec.rows, spec.cols, spec.acc_dtype, heavy), "kernel")
    got = execute(func, isa, folder, spec, [x, *arrays])
    want = reference(spec, x, weight, init if spec.init else None)
    if spec.element == "u8s8":
        np.testing.assert_array_equal(got, want)
    else:
        assert np.abs(got - want).max() <= 1e-5 * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("element", ["u8s8", "f32"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 70, 67), (13, 5, 3), (9, 130, 33)], ids=str)
def test_dense_matrix(sizes: tuple[int, int, int], element: Any, isa: Isa, tmp_path: Path) -> None:
    check(ContractSpec(element, Matrix(*sizes), init=sizes[0] == 13), isa, tmp_path)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pattern", [None, NM(2, 4, axis=1), NM(1, 4, axis=1)], ids=str)
def test_extreme_values_never_saturate(pattern: NM | None, isa: Isa, tmp_path: Path) -> None:
    check(ContractSpec("u8s8", Matrix(6, 20, 64), pattern), isa, tmp_path, extreme=True)


@pytest.mark.parametrize("keep_group", KEEP_GROUP, ids=str)
@pytest.mark.parametrize("element", ["u8s8", "f32"])
def test_every_pattern_on_avx512(keep_group: tuple[int, int], element: Any, tmp_path: Path) -> None:
    """150 is no multiple of any group: the last group is short."""
    check(ContractSpec(element, Matrix(6, 70, 150), NM(*keep_group, axis=1)), "avx512-vnni", tmp_path)


@pytest.mark.parametrize("isa", ["avx-vnni", "avx2", "portable"])
@pytest.mark.parametrize("keep_group", [(2, 4), (1, 8), (3, 8), (4, 16), (5, 9)], ids=str)
@pytest.mark.parametrize(("element", "rows"), [("u8s8", 1), ("u8s8", 5), ("f32", 5)])
def test_patterns_elsewhere(keep_group: tuple[int, int], element: Any, rows: int, isa: Isa, tmp_path: Path) -> None:
    check(ContractSpec(element, Matrix(rows, 21, 75), NM(*keep_group, axis=1)), isa, tmp_path)


CONVOLUTIONS = {
    "3x3": Conv(2, 6, 7, 8, 20, (3, 3), padding=(1, 1, 1, 1)),
    "stem": Conv(1, 14, 14, 3, 17, (7, 7), (2, 2), padding=(3, 3, 3, 3)),
    "1x1": Conv(2, 5, 4, 9, 33, (1, 1)),
    "1x1 strided": Conv(1, 9, 9, 16, 16, (1, 1), (2, 2)),
    "asymmetric, dilated": Conv(2, 9, 10, 6, 5, (3, 2), (2, 1), (1, 2), (1, 0, 2, 3)),
    "grouped": Conv(1, 6, 5, 6, 38, (3, 3), padding=(1, 1, 1, 1), groups=2),
    "padding wider than the image": Conv(1, 2, 1, 4, 3, (3, 3), padding=(3, 4, 2, 5)),
    "no padding, cropped": Conv(1, 8, 9, 4, 4, (2, 2), (3, 3)),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, isa: Isa, tmp_path: Path) -> None:
    element: Any = "f32" if name in ("stem", "1x1 strided") else "u8s8"
    pad = 0 if element == "f32" else 113
    check(ContractSpec(element, CONVOLUTIONS[name], init=True, pad_value=pad), isa, tmp_path)


@pytest.mark.parametrize("name", ["3x3", "asymmetric, dilated", "grouped"])
@pytest.mark.parametrize("element", ["u8s8", "f32"])
def test_sparse_convolution(name: str, element: Any, tmp_path: Path) -> None:
    """Groups run along the channels of one tap, also where a tap's channels are no multiple of the group."""
    spec = ContractSpec(element, CONVOLUTIONS[name], NM(1, 4, axis=1), pad_value=0 if element == "f32" else 9)
    check(spec, "avx512-vnni", tmp_path)


DEPTHWISE = {
    "3x3": Conv(2, 6, 7, 20, 20, (3, 3), padding=(1, 1, 1, 1), groups=20),
    "strided": Conv(1, 9, 8, 16, 16, (3, 3), (2, 2), padding=(0, 1, 1, 1), groups=16),
    "5x5 dilated": Conv(1, 11, 11, 8, 8, (5, 5), (1, 1), (2, 2), (4, 4, 4, 4), 8),
    "5x4": Conv(1, 9, 9, 33, 33, (5, 4), padding=(2, 2, 2, 1), groups=33),
    "pairs of vectors": Conv(2, 7, 9, 83, 83, (3, 3), padding=(1, 1, 1, 1), groups=83),
    "pairs, strided": Conv(1, 11, 14, 50, 50, (3, 3), (2, 2), padding=(1, 1, 1, 1), groups=50),
    "pairs, two quads": Conv(1, 9, 10, 64, 64, (7, 7), padding=(3, 3, 3, 3), groups=64),
    "one pixel": Conv(1, 1, 1, 3, 3, (3, 3), padding=(1, 1, 1, 1), groups=3),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise(name: str, isa: Isa, tmp_path: Path) -> None:
    element: Any = "f32" if name == "strided" else "u8s8"
    pad = 0 if element == "f32" else 113
    check(
        ContractSpec(element, DEPTHWISE[name], init=name != "3x3", pad_value=pad), isa, tmp_path, extreme=name == "5x4"
    )


@pytest.mark.parametrize(
    "geometry", [Matrix(9, 70, 20), CONVOLUTIONS["3x3"], DEPTHWISE["3x3"]], ids=["matrix", "conv", "dw"]
)
def test_heavy_epilogue_is_looped(geometry: Matrix | Conv, tmp_path: Path) -> None:
    check(ContractSpec("u8s8", geometry), "avx512-vnni", tmp_path, heavy=True)


def test_pmaddubsw_is_used_only_where_it_cannot_saturate(tmp_path: Path) -> None:
    spec = ContractSpec("u8s8", Matrix(5, 24, 37))
    rng = np.random.default_rng(0)
    small, large = (rng.integers(-n, n, spec.weight_shape).astype(np.int8) for n in (64, 127))
    assert pairs_are_safe(spec, small)
    assert not pairs_are_safe(spec, large)
    assert knobs(spec, "avx2", small).safe_pairs
    assert not knobs(spec, "avx2", large).safe_pairs
    with pytest.raises(InvalidInput, match="saturate"):
        pack(spec, replace(knobs(spec, "avx2", large), safe_pairs=True), large)
    x = np.full((5, 37), 255, np.uint8)
    chosen = knobs(spec, "avx2", small)
    func = emit(spec, chosen, StoreAcc(5, 24, spec.acc_dtype), "kernel")
    got = execute(func, "avx2", tmp_path, spec, [x, *pack(spec, chosen, small)])
    np.testing.assert_array_equal(got, reference(spec, x, small, None))


@pytest.mark.parametrize("isa", ["avx512-vnni", "avx2", "portable"])
@pytest.mark.parametrize("right", ["kn", "nk"])
@pytest.mark.parametrize("sizes", [(17, 33, 20, 3), (1, 70, 5, 2), (3, 16, 1, 1)], ids=str)
def test_run_time_right_operand(sizes: tuple[int, int, int, int], right: Any, isa: Isa, tmp_path: Path) -> None:
    rows, cols, depth, batch = sizes
    spec = ContractSpec("f32", Matrix(rows, cols, depth, batch), right=right)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((batch, rows, depth)).astype(np.float32)
    w = rng.standard_normal((batch, depth, cols)).astype(np.float32)
    stored = np.ascontiguousarray(w if right == "kn" else w.transpose(0, 2, 1))
    func = emit(spec, knobs(spec, isa), StoreAcc(spec.rows, cols, spec.acc_dtype), "kernel")
    got = execute(func, isa, tmp_path, spec, [x, stored])
    want = (x.astype(np.float64) @ w).reshape(got.shape)
    assert np.abs(got - want).max() <= 1e-5 * max(1.0, np.abs(want).max())


def test_padding_values_do_not_leak_non_finite_numbers(tmp_path: Path) -> None:
    """Loads past a row meet the next row's infinity; f32 kernels must not multiply it by a padded zero."""
    spec = ContractSpec("f32", Matrix(4, 16, 19), NM(2, 4, axis=1))
    x = np.ones((4, 19), np.float32)
    x[1:, 0] = np.inf
    weight = sparsify(spec, np.ones(spec.weight_shape, np.float32), np.random.default_rng(0))
    weight[:, 0] = 0
    chosen = knobs(spec, "avx512-vnni")
    func = emit(spec, chosen, StoreAcc(4, 16, spec.acc_dtype), "kernel")
    got = execute(func, "avx512-vnni", tmp_path, spec, [x, *pack(spec, chosen, weight)])
    np.testing.assert_array_equal(got[0], weight.sum(1))


@pytest.mark.parametrize("pattern", [None, NM(2, 4, axis=1)], ids=str)
def test_prefetching_changes_nothing(pattern: NM | None, tmp_path: Path) -> None:
    spec = ContractSpec("u8s8", Matrix(13, 150, 40), pattern)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (13, 40)).astype(np.uint8)
    weight = sparsify(spec, rng.integers(-128, 128, spec.weight_shape).astype(np.int8), rng)
    chosen = replace(knobs(spec, "avx512-vnni"), prefetch=True)
    func = emit(spec, chosen, StoreAcc(13, 150, spec.acc_dtype), "kernel")
    got = execute(func, "avx512-vnni", tmp_path, spec, [x, *pack(spec, chosen, weight)])
    np.testing.assert_array_equal(got, reference(spec, x, weight, None))
    assert knobs(ContractSpec("u8s8", Matrix(32, 1024, 1024)), "avx512-vnni").prefetch


@pytest.mark.parametrize("name", ["3x3", "grouped"])
def test_prefetching_over_taps_and_groups_changes_nothing(name: str, tmp_path: Path) -> None:
    spec = ContractSpec("u8s8", CONVOLUTIONS[name])
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, spec.input_elements).astype(np.uint8)
    weight = rng.integers(-128, 128, spec.weight_shape).astype(np.int8)
    chosen = replace(knobs(spec, "avx512-vnni"), rows=2, vectors=1, prefetch=True)
    func = emit(spec, chosen, StoreAcc(spec.rows, spec.cols, spec.acc_dtype), "kernel")
    got = execute(func, "avx512-vnni", tmp_path, spec, [x, *pack(spec, chosen, weight)])
    np.testing.assert_array_equal(got, reference(spec, x, weight, None))


def test_tiles_leave_no_small_remainder() -> None:
    """(rows, vectors) of dense AVX-512 tiles, and whether they fetch the next panel meanwhile."""

    def tile(geometry: Matrix | Conv, pattern: NM | None = None) -> tuple[int, int, bool]:
        k = knobs(ContractSpec("u8s8", geometry, pattern), "avx512-vnni")
        return k.rows, k.vectors, k.prefetch

    rows = {1: (1, 4), 5: (5, 4), 13: (13, 2), 16: (8, 2), 50: (10, 2), 128: (8, 2), 196: (10, 2)}
    assert {n: tile(Matrix(n, 768, 768)) for n in rows} == {n: (*t, t[1] == 2) for n, t in rows.items()}
    assert tile(Matrix(64, 32, 64)) == (8, 2, False)  # one panel: nothing to fetch
    assert tile(Matrix(64, 48, 64)) == (4, 3, False)
    assert tile(Conv(1, 14, 14, 64, 64, (3, 3), padding=(1, 1, 1, 1))) == (14, 2, True)
    assert tile(Conv(1, 56, 56, 64, 64, (3, 3), padding=(1, 1, 1, 1))) == (7, 2, True)
    assert tile(Conv(1, 13, 30, 64, 64, (3, 3), padding=(1, 1, 1, 1))) == (10, 2, True)
    assert tile(Conv(1, 31, 31, 64, 64, (3, 3), padding=(1, 1, 1, 1)))[2] is False
    assert tile(Matrix(128, 768, 768), NM(2, 4, axis=1)) == (4, 4, False)
    assert tile(Matrix(128, 3072, 768), NM(2, 4, axis=1)) == (8, 2, True)


def test_mask_and_weights_must_agree() -> None:
    spec = ContractSpec("u8s8", Matrix(2, 3, 8), NM(2, 4, axis=1))
    chosen = knobs(spec, "avx512-vnni")
    weight = np.ones(spec.weight_shape, np.int8)
    with pytest.raises(InvalidInput, match="more than 2 non-zeros"):
        pack(spec, chosen, weight)
    mask = np.zeros(spec.weight_shape, bool)
    mask[:, ::2] = True
    with pytest.raises(InvalidInput, match="outside the mask"):
        pack(spec, chosen, weight, mask)
    weight[:, 1::2] = 0
    back, kept = unpack(spec, chosen, pack(spec, chosen, weight, mask))
    np.testing.assert_array_equal(back, weight)
    np.testing.assert_array_equal(kept, mask)


def test_refusals_say_why() -> None:
    dense = ContractSpec("u8s8", Matrix(4, 4, 4))
    assert "selection reaches" in str(supports(replace(dense, pattern=NM(1, 32, axis=1)), "avx2"))
    assert "f32 only" in str(supports(replace(dense, right="kn"), "avx2"))
    assert "flatten the batch" in str(supports(ContractSpec("f32", Matrix(4, 4, 4, 2)), "avx2"))
    assert "32-bit indices" in str(supports(ContractSpec("f32", Matrix(1 << 16, 1 << 16, 4)), "avx2"))
    assert "no u8" in str(supports(replace(dense, pad_value=-1), "avx2"))
    depthwise = ContractSpec("f32", DEPTHWISE["3x3"], NM(1, 2, axis=1))
    assert "depthwise" in str(supports(depthwise, "avx2"))
    with pytest.raises(InvalidInput, match="selection reaches"):
        emit(replace(dense, pattern=NM(1, 32, axis=1)), knobs(dense, "avx2"), StoreAcc(4, 4, dense.acc_dtype), "k")


def test_bad_geometry_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="at least 1"):
        Matrix(0, 1, 1)
    with pytest.raises(InvalidInput, match="no output"):
        Conv(1, 2, 2, 1, 1, (3, 3))
    with pytest.raises(InvalidInput, match="do not divide"):
        Conv(1, 4, 4, 3, 4, (1, 1), groups=2)
    with pytest.raises(InvalidInput, match="negative padding"):
        Conv(1, 4, 4, 3, 4, (1, 1), padding=(-1, 0, 0, 0))
    spec = ContractSpec("f32", Matrix(2, 3, 4))
    with pytest.raises(InvalidInput, match="expected"):
        pack(spec, knobs(spec, "avx2"), np.zeros((4, 3), np.float32))
    with pytest.raises(InvalidInput, match="do not agree"):
        pack(spec, knobs(spec, "avx2"), np.zeros((3, 4), np.float32), init=np.zeros(3, np.float32))


def test_corrupt_packed_weights_are_found() -> None:
    spec = ContractSpec("u8s8", Matrix(2, 3, 8), NM(2, 4, axis=1))
    chosen = knobs(spec, "avx512-vnni")
    weight = np.tile(np.array([1, 0, 2, 0], np.int8), (3, 2))
    arrays = pack(spec, chosen, weight)
    with pytest.raises(InvalidInput, match="packed weights have"):
        unpack(spec, chosen, [arrays[0][:-4], arrays[1]])
    moved = [arrays[0], arrays[1] ^ np.uint8(1)]
    assert not np.array_equal(unpack(spec, chosen, moved)[0], weight)
