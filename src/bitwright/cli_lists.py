"""``bitwright targets | passes | recipes``: what exists, one line each, from the code itself."""

from __future__ import annotations

from dataclasses import MISSING, fields

from bitwright import cli_show
from bitwright.ir.target import Target
from bitwright.runtime import units


def targets() -> None:
    """A row per built-in target, and this machine's."""
    from bitwright.codegen.targets import BUILTIN, CROSS, GPUS, SOURCES, host

    rows = [target_row(t) for t in (host(calibrate=False), *(BUILTIN | CROSS | GPUS | SOURCES).values())]
    cli_show.console().print(cli_show.table(["target", ">vector", ">peak", "sparse patterns", "where from"], rows))


def target_row(t: Target) -> tuple[str, ...]:
    """Name, vector width, best dense speed of one core, sparse patterns with their gain, source."""
    best = max((r for r in t.rates if r.terms == 1), key=lambda r: r.ops_per_second)
    gains = sparse_text(t)
    peak = f"{units.rate(best.ops_per_second)} {best.x}x{best.w}"
    return t.name, f"{t.vector_bits} bit", peak, gains, t.source


def gpu_rows(t: Target) -> list[tuple[str, str]]:
    """What a GPU target declares."""
    return [
        ("machine code", f"`{t.mcpu}`, by NVRTC; no device is needed to compile"),
        ("shared memory of a block, second-level cache", f"{units.size(t.l1_bytes)}, {units.size(t.l2_bytes)}"),
        ("bandwidth", f"{units.size(t.memory_bandwidth)}/s from memory, {units.size(t.cache_bandwidth)}/s from cache"),
        ("a launch", units.seconds(t.launch_seconds)),
        ("activations of integer layers", str(t.activation)),
        *((f"{r.x} x {r.w} to {r.acc}", units.rate(r.ops_per_second)) for r in t.rates),
        ("sparse patterns, gain over dense", sparse_text(t)),
        ("where the numbers come from", t.source),
    ]


def sparse_text(t: Target) -> str:
    """``u8: 2:4 x1.40, 1:4 x2.70; f32: ...``: expected gain over dense by activation format, and where outputs share a
    pattern by their number (``u8 shared by 64: ...``)."""
    kinds = dict.fromkeys((s.x, s.shared) for s in t.sparse)
    heads = {(x, n): f"{x} shared by {n}" if n > 1 else str(x) for x, n in kinds}
    lists = (
        f"{heads[kind]}: " + ", ".join(f"{s.keep}:{s.group} x{s.gain:.3g}" for s in t.sparse if (s.x, s.shared) == kind)
        for kind in kinds
    )
    return "; ".join(lists) or "none pays"


def passes() -> None:
    """A row per pass: options with their defaults, and its first sentence."""
    from bitwright.passes.registry import PASSES, describe, load

    rows = [(name, load(name).takes, options_text(name), describe(name)) for name in PASSES]
    cli_show.console().print(cli_show.table(["pass", "level", "options", "what it does"], rows))


def options_text(name: str) -> str:
    """``pattern=2:4 only=*``: every option with its default."""
    from bitwright.passes._spec import show_option
    from bitwright.passes.registry import load

    return " ".join(
        f"{f.name.rstrip('_')}={'...' if f.default is MISSING else show_option(f.default)}" for f in fields(load(name))
    )


def recipes() -> None:
    """A row per recipe."""
    from bitwright.passes.pipelines import RECIPES

    rows = [(name, text or "nothing beyond what every compilation does") for name, text in RECIPES.items()]
    cli_show.console().print(cli_show.table(["recipe", "stands for"], rows))
