"""Bodies around one contraction for tests of GPU kernels, and their comparison with the reference in the emulator."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from bitwright.codegen.cuda.emulator import Emulated
from bitwright.codegen.cuda.machine_code import Compiled, compile_cuda, sass
from bitwright.codegen.targets import GPUS
from bitwright.codegen.tuning.space import Point
from bitwright.codegen.tvm.cuda.builder import launch_of
from bitwright.codegen.tvm.cuda.mma import PROCESSORS, Mma, MmaConfig
from bitwright.codegen.tvm.cuda.mma_spec import default, point_of
from bitwright.codegen.tvm.cuda.products import product_of
from bitwright.codegen.tvm.cuda.source import cuda_source
from bitwright.codegen.tvm.template import Refused, Template
from bitwright.ir import ops
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.ops import Op
from bitwright.ir.weights import Array
from tests.codegen.cuda.emulated import launched
from tests.codegen.kernel_batch import Case, body_of, difference

FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32}
INTEGERS = {"s8": np.int8, "u8": np.uint8}


@dataclass(frozen=True)
class Product:
    """A case with the inputs that are constants, and the point of the space at which its kernel is made (or none);
    ``sparse``: the 2:4 kernel is meant, whether or not it is faster."""

    case: Case
    weights: tuple[str, ...] = ("w",)
    point: Point | None = None
    sparse: bool = False

    @property
    def constants(self) -> dict[str, Array]:
        return {k: v for k, v in self.case.inputs.items() if k in self.weights}


def draw(rng: np.random.Generator, shape: tuple[int, ...], kind: str, sparse: bool = False) -> Array:
    """Random values; the first row are extremes. ``sparse``: 2:4 along the last axis, groups of none and one too."""
    a: Array = rng.standard_normal(shape)
    if kind in INTEGERS:
        info = np.iinfo(INTEGERS[kind])
        a = rng.integers(info.min, info.max + 1, shape)
        a.reshape(-1, shape[-1])[0] = info.min or info.max
    if sparse:
        k = shape[-1]
        order = rng.permuted(np.broadcast_to(np.arange(4), (*shape[:-1], -(-k // 4), 4)), axis=-1)
        keep = order < rng.choice([0, 1, 2, 2, 2], (*order.shape[:-1], 1))
        a = a * keep.reshape(*shape[:-1], -1)[..., :k]
    made: Array = a.astype(FLOATS.get(kind) or INTEGERS[kind])
    return made


def linear(
    rng: np.random.Generator, kind: str, rows: int, outs: int, k: int, *, sparse: bool = False, zero: int = 0,
    after: Sequence[tuple[Op, tuple[str, ...]]] = (), more: dict[str, Array] | None = None, point: Point | None = None,
) -> Product:  # fmt: skip
    """x[rows, k] by w[outs, k]; ``after`` works on v0 with the inputs ``more``."""
    op: Op = ops.Linear() if kind in FLOATS else ops.IntLinear(x_zero=zero)
    inputs = {"x": draw(rng, (rows, k), kind), "w": draw(rng, (outs, k), _weight(kind), sparse), **(more or {})}
    operands = ("x", "w", "bias") if "bias" in inputs and kind in FLOATS else ("x", "w")
    label = f"{kind} {rows}x{outs}x{k}{' 2:4' if sparse else ''} {dict(point or {})}"
    constants = tuple(n for n in inputs if n not in ("x", "residual"))
    return Product(_case(label, [(op, operands), *after], inputs, k), constants, point, sparse)


def conv(
    rng: np.random.Generator, kind: str, x: tuple[int, ...], w: tuple[int, ...], *, stride: tuple[int, ...] = (),
    padding: tuple[int, ...] = (), dilation: tuple[int, ...] = (), groups: int = 1, zero: int = 0, sparse: bool = False,
) -> Product:  # fmt: skip
    """Images [n, *space, c] by w [o, c / groups, *kernel]."""
    op: Op
    if kind in FLOATS:
        op = ops.Conv(stride, padding, dilation, groups, True)
    else:
        op = ops.IntConv(stride, padding, dilation, groups, True, zero)
    last = draw(rng, (w[0], int(np.prod(w[1:]))), _weight(kind), sparse).reshape(w[0], *w[2:], w[1])
    inputs = {"x": draw(rng, x, kind), "w": np.ascontiguousarray(np.moveaxis(last, -1, 1))}
    case = _case(f"{kind} conv {x} {w} {op}", [(op, ("x", "w"))], inputs, int(np.prod(w[1:])))
    return Product(case, sparse=sparse)


def matmul(
    rng: np.random.Generator,
    kind: str,
    a: tuple[int, ...],
    b: tuple[int, ...],
    transposed: bool,
    constant: bool = False,
) -> Product:
    """a by b, both computed unless ``constant``."""
    op: Op = ops.MatMul(transposed) if kind in FLOATS else ops.IntMatMul(transposed)
    inputs = {"x": draw(rng, a, kind), "w": draw(rng, b, kind)}
    weights = ("w",) if constant else ()
    return Product(_case(f"{kind} matmul {a} {b} {transposed} {constant}", [(op, ("x", "w"))], inputs, a[-1]), weights)


def _weight(kind: str) -> str:
    return "s8" if kind in INTEGERS else kind


def _case(label: str, chain: list[tuple[Op, tuple[str, ...]]], inputs: dict[str, Array], k: int) -> Case:
    near = 2e-6 * k**0.5 + 1e-5
    return Case(label, body_of(*chain, inputs=inputs), inputs, rtol=near, atol=near * k**0.5)


def configured(template: Mma, p: Product, target: str) -> MmaConfig:
    """The configuration of a case that the template must take; its packed weights unpack again."""
    config = template.at(p.case.body, p.constants, GPUS[target], p.point or _sparse_point(p, target))
    assert isinstance(config, MmaConfig), (p.case.label, config)
    assert config.product.sparse or not p.sparse
    return config


def _sparse_point(p: Product, target: str) -> Point:
    """The point of the 2:4 kernel if that is meant."""
    found = product_of(p.case.body, p.constants)
    if not p.sparse or isinstance(found, Refused):
        return {}
    product = replace(found[1], sparse=True)
    return point_of(default(product, PROCESSORS[GPUS[target].mcpu], GPUS[target].l1_bytes)[0], product)


def check(
    template: Mma, products: Sequence[Product], target: str = "cuda-sm80", orders: Sequence[int] = (1,),
    spoil: Callable[[str], str] = str,
) -> list[str]:  # fmt: skip
    """What differs from the reference, a line per case and order of threads; ``spoil`` changes the kernels' text."""
    configs = [configured(template, p, target) for p in products]
    functions = [template.emit(p.case.body, c, f"k{i}") for i, (p, c) in enumerate(zip(products, configs, strict=True))]
    text = spoil("\n".join(cuda_source(f) for f in functions))
    library = Emulated(text, [f"k{i}" for i in range(len(products))])
    failures = []
    for i, (p, c, f) in enumerate(zip(products, configs, functions, strict=True)):
        packed = template.pack(p.case.body, c, p.constants)
        assert template.verify(p.case.body, c, p.constants, packed) == ""
        want = [to_numpy(t) for t in evaluate(p.case.body, p.case.inputs)]
        inputs = [p.case.inputs[v.name] for v in p.case.body.inputs]
        for order in orders:
            got = launched(library, f"k{i}", launch_of(f), p.case.body, c, inputs, packed, order)
            whys = [difference(g, w, p.case) for g, w in zip(got, want, strict=True)]
            failures += [f"{p.case.label} (order {order}): {why}" for why in whys if why]
    return failures


def machine_code(template: Mma, p: Product, target: str) -> tuple[MmaConfig, Compiled, str]:
    """The configuration, the cubin and its text of one case; limits of the device hold and nothing spills."""
    config = configured(template, p, target)
    function = template.emit(p.case.body, config, "kern")
    made = compile_cuda(cuda_source(function), GPUS[target].mcpu)
    used = made.resources["kern"]
    assert (used.spill_stores, used.spill_loads) == (0, 0), (p.case.label, used)
    assert used.registers * config.threads <= 65536
    assert launch_of(function)[4] <= GPUS[target].l1_bytes
    return config, made, sass(made.cubin)


def main_loop(text: str, word: str) -> list[str]:
    """The instructions of the loop that holds most of ``word``: from a label to a branch back to it, and blocks that
    it jumps to and that jump back."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif re.search(r"/\*[0-9a-f]{4,5}\*/ ", line):
            code.append(line)
    jumps = [(k, labels[m[1]]) for k, line in enumerate(code) if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", line))]
    loops = [(at, k) for k, at in jumps if at <= k]
    first, last = max(loops, key=lambda loop: sum(word in line for line in code[loop[0] : loop[1] + 1]))
    found = code[first : last + 1]
    for k, at in jumps:
        if first <= k <= last and not first <= at <= last:
            ends = [j for j, back in jumps if j >= at and first <= back <= last and not first <= j <= last]
            found += code[at : min(ends, default=at - 1) + 1]
    return found


def shaped(kind: str, rows: int, outs: int, k: int, sparse: bool = False) -> Product:
    """A linear layer whose values do not matter (zeros, or ones in two of four places), for machine code."""
    dtype = FLOATS.get(kind) or INTEGERS[kind]
    weight = np.zeros((outs, k), FLOATS.get(_weight(kind)) or INTEGERS[_weight(kind)])
    weight[:, :: 4 if sparse else 1] = 1
    op: Op = ops.Linear() if kind in FLOATS else ops.IntLinear()
    case = _case(f"{kind} {rows}x{outs}x{k}", [(op, ("x", "w"))], {"x": np.zeros((rows, k), dtype), "w": weight}, k)
    return Product(case, sparse=sparse)


def refused(template: Template, p: Product, target: str = "cuda-sm80") -> str:
    """Why the template does not take the case, or the empty string."""
    return getattr(template.configure(p.case.body, p.constants, GPUS[target]), "reason", "")
