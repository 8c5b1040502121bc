"""Which engine makes the products of a contraction."""

from __future__ import annotations

from bitwright.codegen.instructions import arm, x86
from bitwright.codegen.instructions.core import Instruction
from bitwright.codegen.tvm.contract.engine import (
    DotBytes,
    Engine,
    Floats,
    Generic,
    GenericFma,
    Halves,
    PairBytes,
    ShiftedBytes,
    TwoFloats,
    WideBytes,
)
from bitwright.codegen.tvm.contract.flipped import FlippedBytes
from bitwright.codegen.tvm.contract.plan import Selector
from bitwright.codegen.tvm.contract.spec import LANES, NEON, ContractSpec, Knobs
from bitwright.ir.types import F32, S32, U8, U16

_BYTES_512 = Selector((8, 64), True, (2, 4, 8), 8)
_BYTES_256 = Selector((8, 16), False, (8,), 8, in_window=True)
_BYTES_256_COMPACT = Selector((8, 16), False, (2, 4), 8)
_ANY = Selector((64,), False, (8,), 8, in_window=True)


def _floats(lanes: int, permute: Instruction) -> Floats:
    return Floats(lanes, 1, Selector((lanes,), False, (4,), 32, in_window=True), F32, S32, 1, permute)


_FLOATS_512 = _floats(16, x86.VPERMPS_512)
_TWO_FLOATS_512 = TwoFloats(16, 1, Selector((32,), False, (8,), 32, in_window=True), F32, S32, 1, x86.VPERMPS_512)
_TWO_FLOATS_256 = TwoFloats(8, 1, Selector((16,), False, (4,), 32, in_window=True), F32, S32, 1, x86.VPERMPS_256)
_FLOATS_256 = _floats(8, x86.VPERMPS_256)
_HALVES_512 = Halves(16, 2, Selector((32,), True, (5,), 16, in_window=True), F32, U16, 2)


def engine_of(spec: ContractSpec, knobs: Knobs) -> Engine:
    """The engine of a contraction under these knobs."""
    lanes = LANES[knobs.isa]
    if knobs.isa == "portable":
        return Generic(lanes, 1, _ANY, spec.acc_dtype, U8, 1, bits=knobs.register_bits if spec.element == "u8s8" else 8)
    if knobs.isa == "vector" or (spec.element == "f32" and knobs.isa in NEON):
        kind = Generic if spec.element == "u8s8" else GenericFma
        return kind(lanes, 1, _ANY, spec.acc_dtype, U8, 1, bits=knobs.register_bits if spec.element == "u8s8" else 8)
    if spec.element == "bf16":
        return _HALVES_512
    if spec.element == "f32":
        if spec.sparsity and lanes < spec.sparsity[1] <= 2 * lanes:
            return _TWO_FLOATS_512 if lanes == 16 else _TWO_FLOATS_256
        if spec.sparsity and spec.sparsity[1] > lanes:
            return GenericFma(lanes, 1, _ANY, F32, U8, 1)
        return _FLOATS_512 if lanes == 16 else _FLOATS_256
    return _bytes(spec, knobs)


def _bytes(spec: ContractSpec, knobs: Knobs) -> Engine:
    if knobs.isa == "avx512-vnni":
        return DotBytes(16, 4, _BYTES_512, S32, U8, 4, x86.VPERMB_512, x86.VPDPBUSD_512, bits=knobs.register_bits)
    selector = _BYTES_256_COMPACT if knobs.compact else _BYTES_256
    if knobs.isa == "avx-vnni":
        return DotBytes(8, 4, selector, S32, U8, 4, x86.VPSHUFB_256, x86.VPDPBUSD_256, bits=knobs.register_bits)
    if knobs.isa == "neon-i8mm":
        return DotBytes(4, 4, selector, S32, U8, 4, arm.TBL, arm.USDOT, bits=knobs.register_bits)
    if knobs.isa == "neon-dot":
        return ShiftedBytes(4, 4, selector, S32, U8, 4, arm.TBL, bits=knobs.register_bits)
    kind = PairBytes if knobs.safe_pairs else FlippedBytes if spec.init and spec.sparsity else WideBytes
    return kind(8, 4, selector, S32, U8, 4, x86.VPSHUFB_256, bits=knobs.register_bits)
