"""The report's plots as inline SVG: time per layer, time per pass, speed against what the machine can do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from bitwright.runtime import units
from bitwright.runtime.report import Layer, PassRow

Family = Literal["float", "dense", "sparse"]
FAMILIES: dict[Family, str] = {"float": "floating point", "dense": "dense integer", "sparse": "sparse"}
_MOST = 36
_LONGEST = 34


def family(layer: Layer) -> Family:
    """What a layer is drawn as: sparse when it has a pattern, else by its weights' or input's format."""
    if layer.pattern:
        return "sparse"
    word = layer.formats.w or layer.formats.x or layer.formats.out
    return "dense" if word[:1] in ("s", "u", "t") or word.startswith("bipolar") else "float"


def title(layer: Layer) -> str:
    """What a user calls a layer: its module path or ONNX node where known, else the name of its value."""
    head = layer.origin.partition(", ")[0].partition(" (")[0]
    return head if head and ".py:" not in head else layer.name


def place(layer: Layer) -> str:
    """The source line a layer was written at, if known."""
    return next((t for t in reversed(layer.origin.split(", ")) if ".py:" in t), "")


def seconds_of(layer: Layer) -> float | None:
    """The measured time, else the predicted one."""
    return layer.measured_seconds if layer.measured_seconds is not None else layer.predicted_seconds


@dataclass(frozen=True, slots=True)
class _Bar:
    label: str
    value: float
    text: str
    style: str
    hint: str
    tick: float | None = None


def _shorten(text: str) -> str:
    """The end of a long name says most: ``encoder.layer.3.attention.query``."""
    return text if len(text) <= _LONGEST else "…" + text[-_LONGEST + 1 :]


def _bars(bars: Sequence[_Bar], left: int, width: int) -> str:
    """Horizontal bars with their value at the end; ``tick`` marks a second value on the same scale."""
    row, gap = 18, 5
    span = max((max(b.value, b.tick or 0.0) for b in bars), default=0.0) or 1.0
    scale = (width - left - 110) / span
    parts = []
    for i, b in enumerate(bars):
        y = i * (row + gap)
        w = max(1.5, b.value * scale)
        parts.append(
            f'<g class="{b.style}"><title>{escape(b.hint)}</title>'
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(_shorten(b.label))}</text>'
            f'<rect class="mark" x="{left}" y="{y + 2}" width="{w:.1f}" height="{row - 4}" rx="3"/>'
        )
        end = w
        if b.tick is not None:
            x = left + b.tick * scale
            end = max(w, b.tick * scale)
            parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + row}"/>')
        parts.append(f'<text class="v" x="{left + end + 8:.1f}" y="{y + 13}">{escape(b.text)}</text></g>')
    height = len(bars) * (row + gap)
    return _svg(width, height, parts)


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    """The drawing, never much larger than its text was made for."""
    style = f"max-width:{1.2 * width:.0f}px"
    return f'<svg viewBox="0 0 {width} {height}" style="{style}" role="img">{"".join(parts)}</svg>'


def layer_bars(layers: Sequence[Layer]) -> str:
    """Time per layer in the order they run; of a large model the slowest, the rest added up in one bar."""
    timed = [(layer, t) for layer in layers if (t := seconds_of(layer)) is not None]
    shown = {id(layer) for layer, _ in sorted(timed, key=lambda p: -p[1])[:_MOST]}
    bars = [_layer_bar(layer, t) for layer, t in timed if id(layer) in shown]
    rest = [t for layer, t in timed if id(layer) not in shown]
    if rest:
        text = f"{len(rest)} others"
        bars.append(_Bar(text, sum(rest), units.seconds(sum(rest)), "float", f"{text} together"))
    return _bars(bars, 230, 1000)


def _layer_bar(layer: Layer, value: float) -> _Bar:
    predicted = layer.predicted_seconds if layer.measured_seconds is not None else None
    hint = f"{layer.name}, {layer.op}: {units.seconds(layer.measured_seconds)} measured"
    hint += f", {units.seconds(layer.predicted_seconds)} predicted, kernel {layer.kernel or 'none'}"
    return _Bar(title(layer), value, units.seconds(value), family(layer), hint, predicted)


def pass_text(row: PassRow) -> str:
    """A pass as it is written in a recipe."""
    return f"{row.name}{{{row.options}}}" if row.options else row.name


def pass_bars(passes: Sequence[PassRow]) -> str:
    """Compile time per pass."""
    return _bars(
        [
            _Bar(p.name, p.seconds, units.seconds(p.seconds), "dense" if p.changed else "float", pass_text(p))
            for p in passes
        ],
        170,
        560,
    )


def front_plot(points: Sequence[tuple[float, float]], chosen: tuple[float, float]) -> str:
    """Loss over cost (a share of float) of the best assignments, a line of dots, and the one that was taken.

    Both axes are logarithmic: points without loss or cost are left out. Empty with fewer than two points.
    """
    shown = sorted({(x, y) for x, y in points if x > 0 and y > 0})
    if len(shown) < 2:
        return ""
    taken = [chosen] if min(chosen) > 0 else []
    xs = _axis([x for x, _ in (*shown, *taken)], 84, 552)
    ys = _axis([y for _, y in (*shown, *taken)], 298, 8)
    parts = _grid(xs, ys, units.percent, lambda y: f"{y:.3g}")
    parts.append('<text class="small" x="318" y="336" text-anchor="middle">cost, share of the float model</text>')
    line = " ".join(f"{xs.at(x):.1f},{ys.at(y):.1f}" for x, y in shown)
    parts.append(f'<polyline class="grid" fill="none" points="{line}"/>')
    for style, radius, dots in (("float", 4, shown), ("sparse", 7, taken)):
        for x, y in dots:
            hint = f"{'taken: ' if style == 'sparse' else ''}{units.percent(x)} at loss {y:.3g}"
            dot = f'<circle class="dot" cx="{xs.at(x):.1f}" cy="{ys.at(y):.1f}" r="{radius}"/>'
            parts.append(f'<g class="{style}"><title>{escape(hint)}</title>{dot}</g>')
    return _svg(560, 342, parts)


def _grid(xs: _Axis, ys: _Axis, x_text: Callable[[float], str], y_text: Callable[[float], str]) -> list[str]:
    """Lines and figures of both axes."""
    parts = []
    for x in xs.ticks():
        at = xs.at(x)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{ys.end}" y2="{ys.start}"/>')
        parts.append(f'<text x="{at:.1f}" y="{ys.start + 18}" text-anchor="middle">{x_text(x)}</text>')
    for y in ys.ticks():
        at = ys.at(y)
        parts.append(f'<line class="grid" x1="{xs.start}" x2="{xs.end}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{xs.start - 8}" y="{at + 4:.1f}" text-anchor="end">{y_text(y)}</text>')
    return parts


@dataclass(frozen=True, slots=True)
class _Point:
    layer: Layer
    intensity: float
    speed: float
    limit: float | None


def _points(layers: Sequence[Layer]) -> list[_Point]:
    points = []
    for layer in layers:
        t, ops, size = layer.measured_seconds, layer.operations, layer.bytes
        if t and ops and size:
            limit = ops / t / layer.share_of_limit if layer.share_of_limit else None
            points.append(_Point(layer, ops / size, ops / t, limit))
    return points


@dataclass(frozen=True, slots=True)
class _Axis:
    """A logarithmic axis: values onto ``start``..``end``, with round ticks."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1,) if self.high / self.low > 300 else (1, 3) if self.high / self.low > 20 else (1, 2, 5)
        return [v for e in powers for m in steps if self.low <= (v := m * 10.0**e) <= self.high]


def _axis(values: Sequence[float], start: float, end: float) -> _Axis:
    return _Axis(min(values) / 1.7, max(values) * 1.7, start, end)


def speed_plot(layers: Sequence[Layer]) -> str:
    """Each layer's speed over its operations per byte, and the machine's limit for it; empty without figures."""
    points = _points(layers)
    if not points:
        return ""
    left, right, top, bottom = 84, 552, 8, 298
    xs = _axis([p.intensity for p in points], left, right)
    ys = _axis([v for p in points for v in (p.speed, p.limit or p.speed)], bottom, top)
    parts = _grid(xs, ys, units.count, units.rate)
    middle = (left + right) / 2
    parts.append(f'<text class="small" x="{middle}" y="{bottom + 38}" text-anchor="middle">operations per byte</text>')
    parts += [_point(p, xs.at(p.intensity), ys.at(p.speed), ys.at(p.limit) if p.limit else None) for p in points]
    return _svg(560, bottom + 44, parts)


def _point(p: _Point, x: float, y: float, limit: float | None) -> str:
    hint = f"{title(p.layer)}: {units.rate(p.speed)}"
    stem = ""
    if limit is not None and p.limit is not None:
        hint += f", limit {units.rate(p.limit)} ({units.percent(p.layer.share_of_limit)})"
        stem = f'<line class="stem" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{limit:.1f}"/>'
        stem += f'<line class="cap" x1="{x - 6:.1f}" x2="{x + 6:.1f}" y1="{limit:.1f}" y2="{limit:.1f}"/>'
    return (
        f'<g class="{family(p.layer)}"><title>{escape(hint)}</title>{stem}'
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="6"/></g>'
    )
