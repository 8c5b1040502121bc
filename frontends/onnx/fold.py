"""Constant folding while importing: an operator's own meaning on known operands, within limits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitwright.frontends.onnx import symbolic
from bitwright.frontends.onnx.symbolic import Poly
from bitwright.frontends.onnx.values import Val, as_entries
from bitwright.ir import ops
from bitwright.ir.errors import Problem, Unsupported
from bitwright.ir.types import TensorType
from bitwright.ir.weights import Array, Handle

LARGEST_CONSTANT = 1 << 30
"""Bytes; a constant expression that grows past this is refused."""


class Folder:
    """Folds operators; ``budget`` bounds all bytes written by folding in one import."""

    def __init__(self, limit: int, budget: int = 2 << 30) -> None:
        self.limit, self.budget = limit, budget

    def fold(self, op: ops.Op, xs: Sequence[Val], types: Sequence[TensorType], place: str) -> tuple[Val, ...] | None:
        """The results when the operands are known (up to symbols) and small enough, else None."""
        if not xs or isinstance(op, ops.Dequantize):
            return None
        if all(x.handle is not None for x in xs):
            return self._known(op, xs, types, place)
        if all(x.handle is not None or x.entries is not None for x in xs) and len(types) == 1:
            return self._symbolic(op, xs, types[0])
        return None

    def _symbolic(self, op: ops.Op, xs: Sequence[Val], kind: TensorType) -> tuple[Val, ...] | None:
        arrays = [as_entries(x) for x in xs]
        if any(a is None for a in arrays) or not kind.is_static or kind.size > 4096:
            return None
        try:
            out = symbolic.evaluate(op, [a for a in arrays if a is not None], [x.type.dtype for x in xs])
        except symbolic.Unknown:
            return None
        assert out.shape == kind.shape, (out.shape, kind)
        if any(isinstance(e, Poly) for e in out.flat):
            return (Val(kind, entries=out),)
        return (Val(kind, Handle(out.astype(kind.dtype.numpy))),)

    def _known(self, op: ops.Op, xs: Sequence[Val], types: Sequence[TensorType], place: str) -> tuple[Val, ...] | None:
        if not all(t.is_static for t in types):
            return None
        if (view := _view(op, xs[0])) is not None:
            return (Val(types[0], view, label=xs[0].label),)
        read = sum({id(x.handle): bytes_of(x.type) for x in xs}.values())
        written = sum(bytes_of(t) for t in types)
        if written > LARGEST_CONSTANT and written > 2 * read:
            raise Unsupported(Problem(op.spelling, place, f"a constant expression grows to {written >> 20} MiB"))
        allowed = max(self.limit, (4 if isinstance(op, ops.Cast) else 1) * read)
        if written > allowed or written > self.budget or _work(op, xs, types) > 2e9:
            return None
        self.budget -= written
        outs = _run(op, xs)
        label = xs[0].label if isinstance(op, (ops.Cast, ops.Slice)) else ""
        return tuple(Val(t, Handle(_held(o, t)), label=label) for o, t in zip(outs, types, strict=True))


def bytes_of(t: TensorType) -> int:
    """Bytes that a static tensor takes as an array."""
    return t.size * t.dtype.numpy.itemsize


def _held(a: Array, t: TensorType) -> Array:
    assert (a.shape, a.dtype) == (t.shape, t.dtype.numpy), (a.shape, a.dtype, t)
    return a


def _view(op: ops.Op, x: Val) -> Handle | None:
    """Reshape and Transpose of a constant cost nothing: the same bytes, seen otherwise, still unread."""
    source = x.handle
    assert source is not None
    if isinstance(op, ops.Reshape):
        shape = tuple(int(d) for d in op.shape)
        return source if shape == x.shape else Handle(lambda: source.array.reshape(shape))
    if isinstance(op, ops.Transpose):
        perm = op.perm
        return source if perm == tuple(range(x.rank)) else Handle(lambda: source.array.transpose(perm))
    return None


def _work(op: ops.Op, xs: Sequence[Val], types: Sequence[TensorType]) -> float:
    """Multiply-adds of a contraction (steps of a scatter, which runs row by row)."""
    if isinstance(op, ops.CONTRACTION):
        w = xs[1].type
        columns = w.static_shape[0] if isinstance(op, (ops.Linear, ops.Conv)) else w.static_shape[-1]
        return float(types[0].size) * w.size / max(1, columns)
    if isinstance(op, (ops.ScatterElements, ops.ScatterNd)):
        return 1e4 * float(xs[2].type.size)
    return 0.0


def _run(op: ops.Op, xs: Sequence[Val]) -> list[Array]:
    import torch

    from bitwright.ir.interpret import to_numpy, to_torch
    from bitwright.ir.semantics import apply

    with torch.no_grad():
        return [to_numpy(t) for t in apply(op, *(to_torch(np.asarray(x.array)) for x in xs))]
