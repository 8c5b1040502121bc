"""Reads the torch dialect's quantized values: codes and their scales become PT2E's quantize and dequantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import DType, integer, parse_dtype

if TYPE_CHECKING:
    from bitwright.frontends.mlir.program import Program

KINDS: dict[str, DType] = {
    "qint8": integer(8),
    "quint8": integer(8, False),
    "qint16": integer(16),
    "qint32": integer(32),
}
"""Codes of torch's quantized types."""
NUMBERS = {12: "qint8", 13: "quint8", 14: "qint32", 27: "qint16"}
"""The quantized types by torch's numbers, as quantize operators name them."""

_HELD = {(8, True): torch.int8, (8, False): torch.uint8, (16, True): torch.int16, (32, True): torch.int32}


@dataclass(frozen=True)
class Codes:
    """A value of a quantized type: codes (a node), scale and zero (numbers or nodes), the axis they go along."""

    codes: Any
    scale: Any
    zero: Any
    axis: int | None
    dtype: DType

    @property
    def range(self) -> tuple[int, int, torch.dtype]:
        """Smallest and largest code, and the torch dtype that holds them."""
        width = 8 if self.dtype.bits <= 8 else self.dtype.bits
        return self.dtype.lo, self.dtype.hi, _HELD[width, self.dtype.kind != "uint"]


def quantized(program: Program, name: str, op: Any, args: list[Any]) -> bool:
    """Read one operator of quantized values; False for any other."""
    step = _STEPS.get(name)
    if step is None:
        return False
    step(program, op, args)
    return True


def _kind(program: Program, op: Any, codes: Any = None) -> DType:
    """The format of the codes: an attribute's, else that of the type."""
    if "bitwright.dtype" in op.attributes:
        return parse_dtype(str(op.attributes["bitwright.dtype"].value))
    text = str(op.results[0].type)
    found = next((k for k in KINDS if text.endswith(f"!torch.{k}>")), None)
    if found is None:
        raise InvalidInput(f"{program.operators.place}: {op.name} gives {text}, which is no quantized type")
    return program.format_of(codes) or KINDS[found]


def _quantize_tensor(program: Program, op: Any, args: list[Any]) -> None:
    x, scale, zero, _ = args
    value = Codes(None, scale, zero, None, _kind(program, op))
    low, high, held = value.range
    run = torch.ops.quantized_decomposed.quantize_per_tensor.default
    codes = program.operators.call(run, x, scale, zero, low, high, held)
    codes.meta["codes"] = (low, high)
    program.bind(op, Codes(codes, scale, zero, None, value.dtype))


def _quantize_channel(program: Program, op: Any, args: list[Any]) -> None:
    x, scale, zero, axis, _ = args
    value = Codes(None, scale, zero, axis, _kind(program, op))
    low, high, held = value.range
    run = torch.ops.quantized_decomposed.quantize_per_channel.default
    codes = program.operators.call(run, x, scale, zero, axis, low, high, held)
    codes.meta["codes"] = (low, high)
    program.bind(op, Codes(codes, scale, zero, axis, value.dtype))


def _made(program: Program, op: Any, args: list[Any]) -> None:
    codes, scale, zero, *axis = args
    program.bind(op, Codes(codes, scale, zero, axis[0] if axis else None, _kind(program, op, codes)))


def _codes(program: Program, op: Any, args: list[Any]) -> None:
    program.bind(op, _quantized_operand(program, op, args[0]).codes)


def _dequantize(program: Program, op: Any, args: list[Any]) -> None:
    value = _quantized_operand(program, op, args[0])
    low, high, held = value.range
    ops = torch.ops.quantized_decomposed
    if value.axis is None:
        run: Any = ops.dequantize_per_tensor.default
        node = program.operators.call(run, value.codes, value.scale, value.zero, low, high, held)
    else:
        run = ops.dequantize_per_channel.default
        node = program.operators.call(run, value.codes, value.scale, value.zero, value.axis, low, high, held)
    program.bind(op, node)


def _quantized_operand(program: Program, op: Any, value: Any) -> Codes:
    if not isinstance(value, Codes):
        raise InvalidInput(f"{program.operators.place}: {op.name} takes a quantized value")
    return value


_STEPS = {
    "torch.aten.quantize_per_tensor": _quantize_tensor, "torch.aten.quantize_per_channel": _quantize_channel,
    "torch.aten._make_per_tensor_quantized_tensor": _made, "torch.aten._make_per_channel_quantized_tensor": _made,
    "torch.aten.int_repr": _codes, "torch.aten.dequantize.self": _dequantize,
    "torch.aten.dequantize.tensor": _dequantize,
}  # fmt: skip
