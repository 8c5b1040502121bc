"""Meaning of the contractions whose products and sums are small floats: the bits of ``small_float.py``, in torch.

The order is part of the meaning. Terms are counted by k; each ``chunk`` consecutive ones are summed from zero on, then
the sums of the chunks, in order. A convolution's k counts the taps in row-major order and, at each tap, the channels.
An infinite operand stands for the largest float; a NaN spoils its row or its output. Under autograd the sums have the
gradient of the exact ones (straight through).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.small_float import Format, format_of, small_float_range, sums_fit
from bitwright.ir.types import DType

Tensor = torch.Tensor
TILE, WIDE = 1 << 17, 256
"""Partial sums worked on at once, and how many of them along the longer side."""
PATCHES = 1 << 22
"""Elements of unfolded patches held at once."""


@dataclass(frozen=True)
class Sums:
    """How products are summed: two formats, chunk, rounding; ``flush`` False keeps what lies below the smallest value
    (for training only: no format does that)."""

    product: Format
    acc: Format
    chunk: int = 16
    rounding: str = "floor"
    flush: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, int) or self.chunk < 1:
            raise InvalidInput(f"chunk must be a whole number, at least 1, not {self.chunk!r}")
        if self.rounding not in ("floor", "nearest"):
            raise InvalidInput(f"rounding is 'floor' or 'nearest', not {self.rounding!r}")
        for f in (self.product, self.acc):
            small_float_range(*f)
        if not sums_fit(self.product, self.acc):
            raise InvalidInput(
                f"f64 cannot hold sums of products {self.product} and accumulators {self.acc}: "
                "at most 24 mantissa bits and 52 between the exponents"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The format that emulates the sums: f32 where it rounds them as f64 does."""
        reach = max(2**e - b - 1 for e, _, b in (self.product, self.acc)), max(self.product[2], self.acc[2])
        single = sums_fit(self.product, self.acc, 24) and max(reach) <= 100
        return torch.float32 if single else torch.float64


def sums_of(op: Any) -> Sums:
    """The sums of an operator; raises :class:`InvalidInput` for formats that there are none of."""
    return Sums(format_of(op.product), format_of(op.acc), op.chunk, op.rounding)


def rounder(f: Format, sums: Sums, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rounds a tensor of f32 or f64 to the format, in place."""
    smallest, largest = small_float_range(*f)
    digits, whole = (52, torch.int64) if dtype == torch.float64 else (23, torch.int32)
    below = float(torch.nextafter(torch.tensor(smallest, dtype=dtype), torch.zeros((), dtype=dtype)))
    drop = digits - f[1]
    mask, nearest = torch.tensor(-(1 << drop), dtype=whole), sums.rounding == "nearest"

    def rounded(t: Tensor) -> Tensor:
        if sums.flush:
            torch.hardshrink(t, below, out=t)  # +0 within [-below, below]
        bits = t.view(whole)  # sign and magnitude: cutting low bits goes toward zero
        if nearest:
            bits += ((bits >> drop) & 1) + ((1 << (drop - 1)) - 1)
        bits &= mask.to(t.device)
        return t.clamp_(-largest, largest)

    return rounded


def in_small_float(x: Tensor, dtype: DType, zero: Tensor | None = None) -> Tensor:
    """f32 values of the small float next to each value of ``x`` (as f32), half to even; NaN becomes 0."""
    if zero is not None:
        raise ValueError(f"codes in {dtype} have no zero point")
    y = x.detach().to(torch.float32)
    if y.is_meta:
        return y
    f = format_of(dtype)
    y = torch.nan_to_num(y, nan=0.0).clone().contiguous()
    return rounder(f, Sums(f, f, rounding="nearest"), torch.float32)(y)


@dataclass(frozen=True)
class Terms:
    """Operands [chunk, chunks, rows, 1] and [chunk, chunks, 1, columns], in the format that holds their products."""

    a: Tensor
    b: Tensor
    sums: Sums

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns that are worked on together."""
        chunks, rows, columns = self.a.shape[1], self.a.shape[2], self.b.shape[3]
        wide = min(columns, max(WIDE, TILE // max(1, chunks * rows)))
        high = max(1, TILE // max(1, chunks * wide))
        for i in range(0, rows, high):
            for j in range(0, columns, wide):
                yield slice(i, min(i + high, rows)), slice(j, min(j + wide, columns))

    def products(self, rows: slice, columns: slice) -> Iterator[Tensor]:
        """The rounded products [chunks, rows, columns] of the first terms of all chunks, of the second ones, ...

        They share memory: each is gone when the next is made."""
        q = rounder(self.sums.product, self.sums, self.a.dtype)
        shape = self.a.shape[1], rows.stop - rows.start, columns.stop - columns.start
        exact, out = torch.empty(shape, dtype=self.a.dtype), torch.empty(shape, dtype=self.sums.dtype)
        for u, v in zip(self.a, self.b, strict=True):
            q(torch.mul(u[:, rows], v[..., columns], out=exact))
            yield exact if exact.dtype == out.dtype else out.copy_(exact)


def terms(a: Tensor, b: Tensor, sums: Sums) -> Terms:
    """Terms of a[A, K] with b[B, K], f32 or f64, finite."""
    single = sums.dtype == torch.float32 and _short(a) and _short(b)
    a, b = (t if single else t.double() for t in (a, b))
    return Terms(_by_term(a, sums).unsqueeze(-1), _by_term(b, sums).unsqueeze(-2), sums)


def _by_term(t: Tensor, sums: Sums) -> Tensor:
    """[rows, K] as [chunk, chunks, rows]; zeros at the end change no sum."""
    chunk = max(1, min(sums.chunk, t.shape[1]))
    t = F.pad(t, (0, -t.shape[1] % chunk))
    return t.reshape(t.shape[0], -1, chunk).permute(2, 1, 0).contiguous()


def _short(t: Tensor) -> bool:
    """True for f32 values of 12 significant bits or fewer and of moderate size: f32 holds their products."""
    if t.dtype != torch.float32:
        return False
    size = t.abs()
    moderate = (size == 0) | ((size > 2.0**-60) & (size < 2.0**60))
    return bool((moderate & ((t.contiguous().view(torch.int32) & 0xFFF) == 0)).all())


def dots(a: Tensor, b: Tensor, sums: Sums) -> Tensor:
    """Small-float sums a[A, K] by b[B, K] -> [A, B] in f32 or f64 (``sums.dtype``); no gradient."""
    if a.shape[0] > b.shape[0]:
        return dots(b, a, sums).t().contiguous()
    spoilt = a.isnan().any(1)[:, None] | b.isnan().any(1)
    a, b = (t.double().nan_to_num() if not bool(t.isfinite().all()) else t for t in (a, b))
    out = torch.zeros(a.shape[0], b.shape[0], dtype=sums.dtype, device=a.device)
    if out.numel() and a.shape[1]:
        work, q = terms(a, b, sums), rounder(sums.acc, sums, sums.dtype)
        for rows, columns in work.tiles():
            inner = torch.zeros(())
            for i, p in enumerate(work.products(rows, columns)):
                inner = q(inner.add_(p)) if i else q(p.clone())
            total = out[rows, columns].contiguous()
            for part in inner:
                q(total.add_(part))
            out[rows, columns] = total
    return out.masked_fill_(spoilt, float("nan"))


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, sums: Sums) -> Tensor:
        ctx.save_for_backward(a, b)
        return dots(a, b, sums).to(torch.float32).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        return g @ b, g.t() @ a, None


Dots = Callable[[Tensor, Tensor], Tensor]


def linear(x: Tensor, w: Tensor, bias: Tensor | None, dots_: Dots) -> Tensor:
    """x[..., K], w[O, K], [bias[O]] -> [..., O] by a function that takes [M, K] and [O, K] to [M, O]."""
    y = dots_(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[0])
    return y if bias is None else y + bias


def patches(x: Tensor, size: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """x[N, C, *S] -> [N, *outputs, K]: what every output of a convolution reads; k counts taps, then channels."""
    n = len(size)
    stride, dilation, padding = stride or (1,) * n, dilation or (1,) * n, padding or (0,) * 2 * n
    x = F.pad(x, [p for a in reversed(range(n)) for p in (padding[a], padding[n + a])]).movedim(1, -1)
    outs = [(x.shape[1 + a] - dilation[a] * (size[a] - 1) - 1) // stride[a] + 1 for a in range(n)]
    if min(outs) < 1:
        raise ValueError("the kernel is larger than the padded input")
    taps = []
    for tap in torch.cartesian_prod(*(torch.arange(s) for s in size)).reshape(-1, n).tolist():
        y = x
        for a, t in enumerate(tap):
            first = t * dilation[a]
            y = y[(slice(None),) * (1 + a) + (slice(first, first + stride[a] * (outs[a] - 1) + 1, stride[a]),)]
        taps.append(y)
    return torch.stack(taps, -2).flatten(-2)


def conv(x: Tensor, w: Tensor, bias: Tensor | None, geometry: tuple[Any, Any, Any], dots_: Dots) -> Tensor:
    """x[N, C, *S], w[O, C, *K], [bias[O]] -> [N, O, *outputs]; geometry: stride, padding, dilation."""
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"{x.shape[1]} channels, weights for {w.shape[1]}")
    rows = w.movedim(1, -1).flatten(1)
    each = max(1, math.prod(x.shape[2:]) * rows.shape[1])
    step = x.shape[0] if x.requires_grad or w.requires_grad or x.is_meta else max(1, PATCHES // each)
    parts = [linear(patches(p, tuple(w.shape[2:]), *geometry), rows, bias, dots_) for p in torch.split(x, max(step, 1))]
    return torch.cat(parts).movedim(-1, 1)


def _meaning(op: Any, *xs: Tensor) -> Tensor:
    sums = sums_of(op)
    x, w = xs[:2]
    bias = xs[2] if len(xs) > 2 else None
    if not x.is_floating_point() or x.dtype == torch.float64:
        raise ValueError("small-float sums are of products of f32, f16 or bf16")

    def run(a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = a @ b.t() if a.is_meta else _Straight.apply(a, b, sums)  # type: ignore[no-untyped-call]
        return y

    if isinstance(op, ops.SmallLinear):
        return linear(x, w, bias, run)
    if isinstance(op, ops.SmallConv):
        x = x.movedim(-1, 1) if op.channels_last else x
        y = conv(x, w, bias, (op.stride, op.padding, op.dilation), run)
        return y.movedim(1, -1) if op.channels_last else y
    w = w if op.transpose_b else w.transpose(-1, -2)
    lead: tuple[int, ...] = torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])  # type: ignore[no-untyped-call]
    out = (*lead, x.shape[-2], w.shape[-2])
    if x.is_meta:
        return torch.matmul(x, w.transpose(-1, -2))
    if w.dim() == 2:
        return linear(x, w, None, run)
    a, b = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (x, w))
    each = [run(p, q) for p, q in zip(a, b, strict=True)]
    return torch.stack(each).reshape(out) if each else x.new_zeros(out)


SMALL_FLOAT_MEANING: dict[type[ops.Op], Callable[..., Tensor]] = dict.fromkeys(ops.SMALL_FLOAT, _meaning)
