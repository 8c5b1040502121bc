"""Random well-formed graphs with inputs, as a hypothesis strategy; shared by meaning tests of passes and kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.types import F32, TensorType

Draw = Callable[[st.SearchStrategy[Any]], Any]
_SMOOTH = "relu abs tanh sigmoid silu gelu erf square neg hardswish softsign sin cos".split()
_SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 17, 24, 33])


@st.composite
def graphs(draw: Draw, steps: int = 7) -> tuple[Graph, list[np.ndarray[Any, Any]]]:
    """A float graph of up to ``steps`` operators over one to two inputs, and inputs for it."""
    b = Builder("random")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values: list[str] = []
    for i in range(draw(st.integers(1, 2))):
        shape = tuple(draw(st.lists(_SIZES, min_size=2, max_size=3)))
        if draw(st.booleans()) and i == 0:
            shape = (draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 4, 8, 16])), *[draw(st.integers(3, 9))] * 2)
        values.append(b.input(f"x{i}", TensorType(F32, shape)))
    inputs = [rng.standard_normal(b.types[v].static_shape).astype(np.float32) for v in values]
    for _ in range(draw(st.integers(1, steps))):
        made = _step(draw, b, values, rng)
        if made is not None and b.types[made].size <= 60_000:
            values.append(made)
    return b.finish([values[-1]], ["y"]), inputs


def _step(draw: Draw, b: Builder, values: list[str], rng: np.random.Generator) -> str | None:
    x = values[-1] if draw(st.integers(0, 3)) else draw(st.sampled_from(values))
    rank = b.types[x].rank
    table = [_unary, _binary, _shape, _softmax, _reduce, _norm]
    table += [_linear] * 3 if rank <= 3 else [_conv] * 3 + [_pool]
    made: str | None = draw(st.sampled_from(table))(draw, b, x, values, rng)
    return made


def _unary(draw: Draw, b: Builder, x: str, values: list[str], rng: np.random.Generator) -> str:
    if draw(st.integers(0, 4)) == 0:
        return b.emit(ops.Clamp(-0.5, 1.0), x)
    return b.emit(ops.Unary(draw(st.sampled_from(_SMOOTH))), x)


def _binary(draw: Draw, b: Builder, x: str, values: list[str], rng: np.random.Generator) -> str:
    shape = b.types[x].static_shape
    same = [v for v in values if b.types[v].static_shape == shape]
    other = draw(st.sampled_from(same))
    if draw(st.booleans()):
        thin = tuple(d if draw(st.booleans()) else 1 for d in shape)
        other = b.weight(
            "c", rng.standard_normal(thin[draw(st.integers(0, 1)) if thin[0] == 1 else 0 :]).astype(np.float32)
        )
    return b.emit(ops.Binary(draw(st.sampled_from(["add", "sub", "mul", "max", "min"]))), x, other)


def _shape(draw: Draw, b: Builder, x: str, values: list[str], rng: np.random.Generator) -> str:
    t = b.types[x]
    kind = draw(st.sampled_from(["transpose", "flatten", "slice", "pad", "concat", "flip"]))
    axis = draw(st.integers(0, t.rank - 1))
    size = t.static_shape[axis]
    if kind == "transpose":
        return b.emit(ops.Transpose(tuple(draw(st.permutations(range(t.rank))))), x)
    if kind == "flatten" and t.rank > 2:
        return b.emit(ops.Reshape((t.static_shape[0] * t.static_shape[1], *t.static_shape[2:])), x)
    if kind == "slice" and size > 1:
        start = draw(st.integers(0, size - 1))
        return b.emit(ops.Slice(axis, start, size, draw(st.integers(1, 2))), x)
    if kind == "pad":
        return b.emit(ops.Pad(tuple(int(i % t.rank == axis) for i in range(2 * t.rank)), 0.25), x)
    if kind == "flip":
        return b.emit(ops.Flip((axis,)), x)
    return b.emit(ops.Concat(axis), x, x)


def _softmax(draw: Draw, b: Builder, x: str, values: list[str], rng: np.random.Generator) -> str:
    return b.emit(ops.Softmax(draw(st.integers(0, b.types[x].rank - 1)), draw(st.booleans())), x)


def _reduce(draw: Draw, b: Builder, x: str, values: list[str], rng: np.random.Generator) -> str | None:
    rank = b.types[x].rank
    if rank < 3:
        return None
    axes = tuple(sorted(draw(st.sets(st.integers(0, rank - 1), min_size=1, max_size=rank - 2))))
    return b.emit(ops.Reduce(draw(st.sampled_from(["sum", "mean", "max"])), axes, draw(st.booleans())), x)


def _norm(draw: Draw, b: Builder, x: str, values: list[str], rng: np.random.Generator) -> str:
    last = b.types[x].static_shape[-1]
    scale = b.weight("g", rng.standard_normal(last).astype(np.float32))
    if draw(st.booleans()):
        return b.emit(ops.RmsNorm(eps=1e-3), x, scale)
    return b.emit(ops.LayerNorm(eps=1e-3), x, scale, b.weight("b", rng.standard_normal(last).astype(np.float32)))


def _linear(draw: Draw, b: Builder, x: str, values: list[str], rng: np.random.Generator) -> str:
    depth, out = b.types[x].static_shape[-1], draw(_SIZES)
    w = b.weight("w", np.asarray(rng.standard_normal((out, depth)) / depth**0.5, np.float32))
    if draw(st.booleans()):
        return b.emit(ops.Linear(), x, w, b.weight("bias", np.asarray(rng.standard_normal(out), np.float32)))
    return b.emit(ops.Linear(), x, w)


def _conv(draw: Draw, b: Builder, x: str, values: list[str], rng: np.random.Generator) -> str | None:
    _, c, h, width = b.types[x].static_shape
    k, out = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 4, 8, 12, 16, 20]))
    groups = draw(st.sampled_from([1, 1, 1, c]))
    if groups > 1:
        out = groups * draw(st.integers(1, 2))
    stride, pad = draw(st.integers(1, 2)), draw(st.integers(0, k - 1))
    if min(h, width) + 2 * pad < k:
        return None
    w = b.weight("w", (rng.standard_normal((out, c // groups, k, k)) / (c // groups * k * k) ** 0.5).astype(np.float32))
    return b.emit(ops.Conv((stride,) * 2, (pad,) * 4, (), groups), x, w)


def _pool(draw: Draw, b: Builder, x: str, values: list[str], rng: np.random.Generator) -> str | None:
    if min(b.types[x].static_shape[2:]) < 2:
        return None
    pad = draw(st.integers(0, 1))
    stride = draw(st.integers(1, 2))
    if draw(st.booleans()):
        return b.emit(ops.MaxPool((2, 2), (stride,) * 2, (pad,) * 4), x)
    return b.emit(ops.AvgPool((2, 2), (stride,) * 2, (pad,) * 4, (), draw(st.booleans())), x)
