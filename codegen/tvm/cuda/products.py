"""Contractions of a body as products for tensor cores: which operand lies where, weights as rows of words.

Shared by the kernels of ``mma.sync`` and ``wgmma``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np

from bitwright.codegen.tvm.cuda.mma_spec import Element, Product
from bitwright.codegen.tvm.cuda.operands import Matrix, Window
from bitwright.codegen.tvm.generic import refusal
from bitwright.codegen.tvm.template import Refused
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.target import in_bytes
from bitwright.ir.types import BF16, F16, F32, S8, U8, DType
from bitwright.ir.weights import Array

_ELEMENTS: Mapping[tuple[DType, DType], Element] = {
    (F16, F16): "f16", (BF16, BF16): "bf16",
    (S8, S8): "s8", (S8, U8): "s8u8", (U8, S8): "u8s8", (U8, U8): "u8",
}  # fmt: skip
"""By the formats of w and x."""


def root_of(body: Graph) -> Node | None:
    """The body's only contraction, if the rest is pointwise."""
    computing = [n for n in body.nodes if not isinstance(n.op, (ops.Constant, *ops.POINTWISE))]
    return computing[0] if len(computing) == 1 and isinstance(computing[0].op, ops.CONTRACTION) else None


def product_of(body: Graph, constants: Mapping[str, Array], f32: bool = False) -> tuple[Node, Product] | Refused:
    """The body's contraction and its product (dense), or why it is none that tensor cores do.

    ``f32``: of f32, which they do not, instead.
    """
    root = root_of(body)
    if root is None:
        return Refused("not a contraction with a pointwise epilogue")
    if isinstance(root.op, ops.SMALL_FLOAT):
        return Refused("its sums are small floats, rounded one by one in a fixed order")
    if why := refusal(body):
        return Refused(why)
    names = {v.name for v in body.inputs}
    if any(x not in names for x in root.inputs):
        return Refused("an operand of the contraction is a literal, or computed in the same kernel")
    if any(body.types[o].shape != root.type.shape for o in body.outputs):
        return Refused("what follows the contraction changes the shape")
    x, w = (body.types[v].dtype for v in root.inputs[:2])
    element = _ELEMENTS.get((in_bytes(w), in_bytes(x))) if not f32 else "f32" if x == w == F32 else None
    if element is None:
        return Refused(f"no product of {x} by {w}")
    acc = getattr(root.op, "acc", None)
    if acc is not None and acc.bits > 32:
        return Refused(f"sums of {acc}: tensor cores have 32 bits")
    made = _shaped(body, root, constants, element)
    if isinstance(made, Refused):
        return made
    if 0 in (made.outs, made.rows, made.source.length):
        return Refused("an operand without elements")
    if made.batch > 65535:
        return Refused(f"{made.batch} batches; a grid has 65535 at most")
    return root, made


def _shaped(body: Graph, root: Node, constants: Mapping[str, Array], element: Element) -> Product | Refused:
    x, w = (body.types[v].static_shape for v in root.inputs[:2])
    constant = root.inputs[1] in constants
    if isinstance(root.op, ops.Linear | ops.IntLinear):
        source = Matrix(math.prod(x[:-1]), x[-1], x[-1])
        made = Product(element, w[0], source)
        if constant:
            return made
        if zero_of(root):
            return Refused("a zero point beside weights that are computed at run time")
        return replace(made, left="rows", right=Matrix(w[0], w[1], w[1]))
    if isinstance(root.op, ops.MatMul | ops.IntMatMul):
        return _matmul(root.op, x, w, constant, element)
    if isinstance(root.op, ops.Conv | ops.IntConv):
        return _conv(root.op, x, w, constant, element)
    return Refused(f"{root.op.spelling} has no tensor-core kernel")


def _conv(
    op: ops.Conv | ops.IntConv, x: tuple[int, ...], w: tuple[int, ...], constant: bool, element: Element
) -> Product | Refused:
    n = len(w) - 2
    if not op.channels_last:
        return Refused("only convolutions laid out channels last are tiled")
    if not constant:
        return Refused("the weights of a convolution are computed at run time")
    each = w[0] // op.groups
    if op.groups > 1 and (each < 8 or w[1] < 8):
        return Refused(f"groups of {w[1]} by {each} channels would leave most of a tile empty")
    stride, dilation = op.stride or (1,) * n, op.dilation or (1,) * n
    pads = op.padding or (0,) * (2 * n)
    out = tuple(
        (x[1 + a] + pads[a] + pads[n + a] - dilation[a] * (w[2 + a] - 1) - 1) // stride[a] + 1 for a in range(n)
    )
    window = Window(x[0], x[-1], x[1:-1], out, w[2:], stride, dilation, pads[:n], op.groups)
    return Product(element, each, window.plain(), op.groups, fill=getattr(op, "x_zero", 0) & 255)


def _matmul(
    op: ops.MatMul | ops.IntMatMul, a: tuple[int, ...], b: tuple[int, ...], constant: bool, element: Element
) -> Product | Refused:
    if len(a) < 2 or len(b) < 2:
        return Refused("a vector operand")
    zeros = (op.a_zero, op.b_zero) if isinstance(op, ops.IntMatMul) else (0, 0)
    if zeros[1] or (zeros[0] and not constant):
        return Refused("a zero point beside an operand that is computed at run time")
    (m, k), outs = a[-2:], b[-2] if op.transpose_b else b[-1]
    batches, mine = math.prod(b[:-2]), (1,) * (len(a) - len(b)) + b[:-2]
    if batches > 1 and mine != a[:-2]:
        return Refused("batch axes that broadcast")
    if batches == 1 and len(b) > len(a) and math.prod(b[: len(b) - len(a)]) != 1:
        return Refused("batch axes that broadcast")
    rows = m if batches > 1 else math.prod(a[:-1])
    source = Matrix(rows, k, k, m * k if batches > 1 else 0)
    made = Product(element, outs, source, batches)
    if constant:
        return made
    step = k * outs if batches > 1 else 0
    if op.transpose_b:
        return replace(made, left="rows", right=Matrix(outs, k, k, step))
    if made.size == 1:
        return Refused("bytes cannot be transposed on their way to tensor cores")
    return replace(made, left="columns", right=Matrix(k, outs, outs, step))


def zero_of(root: Node) -> int:
    """The zero point of x."""
    return int(getattr(root.op, "x_zero", getattr(root.op, "a_zero", 0)))


def rows_of(root: Node, weight: Array, p: Product) -> Array:
    """Constant weights as [batch, outs, k] in the order of x's rows, in words whose zero is 0 (no -0)."""
    w = weight
    if isinstance(root.op, ops.Conv | ops.IntConv):
        w = np.moveaxis(w, 1, -1)
    elif isinstance(root.op, ops.MatMul | ops.IntMatMul) and not root.op.transpose_b:
        w = np.swapaxes(w, -1, -2)
    w = np.ascontiguousarray(w).reshape(p.batch, p.outs, -1)
    if p.size != 2:
        return w
    words = np.where(w == 0, np.zeros_like(w), w)
    return cast(Array, words.view(np.uint16))
