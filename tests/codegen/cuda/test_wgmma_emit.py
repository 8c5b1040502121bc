"""Whole kernels of warpgroup products in the emulator against the reference, and their machine code."""

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.cuda.emulator import Emulated, run_guarded
from bitwright.codegen.cuda.machine_code import Compiled, compile_cuda, sass
from bitwright.codegen.targets.nvidia import SM80, SM90
from bitwright.codegen.tvm.cuda import wgmma_layout, wgmma_spec
from bitwright.codegen.tvm.cuda.builder import launch_of
from bitwright.codegen.tvm.cuda.mma_emit import Pointers
from bitwright.codegen.tvm.cuda.mma_spec import Product
from bitwright.codegen.tvm.cuda.operands import Matrix
from bitwright.codegen.tvm.cuda.source import cuda_source
from bitwright.codegen.tvm.cuda.wgmma import Wgmma, WgmmaConfig
from bitwright.codegen.tvm.cuda.wgmma_emit import Kernel, builder
from bitwright.codegen.tvm.cuda.wgmma_spec import Cut
from bitwright.codegen.tvm.template import Refused
from bitwright.codegen.tvm.tir import Vec
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.errors import BitwrightError
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import BF16, F16, F32, U8, TensorType
from bitwright.ir.weights import Array
from tests.codegen.cuda.emulated import launched
from tests.codegen.kernel_batch import Case, body_of, difference

TEMPLATE = Wgmma()


def pruned(w: Array, rng: np.random.Generator, axis: int = 1) -> Array:
    """At most two of four along ``axis``, fewer here and there; incomplete groups at the end lose all but two."""
    moved = np.moveaxis(w, axis, -1).copy()
    wide = np.zeros((*moved.shape[:-1], -(-moved.shape[-1] // 4) * 4), moved.dtype)
    wide[..., : moved.shape[-1]] = moved
    groups = wide.reshape(*wide.shape[:-1], -1, 4)
    order = np.argsort(np.argsort(rng.random(groups.shape), axis=-1), axis=-1)
    groups[order >= rng.integers(1, 3, (*groups.shape[:-1], 1))] = 0
    return np.moveaxis(wide[..., : moved.shape[-1]], -1, axis).copy()


def numbers(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if dtype in ("int8", "uint8"):
        return rng.integers(-128 if dtype == "int8" else 0, 128 if dtype == "int8" else 256, shape).astype(dtype)
    return rng.standard_normal(shape).astype(BF16.numpy if dtype == "bf16" else dtype)


@dataclass
class Kernels:
    """Cases with the cut of each (none: the default); inputs called w and bias are constants."""

    cases: list[tuple[Case, Cut | None]]
    configs: list[WgmmaConfig] = field(default_factory=list)

    def add(self, case: Case, cut: Cut | None = None) -> None:
        self.cases.append((case, cut))

    @cached_property
    def functions(self) -> list[object]:
        made = []
        for i, (case, cut) in enumerate(self.cases):
            config = TEMPLATE.configure(case.body, constants(case), SM90)
            assert isinstance(config, WgmmaConfig), (case.label, config)
            if cut is not None:
                config = cut_as(config, cut)
            self.configs.append(config)
            made.append(TEMPLATE.emit(case.body, config, f"k{i}"))
        return made

    @cached_property
    def text(self) -> str:
        return "\n".join(cuda_source(f) for f in self.functions)

    def run(self, orders: tuple[int, ...] = (1, 2)) -> None:
        """Every case equals the reference in every order of threads."""
        library = Emulated(self.text, [f"k{i}" for i in range(len(self.cases))])
        for i, ((case, _), config) in enumerate(zip(self.cases, self.configs, strict=True)):
            want = [to_numpy(t) for t in evaluate(case.body, case.inputs)]
            packed = TEMPLATE.pack(case.body, config, constants(case))
            assert not TEMPLATE.verify(case.body, config, constants(case), packed)
            inputs = list(case.inputs.values())
            for order in orders:
                got = launched(library, f"k{i}", launch_of(self.functions[i]), case.body, config, inputs, packed, order)
                for g, w in zip(got, want, strict=True):
                    assert not (why := difference(g, w, case)), (case.label, order, config.cut, why)

    def compiled(self) -> Compiled:
        """Machine code without spills, without anything that the assembler warns of."""
        made = compile_cuda(self.text, "sm_90a")
        assert made.warnings == ()
        for name, r in made.resources.items():
            assert r.spill_stores == r.spill_loads == r.stack_bytes == 0, (self.cases[int(name[1:])][0].label, r)
        return made


def constants(case: Case) -> dict[str, Array]:
    return {k: v for k, v in case.inputs.items() if k in ("w", "bias")}


def cut_as(config: WgmmaConfig, cut: Cut) -> WgmmaConfig:
    p = config.product
    assert not (why := cut.fault(p, SM90.l1_bytes)), why
    tasks, split = cut.tasks(p), cut.split > 1
    return replace(
        config, cut=cut, tasks=tasks, threads=cut.threads, grid=(cut.grid(p), 1, 1),
        scratch_bytes=4 * tasks // cut.split * cut.consumers if split else 0,
        work_bytes=4 * tasks * cut.outs * cut.rows if split else 0,
    )  # fmt: skip


def int_linear(
    rows: int, depth: int, outs: int, rng: np.random.Generator, x: str = "uint8", zero: int = 7, sparse: bool = False
) -> Case:
    """Requantize-like: sums plus a row of s32, saturated by hand in f32."""
    w = numbers("int8", (outs, depth), rng)
    w = pruned(w, rng) if sparse else w
    inputs = {"x": numbers(x, (rows, depth), rng), "w": w}
    body = body_of((ops.IntLinear(x_zero=zero), ("x", "w")), inputs=inputs)
    return Case(f"int {rows}x{depth}x{outs} {x} zero {zero} {'2:4' if sparse else ''}", body, inputs)


def requantized(rows: int, depth: int, outs: int, rng: np.random.Generator, sparse: bool = False) -> Case:
    """Per output to u8."""
    w = numbers("int8", (outs, depth), rng)
    inputs = {
        "x": numbers("uint8", (rows, depth), rng), "w": pruned(w, rng) if sparse else w,
        "multiplier": rng.integers(1 << 30, 1 << 31, outs).astype(np.int32),
        "shift": rng.integers(38, 44, outs).astype(np.int32),
    }  # fmt: skip
    requantize = ops.Requantize(dtype=U8, zero=3, axis=1)
    chain = ((ops.IntLinear(x_zero=9), ("x", "w")), (requantize, ("v0", "multiplier", "shift")))
    return Case(f"requantized {rows}x{depth}x{outs}", body_of(*chain, inputs=inputs), inputs)


def linear(
    rows: int, depth: int, outs: int, rng: np.random.Generator, dtype: str = "float16", sparse: bool = False
) -> Case:
    """With bias, residual and relu."""
    w = numbers(dtype, (outs, depth), rng)
    inputs = {
        "x": numbers(dtype, (rows, depth), rng), "w": pruned(w, rng) if sparse else w,
        "bias": numbers(dtype, (outs,), rng), "more": numbers(dtype, (rows, outs), rng),
    }  # fmt: skip
    chain = ((ops.Linear(), ("x", "w", "bias")), (ops.Binary("add"), ("v0", "more")), (ops.Unary("relu"), ("v1",)))
    label = f"{dtype} {rows}x{depth}x{outs} {'2:4' if sparse else ''}"
    loose = 2e-2 if dtype == "bf16" else 4e-3
    return Case(label, body_of(*chain, inputs=inputs), inputs, rtol=loose, atol=loose * np.sqrt(depth))


def conv(rng: np.random.Generator, channels: int, kind: str = "uint8", sparse: bool = False, groups: int = 1) -> Case:
    """3x3, stride 2, padded, channels last."""
    w = numbers("int8" if kind == "uint8" else kind, (40 * groups, channels // groups, 3, 3), rng)
    inputs = {"x": numbers(kind, (2, 7, 9, channels), rng), "w": pruned(w, rng) if sparse else w}
    common = {"stride": (2, 1), "padding": (1, 0, 1, 2), "dilation": (1, 2), "groups": groups, "channels_last": True}
    op = ops.IntConv(x_zero=5, **common) if kind == "uint8" else ops.Conv(**common)  # type: ignore[arg-type]
    label = f"conv {kind} {channels} {'2:4' if sparse else ''} {groups}"
    return Case(label, body_of((op, ("x", "w")), inputs=inputs), inputs, rtol=4e-3, atol=0.2 if kind != "uint8" else 0)


def test_integers_are_exact_for_any_shape() -> None:
    rng, k = np.random.default_rng(0), Kernels([])
    k.add(int_linear(5, 132, 70, rng))
    k.add(int_linear(33, 256, 129, rng, x="int8", zero=-3))
    k.add(int_linear(70, 320, 200, rng, sparse=True))
    k.add(int_linear(9, 20, 64, rng, x="int8", zero=0, sparse=True))
    k.add(int_linear(17, 36, 100, rng))  # copies of four bytes
    k.add(requantized(20, 64, 96, rng))
    k.add(requantized(20, 64, 99, rng, sparse=True))
    k.run()


def test_floats_for_any_shape() -> None:
    rng, k = np.random.default_rng(1), Kernels([])
    for dtype in ("float16", "bf16"):
        k.add(linear(19, 72, 90, rng, dtype))
        k.add(linear(40, 200, 131, rng, dtype, sparse=True))
        k.add(linear(3, 36, 64, rng, dtype))
    k.run()


def test_cuts() -> None:
    rng, k = np.random.default_rng(2), Kernels([])
    for cut in (
        Cut(128, 48, 2, 3, 1, blocks=2), Cut(256, 16, 2, 2, 0, blocks=3), Cut(64, 32, 1, 5, 3, raster=1, blocks=1),
        Cut(128, 16, 1, 4, 2, raster=2, blocks=3), Cut(128, 64, 2, 3, 1, split=3, blocks=5),
        Cut(256, 128, 2, 3, 1, split=2, blocks=2),
    ):  # fmt: skip
        k.add(int_linear(70, 600, 300, rng), cut)
        k.add(int_linear(50, 600, 300, rng, sparse=True), cut)
    for cut in (
        Cut(128, 16, 2, 3, 1, blocks=4, cluster=2), Cut(64, 8, 1, 4, 2, blocks=9, cluster=4),
        Cut(128, 24, 2, 3, 1, split=2, blocks=2, cluster=2),
    ):  # fmt: skip
        k.add(int_linear(37, 600, 200, rng, sparse=cut.outs == 64), cut)
    k.add(linear(50, 300, 200, rng, sparse=True), Cut(128, 24, 2, 4, 2, split=2, blocks=4))
    k.run((3,))


def test_convolutions() -> None:
    rng, k = np.random.default_rng(3), Kernels([])
    k.add(conv(rng, 32))
    k.add(conv(rng, 16, sparse=True))
    k.add(conv(rng, 4))
    k.add(conv(rng, 48, "float16", sparse=True))
    k.add(conv(rng, 32, groups=2), Cut(64, 16, 1, 3, 1, blocks=3))
    k.run()


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (r"bw_cluster_sync\(\);\n}", "has ended"),
        (r"bw_mbarrier_arrive_at\([^;]*, 1\);", "wait for ever"),
        (r"bw_fence_proxy\(\);", "int 37x600"),
        (r"bw_wgmma_wait0\(\);", "wgmma|int 37x600"),
    ],
)
def test_a_missing_call_is_seen(call: str, seen: str) -> None:
    """Removed from the text, the kernel must fail or give wrong sums in some order of threads."""
    rng, k = np.random.default_rng(9), Kernels([])
    k.add(int_linear(37, 600, 200, rng), Cut(128, 16, 2, 3, 1, blocks=4, cluster=2))
    text = re.sub(call, "}" if call.endswith("}") else "", k.text)
    assert text != k.text
    k.text = text
    with pytest.raises((AssertionError, BitwrightError), match=seen):
        k.run(tuple(range(6)))


def test_products_of_computed_operands() -> None:
    rng, k = np.random.default_rng(4), Kernels([])
    inputs = {"a": numbers("float16", (3, 20, 40), rng), "b": numbers("float16", (3, 70, 40), rng)}
    body = body_of((ops.MatMul(transpose_b=True), ("a", "b")), inputs=inputs)
    k.add(Case("batched", body, inputs, rtol=4e-3, atol=4e-2))
    k.run()


def e4m3(p: Product, cut: Cut) -> object:
    """A kernel of 8-bit floats as they lie in memory; no graph has them yet as tensor cores read them."""
    b = builder("kern", p, cut)
    x, w, y = b.param("x", U8, p.rows * p.source.length), b.param("w", U8, 1 << 20), b.param("y", F32, p.rows * p.outs)

    def put(batch: object, row: Any, out: Any, values: list[Vec]) -> None:
        for k, value in enumerate(values):
            with b.when(out + k < p.outs):
                b.store(y, row * p.outs + out + k, value)

    Kernel(b, p, cut, Pointers(x, w)).emit(put)
    return b.finish()


@pytest.mark.parametrize("sparse", [False, True])
def test_eight_bit_floats(sparse: bool) -> None:
    rng = np.random.default_rng(10)
    outs, rows, depth = 90, 37, 272
    p, cut = (
        Product("e4m3", outs, Matrix(rows, depth, depth), sparse=sparse),
        Cut(128, 16, 2, 4, 2, blocks=4, cluster=2),
    )
    x, w = (rng.integers(0, 256, (n, depth)).astype(np.uint8) for n in (rows, outs))
    w = pruned(w, rng) if sparse else w
    for raw in (x, w):
        raw[(raw & 0x7F) == 0x7F] = 0  # NaN
    values = [raw.view(ml_dtypes.float8_e4m3fn).astype(np.float64) for raw in (x, w)]
    arrays = {"x": x, "w": wgmma_layout.pack(w, cut.outs, sparse), "y": np.zeros((rows, outs), np.float32)}
    function = e4m3(p, cut)
    text = cuda_source(function)
    for order in (1, 2):
        got = run_guarded(text, "kern", launch_of(function), arrays, order)["y"]
        np.testing.assert_allclose(got, values[0] @ values[1].T, rtol=1e-4, atol=1.0)
    made = compile_cuda(text, "sm_90a")
    assert made.warnings == ()
    assert ("QGMMA.SP.64x16x64" if sparse else "QGMMA.64x16x32") in sass(made.cubin)


@pytest.mark.parametrize("kind", ["uint8", "float16"])
@pytest.mark.parametrize("sparse", [False, True])
def test_machine_code(kind: str, sparse: bool) -> None:
    rng, k = np.random.default_rng(5), Kernels([])
    case = (
        int_linear(512, 512, 256, rng, sparse=sparse) if kind == "uint8" else linear(512, 512, 256, rng, sparse=sparse)
    )
    k.add(case, Cut(128, 256, 2, 4, 2))
    k.add(case, Cut(256, 128, 2, 4, 2, cluster=2))
    k.add(conv(rng, 64, kind, sparse), Cut(128, 256, 2, 4, 2))
    if kind == "uint8":
        k.add(requantized(512, 512, 256, rng, sparse), Cut(128, 256, 2, 4, 2))
    k.add(case, Cut(64, 64, 1, 4, 2, split=2))
    shown = sass(k.compiled().cubin)
    word = ("IGMMA" if kind == "uint8" else "HGMMA") + (".SP" if sparse else "")
    for wanted in (
        f"{word}.64x256x",
        f"{word}.64x128x",
        f"{word}.64x64x",
        "UBLKCP",
        "USETMAXREG",
        "LDGSTS.E.BYPASS.128",
    ):
        assert wanted in shown


def test_refusals() -> None:
    rng = np.random.default_rng(6)
    few = int_linear(5, 64, 20, rng)
    for target, why in ((SM80, "cuda-sm80 has no wgmma"), (SM90, "20 outputs leave most of a tile of 64 empty")):
        answer = TEMPLATE.configure(few.body, constants(few), target)
        assert isinstance(answer, Refused)
        assert why in answer.reason
    odd = int_linear(5, 63, 64, rng)
    answer = TEMPLATE.configure(odd.body, constants(odd), SM90)
    assert isinstance(answer, Refused)
    assert "element by element" in answer.reason
    inputs = {"a": numbers("float16", (20, 40), rng), "b": numbers("float16", (40, 70), rng)}
    answer = TEMPLATE.configure(body_of((ops.MatMul(), ("a", "b")), inputs=inputs), {}, SM90)
    assert isinstance(answer, Refused)
    assert "k innermost" in answer.reason


def test_points_of_the_space_are_cuts() -> None:
    case = int_linear(300, 512, 256, np.random.default_rng(7))
    space = TEMPLATE.space(case.body, constants(case), SM90)
    config = TEMPLATE.at(case.body, constants(case), SM90, space.default)
    assert isinstance(config, WgmmaConfig)
    assert config.cut == wgmma_spec.cut_of(space.default)
    point = {**space.default, "rows": 64, "outs": 64, "consumers": 1, "stages": 3}
    assert not space.why_not(point)
    assert "fits no block" in space.why_not({**point, "rows": 256, "outs": 256, "consumers": 2})


def test_large_products_are_near_the_peak_by_counting() -> None:
    for sparse in (False, True):
        p = Product("f16", 8192, Matrix(8192, 8192, 8192), sparse=sparse)
        cut, why = wgmma_spec.default(p, SM90.l1_bytes)
        assert cut.outs * cut.rows == 128 * 256
        assert cut.cluster > 1
        assert int(why.split("% of the tensor cores' peak")[0].split()[-1]) > (60 if sparse else 90)


def test_what_is_too_large_is_refused() -> None:
    shapes = {"x": (4, 1 << 13), "w": (1 << 17, 1 << 13)}
    made = Builder("body", "kernel")
    for name, shape in shapes.items():
        made.input(name, TensorType(F16, shape))
    made.emit(ops.Linear(), "x", "w", name="v0")
    weight = np.broadcast_to(np.zeros(1, np.float16), shapes["w"])
    answer = TEMPLATE.configure(made.finish(("v0",)), {"w": weight}, SM90)
    assert isinstance(answer, Refused)
    assert "32-bit indices" in answer.reason


def test_few_rows_split_sums() -> None:
    cut, _ = wgmma_spec.default(Product("s8u8", 4096, Matrix(16, 4096, 4096)), SM90.l1_bytes)
    assert cut.split > 1
    assert cut.rows == 16


@pytest.mark.nightly
def test_random_shapes() -> None:
    rng = np.random.default_rng(8)
    for _ in range(12):
        k = Kernels([])
        for _ in range(8):
            shape = [int(n) for n in (rng.integers(1, 90), 4 * rng.integers(1, 150), rng.integers(32, 300))]
            sparse = bool(rng.integers(2))
            if rng.integers(2):
                x, zero = str(rng.choice(["uint8", "int8"])), int(rng.integers(-3, 4))
                k.add(int_linear(shape[0], shape[1], shape[2], rng, x=x, zero=zero, sparse=sparse))
            else:
                k.add(linear(shape[0], shape[1], shape[2], rng, str(rng.choice(["float16", "bf16"])), sparse))
        k.run((1, 2, 3))
