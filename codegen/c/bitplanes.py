"""Contractions of weights in {-1, 1} or {-1, 0, 1} by words: activations cut into bit planes, products by popcount.

With planes x_p of an unsigned activation, sum x w = sum_p 2^p (|x_p & w+| - |x_p & w-|); for weights without a zero it
is 2 sum_p 2^p |x_p & w+| - sum x (XNOR-Net, arXiv:1603.05279, for several bits of x). Activations of a row are packed
once for all outputs. What padding and zero point add is a constant of each output.
"""

from __future__ import annotations

from contextlib import ExitStack
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.c.text import Idx, Index, over, plus, rest, times
from bitwright.codegen.c.values import Evaluator
from bitwright.codegen.c.window import taps_of
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node

Array = NDArray[Any]
PLANES = 4
"""Up to so many counts of a word pay: in software a count takes some 12 operations, 32 products take about 100."""
WASTE = 1.25
"""Words become shorter while they would store more than this times the bits of a row."""


def signs(node: Node, body: Graph, weights: dict[str, Array]) -> int:
    """Planes of the weights (1: no zeros, 2: with zeros) where counting words pays; 0 where it does not."""
    op = node.op
    if not isinstance(op, ops.IntLinear | ops.IntConv) or node.inputs[1] not in weights:
        return 0
    if isinstance(op, ops.IntConv) and op.groups > 1:
        return 0
    w, x = weights[node.inputs[1]], body.types[node.inputs[0]].dtype
    if not w.size or x.kind != "uint" or int(np.abs(w).max()) > 1:
        return 0
    planes = 1 if bool((w != 0).all()) else 2
    return planes if planes * x.bits <= PLANES else 0


def word_bits(terms: int) -> int:
    """Bits of a word for rows of so many terms: 32, or fewer where the last word would be mostly empty.

    >>> word_bits(288), word_bits(33), word_bits(7)
    (32, 8, 8)
    """
    return next((b for b in (32, 16) if ceil(terms / b) * b <= WASTE * terms), 8)


def planes_of(w: Array) -> tuple[Array, Array]:
    """Weights [O, C, *kernel] as bits [O, taps * C] that are +1, and that are -1."""
    flat = w.reshape(w.shape[0], w.shape[1], -1).transpose(0, 2, 1).reshape(w.shape[0], -1)
    return flat > 0, flat < 0


def words(bits: Array, width: int) -> Array:
    """Rows of bits as words, the first bit lowest."""
    padded = np.pad(bits, ((0, 0), (0, -bits.shape[1] % width)))
    packed = np.packbits(padded, axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view(f"<u{width // 8}")


def row_axis(node: Node) -> int:
    """The axis of the outputs, along which the packed activations stay the same."""
    channels_last = not isinstance(node.op, ops.IntConv) or node.op.channels_last
    return node.type.rank - 1 if channels_last else 1


def _key(node: Node, idx: Idx) -> tuple[object, ...]:
    axis = row_axis(node)
    return ("planes", node.output, *(i for a, i in enumerate(idx) if a != axis))


def prepare(e: Evaluator, node: Node, idx: Idx) -> None:
    """Pack the activations that the outputs of a row read, and sum them."""
    if e.w.recall(_key(node, idx)) is not None:
        return
    w = e.w
    terms = int(np.prod(e.shape(node.inputs[1])[1:], dtype=np.int64))
    width, planes = word_bits(terms), e.dtype(node.inputs[0]).bits
    count = ceil(terms / width)
    name = w.name("planes")
    w.put(f"uint{width}_t {name}[{planes * count}] = {{ 0 }};")
    total = w.variable("int32_t", "0", "sum")
    with ExitStack() as stack:
        x, number = _activation(e, node, idx, stack)
        w.put(f"{total} += {x};")
        at = over(number, width)
        for p in range(planes):
            bit = f"(({x} >> {p}) & 1)" if p else f"({x} & 1)"
            place = rest(number, width)
            moved = f"((uint32_t){bit} << {place})"
            target = f"{name}[{plus(p * count, at)}]"
            w.put(f"{target} = (uint{width}_t)({target} | {moved});")
    w.remember(_key(node, idx), name)
    w.remember((*_key(node, idx), "sum"), total)


def _activation(e: Evaluator, node: Node, idx: Idx, stack: ExitStack) -> tuple[str, Index]:
    """The activation of one term (its zero point outside the image) and the term's number."""
    op, (x, w) = node.op, node.inputs[:2]
    channels = e.shape(w)[1]
    if not isinstance(op, ops.IntConv):
        k = stack.enter_context(e.w.loop(channels, "k"))
        return e.at(x, (*idx[:-1], k)), k
    here, inside, tap = taps_of(e, node, idx, stack)
    c = stack.enter_context(e.w.loop(channels, "c"))
    number = plus(times(tap if isinstance(tap, int) else f"({tap})", channels), c)
    number = number if isinstance(number, int) else e.w.let("int32_t", number, "n")
    where = (idx[0], *here, c) if op.channels_last else (idx[0], c, *here)
    if not inside:
        return e.at(x, where), number
    value = e.w.variable("int32_t", str(op.x_zero), "v")
    with e.w.block(f"if ({inside})"):
        e.w.put(f"{value} = {e.at(x, where)};")
    return value, number


def value(e: Evaluator, node: Node, idx: Idx) -> str:
    """One output: counted words of the packed activations and its weights."""
    prepare(e, node, idx)
    name, total = e.w.recall(_key(node, idx)), e.w.recall((*_key(node, idx), "sum"))
    weight = np.asarray(e.constants[node.inputs[1]])
    plus_bits, minus_bits = planes_of(weight)
    whole = not (weight == 0).any()
    terms = plus_bits.shape[1]
    width, planes = word_bits(terms), e.dtype(node.inputs[0]).bits
    count = ceil(terms / width)
    out = idx[row_axis(node)]
    tables = [e.table(f"{node.inputs[1]}.plus", words(plus_bits, width).reshape(-1)).name]
    if not whole:
        tables.append(e.table(f"{node.inputs[1]}.minus", words(minus_bits, width).reshape(-1)).name)
    text = f"{'1 bit' if whole else '2 bits'} a weight in words of {width}, counted"
    if text not in e.forms:
        e.forms.append(text)
    zero = int(getattr(node.op, "x_zero", 0))
    start = "0"
    if zero:
        sums = (weight.reshape(weight.shape[0], -1).astype(np.int64).sum(1) * -zero).astype(np.int32)
        start = f"(int32_t){e.table(f'{node.inputs[1]}.start', sums).name}[{out}]"
    acc = e.w.variable("int32_t", start if not whole else f"{start} - {total}", "acc")
    with e.w.loop(count, "k") as k:
        for p in range(planes):
            x = f"{name}[{plus(p * count, k)}]"
            for t, sign in zip(tables, "+-", strict=False):
                counted = f"bw_popcount((uint32_t)({x} & {t}[{plus(times(out, count), k)}]))"
                factor = (1 << p) * (2 if whole else 1)
                e.w.put(f"{acc} {sign}= {counted}{f' * {factor}' if factor > 1 else ''};")
    return acc
