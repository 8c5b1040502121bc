"""Editing the constants that carry channels: the same edit of the same constant is one new constant."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import TensorType
from bitwright.ir.weights import Array
from bitwright.passes._layers import stem
from bitwright.passes.sparsity._channels import Coupling, Ints, Use

Picks = list[tuple[tuple[int, ...], Ints]]
"""Axes of a constant, and which of their flat positions to take, in which order."""


def taken(array: Array, picks: Picks) -> Array:
    """The array with the entries of each set of axes picked; several axes keep their sizes (an exchange)."""
    for axes, order in picks:
        if len(axes) == 1:
            array = array.take(order, axes[0])
            continue
        front = np.moveaxis(array, axes, range(len(axes)))
        sizes = front.shape[: len(axes)]
        moved = front.reshape(-1, *front.shape[len(axes) :])[order].reshape(*sizes, *front.shape[len(axes) :])
        array = np.moveaxis(moved, range(len(axes)), axes)
    return np.ascontiguousarray(array)


class Constants:
    """Operands of nodes under an edit: ``pick`` tells which positions of a use are taken, None for all as they are."""

    def __init__(self, coupling: Coupling, pick: Callable[[Use], Ints | None]) -> None:
        self._uses: dict[tuple[str, int], list[Use]] = {}
        self._pick = pick
        self._made: dict[tuple[object, ...], str] = {}
        for u in coupling.uses:
            self._uses.setdefault((u.node.output, u.operand), []).append(u)

    def operands(self, rw: Rewriter, node: Node) -> tuple[str, ...]:
        """The node's operands in the new graph."""
        return tuple(self._operand(rw, node, i) for i in range(len(node.inputs)))

    def _operand(self, rw: Rewriter, node: Node, i: int) -> str:
        uses = self._uses.get((node.output, i), ())
        picks = [(u.axes, p) for u in uses if (p := self._pick(u)) is not None]
        name = node.inputs[i]
        if not picks:
            return rw.of(name)[0]
        key = (name, *((axes, p.tobytes()) for axes, p in picks))
        if key not in self._made:
            self._made[key] = self._make(rw, name, picks)
        return self._made[key]

    def _make(self, rw: Rewriter, name: str, picks: Picks) -> str:
        source = rw.graph.producers[name]
        array = taken(rw.graph.constant(name), picks)  # type: ignore[arg-type]
        t = TensorType(source.type.dtype, array.shape, source.type.encoding)
        if isinstance(source.op, ops.Weight):
            key = stem(source.op.ref)
            return rw.weight(key, array, t, name=key, origin=source.origin)
        return rw.constant(array, t, name=re.sub(r"\.\d+$", "", name), origin=source.origin)


def moved(coupling: Coupling, to: Ints) -> Graph:
    """The graph with channel c in the place of channel ``to[c]`` everywhere; its function is the same."""
    if np.array_equal(to, np.arange(len(to))):
        return coupling.graph

    def pick(u: Use) -> Ints | None:
        order = coupling.order(u.label, to)
        return None if np.array_equal(order, np.arange(len(order))) else order

    constants = Constants(coupling, pick)

    def step(rw: Rewriter, node: Node) -> bool:
        operands = constants.operands(rw, node)
        if operands == rw.of(*node.inputs):
            return False
        rw.keep_as(node, node.op, operands, node.types)
        return True

    return rewrite(coupling.graph, step)[0]


__all__ = ["Constants", "Picks", "moved", "taken"]
