"""What ``bitwright advise`` prints: the whole model, its layers by form, and the plan of a budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console, Group
from rich.table import Table

from bitwright import cli_show
from bitwright.advice import OPTIONS, PAYS, Advice
from bitwright.advice_plan import Plan
from bitwright.runtime import units

_FIRST = ("int8", "2:4", "2:8", "4 bit", "1:4 4x4", "bf16", "2:16", "2 bit", "2:4 /64", "1:4", "2:4 4x4")
"""Options by how much one wants to see them where a console is too narrow for all."""
_LAYER = 30
_CELL = 9
_NAMED = 8


def whole(rows: Sequence[Advice]) -> Table:
    """If every layer took an option (int8 where it has no such kernel, float where not even that)."""
    base = sum(r.seconds for r in rows)
    float_bytes = sum(r.bytes.get("float", 0.0) for r in rows)

    def seconds(option: str) -> float:
        return sum(r.seconds / r.gains.get(option, r.gains.get("int8", 1.0)) for r in rows)

    lines = [["float", units.seconds(base), "", "", units.size(float_bytes), "float"]]
    for option in OPTIONS:
        able = [r for r in rows if option.name in r.gains]
        if not able:
            continue
        took = seconds(option.name)
        size = sum(r.bytes.get(option.name, r.bytes.get("int8", r.bytes.get("float", 0.0))) for r in rows)
        over = "" if option.bits > 8 else f"{seconds('int8') / took:.2f}x"
        lines.append([option.name, units.seconds(took), f"{base / took:.2f}x", over, units.size(size), option.recipe])
    heads = ["every layer as", ">time", ">over float", ">over int8", ">weights", "recipe"]
    return cli_show.table(heads, lines, title="Contractions of the whole model")


def layers(rows: Sequence[Advice], width: int) -> tuple[Table, str]:
    """One row per form of contraction, and what was left out of the table for want of width."""
    offered = [o.name for o in OPTIONS if any(o.name in r.gains for r in rows)]
    room = max(1, (width - _LAYER - 62) // _CELL)
    wanted = [n for n in _FIRST if n in offered][:room]
    shown = [n for n in offered if n in wanted]
    ordered = sorted(rows, key=lambda r: r.form)
    forms = [list(same) for _, same in groupby(ordered, key=lambda r: r.form)]
    forms.sort(key=lambda same: -sum(r.share for r in same))
    cells = []
    for same in forms:
        r = same[0]
        name = r.layer if len(r.layer) <= _LAYER else f"...{r.layer[3 - _LAYER :]}"
        cells.append([
            name, str(len(same)), r.shape, units.seconds(r.seconds), units.percent(sum(x.share for x in same)),
            *(f"{r.gains[n]:.2f}x" if n in r.gains else "" for n in shown), r.reason,
        ])  # fmt: skip
    heads = ["layer", ">of form", "weight", ">float", ">share", *(f">{n}" for n in shown), "verdict"]
    left = [n for n in offered if n not in shown]
    note = f"not shown for want of width: {', '.join(left)}" if left else ""
    return cli_show.table(heads, cells, title="Layers, by form (gain over float)"), note


def plan(found: Plan) -> Group:
    """The choices of a budget; layers of the same choice stand in one row."""
    lines = []
    for choice in dict.fromkeys(r.choice for r in found.rows):
        same = [r for r in found.rows if r.choice == choice]
        lines.append([
            choice, str(len(same)), f"{sum(r.cost for r in same):.2%}", f"{sum(r.loss for r in same):.3g}",
            ", ".join([r.layer for r in same[:_NAMED]] + [f"and {len(same) - _NAMED} more"] * (len(same) > _NAMED)),
        ])  # fmt: skip
    amount = {"size": units.size, "latency": units.seconds}.get(found.kind, lambda v: f"{v:.3g}")
    total = (
        f"{found.kind} {amount(found.cost * found.whole)}, {found.cost:.1%} of float's {amount(found.whole)}; loss "
        f"{found.loss:.3g}\n{found.basis}\nrecipe: {found.recipe}"
    )
    heads = ["choice", ">layers", f">{found.kind}", ">loss", "which"]
    return Group(cli_show.table(heads, lines, title=f"Plan for {found.budget}"), total)


def show(console: Console, rows: Sequence[Advice], found: Plan | None) -> None:
    """Print everything; narrow consoles get fewer options."""
    if not rows:
        console.print("the model has no contraction: nothing to advise", markup=False)
        return
    table, note = layers(rows, console.width)
    console.print(whole(rows))
    console.print(table)
    if note:
        console.print(note, markup=False)
    able = [r for r in rows if r.best]
    console.print(
        f"{len(able)} of {len(rows)} contractions gain at least {PAYS:g}x. Gains are predictions less 15 %, of "
        "contractions alone; what is between them stays as it is. /64: one pattern for 64 outputs; 4x4: blocks of four "
        "inputs, one pattern for four outputs.", markup=False,
    )  # fmt: skip
    if found is not None:
        console.print(plan(found))
