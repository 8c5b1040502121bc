"""A quantized network as a machine with narrow registers would compute it: sums that wrap, or that saturate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Register = Literal["wrap", "saturate"]
INTEGER = (ops.IntLinear, ops.IntConv)
TILE = 1 << 17
"""Sums worked on at once."""


def evaluate_in_registers(
    graph: Graph, inputs: Mapping[str, Any] | Sequence[Any], bits: int, register: Register = "saturate"
) -> tuple[Tensor, ...]:
    """Run an integer-level graph with ``bits``-bit sums in its int_linear and int_conv (the rest is exact).

    A register starts from -zero * sum(weights) and adds products of codes, taps first and then channels; ``wrap`` keeps
    the low bits, ``saturate`` stays at the end of the range at every step. Inputs and results as for
    :func:`bitwright.ir.interpret.evaluate`. Raises :class:`InvalidInput` for widths other than 2 to 64.
    """
    import torch

    from bitwright.ir.infer import bind_op
    from bitwright.ir.interpret import bind_symbols, to_torch
    from bitwright.ir.semantics import apply

    if isinstance(bits, bool) or not 2 <= bits <= 64 or register not in ("wrap", "saturate"):
        raise InvalidInput(f"a register has 2 to 64 bits and wraps or saturates, not {bits} and {register!r}")
    given = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
    names = list(inputs) if isinstance(inputs, Mapping) else [v.name for v in graph.inputs]
    values: dict[str, torch.Tensor] = {n: to_torch(a) for n, a in zip(names, given, strict=True)}
    sizes = bind_symbols(graph, [tuple(values[v.name].shape) for v in graph.inputs])
    last = {x: n for n in graph.nodes for x in n.inputs}
    with torch.no_grad():
        for node in graph.nodes:
            if isinstance(node.op, (ops.Weight, ops.Constant)):
                values[node.output] = to_torch(graph.constant(node.output))
                continue
            xs = [values[x] for x in node.inputs]
            made = apply(bind_op(node.op, sizes), *xs)
            if isinstance(node.op, INTEGER):
                made = (_narrow(node.op, xs[0], xs[1], made[0], bits, register),)
            values.update(zip(node.outputs, made, strict=True))
            for x in node.inputs:
                if last[x] is node and x not in graph.outputs:
                    values.pop(x, None)
    return tuple(values[o] for o in graph.outputs)


def _narrow(op: ops.IntLinear | ops.IntConv, x: Tensor, w: Tensor, exact: Tensor, bits: int, register: str) -> Tensor:
    import torch

    from bitwright.ir.semantics_small_float import conv, linear

    half = 1 << (bits - 1)
    if register == "wrap":
        wide = exact.long()
        low = wide if bits == 64 else ((wide + half) & (2 * half - 1)) - half
        return low.to(exact.dtype)
    shifted, factors = x.double() - op.x_zero, w.double()

    def sums(a: Tensor, b: Tensor) -> Tensor:
        return saturating_sums(a, b, op.x_zero, bits)

    if isinstance(op, ops.IntLinear):
        return torch.empty_like(exact).copy_(linear(shifted, factors, None, sums))
    shifted = shifted.movedim(-1, 1) if op.channels_last else shifted
    parts = [
        conv(u, v, None, (op.stride, op.padding, op.dilation), sums)
        for u, v in zip(shifted.chunk(op.groups, 1), factors.chunk(op.groups, 0), strict=True)
    ]
    y = torch.cat(parts, 1)
    # in the layout of the exact result: the last bits of float operators that follow depend on it
    return torch.empty_like(exact).copy_(y.movedim(1, -1) if op.channels_last else y)


def saturating_sums(x: Tensor, w: Tensor, zero: int, bits: int) -> Tensor:
    """Sums over k of x[R, K] (codes less their zero point) by w[O, K] in a saturating register, integers in f64.

    It starts from -zero * sum(w) and adds (x + zero) * w in order of k.
    """
    import torch

    half = float(1 << (bits - 1))
    kind = torch.float32 if bits <= 20 else torch.float64  # holds the register and a product of bytes beside it
    codes, factors = (x + zero).t().to(kind).contiguous(), w.t().to(kind).contiguous()
    start = (-zero * w.sum(1)).clamp(-half, half - 1).to(kind)
    out = torch.empty(w.shape[0], x.shape[0], dtype=torch.float64)
    step = max(1, TILE // max(1, w.shape[0]))
    for first in range(0, x.shape[0], step):
        part = codes[:, None, first : first + step]
        now = start[:, None].expand(-1, part.shape[-1]).contiguous()
        for c, f in zip(part, factors, strict=True):
            now.addcmul_(f[:, None], c).clamp_(-half, half - 1)
        out[:, first : first + step] = now
    return out.t()


__all__ = ["Register", "evaluate_in_registers", "saturating_sums"]
