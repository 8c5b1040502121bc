"""Integer codes of a tensor: ranges, scales and zero points per tensor, channel or group; zero is always a code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import BIPOLAR, TERNARY, DType, integer

if TYPE_CHECKING:
    import torch

Width = int | Literal["ternary", "bipolar"]
ScaleKind = Literal["float", "pow2"]
RangeRule = Literal["minmax", "mse"] | float
"""``minmax``: the extremes; ``mse``: smallest mean squared error; a number: that percentage of the values is inside."""
CANDIDATES = 60
"""Shrunken ranges tried by ``mse``."""
PIECE = 1 << 17
"""Elements whose candidate ranges are tried at a time."""
_LOOK = 4
"""Candidates between looks at whether smaller ranges can still win."""
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class Levels:
    """The codes of a format: ``lo``, ``lo + step``, ... ``hi``; ``symmetric`` ones have zero point 0.

    Symmetric formats of 3 to 7 bits use -2^(b-1) too, with the scale from 2^(b-1) - 1 (as HAWQ-V3 does); 8 bits stay
    within -127, which every integer kernel takes.
    """

    dtype: DType
    lo: int
    hi: int
    step: int = 1
    symmetric: bool = True

    @property
    def top(self) -> int:
        """The code the largest magnitude maps to; of asymmetric formats the number of steps."""
        return self.hi if self.symmetric else self.hi - self.lo

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest codes of x / scale + zero, half to even (bipolar: zero goes to 1); same dtype as ``x``."""
        import torch

        if self.step == 1:
            return torch.round(x).clamp(self.lo, self.hi)
        return torch.where(x < 0, float(self.lo), float(self.hi)).to(x.dtype)


def levels(bits: Width, symmetric: bool = True) -> Levels:
    """The format of 2 to 8 bits, ``"ternary"`` {-1, 0, 1} or ``"bipolar"`` {-1, 1}; raises :class:`InvalidInput`.

    >>> [(str(f.dtype), f.lo, f.hi) for f in (levels(4), levels(8), levels(4, False), levels("ternary"))]
    [('s4', -8, 7), ('s8', -127, 127), ('u4', 0, 15), ('ternary', -1, 1)]
    """
    if bits in ("ternary", "bipolar"):
        if not symmetric:
            raise InvalidInput(f"{bits} is symmetric: it has no zero point")
        return Levels(TERNARY, -1, 1) if bits == "ternary" else Levels(BIPOLAR, -1, 1, step=2)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise InvalidInput(f"bits is 2 to 8, 'ternary' or 'bipolar', not {bits!r}")
    if not symmetric:
        return Levels(integer(bits, signed=False), 0, (1 << bits) - 1, symmetric=False)
    half = 1 << (bits - 1)
    return Levels(integer(bits), -half if 2 < bits < 8 else 1 - half, half - 1)


class Codes(NamedTuple):
    """``codes`` (int8 or uint8, the tensor's shape) mean ``(codes - zero) * scale``.

    ``scale`` (f32) and ``zero`` (int32): scalars; one entry per index of ``axis``; or with ``group`` the tensor's shape
    with ceil(size / group) entries along ``axis``.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    levels: Levels
    axis: int | None = None
    group: int = 0

    def spread(self, parameter: torch.Tensor) -> torch.Tensor:
        """``scale`` or ``zero`` in a shape that broadcasts against the codes."""
        if self.axis is None:
            return parameter
        if self.group:
            wide = parameter.repeat_interleave(self.group, dim=self.axis)
            return wide.narrow(self.axis, 0, self.codes.shape[self.axis])
        return parameter.reshape([-1 if a == self.axis else 1 for a in range(self.codes.dim())])

    def real(self, rows: slice | None = None) -> torch.Tensor:
        """The values that the codes stand for, f32; of some rows of the first axis only where ``rows`` are given."""
        if rows is not None and self.axis not in (None, 0):  # cut first: spreading all for each cut is quadratic
            many = [t[rows] if self.group else t for t in (self.scale, self.zero)]
            return self._replace(codes=self.codes[rows], scale=many[0], zero=many[1]).real()
        codes, zero, scale = self.codes, self.spread(self.zero), self.spread(self.scale)
        if rows is not None:
            codes, zero, scale = (t.expand(self.codes.shape)[rows] for t in (codes, zero, scale))
        return (codes.int() - zero).float() * scale


def quantize_codes(
    w: torch.Tensor,
    bits: Width = 8,
    symmetric: bool = True,
    *,
    axis: int | None = 0,
    group: int = 0,
    scale: ScaleKind = "float",
    range: RangeRule = "minmax",
    mask: torch.Tensor | None = None,
) -> Codes:
    """Nearest codes of a tensor, with a scale and zero point per tensor, channel or group.

    ``bits``: 2 to 8, ``"ternary"`` or ``"bipolar"``. ``symmetric``: zero point 0, signed codes; else unsigned codes.
    ``axis``: one scale per index of it (None: one for all); with ``group``, one for every ``group`` consecutive
    elements along it. ``scale="pow2"``: powers of two only. ``range``: see :data:`RangeRule`. ``mask``: True where a
    value is kept; elsewhere the code is the zero point. Zeros are exact in any case, bipolar excepted. Raises
    :class:`InvalidInput` for NaN, infinities and options that do not fit together.
    """
    import torch

    form = levels(bits, symmetric)
    if not w.is_floating_point() or not bool(torch.isfinite(w).all()):
        raise InvalidInput(f"only finite floating-point values can be quantized, not {w.dtype} with NaN or infinities")
    if form.step > 1 and mask is not None and not bool(mask.all()):
        raise InvalidInput("bipolar codes have no zero, and the mask needs one: use ternary")
    if scale not in ("float", "pow2"):
        raise InvalidInput(f"scale is 'float' or 'pow2', not {scale!r}")
    if group and axis is None:
        raise InvalidInput("groups lie along an axis: give axis")
    if group < 0 or (axis is not None and not -w.dim() <= axis < w.dim()):
        raise InvalidInput(f"axis={axis} and group={group} do not fit a tensor of shape {list(w.shape)}")
    values = w if mask is None else torch.where(mask, w, torch.zeros((), dtype=w.dtype))
    at = None if axis is None else axis % w.dim()
    rows, shape, sizes = _rows(values, at, group)
    s, z = fit_ranges(rows, sizes, form, scale, range)
    empty = Codes(torch.empty(w.shape, dtype=torch.uint8), s.float().reshape(shape), z.int().reshape(shape), form)
    empty = empty._replace(axis=at, group=group)
    wide = [values.reshape(1) if not w.dim() else values]
    wide += [empty.spread(t).expand(wide[0].shape) for t in (empty.scale, empty.zero)]
    step = max(1, PIECE * len(wide[0]) // max(1, w.numel()))
    dtype = torch.int8 if form.lo < 0 else torch.uint8
    pieces = zip(*(torch.split(t, step) for t in wide), strict=True)
    codes = torch.cat([form.round(v.double() / scale.double() + zero).to(dtype) for v, scale, zero in pieces])
    return empty._replace(codes=codes.reshape(w.shape))


def _rows(w: torch.Tensor, axis: int | None, group: int) -> tuple[torch.Tensor, tuple[int, ...], torch.Tensor]:
    """[scales, values of each], the shape of the scales, and how many values of each row are not padding."""
    import torch

    if axis is None:
        return w.reshape(1, -1), (), torch.tensor([w.numel()])
    if not group:
        rows = w.movedim(axis, 0).reshape(w.shape[axis], -1)
        return rows, (w.shape[axis],), torch.full((len(rows),), rows.shape[1])
    size = w.shape[axis]
    count = -(-size // group)
    last = w.movedim(axis, -1)
    padded = torch.nn.functional.pad(last, (0, count * group - size)).reshape(*last.shape[:-1], count, group)
    sizes = torch.full((count,), group)
    sizes[-1:] = size - (count - 1) * group
    padded, all_sizes = padded.movedim(-2, axis), sizes.expand(*last.shape[:-1], count).movedim(-1, axis)
    return padded.reshape(-1, group), tuple(padded.shape[:-1]), all_sizes.reshape(-1)


def fit_ranges(
    rows: torch.Tensor, sizes: torch.Tensor, form: Levels, scale: ScaleKind = "float", range: RangeRule = "minmax"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (f64) of each row; the first ``sizes`` values of a row count, the rest are zeros."""
    import torch

    if not isinstance(range, str) and not 50 < range <= 100:
        raise InvalidInput(f"a percentile range lies in (50, 100], not {range}")
    if range not in ("minmax", "mse") and isinstance(range, str):
        raise InvalidInput(f"range is 'minmax', 'mse' or a percentage, not {range!r}")
    if not rows.numel():
        return torch.ones(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.float64)
    step = max(1, PIECE // rows.shape[1])
    parts = [
        _fit(r.double(), n, form, scale, range)
        for r, n in zip(torch.split(rows, step), torch.split(sizes, step), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _fit(
    rows: torch.Tensor, sizes: torch.Tensor, form: Levels, kind: ScaleKind, rule: RangeRule
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    lo, hi = rows.min(1).values.clamp_max(0), rows.max(1).values.clamp_min(0)
    if not isinstance(rule, str):
        lo, hi = _inner(rows, sizes, rule)
    best = _parameters(lo, hi, form, kind, up=rule != "mse")
    if rule != "mse":
        return best
    error = _error(rows, *best, form)
    shrink = torch.linspace(1.0, 1.0 / CANDIDATES, CANDIDATES)[1:].tolist()
    ends = [(1.0, 1.0), *((f, f) for f in shrink)]
    ends += [] if form.symmetric else [e for f in shrink for e in ((1.0, f), (f, 1.0))]
    size = rows.abs() if kind == "float" and form.symmetric and form.step == 1 else None
    for tried, (low, high) in enumerate(ends):
        if size is not None and tried % _LOOK == 0 and _hopeless(size, error, torch.maximum(-lo, hi) * low, form):
            break
        for up in (True, False) if kind == "pow2" else (False,):
            best, error = _better(rows, best, error, _parameters(lo * low, hi * high, form, kind, up), form)
    for _ in [0] * (4 if kind == "float" else 0):  # the least-squares scale of these codes, and again
        q = _quantized(rows, *best, form)
        fit = (rows * q).sum(1) / q.square().sum(1).clamp_min(1e-30)
        best, error = _better(rows, best, error, (_usable(fit), best[1]), form)
    return best


def _hopeless(size: torch.Tensor, error: torch.Tensor, reach: torch.Tensor, form: Levels) -> bool:
    """Whether what lies outside a range, and all smaller ones, alone costs every row more than its best error."""
    import torch

    end = reach * (max(-form.lo, form.hi) / form.top)
    return bool((torch.sub(size, end[:, None]).clamp_min_(0).square_().sum(1) > error).all())


def _better(
    rows: torch.Tensor, best: tuple[torch.Tensor, torch.Tensor], error: torch.Tensor,
    tried: tuple[torch.Tensor, torch.Tensor], form: Levels,
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:  # fmt: skip
    import torch

    e = _error(rows, *tried, form)
    won = e < error
    return (torch.where(won, tried[0], best[0]), torch.where(won, tried[1], best[1])), torch.where(won, e, error)


def _parameters(
    lo: torch.Tensor, hi: torch.Tensor, form: Levels, kind: ScaleKind, up: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    reach = torch.maximum(-lo, hi) if form.symmetric else hi - lo
    scale = _usable(reach / form.top)
    if kind == "pow2":
        exponent = torch.log2(scale)
        exponent = (torch.ceil(exponent - 1e-9) if up else torch.floor(exponent)).clamp(-126, 126)
        one = np.ones((), scale.numpy().dtype)
        scale = torch.from_numpy(np.ldexp(one, exponent.int().numpy()))  # torch.exp2 may be off by a bit
    zero = torch.zeros_like(scale) if form.symmetric else torch.round(form.lo - lo / scale).clamp(form.lo, form.hi)
    return scale, zero


def _usable(scale: torch.Tensor) -> torch.Tensor:
    """As f32 holds it; 1 where it is zero or so small that its inverse overflows."""
    import torch

    return torch.where(scale.float() >= _TINY, scale.float(), 1.0).double()


def _quantized(rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, form: Levels) -> torch.Tensor:
    return form.round(rows / scale[:, None] + zero[:, None]) - zero[:, None]


def _error(rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, form: Levels) -> torch.Tensor:
    error = (_quantized(rows, scale, zero, form) * scale[:, None]).sub_(rows).square_()
    if form.step > 1:
        error = error * (rows != 0)  # padding would count, since zero is no code
    return error.sum(1)


def _inner(rows: torch.Tensor, sizes: torch.Tensor, percent: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of each row without the outermost (100 - percent) / 2 percent on either side."""
    import torch

    real = torch.arange(rows.shape[1]) < sizes[:, None]
    order = rows.masked_fill(~real, float("inf")).sort(1).values
    cut = (sizes.double() - 1).clamp_min(0) * (1 - percent / 100) / 2

    def at(position: torch.Tensor) -> torch.Tensor:
        below = position.floor().long()
        above = torch.minimum(below + 1, sizes - 1)
        a, b = (order.gather(1, i[:, None])[:, 0] for i in (below, above))
        return a + (b - a) * (position - below)

    return at(cut).clamp_max(0), at(sizes - 1 - cut).clamp_min(0)


__all__ = ["Codes", "Levels", "RangeRule", "ScaleKind", "Width", "fit_ranges", "levels", "quantize_codes"]
