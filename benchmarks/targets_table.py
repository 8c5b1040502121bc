"""Every quantized model of the zoo on every target: whether the outputs are the reference's bits.

    python benchmarks/targets_table.py [--models digits,resnet18] [--recipes int8] [--write]

Tiny sizes. Programs for this machine run, those for Arm and RISC-V run emulated, C passes its self-test here and
emulated, devices on paper are simulated. A recipe is the same for all; ``=`` means all bits of all outputs, a number is
the root mean square of the difference over that of the outputs, where a model has layers in f32 whose order of sums is
the target's own. ``--write`` keeps results/targets_table.json and .md; cells found there are not run again unless
``--again``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import bitwright as bw
from bitwright.codegen.c.toolchain import toolchain
from bitwright.codegen.devices import library
from bitwright.codegen.targets import BUILTIN, CROSS, resolve
from bitwright.codegen.targets.machine import cpu_flags
from bitwright.ir.errors import BitwrightError, Unsupported
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.pipeline import lower
from tests.zoo import ZOO

Array = np.ndarray[Any, Any]
RECIPES = {
    "int8": "int8",
    "2:4 int8": "nm-mask{pattern=2:4}, int8",
    "4 bits": "observe-ranges, quantize-weights{bits=4}, quantize-int8",
    "ternary": "observe-ranges, quantize-weights{bits=ternary}, quantize-int8",
    "signs": "observe-ranges, quantize-weights{bits=bipolar}, quantize-int8{bits=2}",
}
MACHINES = [*BUILTIN, *CROSS]
CHAINS = ["c:host", "c:aarch64", "c:riscv64"]
DEVICES = [n for n in library.names() if n != "m7e4"]  # has no integers
TARGETS = [*MACHINES, *CHAINS, *DEVICES]
RESULT = Path(__file__).parent / "results" / "targets_table"


@cache
def captured(name: str) -> tuple[Graph, tuple[Array, ...]]:
    """A tiny model of the zoo and its example inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, example = ZOO[name]("tiny")
        return bw.capture(module, example), tuple(np.asarray(x) for x in example)


@cache
def reference(name: str, recipe: str) -> tuple[Array, ...]:
    """What the kernel-level graph means."""
    graph, inputs = captured(name)
    low = lower(graph, RECIPES[recipe], resolve("x86-avx2"), [inputs]).graph
    return tuple(to_numpy(t) for t in evaluate(low, inputs))


@cache
def c_program(name: str, recipe: str) -> Any:
    """The model as C, one program for all compilers."""
    graph, inputs = captured(name)
    return bw.compile_c(graph, recipe=RECIPES[recipe], calibration=[inputs], name=name)


def distance(got: tuple[Array, ...], want: tuple[Array, ...]) -> float:
    """0.0 for the same bits; else the root mean square of the difference over that of ``want``."""
    if all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True)):
        return 0.0
    top = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(got, want, strict=True))
    size = sum(float(np.square(b.astype(np.float64)).sum()) for b in want)
    return max(float(np.sqrt(top / (size or 1.0))), 1e-12)


def outputs(name: str, recipe: str, target: str) -> tuple[Array, ...]:
    """What a target makes of the model's example; raises :class:`BitwrightError` where it refuses."""
    graph, inputs = captured(name)
    if target in library.names():
        done = bw.simulate(graph, target, list(inputs), recipe=RECIPES[recipe], calibration=[inputs])
        return done.outputs
    program = bw.compile(graph, target=target, recipe=RECIPES[recipe], calibration=[inputs])
    result = (bw.emulate(program) if target in CROSS else program)(*inputs)
    return tuple(np.asarray(a) for a in (result if isinstance(result, tuple) else (result,)))


def c_cell(name: str, recipe: str, chain: str) -> str:
    """Of the self-test, whose samples are the reference's results; exact where the whole model is integers."""
    program = c_program(name, recipe)
    if why := toolchain(chain).missing():
        return f"not run: {why}"
    wrong = program.self_test(chain)
    return f"WRONG: {wrong} values" if wrong else "=" if program.source.exact else "< 1e-2"


def cell(name: str, recipe: str, target: str) -> str:
    """One entry of the table."""
    if target in BUILTIN and not set(BUILTIN[target].features) <= {f.replace("_", "") for f in cpu_flags()}:
        return "not run: this CPU cannot"
    try:
        if target.startswith("c:"):
            return c_cell(name, recipe, target[2:])
        apart = distance(outputs(name, recipe, target), reference(name, recipe))
    except Unsupported as e:
        return f"refused: {e.problems[0].why}"
    except BitwrightError as e:
        return f"refused: {str(e).splitlines()[0]}"
    return f"{apart:.0e}" if apart else "="


def table(cells: dict[str, str]) -> str:
    """Markdown: a row for every model and recipe; refusals by number, the reasons below."""
    shown = [t for t in TARGETS if any(k.endswith(f"|{t}") for k in cells)]
    rows = list(dict.fromkeys(k.rsplit("|", 1)[0] for k in cells))
    notes: dict[str, int] = {}
    lines = ["| model, recipe | " + " | ".join(shown) + " |", "| --- |" + " :-: |" * len(shown)]
    for row in rows:
        texts = []
        for t in shown:
            found = cells.get(f"{row}|{t}", "")
            if found.startswith(("refused", "not run")):
                why = found.replace("|", "/")
                found = f"[{notes.setdefault(why, len(notes) + 1)}]"
            texts.append(found)
        lines.append(f"| {row.replace('|', ', ')} | " + " | ".join(texts) + " |")
    told = [f"{n}. {why}" for why, n in notes.items()]
    same = sum(v == "=" for v in cells.values())
    near = sum(v[0] in "<123456789" for v in cells.values())
    other = len(cells) - same - near
    count = f"{len(cells)} cells: {same} the same bits, {near} up to sums in f32, {other} refused or not run.\n"
    return "\n".join([count, *lines, "", *told])


HEAD = """# Every model on every target

`=`: all outputs have the bits of the reference. A number: a model with layers in f32 (layer norms, softmax, GELU), with
sums in the order of the target; the root mean square of the difference over that of the outputs. C checks models with
f32 layers to 1e-2. In brackets: why not. Tiny sizes of the zoo of the tests; Arm and RISC-V programs and C for them ran
under qemu. Written by `python benchmarks/targets_table.py --write`.

"""


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(ZOO))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    file = RESULT.with_suffix(".json")
    cells: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    for name in given.models.split(","):
        for recipe in given.recipes.split(","):
            for target in given.targets.split(","):
                key = f"{name}|{recipe}|{target}"
                if key in cells and not given.again:
                    continue
                began = time.perf_counter()
                cells[key] = cell(name, recipe, target)
                print(f"{key}: {cells[key][:100]} ({time.perf_counter() - began:.1f} s)", flush=True)
            if given.write:
                file.write_text(json.dumps(cells, indent=1) + "\n")
                RESULT.with_suffix(".md").write_text(HEAD + table(cells) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
