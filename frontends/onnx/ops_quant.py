"""Quantization: QDQ as Quantize and Dequantize, QOperators through them, integer contractions on s32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitwright.frontends.onnx.call import Call
from bitwright.frontends.onnx.ops_contract import conv, matmul, windows
from bitwright.frontends.onnx.reader import dtype_of_element
from bitwright.frontends.onnx.values import Packed, Val
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import S32, U8, DType, TensorType, integer
from bitwright.ir.weights import Array


def _per_tensor(c: Call, v: Val) -> Val:
    return c.reshape(v, ()) if v.rank == 1 and v.shape == (1,) else v


def _layout(c: Call, x: Val, scale: Val, axis: int, block: int) -> tuple[int | None, int]:
    """axis and group of a scale; block is the size of a block along the axis, 0 for none."""
    if scale.rank == 0:
        return None, 0
    axis = c.axis(axis, x.rank)
    if block:
        if scale.rank != x.rank or any(
            s != d for i, (s, d) in enumerate(zip(scale.shape, x.shape, strict=True)) if i != axis
        ):
            raise InvalidInput(f"a blocked scale {scale.type} for {x.type}")
        if scale.shape[axis] != -(-c.size(x, axis) // block):
            raise InvalidInput(f"a scale {scale.type} for blocks of {block} along axis {axis} of {x.type}")
        return axis, block
    if scale.rank != 1 or scale.shape[0] != (x.shape[axis] if isinstance(scale.shape[0], str) else c.size(x, axis)):
        raise InvalidInput(f"a scale {scale.type} for axis {axis} of {x.type}")
    return axis, 0


def _zero(c: Call, zero: Val | None, scale: Val) -> Val | None:
    """The zero point, dropped when it is known to be 0."""
    if zero is None:
        return None
    if zero.handle is not None and zero.type.size < 1 << 20 and not np.any(zero.handle.array):
        return None
    if zero.type.size != scale.type.size:
        raise InvalidInput(f"a zero point {zero.type} for a scale {scale.type}")
    return c.reshape(zero, scale.dims)


def quantize(c: Call, x: Val, scale: Val, zero: Val | None, dtype: DType, axis: int = 1, block: int = 0) -> Val:
    """Quantize with ONNX's operands."""
    scale = _per_tensor(c, scale)
    where, group = _layout(c, x, scale, axis, block)
    zero = _zero(c, zero, scale)
    return c.emit(ops.Quantize(dtype, where, group), x, scale, *([] if zero is None else [zero]))


def dequantize(c: Call, q: Val, scale: Val, zero: Val | None, axis: int | None, group: int) -> Val:
    """Dequantize; the result remembers its operands, so that a transpose can go below it."""
    y = c.emit(ops.Dequantize(axis, group), q, scale, *([] if zero is None else [zero]), fold=False)
    return Val(y.type, ir=y.ir, label=q.label, packed=Packed(q, scale, zero, axis, group), sources=y.sources)


def dequantized(c: Call, q: Val, scale: Val, zero: Val | None, axis: int = 1, block: int = 0) -> Val:
    """Dequantize with ONNX's operands."""
    scale = _per_tensor(c, scale)
    where, group = _layout(c, q, scale, axis, block)
    return dequantize(c, q, scale, _zero(c, zero, scale), where, group)


def _quantize_linear(c: Call) -> Val:
    x, scale, zero = c.x(0), c.x(1), c.opt(2)
    dtype = U8 if zero is None else zero.type.dtype
    if c.int_("output_dtype"):
        dtype = dtype_of_element(c.int_("output_dtype"), c.importer.origin, "QuantizeLinear")
    if not dtype.is_integer:
        raise c.refuse(f"quantization to {dtype} is not supported")
    if not x.type.dtype.is_float:
        x = c.cast(x, scale.type.dtype)
    return quantize(c, x, scale, zero, dtype, c.int_("axis", 1), c.int_("block_size"))


def _dequantize_linear(c: Call) -> Val:
    y = dequantized(c, c.x(0), c.x(1), c.opt(2), c.int_("axis", 1), c.int_("block_size"))
    if c.int_("output_dtype"):
        return c.cast(y, dtype_of_element(c.int_("output_dtype"), c.importer.origin))
    return y


# --- integer contractions ---------------------------------------------------------------------------------------


def _shifted(c: Call, x: Val, zero: Val | None, axis: int) -> Val:
    """x - zero in s32; a vector of zeros runs along ``axis``. Constants keep their narrow format."""
    wide = c.cast(x, S32, fold=False)
    if zero is None or (zero.handle is not None and not np.any(zero.handle.array)):
        return wide
    z = c.cast(_per_tensor(c, zero), S32)
    if z.rank == 1:
        z = c.reshape(z, [z.dims[0] if i == axis % x.rank else 1 for i in range(x.rank)])
    return c.sub(wide, z)


def _matmul_integer(c: Call) -> Val:
    a, b = c.x(0), c.x(1)
    return matmul(c, _shifted(c, a, c.opt(2), -2), _shifted(c, b, c.opt(3), -1))


def _conv_integer(c: Call) -> Val:
    return conv(c, _shifted(c, c.x(0), c.opt(2), 1), _shifted(c, c.x(1), c.opt(3), 0), None)


# --- operators on quantized tensors -----------------------------------------------------------------------------


def _qlinear_matmul(c: Call) -> Val:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (c.x(i) for i in range(8))
    left = dequantized(c, a, a_scale, a_zero, -2)
    right = dequantized(c, b, b_scale, b_zero, -1)
    return quantize(c, matmul(c, left, right), y_scale, y_zero, y_zero.type.dtype)


def _bias(c: Call, bias: Val | None, x_scale: Val, w_scale: Val) -> Val | None:
    """An s32 bias whose scale is the product of the operands' scales."""
    if bias is None:
        return None
    scale = c.mul(_per_tensor(c, x_scale), _per_tensor(c, w_scale))
    return dequantize(c, bias, scale, None, None if scale.rank == 0 else 0, 0)


def _qlinear_conv(c: Call) -> Val:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (c.x(i) for i in range(8))
    weight = dequantized(c, w, w_scale, w_zero, 0)
    y = conv(c, dequantized(c, x, x_scale, x_zero), weight, _bias(c, c.opt(8), x_scale, w_scale))
    return quantize(c, y, y_scale, y_zero, y_zero.type.dtype)


def _qgemm(c: Call) -> Val:
    a, a_scale, a_zero, b, b_scale, b_zero = (c.x(i) for i in range(6))
    bias, y_scale, y_zero = c.opt(6), c.opt(7), c.opt(8)
    left = dequantized(c, a, a_scale, a_zero)
    right = dequantized(c, b, b_scale, b_zero, 0 if c.int_("transB") else 1)
    from bitwright.frontends.onnx.ops_shape import transposed

    left = transposed(c, left, (1, 0)) if c.int_("transA") else left
    right = right if c.int_("transB") else transposed(c, right, (1, 0))
    alpha = c.float_("alpha", 1.0)
    scale = a_scale if alpha == 1.0 else c.mul(a_scale, alpha)
    offset = _bias(c, bias, scale, b_scale)
    y = c.emit(ops.Linear(), left, right)
    y = y if alpha == 1.0 else c.mul(y, alpha)
    y = y if offset is None else c.add(y, offset)
    return y if y_scale is None else quantize(c, y, y_scale, y_zero, a.type.dtype)


def _qlinear_binary(fn: str) -> Callable[[Call], Val]:
    def handler(c: Call) -> Val:
        a = dequantized(c, c.x(0), c.x(1), c.opt(2))
        b = dequantized(c, c.x(3), c.x(4), c.opt(5))
        return quantize(c, c.binary(fn, a, b), c.x(6), c.opt(7), c.x(0).type.dtype)

    return handler


def _qlinear_unary(fn: Callable[[Call, Val], Val]) -> Callable[[Call], Val]:
    def handler(c: Call) -> Val:
        y = fn(c, dequantized(c, c.x(0), c.x(1), c.opt(2)))
        return quantize(c, y, c.x(3), c.opt(4), c.x(0).type.dtype)

    return handler


def _leaky(c: Call, x: Val) -> Val:
    return c.emit(ops.LeakyRelu(c.float_("alpha", 0.01)), x)


def _global_average(c: Call, x: Val) -> Val:
    if c.int_("channels_last"):
        raise c.refuse("channels_last is not supported")
    return c.reduce("mean", x, tuple(range(2, x.rank)), keep=True)


def _average(c: Call, x: Val) -> Val:
    kernel = c.ints("kernel_shape") or ()
    if c.int_("channels_last") or c.int_("ceil_mode"):
        raise c.refuse("channels_last and ceil_mode are not supported")
    stride, _, pads = windows(c, x, kernel)
    return c.emit(ops.AvgPool(kernel, stride, pads, (), bool(c.int_("count_include_pad"))), x)


def _softmax(c: Call, x: Val) -> Val:
    return c.emit(ops.Softmax(c.axis(c.int_("axis", -1), x.rank)), x)


def _qlinear_concat(c: Call) -> Val:
    y_scale, y_zero = c.x(0), c.x(1)
    parts = [dequantized(c, c.x(i), c.x(i + 1), c.opt(i + 2)) for i in range(2, len(c.ins), 3)]
    joined = c.concat(parts, c.axis(c.int_("axis"), parts[0].rank))
    return quantize(c, joined, y_scale, y_zero, y_zero.type.dtype)


def _matmul_nbits(c: Call) -> Val:
    """Packed 2-, 4- or 8-bit weights [O, blocks, bytes] in blocks along K: a Dequantize and a Linear."""
    a, scale = c.x(0), c.x(2)
    k, out, bits, block = c.int_("K"), c.int_("N"), c.int_("bits", 4), c.int_("block_size", 32)
    c.int_("accuracy_level")  # how coarse activations may be: a permission, which dynamic-quantize makes use of
    if bits not in (2, 4, 8) or not 1 <= k <= 1 << 24 or not 1 <= out <= 1 << 24 or block < 16:
        raise c.refuse(f"weights of {bits} bits, K={k}, N={out}, block_size={block}")
    if c.value(4) is not None:
        raise c.refuse("reordered groups (g_idx) are not supported")
    blocks = -(-k // block)
    per = 8 // bits
    packed = c.const(1, "weight").reshape(out, blocks * block // per)
    q = _unpacked(packed, bits)[:, :k]
    scale = c.reshape(scale, (out, blocks))
    zero, middle = c.opt(3), np.full((out, blocks), 1 << (bits - 1), np.uint8)
    if zero is not None and zero.type.dtype.is_float:
        raise c.refuse("float zero points are not supported")
    if zero is not None:
        middle = _unpacked(c.known(zero, "zero points").reshape(out, -1), bits)[:, :blocks]
    narrow = integer(bits, signed=False)
    weight = c.importer.constant(q, TensorType(narrow, q.shape), label=c.x(1).label)
    zeros = c.importer.constant(middle, TensorType(narrow, middle.shape))
    group = 0 if blocks == 1 else block
    if blocks == 1:
        scale, zeros = c.reshape(scale, (out,)), c.reshape(zeros, (out,))
    w = dequantize(c, weight, scale, zeros, 1 if group else 0, group)
    bias = c.opt(5)
    return c.emit(ops.Linear(), a, c.cast(w, a.type.dtype), *([] if bias is None else [bias]))


def _unpacked(packed: Array, bits: int) -> Array:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return values.reshape(packed.shape[0], -1)


_MS = "com.microsoft"
TABLE = {
    ("", "QuantizeLinear"): _quantize_linear, ("", "DequantizeLinear"): _dequantize_linear,
    (_MS, "QuantizeLinear"): _quantize_linear, (_MS, "DequantizeLinear"): _dequantize_linear,
    ("", "MatMulInteger"): _matmul_integer, ("", "ConvInteger"): _conv_integer,
    ("", "QLinearMatMul"): _qlinear_matmul, ("", "QLinearConv"): _qlinear_conv, (_MS, "QGemm"): _qgemm,
    (_MS, "QLinearAdd"): _qlinear_binary("add"), (_MS, "QLinearMul"): _qlinear_binary("mul"),
    (_MS, "QLinearSigmoid"): _qlinear_unary(lambda c, x: c.unary("sigmoid", x)),
    (_MS, "QLinearLeakyRelu"): _qlinear_unary(_leaky), (_MS, "QLinearSoftmax"): _qlinear_unary(_softmax),
    (_MS, "QLinearGlobalAveragePool"): _qlinear_unary(_global_average),
    (_MS, "QLinearAveragePool"): _qlinear_unary(_average), (_MS, "QLinearConcat"): _qlinear_concat,
    (_MS, "MatMulNBits"): _matmul_nbits,
}  # fmt: skip
