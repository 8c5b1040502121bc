"""Reports and lists as terminal tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitwright.ir.errors import InvalidInput, did_you_mean
from bitwright.runtime import units
from bitwright.runtime.html import formats_text, kept_text, rebuilt_text
from bitwright.runtime.plots import FAMILIES, family, pass_text, title

if TYPE_CHECKING:
    from bitwright.advice import Advice
    from bitwright.comparison import Comparison, Row
    from bitwright.runtime.program import Program
    from bitwright.runtime.report import Layer, Report

_PIPE_WIDTH = 200
_STYLES = {"float": "", "dense": "blue", "sparse": "dark_orange"}


def console(*, stderr: bool = False) -> Console:
    """A console; into a file or pipe it is wide, so that nothing is cut."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PIPE_WIDTH, highlight=False, soft_wrap=False)


def table(heads: Sequence[str], rows: Iterable[Sequence[str | Text]], *, title: str = "") -> Table:
    """A plain table; a head that starts with ``>`` is a column of numbers, the last column takes the rest."""
    out = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for head in heads:
        number = head.startswith(">")
        out.add_column(head.removeprefix(">"), justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        out.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return out


def shape_text(shape: Sequence[int | str]) -> str:
    """``b x 64 x 8 x 8``."""
    return " x ".join(map(str, shape)) or "scalar"


def layers(report: Report, width: int | None = None) -> Table:
    """One row per layer: what it is, what was done, what it costs.

    Columns nobody filled are left out, and so are the least important ones of a table wider than ``width`` (None: the
    console's); the caption names them.
    """
    rows = report.layers
    columns: list[tuple[str, list[str | Text]]] = [
        ("layer", [Text(title(x), _STYLES[family(x)]) for x in rows]),
        ("operation", [x.op.replace("+", ", ") for x in rows]),
        ("shape", [shape_text(x.shape) if x.shape else "" for x in rows]),
        ("formats", [formats_text(x.formats) for x in rows]),
        ("mask", [_short_pattern(x.pattern) for x in rows]),
        ("accumulator", [x.accumulator.removeprefix("needs ") for x in rows]),
        (">magnitude kept", [kept_text(x) for x in rows]),
        (">layer error", [rebuilt_text(x) for x in rows]),
        (">weight noise, clipped", [_noise(x) for x in rows]),
        (">of loss", [units.percent(x.figure("loss_share")) for x in rows]),
        ("kernel", [x.kernel for x in rows]),
        (">bytes", [units.size(x.bytes) for x in rows]),
        (">predicted", [units.seconds(x.predicted_seconds) for x in rows]),
        (">measured", [units.seconds(x.measured_seconds) for x in rows]),
        (">of limit", [units.percent(x.share_of_limit) for x in rows]),
        (">error", [units.percent(x.error) for x in rows]),
    ]
    used = [(head, cells) for head, cells in columns if any(str(c) not in ("", units.UNKNOWN) for c in cells)]
    shown = _fitting(used, console().width if width is None else width)
    left = [head.removeprefix(">") for head, cells in used if (head, cells) not in shown]
    made = table([h for h, _ in shown], zip(*(cells for _, cells in shown), strict=True), title="Layers")
    if left:
        made.caption = f"not shown for want of width: {', '.join(left)} (inspect --why LAYER, or --html)"
        made.caption_justify = "left"
    return made


_LEAST = (
    ">of loss", ">bytes", ">weight noise, clipped", "shape", ">predicted", "operation", ">layer error", "accumulator",
    ">magnitude kept", "kernel",
)  # fmt: skip
"""Columns in the order in which a narrow console does without them."""
_WRAPS = 34
"""What a cell of text is taken to need: longer ones are folded."""


def _fitting(columns: list[tuple[str, list[str | Text]]], width: int) -> list[tuple[str, list[str | Text]]]:
    def need(head: str, cells: list[str | Text]) -> int:
        longest = max(len(str(c)) for c in (head.removeprefix(">"), *cells))
        return (longest if head.startswith(">") else min(longest, _WRAPS)) + 3  # padding and the space between

    shown = list(columns)
    for head in _LEAST:
        if sum(need(h, cells) for h, cells in shown) <= width:
            break
        shown = [(h, cells) for h, cells in shown if h != head]
    return shown


def _noise(x: Layer) -> str:
    """``21 dB, 0.4 %``: signal over noise of the quantized weights; share of the activations that were clipped."""
    snr, clipped = x.figure("weight_snr_db"), x.figure("saturation")
    parts = ["" if snr is None else f"{snr:.0f} dB", units.percent(clipped) if clipped and clipped >= 5e-4 else ""]
    return ", ".join(p for p in parts if p)


def _short_pattern(pattern: str) -> str:
    """``2:4`` for ``nm<2:4, axis=1>``: the axis is always the reduction here."""
    return pattern.partition("<")[2].split(",")[0].rstrip(">") if pattern.startswith("nm<") else pattern


def reasons(report: Report) -> Table:
    """Why the layers are as they are: each distinct reason once, with the layers it holds for."""
    groups: dict[str, list[str]] = {}
    for x in report.layers:
        for text in (x.reason, *report.notes_of(x)[0]):  # remarks are of one layer each: `--why LAYER` shows them
            if text:
                groups.setdefault(text, []).append(title(x))
    shown = ((text, str(len(names)), _listed(list(dict.fromkeys(names)))) for text, names in groups.items())
    return table(["reason", ">layers", "which"], shown, title="Why")


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def summary(report: Report) -> Text:
    """One line: how many layers are what, their time and bytes."""
    working = [x for x in report.layers if x.operations] or report.layers
    counts = {word: sum(family(x) == kind for x in working) for kind, word in FAMILIES.items()}
    parts = [f"{n} {word}" for word, n in counts.items() if n]
    text = f"{len(working)} layers: {', '.join(parts)}" if parts else "no layers"
    for word, times in (
        ("predicted", [x.predicted_seconds for x in report.layers]),
        ("measured", [x.measured_seconds for x in report.layers]),
    ):
        known = [t for t in times if t is not None]
        if known:
            text += f"; {word} {units.seconds(sum(known))}"
    return Text(text)


def passes(report: Report) -> Table:
    """One row per pass."""
    rows = (
        (
            str(p.index), pass_text(p), units.seconds(p.seconds),
            f"{p.nodes_before} → {p.nodes_after}" if p.changed else "unchanged",
            units.percent(p.error) if p.error is not None else "", "; ".join(p.notes),
        )
        for p in report.passes
    )  # fmt: skip
    return table([">", "pass", ">time", ">operators", ">output error", "notes"], rows, title="Passes")


def refusals(report: Report) -> Table:
    """One row per thing that was asked for and not done."""
    rows = ((r.place, r.pass_name, r.reason, r.cure) for r in report.refusals)
    return table(["layer", "asked of", "why it was not done", "what would make it possible"], rows, title="Refusals")


def program(p: Program) -> Table:
    """What a program takes, gives and needs."""
    m = p.manifest
    rows = [
        ("target", " ".join(t for t in (m.target, m.arch) if t)),
        ("inputs", ", ".join(f"{t.name}: {t}" for t in m.inputs)),
        ("outputs", ", ".join(f"{t.name}: {t}" for t in m.outputs)),
        ("weights", units.size(m.weights_bytes)),
        ("working memory", f"{units.size(m.arena_bytes)} and {units.size(m.scratch_bytes)} a thread"),
        ("processor features", " ".join(m.features) or "none beyond the architecture's"),
        ("made by", ", ".join(f"{k} {v}" for k, v in m.versions.items())),
    ]
    out = Table(box=None, show_header=False, pad_edge=False, title=m.name, title_justify="left", title_style="bold")
    for name, value in rows:
        if value:
            out.add_row(Text(name, "dim"), Text(value))
    return out


def layer_story(report: Report, layer: Layer) -> Table:
    """Everything known about one layer, refusals included."""
    facts: list[tuple[str, str]] = [
        ("operation", layer.op),
        ("written at", layer.origin),
        ("result", shape_text(layer.shape)),
        ("formats", formats_text(layer.formats)),
        ("mask", f"{layer.pattern}, {units.percent(layer.density)} kept" if layer.pattern else "none"),
        ("magnitude kept", kept_text(layer, long=True)),
        ("error of the masked layer", rebuilt_text(layer)),
        ("range of what it reads", _range(layer)),
        ("clipped of it", _clipped(layer)),
        ("signal over noise", _signal(layer)),
        ("share of the expected loss", units.percent(layer.figure("loss_share"))),
        ("accumulator", layer.accumulator),
        ("kernel", layer.kernel),
        ("why", layer.reason),
        *(("note", n) for n in layer.notes),
        ("work", f"{units.count(layer.operations)} operations, {units.size(layer.bytes)}"),
        (
            "time",
            f"{units.seconds(layer.predicted_seconds)} predicted, {units.seconds(layer.measured_seconds)} measured",
        ),
        ("of the limit", units.percent(layer.share_of_limit)),
        ("error", units.percent(layer.error)),
    ]
    for r in report.refusals:
        if r.place in (layer.name, layer.weight):
            facts.append((f"refused by {r.pass_name}", r.reason + (f"; to go on: {r.cure}" if r.cure else "")))
    out = Table(box=None, show_header=False, pad_edge=False, title=layer.name, title_justify="left", title_style="bold")
    for name, value in facts:
        if value and value != units.UNKNOWN:
            out.add_row(Text(name, "dim"), Text(value))
    return out


def _range(x: Layer) -> str:
    low, high = x.figure("low"), x.figure("high")
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}, held as {x.formats.x}"


def _clipped(x: Layer) -> str:
    share = x.figure("saturation")
    return "" if share is None else f"{100 * share:.2g} % of the values in the first calibration rows"


def _signal(x: Layer) -> str:
    found = (("weights", x.figure("weight_snr_db")), ("result", x.figure("output_snr_db")))
    return ", ".join(f"{what} {value:.1f} dB" for what, value in found if value is not None)


def drift(row: Row | None, bound: float, report: Report) -> str:
    """Names the first layer that is too far from the model, and what was done to it."""
    if row is None:
        return f"no layer is further than {units.percent(bound)} from the model"
    layer = next((x for x in report.layers if x.name == row.layer), None)
    made = f" ({formats_text(layer.formats)}, {layer.pattern or 'no mask'})" if layer and layer.formats.x else ""
    where = f", written at {row.origin}" if row.origin else ""
    far = f"first layer further than {units.percent(bound)} from the model"
    return f"{far}: {row.layer}{made}, {units.percent(row.drift)}{where}"


def comparison(result: Comparison) -> Table:
    """One row per layer: error against the reference run of the same compilation, and against the model itself."""
    rows = (
        (
            r.layer, r.origin, f"{r.error:.2g}", units.percent(r.drift),
            Text("ok", "green") if r.ok else Text(f"BAD: over {r.bound:.2g}", "bold red"),
        )
        for r in result.rows
    )  # fmt: skip
    return table(["layer", "written at", ">against the reference", ">against the model", ""], rows)


def certificates(result: Comparison) -> Table:
    """One row per integer contraction: the width its sums need, and whether the packed weights confirm it."""
    rows = (
        (
            x.certificate.value, str(x.certificate), f"{x.certificate.range[0]}..{x.certificate.range[1]}",
            Text("ok", "green") if x.ok else Text(f"BAD: {x.fault}", "bold red"),
        )
        for x in result.certificates
    )  # fmt: skip
    return table(["accumulator", "certificate", "sums", "from the packed weights"], rows)


def advice(rows: Sequence[Advice]) -> Table:
    """One row per contraction: its share of the time, what each choice would gain over float, and the verdict."""
    choices = list(dict.fromkeys(name for r in rows for name in r.gains))
    cells = (
        (
            r.layer, r.shape, units.seconds(r.seconds), units.percent(r.share),
            *(f"{r.gains[c]:.2f}x" if c in r.gains else "" for c in choices), r.reason,
        )
        for r in rows
    )  # fmt: skip
    return table(["layer", "weight", ">float", ">share", *(f">{c}" for c in choices), "verdict"], cells)


def print_report(report: Report, *, with_passes: bool = True) -> None:
    """Passes, refusals, layers, notes and the summary, as tables."""
    out = console()
    if with_passes and report.passes:
        out.print(passes(report))
    if report.refusals:
        out.print(refusals(report))
    if report.layers:
        out.print(layers(report))
        out.print(reasons(report))
    for note in report.notes:
        out.print(note, markup=False)
    out.print(summary(report))


def pass_story(report: Report, name: str | None, diff: bool) -> None:
    """What one pass (None: every pass) did and refused, with text diffs on request."""
    names = [p.name for p in report.passes]
    if name and name not in names:
        raise InvalidInput(f"pass {name!r} did not run{did_you_mean(name, names)} ({', '.join(dict.fromkeys(names))})")
    rows = [p for p in report.passes if name in (None, p.name)]
    refused = [r for r in report.refusals if name in (None, r.pass_name)]
    part = report.model_copy(update={"passes": rows, "refusals": refused})
    out = console()
    out.print(passes(part))
    if refused:
        out.print(refusals(part))
    for row in rows if diff else []:
        if row.changed:
            print(row.diff or f"{row.name} changed weight values only")


def find_layer(report: Report, name: str) -> Layer:
    """The layer of that name or module path, or the only one that holds it; raises :class:`InvalidInput`."""
    names = [n for x in report.layers for n in (x.name, title(x), x.weight) if n]
    exact = [x for x in report.layers if name in (x.name, title(x), x.weight)]
    found = exact or [x for x in report.layers if any(name in n for n in (x.name, title(x), x.weight))]
    if len(found) == 1:
        return found[0]
    if found:
        raise InvalidInput(
            f"{name!r} fits {len(found)} layers: {', '.join(f'{x.name} ({title(x)})' for x in found[:8])}"
        )
    raise InvalidInput(f"no layer is called {name!r}{did_you_mean(name, names)}; `bitwright inspect` lists them")
