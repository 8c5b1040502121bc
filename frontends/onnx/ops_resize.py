"""Resize and Upsample: the IR's Resize where it says the same, a matrix per axis otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitwright.frontends.onnx.call import Call
from bitwright.frontends.onnx.symbolic import Entry, Poly
from bitwright.frontends.onnx.values import Val
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import F32
from bitwright.ir.weights import Array

_COORDINATES = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
LARGEST_AXIS = 1 << 14


@dataclass(frozen=True)
class Rule:
    """How a Resize interpolates: the node's attributes."""

    mode: str
    coordinates: str
    rounding: str
    cubic: float
    antialias: bool
    exclude: bool
    extrapolation: float


def _rule(c: Call) -> Rule:
    c.ignore("axes", "keep_aspect_ratio_policy")
    default = "asymmetric" if c.since < 11 else "half_pixel"
    mode, coordinates = c.text("mode", "nearest"), c.text("coordinate_transformation_mode", default)
    rounding = c.text("nearest_mode", "round_prefer_floor" if c.since >= 11 else "floor")
    return Rule(
        mode, coordinates, rounding, c.float_("cubic_coeff_a", -0.75), bool(c.int_("antialias")),
        bool(c.int_("exclude_outside")), c.float_("extrapolation_value"),
    )  # fmt: skip


def _resize(c: Call) -> Val:
    x, rule = c.x(), _rule(c)
    if rule.mode not in ("nearest", "linear", "cubic"):
        raise InvalidInput(f"mode is {rule.mode!r}")
    axes = c.axes(c.ints("axes") or range(x.rank), x.rank)
    roi, scales, sizes = _operands(c, x, axes)
    changed = [a for a in range(x.rank) if scales[a] != 1.0 or sizes[a] is not None or roi[a] != (0.0, 1.0)]
    target = {a: c.size(x, a) if sizes[a] is None else int(sizes[a] or 0) for a in changed}
    if max(target.values(), default=0) > LARGEST_AXIS:
        raise c.refuse(f"a resize to {target}")
    exact = all(float(target[a]) == c.size(x, a) * scales[a] for a in changed)
    plain = not rule.antialias and not rule.exclude and rule.coordinates in _COORDINATES
    if plain and 3 <= x.rank <= 5 and all(a >= 2 for a in changed) and (exact or rule.coordinates != "align_corners"):
        space = range(2, x.rank)
        op = ops.Resize(
            tuple(target[a] if a in changed else c.size(x, a) for a in space), tuple(scales[a] for a in space),
            rule.mode, rule.coordinates, rule.rounding, rule.cubic,
        )  # fmt: skip
        return c.emit(op, x)
    for a in changed:
        x = _along(c, x, a, rule, scales[a], target[a], roi[a])
    return x


Plan = tuple[list[tuple[float, float]], list[float], list[int | None]]


def _operands(c: Call, x: Val, axes: Sequence[int]) -> Plan:
    """roi, scale and new size (None: as it is) of every axis of x."""
    at = (None, 1, None) if c.since < 11 else (1, 2, 3)
    given = [None if i is None or c.value(i) is None or c.x(i).type.size == 0 else i for i in at]
    if (given[1] is None) == (given[2] is None):
        raise InvalidInput("exactly one of scales and sizes must be given")
    wanted = c.entries(given[1] if given[1] is not None else given[2] or 0)
    if len(wanted) != len(axes):
        raise InvalidInput(f"scales or sizes do not fit {len(axes)} axes")
    roi = [(0.0, 1.0)] * x.rank
    if given[0] is not None and c.text("coordinate_transformation_mode") == "tf_crop_and_resize":
        values = c.const(given[0], "roi").reshape(-1).tolist()
        for i, a in enumerate(axes):
            roi[a] = (float(values[i]), float(values[len(axes) + i]))
    make = _from_scales if given[1] is not None else _from_sizes
    scales, sizes = make(c, x, axes, wanted)
    return roi, scales, sizes


def _from_scales(c: Call, x: Val, axes: Sequence[int], wanted: list[Entry]) -> tuple[list[float], list[int | None]]:
    scales, sizes = [1.0] * x.rank, [None] * x.rank  # type: tuple[list[float], list[int | None]]
    for a, s in zip(axes, wanted, strict=True):
        if isinstance(s, Poly) or not s > 0:
            raise InvalidInput(f"a scale of {s}")
        if s != 1:
            scales[a], sizes[a] = float(s), int(np.floor(c.size(x, a) * np.float64(s)))
    return scales, sizes


def _from_sizes(c: Call, x: Val, axes: Sequence[int], wanted: list[Entry]) -> tuple[list[float], list[int | None]]:
    scales, sizes = [1.0] * x.rank, [None] * x.rank  # type: tuple[list[float], list[int | None]]
    policy = c.text("keep_aspect_ratio_policy", "stretch")
    target = {a: w for a, w in zip(axes, wanted, strict=True) if w != x.dims[a] or policy != "stretch"}
    if any(isinstance(w, Poly) for w in target.values()):
        raise c.refuse("a resize to a symbolic size")
    ratios = {a: int(w) / c.size(x, a) for a, w in target.items()}  # type: ignore[arg-type]
    if policy != "stretch":
        same = (min if policy == "not_larger" else max)(ratios.values())
        target = {a: int(np.floor(same * c.size(x, a) + 0.5)) for a in target}
        ratios = dict.fromkeys(target, same)
    for a, w in target.items():
        scales[a], sizes[a] = ratios[a], int(w)  # type: ignore[arg-type]
    return scales, sizes


def _along(c: Call, x: Val, axis: int, rule: Rule, scale: float, size: int, roi: tuple[float, float]) -> Val:
    """Resize one axis by a matrix (a table look-up when every row has a single one)."""
    if c.size(x, axis) > LARGEST_AXIS:
        raise c.refuse(f"a resize of {x.type}")
    at, outside = _positions(rule, c.size(x, axis), scale, size, roi)
    rows = np.stack([_row(rule, p, c.size(x, axis), scale) for p in at]) if size else np.zeros((0, c.size(x, axis)))
    rows[outside] = 0.0
    one_hot = bool(((rows != 0).sum(1) == 1).all() and (rows.max(1, initial=1.0) == 1).all())
    if one_hot:
        return c.emit(ops.Gather(axis), x, c.literal(rows.argmax(1)))
    wide = x if x.type.dtype.is_float else c.cast(x, F32)
    dtype = wide.type.dtype
    perm = [i for i in range(x.rank) if i != axis] + [axis]
    y = c.emit(ops.Linear(), c.transpose(wide, perm), c.literal(rows, dtype))
    if outside.any() and rule.extrapolation:
        y = c.add(y, c.literal(outside * rule.extrapolation, dtype))
    y = c.transpose(y, np.argsort(perm).tolist())
    return y if wide is x else c.cast(c.unary("round", y), x.type.dtype)


def _positions(rule: Rule, n: int, scale: float, size: int, roi: tuple[float, float]) -> tuple[Array, Array]:
    """Where each output reads, in input coordinates, and which outputs lie outside (tf_crop_and_resize)."""
    i, width = np.arange(size, dtype=np.float64), scale * n
    nowhere = np.zeros(size, bool)
    match rule.coordinates:
        case "align_corners":
            return (i * 0 if width == 1 else i * (n - 1) / (width - 1)), nowhere
        case "asymmetric":
            return i / scale, nowhere
        case "pytorch_half_pixel" if width == 1:
            return i * 0, nowhere
        case "half_pixel" | "pytorch_half_pixel":
            return (i + 0.5) / scale - 0.5, nowhere
        case "half_pixel_symmetric":
            return n / 2 * (1 - size / width) + (i + 0.5) / scale - 0.5, nowhere
        case "tf_crop_and_resize":
            step = (roi[1] - roi[0]) * (n - 1)
            at = (i * 0 + step / 2 if width == 1 else i * step / (width - 1)) + roi[0] * (n - 1)
            return at, (at < 0) | (at > n - 1)
    raise InvalidInput(f"coordinate_transformation_mode is {rule.coordinates!r}")


def _row(rule: Rule, at: float, n: int, scale: float) -> Array:
    """Weights of the n inputs for the output that reads position ``at``."""
    if rule.mode == "nearest":
        pick = {"floor": np.floor(at), "ceil": np.ceil(at), "round_prefer_floor": np.ceil(at - 0.5),
                "round_prefer_ceil": np.floor(at + 0.5)}[rule.rounding]  # fmt: skip
        return np.asarray(np.arange(n) == min(max(pick, 0), n - 1), np.float64)
    shrink = min(scale, 1.0) if rule.antialias else 1.0
    reach = (1 if rule.mode == "linear" else 2) / shrink
    taps = np.arange(int(np.floor(at - reach)) + 1, int(np.floor(at)) + int(np.ceil(reach)) + 1)
    distance = np.abs(taps - at) * shrink
    weights = np.clip(1 - distance, 0, 1) if rule.mode == "linear" else _cubic(distance, rule.cubic)
    if rule.exclude:
        weights = np.where((taps >= 0) & (taps < n), weights, 0.0)
    if rule.exclude or rule.antialias:
        weights = weights / weights.sum()
    row = np.zeros(n)
    np.add.at(row, np.clip(taps, 0, n - 1), weights)
    return row


def _cubic(d: Array, a: float) -> Array:
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _upsample(c: Call) -> Val:
    x = c.x()
    given = c.floats("scales") if c.since < 9 else tuple(c.const(1, "scales").reshape(-1).tolist())
    if given is None:  # operator set 1
        given = (1.0, 1.0, c.float_("height_scale", 1.0), c.float_("width_scale", 1.0))
    mode = {"nearest": "nearest", "linear": "linear", "bilinear": "linear"}.get(c.text("mode", "nearest"))
    if mode is None or len(given) != x.rank or min(given) < 1:
        raise InvalidInput(f"scales {given}, mode {c.text('mode')!r} for {x.type}")
    rule = Rule(mode, "asymmetric", "floor", -0.75, False, False, 0.0)
    if given[:2] == (1.0, 1.0) and 3 <= x.rank <= 5:
        size = tuple(int(np.floor(c.size(x, 2 + i) * s)) for i, s in enumerate(given[2:]))
        if max(size) > LARGEST_AXIS:
            raise c.refuse(f"a resize to {size}")
        return c.emit(ops.Resize(size, given[2:], mode, "asymmetric", "floor"), x)
    for a, s in enumerate(given):
        if s != 1:
            x = _along(c, x, a, rule, s, int(np.floor(c.size(x, a) * s)), (0.0, 1.0))
    return x


TABLE = {("", "Resize"): _resize, ("", "Upsample"): _upsample}
