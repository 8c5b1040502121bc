"""Writes docs/passes.md, targets.md and ops.md from the code; ``--check`` only says whether they are current."""

from __future__ import annotations

import inspect
import sys
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path

from bitwright.cli_lists import gpu_rows, sparse_text
from bitwright.codegen.targets import BUILTIN, CROSS, GPUS
from bitwright.ir import ops
from bitwright.ir.target import LanesRate, Rate, Target
from bitwright.passes._pass import Pass
from bitwright.passes._spec import show_option
from bitwright.passes.pipelines import CANONICAL, RECIPES
from bitwright.passes.registry import PASSES, load
from bitwright.runtime import units

HERE = Path(__file__).resolve().parent
NOTE = "<!-- written by docs/generate.py: run `make docs` after changing the code -->\n"


def passes_page() -> str:
    """Every pass: sentence, options, levels, the rewrite its docstring shows."""
    parts = ["# Passes\n", NOTE]
    parts.append(
        "A pass takes a graph and gives a graph. In text, options stand in braces:"
        ' `nm-mask{pattern=2:4 only="encoder.*"}`; in Python they are fields of the same name.'
        " A pass that cannot do something says so as a refusal with a reason, which the report shows.\n"
    )
    parts.append("## Recipes\n\nNames for lists of passes; a recipe may mix names and passes.\n")
    parts += [f"- `{name}`: {f'`{text}`' if text else 'no pass of its own'}" for name, text in RECIPES.items()]
    parts.append(f"\nEvery compilation begins with\n`{CANONICAL}`.\n")
    folders: dict[str, list[str]] = {}
    for name, place in PASSES.items():
        folders.setdefault(place.partition(".")[0], []).append(name)
    for folder, names in folders.items():
        parts.append(f"## {folder}\n")
        parts += [_pass(load(n), n) for n in sorted(names)]
    return "\n".join(parts)


def _pass(cls: type[Pass], name: str) -> str:
    text = inspect.cleandoc(cls.__doc__ or "")
    words, _, rewrite = text.partition("before:")
    lines = [f"### {name}\n", f"{words.strip()}\n"]
    level = f"{cls.takes} level" if cls.takes == cls.gives else f"from the {cls.takes} to the {cls.gives} level"
    facts = [level, *(["may change values"] if cls.lossy else ["exact"])]
    facts += [f"needs {', '.join(cls.needs)}"] if cls.needs else []
    facts += [f"establishes {', '.join(cls.establishes)}"] if cls.establishes else []
    lines.append(f"*{'; '.join(facts)}; `passes/{PASSES[name].partition(':')[0].replace('.', '/')}.py`*\n")
    if options := fields(cls):
        lines.append("| option | default |\n|---|---|")
        for f in options:
            default = "required" if f.default is MISSING else f"`{show_option(f.default)}`"
            lines.append(f"| `{f.name.rstrip('_')}` | {default} |")
        lines.append("")
    if rewrite:
        before, _, after = rewrite.partition("after:")
        lines.append("```")
        lines += ["before:", textwrap.indent(inspect.cleandoc(before), "  ")]
        lines += ["after:", textwrap.indent(inspect.cleandoc(after), "  "), "```\n"]
    return "\n".join(lines)


def targets_page() -> str:
    """Every built-in target: what it declares."""
    parts = ["# Targets\n", NOTE]
    parts.append(
        "A target is data: it never asks the machine. `host` is this machine: the best of the targets below that it"
        " can run, with its own caches and core count, and speeds measured once. Costs are for one core,"
        " those of a GPU for the whole device.\n"
    )
    parts += [_target(t) for t in (BUILTIN | CROSS | GPUS).values()]
    return "\n".join(parts)


def _target(t: Target) -> str:
    if t.kind == "gpu":
        table = "\n".join(f"| {k} | {v} |" for k, v in gpu_rows(t))
        return f"## {t.name}\n\n| | |\n|---|---|\n{table}\n"
    caches = ", ".join(units.size(b) for b in (t.l1_bytes, t.l2_bytes, t.l3_bytes))
    rows = [
        ("kind, instruction set", f"{t.kind}, {t.isa} (`{t.mcpu if t.mcpu.startswith('-') else f'-mcpu={t.mcpu}'}`)"),
        ("features", " ".join(f"`{f}`" for f in t.features) or "none beyond the architecture's"),
        ("vectors", f"{t.vector_registers} registers of {t.vector_bits} bits"),
        ("caches", caches),
        ("bandwidth", f"{units.size(t.memory_bandwidth)}/s from memory, {units.size(t.cache_bandwidth)}/s from cache"),
        ("activations of integer layers", str(t.activation)),
        *((_rate(r), units.rate(r.ops_per_second)) for r in t.rates),
        ("sparse patterns, gain over dense", sparse_text(t)),
        *((f"{r.x} in lanes, units shared by {r.shared}: time over dense", _lanes(r)) for r in t.lanes),
        ("where the numbers come from", t.source),
    ]
    table = "\n".join(f"| {k} | {v} |" for k, v in rows)
    return f"## {t.name}\n\n| | |\n|---|---|\n{table}\n"


def _lanes(r: LanesRate) -> str:
    return f"{r.slope:g} of the share of 32-bit units that are kept, and {r.fixed:g}"


def _rate(r: Rate) -> str:
    products = f"{r.x} x {r.w} to {r.acc}"
    return f"{products}, sums of {r.terms} products and more" if r.terms > 1 else products


def ops_page() -> str:
    """Every operator: spelling, attributes, meaning."""
    parts = ["# Operators\n", NOTE]
    parts.append(
        "The operators of the IR, at all three levels. Their one meaning is `ir/semantics.py`; the text form prints"
        " attributes that differ from the default.\n"
    )
    parts.append("| operator | attributes | meaning |\n|---|---|---|")
    parts += [_op(c) for c in vars(ops).values() if isinstance(c, type) and issubclass(c, ops.Op) and _own(c)]
    families = {"unary": ops.UNARY, "binary": ops.BINARY, "reduce": ops.REDUCE}
    for name, members in families.items():
        parts.append(f"\n{name.capitalize()}: {', '.join(f'`{m}`' for m in sorted(members))}.")
    return "\n".join(parts) + "\n"


def _own(cls: type[ops.Op]) -> bool:
    return cls is not ops.Op and not cls.__name__.startswith("_")


def _op(cls: type[ops.Op]) -> str:
    own = ", ".join(f"`{f.name}={f.default}`" for f in fields(cls) if f.name != "body").replace("|", "\\|")
    text = " ".join((cls.__doc__ or "").replace("``", "`").replace("|", "\\|").split())
    return f"| `{cls.name or cls.__name__.lower()}` | {own} | {text} |"


def pages() -> dict[str, str]:
    """File name to text."""
    return {"passes.md": passes_page(), "targets.md": targets_page(), "ops.md": ops_page()}


def main() -> int:
    """Write the pages, or with ``--check`` name those that are not current."""
    old = [name for name, text in pages().items() if not _same(HERE / name, text)]
    if "--check" in sys.argv[1:]:
        print(*(f"docs/{name} is not current: run `make docs`" for name in old), sep="\n", end="\n" if old else "")
        return 1 if old else 0
    for name in old:
        (HERE / name).write_text(pages()[name], encoding="utf-8")
        print(f"wrote docs/{name}")
    return 0


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
