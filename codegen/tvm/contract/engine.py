"""How each instruction set forms products: one engine per element type and instruction-set level.

An engine says how many lanes an accumulator has, how many products one lane of one step adds (``quad``), how
activations are broadcast or selected, and how a multiply-accumulate is spelled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bitwright.codegen.instructions import arm, x86
from bitwright.codegen.instructions.core import Instruction
from bitwright.codegen.tvm.contract import lowbit
from bitwright.codegen.tvm.contract.plan import Plan, Selector, Step
from bitwright.codegen.tvm.spelling import call
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, concat, const, constants, fma, shuffle
from bitwright.ir.types import S8, S16, S32, S64, U8, U16, U32, DType

Operand = tuple[Vec, ...]
"""A prepared operand of a multiply-accumulate (one or more vectors)."""


@dataclass(frozen=True)
class Engine:
    """Common form; subclasses spell the instructions."""

    lanes: int
    quad: int
    selector: Selector
    acc: DType
    index_dtype: DType
    index_quad: int
    bits: int = field(default=8, kw_only=True)
    """What a stored weight takes."""

    @property
    def biased(self) -> bool:
        """Whether stored weights below 8 bits count from the smallest."""
        return False

    def broadcast(self, b: Builder, x: Pointer, at: Index) -> Operand:
        """``quad`` consecutive activations in every lane."""
        raise NotImplementedError

    def window(self, b: Builder, x: Pointer, at: Index, reach: int) -> Vec:
        """The ``reach`` activations that a selection can use."""
        raise NotImplementedError

    def indices(self, b: Builder, stream: Pointer, at: Index, step: Step, plan: Plan) -> Vec:
        """The indices of one step and one vector of outputs, ready for :meth:`select`."""
        raise NotImplementedError

    def select(self, b: Builder, window: Vec, index: Vec) -> Operand:
        """Activations per lane out of a window."""
        raise NotImplementedError

    def weights(self, b: Builder, w: Pointer, at: Index, part: int = 0) -> Operand:
        """The weights of one step and one vector of outputs: the ``part``-th step that shares the stored vector."""
        return (b.let(b.load(w, at, self.lanes * self.quad)),)

    def total(self, acc: Vec) -> Vec:
        """The finished sum of an accumulator."""
        return acc

    @property
    def shifted(self) -> bool:
        """Whether products lack what all rows of a tile lack alike: twice the sum of :meth:`lacking`."""
        return False

    def lacking(self, sums: Vec, w: Operand) -> Vec:
        """sums + half of what products with these weights lack."""
        raise NotImplementedError

    @property
    def together(self) -> int:
        """How many vectors of channels a depthwise kernel interleaves at once: 2 with :meth:`interleave_pair`."""
        return 1

    def interleave(self, b: Builder, rows: list[Vec]) -> Operand:
        """``quad`` vectors of activations, one per product of a lane."""
        raise NotImplementedError

    def interleave_pair(self, b: Builder, rows: list[Vec]) -> list[Operand]:
        """``quad`` vectors of activations of twice the lanes: the operands of both halves."""
        raise NotImplementedError

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        """acc + the sum over quad of a * w."""
        raise NotImplementedError


@dataclass(frozen=True)
class Bytes(Engine):
    """u8 x s8, four products per 32-bit lane, selection by byte shuffles."""

    shuffle: Instruction

    def _activations(self, b: Builder, a: Vec) -> Operand:
        return (b.let(a),)

    def broadcast(self, b: Builder, x: Pointer, at: Index) -> Operand:
        return self._activations(b, b.load(x, at, 4).bits(S32).spread(self.lanes).bits(U8))

    def window(self, b: Builder, x: Pointer, at: Index, reach: int) -> Vec:
        load = next(n for n in self.selector.loads if reach <= n)
        if load == 8:
            return b.let(b.load(x, at, 8).bits(S64).spread(self.lanes // 2).bits(U8))
        value = b.let(b.load(x, at, load))
        copies = self.lanes * 4 // load
        return b.let(concat([value] * copies)) if copies > 1 else value

    def indices(self, b: Builder, stream: Pointer, at: Index, step: Step, plan: Plan) -> Vec:
        raw = b.load(stream, at, self.lanes * 4)
        if plan.bits == 8:
            return b.let(raw)
        index = (raw.bits(U16) >> step.shift).bits(U8) if step.shift else raw
        index = index & ((1 << plan.bits) - 1)
        if any(step.add):
            offset = constants(list(step.add) * self.lanes, U8)
            index = index | offset if plan.group & (plan.group - 1) == 0 else index + offset
        return b.let(index)

    def select(self, b: Builder, window: Vec, index: Vec) -> Operand:
        return self._activations(b, call(self.shuffle, window, index).bits(U8))

    def interleave(self, b: Builder, rows: list[Vec]) -> Operand:
        order = [row * self.lanes + lane for lane in range(self.lanes) for row in range(4)]
        return self._activations(b, b.let(concat(rows)).shuffle(order))


@dataclass(frozen=True)
class DotBytes(Bytes):
    """vpdpbusd."""

    dot: Instruction

    @property
    def together(self) -> int:
        return 2 if self.lanes == 16 else 1

    def interleave_pair(self, b: Builder, rows: list[Vec]) -> list[Operand]:
        """Bytes of two rows, then pairs of them: full registers all the way."""
        wide = 2 * self.lanes
        order = [row * wide + lane for lane in range(wide) for row in range(2)]
        pairs = [b.let(concat(rows[i : i + 2]).shuffle(order)).bits(U16) for i in (0, 2)]
        halves = ([p * wide + lane for lane in range(first, first + 16) for p in (0, 1)] for first in (0, 16))
        return [self._activations(b, b.let(shuffle(pairs, half)).bits(U8)) for half in halves]

    def weights(self, b: Builder, w: Pointer, at: Index, part: int = 0) -> Operand:
        raw = b.load(w, at, self.lanes * 4)
        return (b.let(raw if self.bits == 8 else lowbit.at_the_top(raw, self.bits, part)),)

    def total(self, acc: Vec) -> Vec:
        return acc >> (8 - self.bits) if self.bits < 8 else acc

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        return call(self.dot, acc, a[0], w[0])


@dataclass(frozen=True)
class ShiftedBytes(Bytes):
    """sdot of activations less 128, and 128 times the sum of the weights, which every row of a tile shares: exact.

    Kernels of tiles sum up what lacks beside the products; others take it along as a second operand.
    """

    @property
    def shifted(self) -> bool:
        return True

    def lacking(self, sums: Vec, w: Operand) -> Vec:
        return call(arm.SDOT, sums, w[0], const(64, S8, self.lanes * 4))

    @property
    def biased(self) -> bool:
        return True

    def _activations(self, b: Builder, a: Vec) -> Operand:
        return (b.let(a ^ 0x80),)

    def window(self, b: Builder, x: Pointer, at: Index, reach: int) -> Vec:
        return b.let(super().window(b, x, at, reach) ^ 0x80)

    def select(self, b: Builder, window: Vec, index: Vec) -> Operand:
        return (b.let(call(self.shuffle, window, index).bits(U8)),)

    def weights(self, b: Builder, w: Pointer, at: Index, part: int = 0) -> Operand:
        raw = b.load(w, at, self.lanes * 4)
        plain = b.let(raw if self.bits == 8 else lowbit.as_bytes(raw, self.bits, part))
        return plain, b.let(self.lacking(const(0, S32, self.lanes), (plain,)) << 1)

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        found = call(arm.SDOT, acc, a[0], w[0])
        return found + w[1] if len(w) > 1 else found


@dataclass(frozen=True)
class PairBytes(Bytes):
    """pmaddubsw and pmaddwd by one. Exact only when no pair of products leaves 16 bits."""

    @property
    def biased(self) -> bool:
        return True

    def weights(self, b: Builder, w: Pointer, at: Index, part: int = 0) -> Operand:
        raw = b.load(w, at, self.lanes * 4)
        return (b.let(raw if self.bits == 8 else lowbit.as_bytes(raw, self.bits, part)),)

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        return self.widen(acc, self.partial(None, a, w))

    def partial(self, sums: Vec | None, a: Operand, w: Operand) -> Vec:
        """The 16-bit sums, two for each lane of the accumulator, with the pairs of one step added."""
        pairs = call(x86.VPMADDUBSW_256, a[0], w[0])
        return pairs if sums is None else sums + pairs

    def widen(self, acc: Vec, sums: Vec) -> Vec:
        """acc + the two 16-bit sums of every lane."""
        return acc + call(x86.VPMADDWD_256, sums, const(1, S16, 16))


@dataclass(frozen=True)
class WideBytes(Bytes):
    """Even and odd bytes widened to 16 bits, two pmaddwd: exact for all weights."""

    def _activations(self, b: Builder, a: Vec) -> Operand:
        words = b.let(a).bits(U16)
        return b.let(words & 0xFF), b.let(words >> 8)

    def select(self, b: Builder, window: Vec, index: Vec) -> Operand:
        """Selected bytes come out as words: an index above 127 gives zero."""
        words = index.bits(U16)
        halves = (b.let(words | 0xFF00), b.let((words >> 8) | 0xFF00))
        return tuple(b.let(call(self.shuffle, window, half)) for half in halves)

    def weights(self, b: Builder, w: Pointer, at: Index, part: int = 0) -> Operand:
        words = b.let(b.load(w, at, self.lanes * 4)).bits(S16)
        return b.let((words << 8) >> 8), b.let(words >> 8)

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        even = call(x86.VPMADDWD_256, a[0], w[0])
        return acc + even + call(x86.VPMADDWD_256, a[1], w[1])


@dataclass(frozen=True)
class Floats(Engine):
    """f32 with fused multiply-add, selection by vpermps with 4-bit indices packed in 32-bit lanes."""

    permute: Instruction

    def broadcast(self, b: Builder, x: Pointer, at: Index) -> Operand:
        return (b.let(b.load(x, at).spread(self.lanes)),)

    def window(self, b: Builder, x: Pointer, at: Index, reach: int) -> Vec:
        return b.let(b.load(x, at, self.lanes))

    def indices(self, b: Builder, stream: Pointer, at: Index, step: Step, plan: Plan) -> Vec:
        raw = b.load(stream, at, self.lanes).bits(U32)
        return b.let(raw >> step.shift if step.shift else raw)

    def select(self, b: Builder, window: Vec, index: Vec) -> Operand:
        return (b.let(call(self.permute, window, index)),)

    def interleave(self, b: Builder, rows: list[Vec]) -> Operand:
        return (rows[0],)

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        return fma(a[0], w[0], acc)


@dataclass(frozen=True)
class Halves(Engine):
    """Pairs of bf16 in lanes of 32 bits by vdpbf16ps, selection by vpermw; bf16 is read as 16-bit words.

    Indices are packed in time, three fields of five bits in a word: vpermw reads only the low five, so that a shift is
    all the unpacking there is.
    """

    def broadcast(self, b: Builder, x: Pointer, at: Index) -> Operand:
        return (b.let(b.load(x, at, 2).bits(S32).spread(self.lanes)),)

    def window(self, b: Builder, x: Pointer, at: Index, reach: int) -> Vec:
        return b.let(b.load(x, at, 2 * self.lanes))

    def indices(self, b: Builder, stream: Pointer, at: Index, step: Step, plan: Plan) -> Vec:
        raw = b.load(stream, at, 2 * self.lanes)
        return b.let(raw >> step.shift if step.shift else raw)

    def select(self, b: Builder, window: Vec, index: Vec) -> Operand:
        return (b.let(call(x86.VPERMW_512, window, index)),)

    def weights(self, b: Builder, w: Pointer, at: Index, part: int = 0) -> Operand:
        b.require(x86.VDPBF16PS_512.wrapper)
        return (b.let(b.load(w, at, 2 * self.lanes).bits(S32)),)

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        return call(x86.VDPBF16PS_512, acc, a[0], w[0])


@dataclass(frozen=True)
class TwoFloats(Floats):
    """Windows of two vectors: both are permuted, and the bit above a permutation's reach chooses between them."""

    def window(self, b: Builder, x: Pointer, at: Index, reach: int) -> Vec:
        return b.let(b.load(x, at, 2 * self.lanes))

    def select(self, b: Builder, window: Vec, index: Vec) -> Operand:
        low, high = (call(self.permute, window.part(n, self.lanes), index) for n in (0, self.lanes))
        top = index.bits(S32) << (32 - self.lanes.bit_length())
        return (b.let(top.lt(0).select(high, low)),)


@dataclass(frozen=True)
class Generic(Engine):
    """Any target and both element types: one product per lane and step; a selection is scalar loads."""

    def broadcast(self, b: Builder, x: Pointer, at: Index) -> Operand:
        value = b.load(x, at)
        return (b.let(self._widen(value).spread(self.lanes)),)

    def indices(self, b: Builder, stream: Pointer, at: Index, step: Step, plan: Plan) -> Vec:
        return b.let(b.load(stream, at, self.lanes).cast(S32))

    def weights(self, b: Builder, w: Pointer, at: Index, part: int = 0) -> Operand:
        raw = b.load(w, at, self.lanes)
        return (b.let(self._widen(raw) if self.bits == 8 else lowbit.as_words(raw, self.bits, part)),)

    def interleave(self, b: Builder, rows: list[Vec]) -> Operand:
        return (b.let(self._widen(rows[0])),)

    def gather(self, b: Builder, x: Pointer, base: Index, index: Vec) -> Operand:
        """Activations ``x[base + index]`` per lane."""
        return (b.let(self._widen(b.gather(x, base, index))),)

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        product = a[0] * w[0]
        return acc + (product.cast(S32) if self.acc == S32 else product)

    def _widen(self, value: Vec) -> Vec:
        """8-bit operands to 16 bits, where a u8 x s8 product is exact."""
        return value.cast(S16) if self.acc == S32 else value


@dataclass(frozen=True)
class GenericFma(Generic):
    """Generic selection with fused multiply-add (groups no vpermps reaches, machines without one)."""

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        return fma(a[0], w[0], acc)
