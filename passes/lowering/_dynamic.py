"""Linear layers whose activations get their codes at run time, as integer ones: with group scales or plain sums."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.semantics_dynamic import OFFSET
from bitwright.ir.types import BF16, F32, NM, S8, U8, DType, TensorType
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of
from bitwright.passes._pass import Context
from bitwright.passes.lowering._terms import Reader

GROUP_OF = 16
"""Kernels take groups of multiples of so many inputs."""
NAME = "lower-to-integer"


class _Weight(NamedTuple):
    """Codes (an old name), scales [O, groups], zero points like them or None, inputs of a group (0: all)."""

    codes: str
    scale: Array
    zero: Array | None
    group: int


def dynamic_linear(reader: Reader, node: Node, context: Context) -> bool:
    """Put an integer layer in the place of a Linear of run-time codes; False leaves the node to be kept.

    Weights with one scale an output that have 8 bits or a pattern become an exact int_linear of u8 codes, whose kernels
    know patterns, and two scales behind it; all others a group_linear.
    """
    source = _source(reader, node)
    if source is None:
        return False
    found = _weight(reader, node)
    if isinstance(found, str):
        context.refuse(NAME, layer_of(reader.graph, node), f"stays float: {found}", "use groups of 32, 64 or 128")
        return False
    reader.rw.free(node)
    t = reader.graph.types[found.codes]
    plain = not found.group and found.zero is None and t.dtype.lo < 0
    depth = int(t.shape[1])
    if plain and (t.dtype.bits > 4 or isinstance(t.encoding, NM)) and depth * 255 * 128 < 1 << 31:
        value = _by_sums(reader, node, source, found)
    else:
        value = _by_groups(reader, node, source, found)
    if len(node.inputs) > 2:
        value = reader.rw.emit(
            ops.Binary("add"), value, reader.rw.of(node.inputs[2])[0], name=node.output, origin=node.origin
        )
    reader.rw.replace(node, value)
    return True


def _source(reader: Reader, node: Node) -> str | None:
    """The old activation behind ``cast(codes) * scale`` of one dynamic_quantize; None when the operand is none."""
    producers = reader.graph.producers
    real = producers.get(node.inputs[0])
    if not isinstance(node.op, ops.Linear) or real is None or not isinstance(real.op, ops.Binary):
        return None
    wide, made = (producers.get(x) for x in real.inputs)
    if real.op.fn != "mul" or made is None or not isinstance(made.op, ops.DynamicQuantize) or wide is None:
        return None
    same = isinstance(wide.op, ops.Cast) and wide.inputs[0] == made.outputs[0] and real.inputs[1] == made.outputs[1]
    return made.inputs[0] if same and made.op.dtype == S8 else None


def _weight(reader: Reader, node: Node) -> _Weight | str:
    graph = reader.graph
    source = graph.producers.get(node.inputs[1])
    if source is None or not isinstance(source.op, ops.Dequantize) or not graph.is_constant(source.inputs[0]):
        return "the weight is not a dequantized constant"
    t, op = graph.types[source.inputs[0]], source.op
    scale, *zeros = (graph.constant(x) for x in source.inputs[1:])
    if scale is None or any(z is None for z in zeros) or not t.dtype.is_integer or t.dtype.bits > 8:
        return f"weight of {t.dtype} with computed scales"
    outputs, depth = t.static_shape
    by_group = op.group and op.group < depth
    if by_group and (op.axis not in (1, -1) or op.group % GROUP_OF):
        return f"groups of {op.group} along axis {op.axis}: kernels take multiples of {GROUP_OF} inputs"
    if not by_group and graph.types[source.inputs[1]].size > 1 and not op.group and op.axis not in (0, -2):
        return f"weight scales along axis {op.axis}, not along the outputs"
    count = -(-depth // op.group) if by_group else 1

    def spread(a: Array) -> Array:
        return np.broadcast_to(a.reshape(-1, 1) if a.size != outputs * count else a.reshape(outputs, count),
                               (outputs, count))  # fmt: skip

    zero = spread(np.asarray(zeros[0])) if zeros else None
    return _Weight(source.inputs[0], spread(np.asarray(scale, np.float32)), zero, op.group if by_group else 0)


def _codes(reader: Reader, old: str, dtype: DType, origin: str) -> tuple[str, str]:
    """Codes and scales of an activation, made once."""
    key = (old, dtype)
    if key not in reader.dynamic:
        names = (f"{old}.{dtype}", f"{old}.{dtype}.scale")
        x = reader.rw.of(old)[0]
        reader.dynamic[key] = reader.rw.emit_all(ops.DynamicQuantize(dtype), x, names=names, origin=origin)[:2]
    codes, scale = reader.dynamic[key]
    return codes, scale


def _by_groups(reader: Reader, node: Node, source: str, w: _Weight) -> str:
    rw, name = reader.rw, node.output
    codes, x_scale = _codes(reader, source, S8, node.origin)
    weight, zero = _signed(reader, w, name)
    narrow = w.scale.astype(ml_dtypes.bfloat16)
    short = bool(np.array_equal(narrow.astype(np.float32), w.scale))  # 16 bits where that loses nothing
    kind = TensorType(BF16 if short else F32, w.scale.shape)
    scale = rw.weight(f"{name}.scales", narrow if short else np.ascontiguousarray(w.scale), kind, origin=node.origin)
    operands = [codes, x_scale, weight, scale]
    if zero is not None:
        t = TensorType(rw.types[weight].dtype, zero.shape)
        operands.append(rw.weight(f"{name}.zeros", zero.astype(t.dtype.numpy), t, origin=node.origin))
    return rw.emit(ops.GroupLinear(w.group), *operands, name=_result(node), origin=node.origin)


def _signed(reader: Reader, w: _Weight, name: str) -> tuple[str, Array | None]:
    """New codes and zero points; unsigned codes around their middle become signed ones without zero points."""
    rw, t = reader.rw, reader.graph.types[w.codes]
    middle = 1 << (t.dtype.bits - 1)
    if w.zero is None or not w.zero.any():
        return rw.of(w.codes)[0], None
    if t.dtype.lo or (w.zero != middle).any():
        return rw.of(w.codes)[0], w.zero
    source = reader.graph.producers[w.codes]
    key = source.op.ref if isinstance(source.op, ops.Weight) else name
    array = (np.asarray(reader.graph.constant(w.codes)).astype(np.int16) - middle).astype(np.int8)
    kind = TensorType(DType("int", t.dtype.bits), t.shape)
    return rw.weight(key, array, kind, name=key, origin=source.origin), None


def _by_sums(reader: Reader, node: Node, source: str, w: _Weight) -> str:
    rw, name = reader.rw, node.output
    codes, x_scale = _codes(reader, source, U8, node.origin)
    acc = rw.emit(ops.IntLinear(OFFSET), codes, rw.of(w.codes)[0], name=f"{name}.acc", origin=node.origin)
    scale = rw.constant(w.scale.reshape(-1).copy(), name=f"{name}.scales", origin=node.origin)
    real = rw.emit(ops.Dequantize(node.type.rank - 1), acc, scale, name=f"{name}.real", origin=node.origin)
    return rw.emit(ops.Binary("mul"), real, x_scale, name=_result(node), origin=node.origin)


def _result(node: Node) -> str:
    return node.output if len(node.inputs) < 3 else f"{node.output}.product"


__all__ = ["dynamic_linear"]
