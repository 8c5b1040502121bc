"""Pooling over space with the channels in vectors: windows of channels-last tensors, and reductions of middle axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.generic_eval import lowest, unflatten
from bitwright.codegen.tvm.pointwise import emit_pointwise
from bitwright.codegen.tvm.pointwise_program import NotPointwise
from bitwright.codegen.tvm.pool_values import Chain, lanes_of
from bitwright.codegen.tvm.template import Config, Refused, Template, plain_args
from bitwright.codegen.tvm.tir import Builder, Index, Vec, const, is_static, maximum, minimum, scalar
from bitwright.codegen.tvm.vecmath import keep
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.target import Target
from bitwright.ir.types import F32, F64, S8, S16, S32, U8, DType
from bitwright.ir.weights import Array

KINDS: dict[str, tuple[DType, ...]] = {
    "max": (F32, F64, U8, S8, S16, S32), "min": (F32, F64, U8, S8, S16, S32),
    "sum": (F32, F64, S32), "mean": (F32, F64),
}  # fmt: skip
UNROLLED = 9
"""Windows of up to this many taps are unrolled."""
BLOCK = 4
"""Vectors of channels that a reduction carries at once."""
CHUNK = 64
"""Elements that a float sum adds before it adds to the total: keeps rounding errors small."""
Span = tuple[Index, Index]


@dataclass(frozen=True)
class PoolConfig(Config):
    """``lanes`` channels per vector; a reduction carries ``block`` vectors."""

    lanes: int = 16
    block: int = BLOCK


class Pool(Template):
    """MaxPool and AvgPool of channels-last tensors, Reduce over middle axes; pointwise work around them."""

    name: ClassVar[str] = "pool"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes f32 and f64, and integers for maxima and exact sums."""
        try:
            made = _Body(body)
            lanes = lanes_of(made.kinds, target.vector_bits)
        except NotPointwise as why:
            return Refused(str(why))
        if target.kind != "cpu":
            return Refused("pool kernels are for CPUs")
        block = min(BLOCK, -(-made.channels // lanes))
        return PoolConfig(
            tasks=made.tasks(lanes * block), args=plain_args(body), isa=target.isa, mcpu=target.mcpu,
            reason=f"{made.root.op.spelling} over {made.what} in vectors of {lanes} channels", lanes=lanes, block=block,
        )  # fmt: skip

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        """Output rows of a window, or blocks of channels of a reduction."""
        assert isinstance(config, PoolConfig)
        made = _Body(body)
        return (_Windows if made.windows else _Middle)(made, config, symbol).emit()


class _Body:
    """The pooling operator and the chains around it; raises NotPointwise for what the template does not take."""

    def __init__(self, body: Graph) -> None:
        roots = [n for n in body.nodes if not isinstance(n.op, (*ops.POINTWISE, ops.Constant))]
        if len(roots) != 1 or not isinstance(roots[0].op, (ops.MaxPool, ops.AvgPool, ops.Reduce)):
            raise NotPointwise("not one pooling operator")
        if len(body.outputs) != 1 or any(
            not t.is_static or t.size in (0,) or t.size >= 1 << 31 for t in body.types.values()
        ):
            raise NotPointwise("several results, or an empty or huge tensor")
        self.body, self.root, self.out = body, roots[0], body.outputs[0]
        self.x = self.root.inputs[0]
        self.shape, self.result = body.types[self.x].static_shape, self.root.type.static_shape
        self.kind = body.types[self.x].dtype
        self.fn = _function(self.root)
        self.windows = not isinstance(self.root.op, ops.Reduce)
        if body.types[self.out].static_shape != self.result:
            raise NotPointwise("another shape behind the pooling")
        if self.kind not in KINDS.get(self.fn, ()):
            raise NotPointwise(f"{self.fn} of {self.kind}")
        if self.windows and not self.root.op.channels_last:  # type: ignore[attr-defined]
            raise NotPointwise("channels first")
        self.axes = (0, 0) if self.windows else self._middle()
        inside, outside = self._groups()
        self.before = Chain(body, self.shape, self.x, (), inside)
        self.after = Chain(body, self.result, self.out, (self.root.output,), outside)
        self.channels = self.shape[-1] if self.windows else math.prod(self.shape[self.axes[1] :])
        self.kinds = self.before.dtypes | self.after.dtypes | {self.kind}

    def _middle(self) -> tuple[int, int]:
        op = self.root.op
        assert isinstance(op, ops.Reduce)
        axes = sorted(a % len(self.shape) for a in op.axes) if self.shape else []
        if not axes or axes != list(range(axes[0], axes[-1] + 1)) or axes[-1] == len(self.shape) - 1:
            raise NotPointwise("a reduction of other than middle axes")
        return axes[0], axes[-1] + 1

    def _groups(self) -> tuple[list[int], list[int]]:
        """Runs of axes walked with one counter: before the root and behind it."""
        rank = len(self.shape)
        if self.windows:
            return [1] * rank, [1] * rank
        first, behind = self.axes
        kept = behind - first if self.root.op.keepdim else 0  # type: ignore[attr-defined]
        return [first, behind - first, rank - behind], [first, kept, rank - behind]

    @property
    def what(self) -> str:
        return "windows" if self.windows else "middle axes"

    def tasks(self, channels: int) -> int:
        """Rows of windows, or (leading index, block of channels) pairs."""
        if self.windows:
            return math.prod(self.result[:-2])
        return math.prod(self.shape[: self.axes[0]]) * -(-self.channels // channels)


def _function(root: Node) -> str:
    if isinstance(root.op, ops.MaxPool):
        return "max"
    return "mean" if isinstance(root.op, ops.AvgPool) else str(getattr(root.op, "fn", ""))


class _Kernel:
    def __init__(self, made: _Body, config: PoolConfig, symbol: str) -> None:
        self.made, self.config, self.b = made, config, Builder(symbol)
        inputs, types = made.body.inputs, made.body.types
        self.inputs = {v.name: self.b.param(f"x{i}", v.type.dtype, v.type.size) for i, v in enumerate(inputs)}
        self.y = self.b.param("y", types[made.out].dtype, types[made.out].size)

    def read(self, at: Sequence[Index], lanes: int) -> Vec:
        return keep(self.b, self.made.before.value(self.b, self.config.isa, self.inputs, at, lanes, {}))

    def write(self, value: Vec, at: Sequence[Index], place: Index, valid: int) -> None:
        given = {self.made.root.output: keep(self.b, value)}
        result = self.made.after.value(self.b, self.config.isa, self.inputs, at, value.lanes, given)
        self.b.store(self.y, place, result, valid)

    def start(self, lanes: int) -> Vec:
        made = self.made
        value = lowest(made.kind, 1 if made.fn == "max" else -1) if made.fn in ("max", "min") else 0
        return const(value, made.kind, lanes)

    def step(self, total: Vec, value: Vec) -> Vec:
        if self.made.fn in ("sum", "mean"):
            return total + value
        return emit_pointwise(self.b, ops.Binary(self.made.fn), [total, value], isa=self.config.isa)

    def channels(self, emit: Callable[[Index, int, int], None]) -> None:
        """``emit(first channel, lanes, valid)`` for all channels."""
        lanes, n = self.config.lanes, self.made.channels
        if n >= lanes:
            with self.b.loop(n // lanes, name="block") as i:
                emit(self.b.index(i * lanes), lanes, lanes)
        if rest := n % lanes:
            emit(n - rest, min(1 << (rest - 1).bit_length(), lanes), rest)


class _Windows(_Kernel):
    """Rows of windows; the two ends of a row, where windows leave the input, are written out one by one."""

    def __init__(self, made: _Body, config: PoolConfig, symbol: str) -> None:
        super().__init__(made, config, symbol)
        op, n = made.root.op, len(made.shape) - 2
        assert isinstance(op, (ops.MaxPool, ops.AvgPool))
        self.kernel, self.space, self.outs = op.kernel, made.shape[1:-1], made.result[1:-1]
        self.stride = op.stride or (1,) * n
        self.begin, self.end = op.padding[:n] or (0,) * n, op.padding[n:] or (0,) * n
        self.dilation = (getattr(op, "dilation", ()) or (1,) * n) if isinstance(op, ops.MaxPool) else (1,) * n
        self.padded = isinstance(op, ops.AvgPool) and op.count_padding

    def emit(self) -> Any:
        b = self.b
        with b.loop(b.end, b.begin, name="task") as task:
            head = unflatten(b.index(task), self.made.result[:-2])
            spans = [self._span(a, i) for a, i in enumerate(head[1:])]
            lo, hi = self._inner()
            for at in [*range(lo), *range(hi, self.outs[-1])]:
                self._pixel(head, at, spans)
            if hi > lo:
                with b.loop(hi, lo, name="w") as w:
                    self._pixel(head, b.index(w), spans)
        return b.finish()

    def _inner(self) -> tuple[int, int]:
        """The outputs along the last space axis whose windows lie inside the input."""
        s, p, size = self.stride[-1], self.begin[-1], self.space[-1]
        reach = self.dilation[-1] * (self.kernel[-1] - 1)
        lo = min(-(-p // s), self.outs[-1])
        return lo, max(lo, min(self.outs[-1], (size - 1 - reach + p) // s + 1))

    def _span(self, axis: int, at: Index) -> Span:
        """Taps of a window along ``axis`` that lie inside the input."""
        taps, d = self.kernel[axis], self.dilation[axis]
        last = (self.outs[axis] - 1) * self.stride[axis] - self.begin[axis] + d * (taps - 1)
        if self.begin[axis] == 0 and last < self.space[axis]:
            return 0, taps
        return self._clip(at * self.stride[axis] - self.begin[axis], taps, d, self.space[axis])

    def _clip(self, first: Index, taps: int, d: int, size: int) -> Span:
        if is_static(first):
            lo = min(max(0, -(first // d)), taps)
            return lo, max(lo, min(taps, -((first - size) // d)))
        lo, hi = maximum(0 - first, 0), maximum(size - first, 0)
        if d != 1:
            lo, hi = tirx.truncdiv(lo + (d - 1), d), tirx.truncdiv(hi + (d - 1), d)
        lo = self.b.index(minimum(lo, taps))
        return lo, self.b.index(maximum(minimum(hi, taps), lo))

    def _pixel(self, head: Sequence[Index], w: Index, spans: list[Span]) -> None:
        b, lo_hi = self.b, self._inner()
        first = w * self.stride[-1] - self.begin[-1]
        inside = not is_static(w) or lo_hi[0] <= w < lo_hi[1]
        last = (0, self.kernel[-1]) if inside else self._clip(first, self.kernel[-1], self.dilation[-1], self.space[-1])
        taps = [*spans, last]
        counts = self._counts(head, w, taps)
        place = b.index(_flat((*head, w), self.made.result[:-1]) * self.made.result[-1])

        def channel(c: Index, lanes: int, valid: int) -> None:
            total = b.register(self.made.kind, lanes, self.start(lanes))
            self._taps(total, head, w, c, taps, [])
            value = total.get()
            if isinstance(self.made.root.op, ops.AvgPool):
                value = value / (counts if isinstance(counts, float) else counts.spread(lanes))
            self.write(value, (*head, w, c), place + c, valid)

        self.channels(channel)

    def _taps(
        self, total: Any, head: Sequence[Index], w: Index, c: Index, spans: list[Span], done: list[Index]
    ) -> None:
        """The window's loops: unrolled where the range is known and the window small."""
        if len(done) == len(spans):
            out = (*head[1:], w)
            at = [
                i * s - p + t * d
                for i, s, p, t, d in zip(out, self.stride, self.begin, done, self.dilation, strict=True)
            ]
            total.set(self.step(total.get(), self.read((head[0], *at, c), total.lanes)))
            return
        lo, hi = spans[len(done)]
        if is_static(lo) and is_static(hi) and math.prod(self.kernel) <= UNROLLED:
            for t in range(lo, hi):
                self._taps(total, head, w, c, spans, [*done, t])
        else:
            with self.b.loop(hi, lo, name="tap") as t:
                self._taps(total, head, w, c, spans, [*done, self.b.index(t)])

    def _counts(self, head: Sequence[Index], w: Index, taps: list[Span]) -> float | Vec:
        """How many elements a mean divides by."""
        total: Index = 1
        for axis, (i, (lo, hi)) in enumerate(zip((*head[1:], w), taps, strict=True)):
            if self.padded:
                size = self.begin[axis] + self.space[axis] + self.end[axis]
                inside = (self.outs[axis] - 1) * self.stride[axis] + self.kernel[axis] <= size
                lo, hi = (
                    (0, self.kernel[axis]) if inside else self._clip(i * self.stride[axis], self.kernel[axis], 1, size)
                )
            total = total * (hi - lo)
        return float(total) if is_static(total) else keep(self.b, scalar(total, self.made.kind))


class _Middle(_Kernel):
    """[N, S, C] reduced to [N, C]: blocks of channels walk down S."""

    def emit(self) -> Any:
        b, made = self.b, self.made
        wide = self.config.lanes * self.config.block
        blocks = -(-made.channels // wide)
        with b.loop(b.end, b.begin, name="task") as task:
            task = b.index(task)
            n, block = (task, 0) if blocks == 1 else unflatten(task, (1 << 30, blocks))
            if made.channels % wide == 0:
                self._block(n, b.index(block * wide), self._full())
            else:
                with b.when(block < blocks - 1 if not is_static(block) else False):
                    self._block(n, b.index(block * wide), self._full())
                with b.when(tirx.EQ(block, blocks - 1) if not is_static(block) else True):
                    self._block(n, (blocks - 1) * wide, self._rest(made.channels - (blocks - 1) * wide))
        return b.finish()

    def _full(self) -> list[tuple[int, int, int]]:
        """(offset, lanes, valid) of the vectors of a block."""
        return self._rest(self.config.lanes * self.config.block)

    def _rest(self, channels: int) -> list[tuple[int, int, int]]:
        lanes = self.config.lanes
        parts = [(k * lanes, lanes, lanes) for k in range(channels // lanes)]
        if rest := channels % lanes:
            parts.append((channels - rest, min(1 << (rest - 1).bit_length(), lanes), rest))
        return parts

    def _block(self, n: Index, c: Index, parts: list[tuple[int, int, int]]) -> None:
        b, made = self.b, self.made
        count = math.prod(made.shape[made.axes[0] : made.axes[1]])
        totals = [b.register(made.kind, lanes, self.start(lanes)) for _, lanes, _ in parts]
        if made.kind.is_float and made.fn in ("sum", "mean") and count > 2 * CHUNK:
            with b.loop(-(-count // CHUNK), name="chunk") as k:
                inner = [b.register(made.kind, lanes, self.start(lanes)) for _, lanes, _ in parts]
                k = b.index(k)
                self._walk(inner, n, b.index(k * CHUNK), b.index(minimum((k + 1) * CHUNK, count)), c, parts)
                for t, i in zip(totals, inner, strict=True):
                    t.set(t.get() + i.get())
        else:
            self._walk(totals, n, 0, count, c, parts)
        for t, (at, _, valid) in zip(totals, parts, strict=True):
            value = t.get() / float(count) if made.fn == "mean" else t.get()
            self.write(value, (n, 0, c + at), b.index(n * made.channels + c) + at, valid)

    def _walk(self, totals: Sequence[Any], n: Index, lo: Index, hi: Index, c: Index, parts: Sequence[Any]) -> None:
        with self.b.loop(hi, lo, name="s") as s:
            s = self.b.index(s)
            for t, (at, lanes, _) in zip(totals, parts, strict=True):
                t.set(self.step(t.get(), self.read((n, s, c + at), lanes)))


def _flat(idx: Sequence[Index], shape: Sequence[int]) -> Index:
    total: Index = 0
    for i, n in zip(idx, shape, strict=True):
        total = total * n + i
    return total
