"""Predicted against measured seconds of the layers of whole models, and the fit of the cost model's parameters.

    python benchmarks/predictions.py [--models resnet50,bert_base] [--records FILE] [--fit] [--quick] [--dry]

Every program runs at batch 1 on one thread; a layer's time is the best of its calls inside the program
(``Program.profile``), so its weights come from where the rest of the model left them; on a shared machine the median of
long layers measures the neighbours. Equal layers count once. ``--records`` keeps the measurements for the next run.
``--fit`` fits ``Target.costs`` to every second distinct layer and reports the error on the others, which it has not
seen; it prints the values, which belong into ``ir/target.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import re
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import gemm
import models
import numpy as np
import peers
import tables

import bitwright as bw
from bitwright.advice import CAUTION
from bitwright.codegen.cost import cost_of, working_set
from bitwright.codegen.targets import resolve
from bitwright.ir.graph import Graph
from bitwright.ir.target import Costs, Target
from bitwright.ir.text import parse, show
from bitwright.runtime.bench import pinned

RECIPES = {"float": "float"} | models.RECIPES
MODELS = ("resnet50", "mobilenet_v2", "bert_base", "vit_small", "minilm", "gpt2_small")
LAYERS = tuple(f"{m}x{n}x{k}" for m in (1, 2, 4, 8, 16, 64) for n, k in ((768, 3072), (4096, 1024), (2048, 5632)))
SMALLEST = 2e-6
"""Seconds below which a step is not a layer worth predicting: the clock around it costs as much."""
MOST = 0.15


@dataclasses.dataclass(frozen=True)
class Record:
    """One layer of one program: its body as text, what runs it, and its seconds."""

    model: str
    recipe: str
    layer: str
    op: str
    kernel: str
    body: str
    seconds: float
    working_set: int
    generic: bool
    sparse: bool

    @property
    def contraction(self) -> bool:
        return self.kernel in ("contract", "lut", "depthwise")

    @property
    def key(self) -> tuple[str, str]:
        return self.body, self.kernel


def records_of(name: str, recipe: str, repeats: int, core: int) -> list[Record]:
    """Compile, profile, and pair every step with its region of the compiled graph."""
    it = linear(name) if "x" in name else models.subject(name)
    data = it.calibration if "int8" in recipe else None
    program = bw.compile(bw.capture(it.module, it.inputs), recipe=RECIPES.get(recipe, recipe), calibration=data)
    regions = {n.output: n.op.body for n in parse(program.graph).nodes if hasattr(n.op, "body")}
    layers = {x.name: x for x in program.report.layers}
    used = working_set(parse(program.graph), resolve("host"))
    with pinned(core):
        steps = program.profile(*it.arrays, repeats=repeats)
    out: dict[tuple[str, str], list[Record]] = {}
    for s in steps:
        layer, body = layers.get(s.label), regions.get(s.label)
        if layer is None or body is None:
            continue
        found = Record(
            name, recipe, layer.name, layer.op, layer.kernel, plain(body), s.best, used,
            layer.kernel == "generic", not layer.reason.startswith(("dense", "runs dense")),
        )  # fmt: skip
        out.setdefault(found.key, []).append(found)
    return [dataclasses.replace(same[0], seconds=statistics.median(x.seconds for x in same)) for same in out.values()]


def plain(body: Graph) -> str:
    """Text without the names of its values, so that equal layers are one."""
    known: dict[str, str] = {}
    text = re.sub(r"#.*|\(\S+ = ", lambda m: "" if m[0][0] == "#" else "(y = ", show(body))
    return re.sub(r"%[^\s:,()]+", lambda m: known.setdefault(m[0], f"%v{len(known)}"), text)


def linear(name: str) -> peers.Subject:
    """A layer alone, ``rows x outputs x inputs``: few rows occur in no model of the list."""
    m, n, k = map(int, name.split("x"))
    return gemm.subject(m, n, k)


def apart(name: str, recipe: str, repeats: int, core: int) -> list[Record]:
    """:func:`records_of` in a process of its own, so that a program that crashes loses its own records only."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(records_of, name, recipe, repeats, core).result()
        except Exception as error:  # the other programs' layers are still worth comparing
            print(f"{name}, {recipe}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            return []


@cache
def graph_of(text: str) -> Graph:
    return parse(text)


def predicted(r: Record, target: Target) -> float:
    return cost_of(
        graph_of(r.body), target, generic=r.generic, sparse=r.sparse, working_set=r.working_set
    ).seconds  # fmt: skip


def errors(records: Sequence[Record], target: Target) -> list[float]:
    """Predicted over measured, less one."""
    return [predicted(r, target) / r.seconds - 1 for r in records]


def fitted(records: Sequence[Record], target: Target, rounds: int = 40) -> Target:
    """The target with the costs that make the logarithms of predicted and measured agree best (soft L1)."""
    from scipy.optimize import least_squares  # type: ignore[import-untyped,unused-ignore]

    names = [f.name for f in dataclasses.fields(Costs)]
    start = np.log([max(getattr(target.costs, n), 1e-15) for n in names])

    def changed(x: Any) -> Target:
        return dataclasses.replace(target, costs=Costs(*(float(v) for v in np.exp(x))))

    def residuals(x: Any) -> Any:
        it = changed(x)
        misses = [math.log(predicted(r, it) / r.seconds) for r in records]
        return np.array([*misses, *(0.02 * (x - start))])  # what the records do not say stays where it was

    found = least_squares(residuals, start, loss="soft_l1", f_scale=0.1, max_nfev=rounds, diff_step=0.02)
    return changed(found.x)


def summary(records: Sequence[Record], target: Target) -> list[list[str]]:
    """Median absolute error by model, recipe and kind."""
    rows = []
    groups: dict[str, list[Record]] = {"all": list(records)}
    for r in records:
        kind = "contractions" if r.contraction else "other steps"
        for name in (kind, f"{kind}, {r.recipe}", f"{kind}, {r.model}"):
            groups.setdefault(name, []).append(r)
    for name, members in groups.items():
        found = sorted(map(abs, errors(members, target)))
        rows.append([name, str(len(members)), f"{statistics.median(found):.1%}",
                     f"{found[int(0.9 * (len(found) - 1))]:.1%}"])  # fmt: skip
    return rows


def promises(records: Sequence[Record], target: Target) -> list[tuple[float, float, Record]]:
    """(promised, measured) speed-up of every layer with a pattern over the same layer in dense int8.

    Layers are paired by model and name; a promise is a predicted gain times ``advice.CAUTION``.
    """
    dense = {(r.model, r.layer): r for r in records if r.recipe == "int8" and r.contraction}
    out = []
    for r in records:
        base = dense.get((r.model, r.layer))
        if base is None or not r.contraction or " " not in r.recipe or not r.sparse:
            continue
        gain = predicted(base, target) / predicted(r, target)
        out.append((gain * CAUTION if gain > 1 else gain, base.seconds / r.seconds, r))
    return out


def lines(records: Sequence[Record], target: Target) -> list[list[str]]:
    """One line per contraction."""
    return [
        [f"{r.model}, {r.recipe}", r.layer, r.op[:48], f"{r.seconds * 1e6:.1f}", f"{predicted(r, target) * 1e6:.1f}",
         f"{predicted(r, target) / r.seconds - 1:+.0%}"]
        for r in records
    ]  # fmt: skip


def measure(args: argparse.Namespace) -> list[Record]:
    """From the file of records, or anew."""
    path = Path(args.records) if args.records else None
    if path and path.exists():
        return [Record(**r) for r in json.loads(path.read_text())]
    found: list[Record] = []
    for name in args.models.split(","):
        for recipe in args.recipes.split(","):
            found += apart(name, recipe, 7 if args.quick else 25, args.core)
            print(f"{name}, {recipe}: {len(found)} records", flush=True)
            if path:
                path.write_text(json.dumps([dataclasses.asdict(r) for r in found]))
    return found


def distinct(records: Sequence[Record]) -> list[Record]:
    """Layers that are long enough, each body once."""
    out: dict[tuple[str, str], Record] = {}
    for r in records:
        if r.seconds >= SMALLEST:
            out.setdefault(r.key, r)
    return list(out.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join((*MODELS, *LAYERS)))
    parser.add_argument("--recipes", default="float,int8,int8 2:4,int8 2:8")
    parser.add_argument("--records", help="file of measurements: read if it exists, else written")
    parser.add_argument("--fit", action="store_true", help="fit the parameters to every second layer and print them")
    parser.add_argument("--quick", action="store_true", help="7 calls of each program")
    parser.add_argument("--core", type=int)
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    args.core = tables.last_core() if args.core is None else args.core
    target = resolve("host")
    found = measure(args)
    records = distinct(found)
    if args.fit:
        seen, unseen = records[::2], records[1::2]
        target = fitted(seen, target)
        print(f"costs={target.costs}")
        for name, part in (("seen", seen), ("not seen", unseen)):
            print(tables.markdown([name, "layers", "median", "90 %"], summary(part, target)))
        return
    env = tables.environment(peers.versions())
    contractions = [r for r in records if r.contraction]
    middle = statistics.median(map(abs, errors(contractions, target)))
    text = tables.heading("Predicted against measured, layer by layer", env, "One thread, batch 1, untuned.")
    text += f"\n- {len(contractions)} distinct contractions: median of absolute errors {middle:.1%} "
    text += f"(at most {MOST:.0%}): {tables.verdict(middle <= MOST)}\n"
    told = promises(found, target)
    denied = [(p, m, r) for p, m, r in told if p > 1.1 and p > 1.1 * m]
    text += (
        f"- {len(told)} patterns over dense int8: {len(denied)} promised gains above 1.1x are denied by more than a "
    )
    text += f"tenth: {tables.verdict(not denied)}\n"
    text += "".join(
        f"  - {r.model}, {r.recipe}, {r.layer}: promised {p:.2f}x, measured {m:.2f}x\n" for p, m, r in denied
    )
    text += "\n" + tables.markdown(["", "layers", "median of errors", "90 %"], summary(records, target)) + "\n"
    text += tables.markdown(
        ["program", "layer", "operators", "us", "predicted us", "error"], lines(contractions, target)
    )
    print(text)
    if not (args.dry or args.quick):
        fields = ("model", "recipe", "layer", "op", "kernel", "seconds")
        data = [{k: getattr(r, k) for k in fields} | {"predicted": predicted(r, target)} for r in records]
        tables.save("predictions", text, {"environment": env, "layers": data})


if __name__ == "__main__":
    main()
