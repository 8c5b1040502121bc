"""Which layers suffer from an accumulator: overflow, underflow and swamping, counted on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.small_float import Format, Rounding
from bitwright.ir.types import DType, parse_dtype
from bitwright.passes._layers import layer_of
from bitwright.passes._pass import Batch, Context
from bitwright.passes.accumulators._losses import Losses, float_sums, integer_sums, operands
from bitwright.passes.lowering.to_integer import LowerToInteger
from bitwright.passes.sparsity._frontier import walk
from bitwright.passes.sparsity._inputs import need_calibration

if TYPE_CHECKING:
    import torch

Register = Literal["wrap", "saturate"]


def attribute_accumulator(
    graph: Graph, calibration: Sequence[Batch], accumulator: int | str | DType, *, register: Register = "wrap",
    product: str | DType | None = None, chunk: int = 16, rounding: Rounding = "floor", sample: int = 64,
) -> dict[str, Losses]:  # fmt: skip
    """Losses by layer, in order of execution, were every layer to sum in ``accumulator``.

    ``accumulator``: bits of an integer register (or ``"s16"``) for the integer contractions, which a graph of quantize
    and dequantize is lowered to; or a small float such as ``"f4m3b8"`` for the floating-point contractions, with
    ``product``, ``chunk`` and ``rounding`` as in :func:`bitwright.ir.numerics.small_float_dot`. Layers with a weight
    only, terms in the kernels' order (taps, then channels). Of each layer ``sample`` rows of each batch are looked at,
    evenly spaced. Raises :class:`InvalidInput` for formats that are none, and without calibration data.
    """
    need_calibration(Context(calibration=calibration), "attribute_accumulator")
    if sample < 1 or register not in ("wrap", "saturate"):
        raise InvalidInput(f"sample is at least 1 and register wraps or saturates, not {sample} and {register!r}")
    kind = parse_dtype(f"s{accumulator}" if isinstance(accumulator, int) else str(accumulator))
    integers = kind.kind == "int"
    if not integers and (kind.kind != "float" or kind.bits > 32):
        raise InvalidInput(f"{kind} is no accumulator: give bits of an integer, or a small float such as f4m3b8")
    if integers and graph.level == "graph":
        graph = LowerToInteger().run(graph, Context())
    wanted = (ops.IntLinear, ops.IntConv) if integers else (ops.Linear, ops.Conv)
    nodes = [n for n in graph.nodes if isinstance(n.op, wanted) and graph.is_constant(n.inputs[1])]
    layers = {name: Losses(name) for name in dict.fromkeys(layer_of(graph, n) for n in nodes)}
    found = {n.output: layers[layer_of(graph, n)] for n in nodes}
    formats = None if integers else (_format(parse_dtype(str(product or kind))), _format(kind))

    def visit(node: Node, xs: list[torch.Tensor], *_: list[torch.Tensor]) -> None:
        losses, weight = found[node.output], np.asarray(graph.constant(node.inputs[1]))
        for x, w in (pair for one in xs for pair in operands(node, one, weight, sample)):
            if formats is None:
                integer_sums(losses, node, x, w, kind.bits, register)
            else:
                float_sums(losses, x, w, formats, chunk, rounding)

    walk(graph, calibration, set(found), visit)
    return layers


def _format(t: DType) -> Format:
    bias = t.bias if t.bias is not None else (1 << (t.exponent - 1)) - 1
    return t.exponent, t.mantissa, bias


__all__ = ["Losses", "attribute_accumulator"]
