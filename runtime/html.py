"""The report as one HTML page that needs nothing else: tables, plots, reasons."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from bitwright.ir.files import save
from bitwright.runtime import plots, units
from bitwright.runtime.html_style import SCRIPT, STYLE
from bitwright.runtime.report import Formats, Layer, Refusal, Report

_DIFF_LIMIT = 20_000
_DIFF_STYLES = {"+": "good", "-": "warn", "@": "empty"}


def write_html(report: Report | Sequence[Report], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Write the page, whole or not at all; several reports stand on one page, one after the other.

    Raises :class:`BitwrightError` when the place cannot be written.
    """
    save(path, page([report] if isinstance(report, Report) else list(report), title))


def page(reports: Sequence[Report], title: str = "") -> str:
    """The whole page as text."""
    name = title or " and ".join(r.model or "program" for r in reports)
    body = "".join(_section(r) for r in reports)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)} · bitwright</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _section(report: Report) -> str:
    machine = report.machine.get("processor") or report.machine.get("cpu") or ""
    where = f" · {machine}" if machine else ""
    return "".join(
        [
            '<header><div class="kicker">bitwright report</div>',
            f"<h1>{escape(report.model or 'program')}</h1>",
            f"<p>compiled for <code>{escape(report.target or 'unknown')}</code>{escape(where)}</p>",
            "</header>",
            _tiles(report),
            _notes(report.notes),
            _times(report),
            '<div class="pair">',
            _speed(report),
            _passes_plot(report),
            "</div>",
            _front(report),
            _layers(report),
            _refusals(report.refusals),
            _passes(report),
            _provenance(report),
        ]
    )


# --- figures at the top --------------------------------------------------------------------------------------


def _tiles(report: Report) -> str:
    layers, tiles = report.layers, []
    measured = [x.measured_seconds for x in layers if x.measured_seconds is not None]
    predicted = [x.predicted_seconds for x in layers if x.predicted_seconds is not None]
    if measured:
        tiles.append(_tile(units.seconds(sum(measured)), "all layers, measured"))
    if predicted:
        tiles.append(_tile(units.seconds(sum(predicted)), "all layers, predicted"))
    if kinds := Counter(plots.family(x) for x in layers if x.operations):
        total = sum(kinds.values())
        tiles.append(_tile(f"{kinds['sparse']} / {total}", "layers sparse"))
        tiles.append(_tile(f"{kinds['sparse'] + kinds['dense']} / {total}", "layers in integers"))
    tiles.append(_tile(str(len(report.refusals)), "refused requests"))
    figures = {k: v for k, v in report.figures.items() if v is not None and not (predicted and "predicted" in k)}
    tiles += [_tile(_figure(name, value), name) for name, value in figures.items()]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _figure(name: str, value: float) -> str:
    if "second" in name or name.endswith("time"):
        return units.seconds(value)
    if "bytes" in name:
        return units.size(value)
    if "share" in name or "error" in name or "accuracy" in name:
        return units.percent(value)
    return f"{value:,.0f}" if value == int(value) else units.significant(value)


def _tile(value: str, label: str) -> str:
    words = label.replace("_", " ").removesuffix(" seconds").replace(" bytes", "")
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(words)}</span></div>'


def _notes(notes: Iterable[str]) -> str:
    items = "".join(f"<p>{escape(n)}</p>" for n in notes)
    return f'<section class="card"><h2>Notes</h2>{items}</section>' if items else ""


# --- plots ----------------------------------------------------------------------------------------------------


def _key(style: str, text: str) -> str:
    return f'<span class="{style}"><i class="key" style="background:currentColor"></i></span>{escape(text)}'


def _legend(layers: Sequence[Layer], *extra: str) -> str:
    present = {plots.family(x) for x in layers}
    keys = [_key(f, text) for f, text in plots.FAMILIES.items() if f in present]
    return f'<div class="legend">{"".join(f"<span>{k}</span>" for k in [*keys, *extra])}</div>'


def _times(report: Report) -> str:
    timed = [x for x in report.layers if plots.seconds_of(x) is not None]
    if not timed:
        return ""
    measured = any(x.measured_seconds is not None for x in timed)
    both = measured and any(x.predicted_seconds is not None for x in timed)
    extra = ("<b>|</b> predicted",) if both else ()
    what = "Measured on this machine" if measured else "Predicted, not measured"
    return (
        f'<section class="card"><h2>Time per layer</h2><p>{what}, in the order the layers run.</p>'
        f"{_legend(timed, *extra)}{plots.layer_bars(timed)}</section>"
    )


def _speed(report: Report) -> str:
    plot = plots.speed_plot(report.layers)
    if not plot:
        return ""
    return (
        '<section class="card"><h2>Speed against the machine&rsquo;s limit</h2>'
        "<p>A dot is a layer; the bar above it is what this machine could do for it.</p>"
        f"{_legend([x for x in report.layers if x.operations])}{plot}</section>"
    )


def _front(report: Report) -> str:
    """What each size or latency would have cost in accuracy, where formats were assigned within a budget."""
    found = report.facts.get("precision-front") or {}
    plot = plots.front_plot([(x, y) for x, y in found["points"]], tuple(found["chosen"])) if found else ""
    if not plot:
        return ""
    rows = "".join(f"<li>{units.percent(x)} at loss {y:.3g}</li>" for x, y in found["points"])
    return (
        f'<section class="card"><h2>Formats: {escape(found["cost_of"])} against loss</h2>'
        "<p>Each dot is the best assignment of its cost; the large one was taken. Loss: what the layers add to the "
        f"model&rsquo;s loss, one at a time.</p>{plot}<details><summary>as figures</summary><ul>{rows}</ul></details>"
        "</section>"
    )


def _passes_plot(report: Report) -> str:
    if not report.passes:
        return ""
    legend = f"<span>{_key('dense', 'changed the graph')}</span><span>{_key('float', 'changed nothing')}</span>"
    return (
        '<section class="card"><h2>Compile time per pass</h2>'
        f"<p>{units.seconds(sum(p.seconds for p in report.passes))} in all.</p>"
        f'<div class="legend">{legend}</div>{plots.pass_bars(report.passes)}</section>'
    )


# --- tables ---------------------------------------------------------------------------------------------------


def _table(heads: Sequence[tuple[str, str]], rows: Iterable[str]) -> str:
    """``heads``: (text, classes); ``n`` is a number; every column sorts."""
    head = "".join(f'<th class="{cls}" data-sort>{escape(text)}</th>' for text, cls in heads)
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(text: str, *, sort: object = None, cls: str = "", small: str = "", more: str = "") -> str:
    key = "" if sort is None else str(sort)
    more = (f"<small>{escape(small)}</small>" if small else "") + more
    inner = text if text else f'<span class="empty">{units.UNKNOWN}</span>'
    return f'<td class="{cls}" data-v="{escape(key)}">{inner}{more}</td>'


def _number(text: str, value: float | None) -> str:
    return _cell("" if value is None else escape(text), sort=value, cls="n")


def formats_text(f: Formats) -> str:
    """``u8 x s8 → s32 → u8``, leaving out what is not there."""
    left = " x ".join(t for t in (f.x, f.w) if t)
    return " → ".join(t for t in (left, f.acc, f.out) if t)


def kept_text(x: Layer, *, long: bool = False) -> str:
    """Share of the weights' magnitude that a mask kept, and of what an unstructured mask of the same count keeps."""
    kept, best = x.figure("kept_magnitude"), x.figure("kept_unstructured")
    if kept is None:
        return ""
    share = f"{100 * kept:.1f} %"
    if not best:
        return share
    ratio = f"{100 * kept / best:.1f} %"
    return f"{share}; {ratio} of what any mask of so many weights can keep" if long else f"{share} ({ratio} of best)"


def rebuilt_text(x: Layer) -> str:
    """Error of a masked layer's result before and after its weights were reconstructed."""
    before, after = x.figure("error_before"), x.figure("error_after")
    if before is None or after is None:
        return ""
    return f"{units.percent(before)} → {units.percent(after)}"


def _mask_text(x: Layer) -> str:
    kept = kept_text(x)
    parts = [
        units.percent(x.density) + " kept" if x.density is not None and x.pattern else "",
        f"magnitude {kept}" if kept else "",
        f"error {text}" if (text := rebuilt_text(x)) else "",
    ]
    return " · ".join(p for p in parts if p)


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    heads = [
        ("layer", ""), ("shape", ""), ("formats", ""), ("mask", ""), ("kernel, and why", ""), ("bytes", "n"),
        ("predicted", "n"), ("measured", "n"), ("of the limit", "n"), ("error", "n"),
    ]  # fmt: skip
    return (
        '<section class="card"><h2>Layers</h2><p>What was done to each, and why. '
        "“Error” is relative to the floating-point model. Select a heading to sort.</p>"
        f"{_table(heads, (_layer_row(x, *report.notes_of(x)) for x in report.layers))}</section>"
    )


def _layer_row(x: Layer, notes: Sequence[str], remarks: Sequence[str]) -> str:
    style = plots.family(x)
    mask = f'<span class="chip {style}">{escape(x.pattern)}</span>' if x.pattern else ""
    below = " · ".join(t for t in (x.op.replace("+", " + "), x.name, plots.place(x)) if t and t != plots.title(x))
    why = " · ".join(t for t in (x.reason, *notes) if t)
    lines = "".join(f"<p><small>{escape(r)}</small></p>" for r in remarks)
    told = f"<details><summary>what passes found</summary>{lines}</details>" if lines else ""
    formats = f'<span class="chip {style}">{escape(text)}</span>' if (text := formats_text(x.formats)) else ""
    cells = [
        _cell(escape(plots.title(x)), sort=plots.title(x), cls="name", small=below),
        _cell(f"<code>{escape(' x '.join(map(str, x.shape)))}</code>" if x.shape else "", sort=x.operations, cls="nw"),
        _cell(formats, sort=text, small=x.accumulator),
        _cell(mask, sort=x.pattern, small=_mask_text(x)),
        _cell(f"<code>{escape(x.kernel)}</code>" if x.kernel else "", sort=x.kernel, small=why, more=told),
        _number(units.size(x.bytes), x.bytes),
        _number(units.seconds(x.predicted_seconds), x.predicted_seconds),
        _number(units.seconds(x.measured_seconds), x.measured_seconds),
        _gauge(x.share_of_limit, style),
        _number(units.percent(x.error), x.error),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _gauge(share: float | None, style: str) -> str:
    if share is None:
        return _cell("", cls="n")
    width = 100 * min(1.0, max(0.0, share))
    bar = f'<span class="gauge {style}"><i style="width:{width:.0f}%"></i></span>'
    return _cell(bar + units.percent(share), sort=share, cls="n")


def _refusals(refusals: Sequence[Refusal]) -> str:
    if not refusals:
        return '<section class="card"><h2>Refusals</h2><p>None: every request was carried out.</p></section>'
    rows = (
        f"<tr>{_cell(escape(r.place), sort=r.place, cls='name')}"
        f"{_cell(f'<code>{escape(r.pass_name)}</code>', sort=r.pass_name)}"
        f"{_cell(escape(r.reason), sort=r.reason)}{_cell(escape(r.cure), sort=r.cure)}</tr>"
        for r in refusals
    )
    heads = [("layer", ""), ("asked of", ""), ("why it was not done", ""), ("what would make it possible", "")]
    return (
        '<section class="card"><h2>Refusals</h2><p>What was asked for and not done, with the reason.</p>'
        f"{_table(heads, rows)}</section>"
    )


def _passes(report: Report) -> str:
    if not report.passes:
        return ""
    rows = (
        f"<tr>{_number(str(p.index), p.index)}"
        f"{_cell(_code(plots.pass_text(p)), sort=p.name, small=' · '.join(p.notes), more=_diff(p.diff))}"
        f"{_number(units.seconds(p.seconds), p.seconds)}"
        f"{_cell(f'{p.nodes_before} → {p.nodes_after}' if p.changed else 'unchanged', sort=p.nodes_after, cls='n')}"
        f"{_number(units.percent(p.error), p.error)}</tr>"
        for p in report.passes
    )
    heads = [("", "n"), ("pass", ""), ("time", "n"), ("operators", "n"), ("output error it caused", "n")]
    return (
        '<section class="card"><h2>Passes</h2><p>In the order they ran. The error of a pass that may change values '
        f"is measured on the calibration data.</p>{_table(heads, rows)}</section>"
    )


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _diff(text: str) -> str:
    """What a pass changed, folded away; a long one is cut with a word on where the rest is."""
    if not text:
        return ""
    cut = text[:_DIFF_LIMIT].rpartition("\n")[0] + "\n... the rest: bitwright inspect --pass NAME --diff"
    lines = (cut if len(text) > _DIFF_LIMIT else text).splitlines()
    marked = (f'<span class="{_DIFF_STYLES.get(t[:1], "")}">{escape(t)}</span>' for t in lines)
    return f"<details><summary>what it changed</summary><pre>{chr(10).join(marked)}</pre></details>"


def _provenance(report: Report) -> str:
    pairs = [*report.machine.items(), *report.versions.items()]
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs)
    return f'<section class="card"><h2>Where the figures come from</h2><dl>{items}</dl></section>' if items else ""
