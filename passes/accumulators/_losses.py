"""The sums of one layer in a given accumulator, step by step, and what was lost on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.interpret import to_numpy
from bitwright.ir.small_float import Format, Rounding, round_small_float, small_float_range
from bitwright.ir.weights import Array
from bitwright.passes.sparsity._inputs import lowered, rows

if TYPE_CHECKING:
    import torch


@dataclass
class Losses:
    """What an accumulator did to the sums of one layer that were looked at.

    ``overflow``: sums that left the range (a register that wraps: at the end; one that saturates, and small floats: at
    any step, products included). ``underflow``: products that became zero, ``swamped``: products that were not zero and
    changed nothing when added, both of ``terms`` in all. ``error``: relative RMS error of the sums.
    """

    layer: str
    sums: int = 0
    terms: int = 0
    overflow: int = 0
    underflow: int = 0
    swamped: int = 0
    missed: float = 0.0
    energy: float = 0.0

    @property
    def error(self) -> float:
        return float(np.sqrt(self.missed / self.energy)) if self.energy else 0.0

    def count(self, got: Array, exact: Array, overflow: Array, terms: int) -> None:
        """Add sums [rows, outputs] of ``terms`` products each."""
        self.sums += got.size
        self.terms += got.size * terms
        self.overflow += int(np.count_nonzero(overflow))
        self.missed += float(np.square(got.astype(np.float64) - exact).sum())
        self.energy += float(np.square(exact.astype(np.float64)).sum())


def operands(node: Node, x: torch.Tensor, weight: Array, sample: int) -> list[tuple[Array, Array]]:
    """Some rows [R, K] of the input (less its zero point) and the weight [O, K], for each group."""
    op = node.op
    if isinstance(op, ops.IntLinear):
        x, op = x.double() - op.x_zero, ops.Linear()
    elif isinstance(op, ops.IntConv):
        plain = ops.Conv(op.stride, op.padding, op.dilation, op.groups, op.channels_last)
        x, op = x.double() - op.x_zero, plain
    groups = op.groups if isinstance(op, ops.Conv) else 1
    parts = np.concatenate([to_numpy(p) for p in rows(op, x, weight.shape[2:] if isinstance(op, ops.Conv) else ())])
    picked = parts[np.unique(np.linspace(0, len(parts) - 1, min(sample, len(parts))).astype(int))]
    w = lowered(op, weight).numpy().reshape(groups, len(weight) // groups, -1)
    taps = int(np.prod(weight.shape[2:]))
    x_groups = picked.reshape(len(picked), taps, groups, -1).transpose(2, 0, 1, 3).reshape(groups, len(picked), -1)
    return list(zip(x_groups, w, strict=True))


def integer_sums(losses: Losses, node: Node, x: Array, w: Array, bits: int, register: str) -> None:
    """Registers start from -zero * sum(w) and add products of codes."""
    zero = int(node.op.x_zero)  # type: ignore[attr-defined]
    half, codes, factors = 1 << (bits - 1), (x + zero).astype(np.int64), w.astype(np.int64)
    exact = x.astype(np.int64) @ factors.T
    if register == "wrap":
        got = (exact + half) % (2 * half) - half if bits < 64 else exact
        losses.count(got, exact, got != exact, x.shape[1])
        return
    start = np.broadcast_to(-zero * factors.sum(1), exact.shape)
    now = np.clip(start, -half, half - 1)
    out = now != start
    for k in range(x.shape[1]):
        moved = now + codes[:, k, None] * factors[:, k]
        now = np.clip(moved, -half, half - 1)
        out |= now != moved
    losses.count(now, exact, out, x.shape[1])


def float_sums(
    losses: Losses, x: Array, w: Array, formats: tuple[Format, Format], chunk: int, rounding: Rounding
) -> None:
    """The order of ``small_float_dot``: chunks from zero, then the sums of the chunks."""
    product, accumulator = formats
    tops = [small_float_range(*f)[1] for f in formats]
    total = np.zeros((len(x), len(w)))
    out = np.zeros(total.shape, bool)

    def add(a: Array, b: Array) -> Array:
        nonlocal out
        moved = a + b
        after: Array = round_small_float(moved, *accumulator, rounding)
        out |= np.abs(moved) > tops[1]
        losses.swamped += int(np.count_nonzero((after == a) & (b != 0)))
        return after

    for first in range(0, x.shape[1], chunk):
        inner = np.zeros(total.shape)
        for k in range(first, min(first + chunk, x.shape[1])):
            exact = x[:, k, None] * w[:, k]
            p = round_small_float(exact, *product, rounding)
            out |= np.abs(exact) > tops[0]
            losses.underflow += int(np.count_nonzero((p == 0) & (exact != 0)))
            inner = add(inner, p)
        total = add(total, inner)
    losses.count(total, x @ w.T, out, x.shape[1])
