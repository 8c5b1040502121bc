"""Tables and plot of accuracy against the width of the accumulator, for accumulator_accuracy.py."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tables
import torch

import bitwright as bw

STEM = "accumulator_accuracy"
WIDTHS = (32, 16, 14, 12, 10)
ENCODER_WIDTHS, CONSTRAINED_ENCODER = (32, 20, 18, 16, 14), (20, 18, 16)
SCHEMES = {
    "int8": "int8",
    "W4A4": "observe-ranges{also=4}, quantize-weights{bits=4 rounding=gptq}, quantize-int8{bits=4}",
}
NEW, CALIBRATION = 8, 32
"""Sentences to judge by, and to calibrate with."""
BATCH = 64
LABELS = {"a2q+": "constrained (A2Q+)", "axe-gptq": "constrained (AXE)", "trained": "trained (A2Q+)"}
ENCODER = "MiniLM sentence encoder"


@dataclass(frozen=True)
class Sums:
    """A small-float accumulator: formats of products and sums."""

    name: str
    bits: int
    product: str
    acc: str


FORMATS = (
    Sums("M10E5, bias 16", 16, "f5m10b16", "f5m10b16"),
    Sums("M7E4, biases 12 and 10", 12, "f4m7b12", "f4m7b10"),
    Sums("M6E5, bias 16", 12, "f5m6b16", "f5m6b16"),
    Sums("M4E3, biases 7 and 5", 8, "f3m4b7", "f3m4b5"),
)


@dataclass
class Results:
    """Percent of the test images told right, or mean cosine to the float vectors; how they were measured."""

    scheme: str = "int8"
    images: int = 450
    steps: int = 24
    date: str = ""
    minutes: float = 0.0
    float_: float = 0.0
    tuned_float: float = 0.0
    integers: dict[int, dict[str, float]] = field(default_factory=dict)
    floats: dict[str, dict[str, float]] = field(default_factory=dict)


def told(title: str, r: Results) -> str:
    """What the figures of a section are."""
    when = f"Measured {r.date[:10]}{f' in {r.minutes:.0f} minutes' if r.minutes else ''}."
    if title == ENCODER:
        return (
            f"Mean cosine to the vectors of the float model, over {r.images} sentences that no pass has seen; "
            f"calibration: {CALIBRATION} other sentences. {when}"
        )
    tuned = (
        f", and {r.tuned_float:.1f} after the same {r.steps} steps of fine-tuning with exact sums" if r.floats else ""
    )
    return (
        f"Percent of {r.images} test images told right (one image is {100 / r.images:.2f}); float: {r.float_:.1f}"
        f"{tuned}. {when}"
    )


def text_of(title: str, r: Results) -> str:
    """A section: what it is, and one or two Markdown tables."""
    places = 4 if title == ENCODER else 1
    columns = list(dict.fromkeys(c for row in r.integers.values() for c in row))
    parts = [
        tables.markdown(
            [f"{r.scheme}, bits of the sums", *(LABELS.get(c, c) for c in columns)],
            [[b, *(f"{row[c]:.{places}f}" if c in row else "" for c in columns)] for b, row in r.integers.items()],
        )
    ]
    kinds = list(dict.fromkeys(k for row in r.floats.values() for k in row))
    widths = {s.name: s.bits for s in FORMATS}
    if kinds:
        rows = [
            [n, widths[n], *(f"{row[k]:.{places}f}" if k in row else "" for k in kinds)] for n, row in r.floats.items()
        ]
        parts.append(tables.markdown(["small-float sums", "bits", *kinds], rows))
    return f"## {title}\n\n{told(title, r)}\n\n" + "\n".join(parts)


def plot(results: dict[str, Results], path: Path) -> None:
    """Accuracy against bits of the accumulator, one panel a section."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wide = min(3, len(results))
    figure, axes = plt.subplots(-(-len(results) // wide), wide, squeeze=False)
    figure.set_size_inches(5 * wide, 3.8 * len(axes))
    styles = {"wrap": "o--", "saturate": "s--", "a2q+": "^-", "axe-gptq": "v-", "trained": "d-"}
    for axis, (title, r) in zip(axes.flat, results.items(), strict=False):
        bits = sorted(b for b in r.integers if b < 32)
        for name, style in styles.items():
            if spots := [(b, r.integers[b][name]) for b in bits if name in r.integers[b]]:
                axis.plot(*zip(*spots, strict=True), style, label=LABELS.get(name, name))
        for kind, marker in (("zero-shot", "x"), ("fine-tuned", "*")):
            spots = [(s.bits, r.floats[s.name][kind]) for s in FORMATS if kind in r.floats.get(s.name, {})]
            if spots:
                axis.scatter(*zip(*spots, strict=True), marker=marker, s=70, zorder=3, label=f"small float, {kind}")
        axis.axhline(r.float_, color="grey", linewidth=0.8, label="float")
        if exact := r.integers.get(32, {}).get("wrap"):
            axis.axhline(exact, color="grey", linewidth=0.8, linestyle=":", label="exact sums")
        low = min([*bits, *(s.bits for s in FORMATS if s.name in r.floats)], default=8)
        axis.set(
            title=title if r.scheme in title else f"{title}, {r.scheme}",
            xlabel="bits of the accumulator",
            xticks=range(low, max(bits, default=16) + 1, 2),
        )
        axis.set_ylabel("mean cosine to float" if title == ENCODER else "test images told right, %")
    axes.flat[0].legend(fontsize=7)
    for axis in list(axes.flat)[len(results) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def stored() -> dict[str, Results]:
    """Sections of the results file."""
    path = tables.RESULTS / f"{STEM}.json"
    if not path.exists():
        return {}
    kept: dict[str, Any] = json.loads(path.read_text())
    found = {t: Results(**r) for t, r in kept["results"].items()}
    for r in found.values():
        r.integers, r.date = {int(b): row for b, row in r.integers.items()}, r.date or kept["environment"]["date"]
    return found


def merged(one: Results, two: Results) -> Results:
    """Two parts of one section."""
    bits = {*one.integers, *two.integers}
    order = ("wrap", "saturate", *LABELS)
    rows = {b: one.integers.get(b, {}) | two.integers.get(b, {}) for b in sorted(bits, reverse=True)}
    return replace(
        one,
        integers={b: {k: row[k] for k in order if k in row} for b, row in rows.items()},
        floats=one.floats | two.floats,
        tuned_float=max(one.tuned_float, two.tuned_float),
        minutes=max(one.minutes, two.minutes),
        date=max(one.date, two.date),
    )


def write(shown: dict[str, Results]) -> None:
    """The results file, as far as it is known, and the plot."""
    env = tables.environment({"torch": torch.__version__, "bitwright": bw.__version__})
    method = (
        "Accuracy, not speed: sums emulated bit for bit; seeds fix every figure. Integer registers start from the zero "
        "point's share and add products of codes; constrained weights are checked to give exact sums in them. "
        "Attention stays float; products of M10E5 and M6E5 have the sums' format. Fine-tuning: steps of "
        f"{BATCH} images, the last quarter with underflow. W4A4: `{SCHEMES['W4A4']}`. "
        "The first line is of the last run; parts that it did not run keep their date."
    )
    text = tables.heading("Accuracy and accumulators", env, method) + "\n"
    text += "\n".join(text_of(t, r) for t, r in shown.items())
    text += f"\n![accuracy against bits]({STEM}.png)\n"
    tables.save(STEM, text, {"environment": env, "results": {t: vars(r) for t, r in shown.items()}})
    plot(shown, tables.RESULTS / f"{STEM}.png")
