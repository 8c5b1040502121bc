"""What each number format costs in accuracy: three small networks on digits, and the MiniLM sentence encoder.

    python benchmarks/precision_accuracy.py [--only cnn|transformer|depthwise|minilm] [--write]

Every row is a list of passes that a user would name; the graph they give is evaluated by the reference interpreter, to
which the integer kernels are bit-exact (rows marked * are also compiled and run). Calibration data are training images
or other sentences than those judged. ``--write`` keeps the tables made in benchmarks/results/precision_accuracy.md and
.json, beside those that are there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

import digits
import digits_networks
import digits_transformer
import numpy as np
import tables
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.codegen.targets import resolve
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.passes import Context, parse_passes, run_pipeline
from bitwright.passes.pipelines import CANONICAL
from bitwright.passes.precision._assignment import Problem, apply_choice
from bitwright.passes.precision._checked import best_of, measure, plan_of
from bitwright.passes.precision.assign_precision import AssignPrecision

Array = np.ndarray[Any, Any]
BUDGETS = (0.13, 0.16, 0.20)
NEW, CALIBRATION = 48, 32
"""Sentences: to judge by, to calibrate with."""
IMBALANCE = 1.0
"""Deviation of the logarithms of the channel factors in the depthwise network."""
METHOD = (
    "Accuracy, not speed: the reference interpreter on the quantized graphs; seeds fix every figure. Rows marked * are "
    "also compiled and run. Sizes count weights, of 32 bits in float. W4A8: 4-bit weights, 8-bit activations. Signal "
    "over noise: of the output against the float network's."
)


@dataclass(frozen=True)
class Subject:
    """A float graph, its calibration batches, inputs to judge by, and the quality of an output on them."""

    graph: Graph
    calibration: Sequence[Any]
    inputs: tuple[Array, ...]
    quality: Callable[[Tensor], float]


@dataclass
class Rows:
    """Quality and output error of each row, in order."""

    subject: Subject
    found: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.exact,) = evaluate(self.subject.graph, self.subject.inputs)
        self.found["float"] = {"quality": self.subject.quality(self.exact)}

    def add(self, name: str, graph: Graph, context: Context | None = None, *, run: bool = False) -> None:
        """Judge a quantized graph; with ``run`` its compiled program as well."""
        (made,) = evaluate(graph, self.subject.inputs)
        change = float((made - self.exact).double().square().sum() / self.exact.double().square().sum())
        row = {"quality": self.subject.quality(made), "snr": -10 * float(np.log10(max(change, 1e-30)))}
        if run:
            program = bw.compile(graph, recipe="", batch=16)
            parts = [program(*(a[i : i + 16] for a in self.subject.inputs)) for i in range(0, len(made), 16)]
            row["kernels"] = self.subject.quality(torch.from_numpy(np.concatenate(parts)))
        self.found[name] = row
        print(f"  {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)


def start(subject: Subject, passes: str, calibration: Sequence[Any] | None = None) -> tuple[Graph, Context]:
    """The graph after the canonical passes and more, and what was found on the way."""
    context = Context(resolve("host"), subject.calibration if calibration is None else calibration)
    return run_pipeline(subject.graph, parse_passes(f"{CANONICAL}, {passes}"), context)[0], context


def then(state: tuple[Graph, Context], passes: str) -> tuple[Graph, Context]:
    """More passes on a state, which is kept as it is."""
    graph, context = state
    mine = Context(context.target, context.calibration, facts=dict(context.facts))
    return run_pipeline(graph, parse_passes(passes), mine)[0], mine


def mixed(rows: Rows, state: tuple[Graph, Context], choices: str, name: str, after: str) -> None:
    """Assignments at every budget from one measurement, then ``after``."""
    graph, context = state
    p = AssignPrecision(choices=choices, front=0)
    problem, lost = Problem.of(graph, context, p), measure(graph, context, p)
    for budget in BUDGETS:
        mine = Context(context.target, context.calibration, facts=dict(context.facts))
        try:
            plan = best_of(replace(problem, budget=budget), lost).plan
        except InvalidInput as e:
            print(f"  {name} at {budget:.0%}: {e}")
            continue
        chosen = plan_of(problem, plan)
        made = apply_choice(graph, mine, p, chosen)
        rows.add(f"{name} at {budget:.0%} of the float size{', ' + after if after else ''}", *then((made, mine), after))


# --- digits ----------------------------------------------------------------------------------------------------

ROUNDINGS = ("nearest", "adaround", "adaquant", "gptq")


def digits_rows(subject: Subject, norms: bool, adaround: int = 2000, level_first: bool = False) -> Rows:
    """Every row of a digits network; ``norms``: it has batch norms; ``adaround``: its iterations.

    ``level_first``: rows below 8 bits start with equalize-layers.
    """
    rows = Rows(subject)
    ranged = start(subject, "observe-ranges{also=4}")
    rows.add("W8A8 per channel *", *then(ranged, "quantize-int8"), run=True)
    rows.add("W8A8 per tensor", *then(ranged, "quantize-int8{granularity=tensor}"))
    if norms:
        level = start(subject, "equalize-layers, observe-ranges")
        rows.add("W8A8 per tensor, equalize-layers", *then(level, "quantize-int8{granularity=tensor}"))
        fixed = then(level, "quantize-int8{granularity=tensor}, correct-bias")
        rows.add("W8A8 per tensor, equalize-layers, correct-bias", *fixed)
    low = {}
    first = "equalize-layers, " if level_first else ""
    ranged = start(subject, f"{first}observe-ranges{{also=4}}")
    for rounding in ROUNDINGS:
        more = f" iterations={adaround}" if rounding == "adaround" else ""
        low[rounding] = then(ranged, f"quantize-weights{{bits=4 rounding={rounding}{more}}}")
        rows.add(f"{first}W4A8 {rounding}", *then(low[rounding], "quantize-int8"))
    after = ("", ", retune-norms", ", retune-norms, correct-bias") if norms else ("", ", correct-bias")
    for rounding in ("nearest", "adaquant"):
        for more in after:
            star = " *" if (rounding, more) == ("nearest", "") else ""
            made = then(low[rounding], f"quantize-int8{{bits=4}}{more}")
            rows.add(f"{first}W4A4 {rounding}{more}{star}", *made, run=bool(star))
    mixed(rows, ranged, "s8|s4", f"{first}W4/W8, A8", "retune-norms" if norms else "correct-bias")
    mixed(rows, ranged, "s8|s4a4", f"{first}W4A4/W8A8", "retune-norms" if norms else "correct-bias")
    if norms:
        free = start(subject, f"synthesize-calibration, {first}observe-ranges{{also=4}}", [])
        for name, state in (("data-free", free), ("real data", ranged)):
            rows.add(f"{first}W8A8, correct-bias, {name}", *then(state, "quantize-int8, correct-bias"))
            recipe = "quantize-weights{bits=4}, quantize-int8{bits=4}, retune-norms"
            rows.add(f"{first}W4A4 nearest, retune-norms, {name}", *then(state, recipe))
    return rows


def digits_subject(net: nn.Module, data: Any, size: int) -> Subject:
    graph = bw.capture(net.eval(), (data.x[:2],), dynamic_batch=True)
    calibration = [(part.numpy(),) for part in data.x[:256].split(size)]
    return Subject(
        graph, calibration, (data.test_x.numpy(),),
        lambda y: 100 * float((y.argmax(1) == data.test_y).float().mean()),
    )  # fmt: skip


def trained(make: Callable[[], Any], epochs: int, rate: float) -> Subject:
    """A network of the examples, trained here in seconds."""
    data = digits.load()
    torch.manual_seed(0)
    net = make()
    digits.train(net, data, epochs, rate, lambda: None, lambda e, x: None)
    return digits_subject(net, data, 64)


def depthwise() -> Subject:
    """The MobileNet-like network, its channels scaled apart as those of trained depthwise networks are."""
    net = digits_networks.unbalanced(digits_networks.trained("depthwise"), IMBALANCE)
    return digits_subject(net, digits_networks.data(), 64)


def subjects() -> Iterator[tuple[str, Callable[[], Subject], Callable[[Subject], Rows]]]:
    """Title, network and rows of each table."""
    yield "Digits depthwise network", depthwise, partial(digits_rows, norms=True, level_first=True)
    yield (
        "Digits transformer",
        partial(trained, digits_transformer.Transformer, 25, 3e-3),
        partial(digits_rows, norms=False),
    )
    yield "MiniLM", minilm_subject, minilm_rows
    yield "Digits CNN", partial(trained, digits.Net, 5, 4e-3), partial(digits_rows, norms=True, adaround=200)


# --- MiniLM ----------------------------------------------------------------------------------------------------


def minilm_subject() -> Subject:
    import sentences

    ids, mask = sentences.tokens(sentences.sentences(NEW + CALIBRATION))
    module = sentences.Encoder().eval()
    graph = bw.capture(module, tuple(torch.from_numpy(v[:2]) for v in (ids, mask)), dynamic_batch=True, name="MiniLM")
    calibration = [(ids[i : i + 16], mask[i : i + 16]) for i in range(NEW, NEW + CALIBRATION, 16)]
    reference = torch.from_numpy(sentences.encode(module, (ids[:NEW], mask[:NEW])))
    return Subject(graph, calibration, (ids[:NEW], mask[:NEW]), lambda y: float((y * reference).sum(1).mean()))


def minilm_rows(subject: Subject) -> Rows:
    """Formats, ranges and roundings of the encoder; quality is the mean cosine to the float encoder's vectors."""
    rows = Rows(subject)
    plain = start(subject, "observe-ranges")
    rows.add("W8A8, extremes *", *then(plain, "quantize-int8"), run=True)
    for method in ("percentile", "mse"):
        rows.add(f"W8A8, {method}", *then(start(subject, f"observe-ranges{{method={method}}}"), "quantize-int8"))
    for options in ("", "{search=true insert=true}"):
        smooth = start(subject, f"smooth-quant{options}, observe-ranges")
        rows.add(f"W8A8, smooth-quant{options}", *then(smooth, "quantize-int8"))
    for rounding, more in (("nearest", ""), ("gptq", ""), ("adaquant", " iterations=50")):
        low = then(plain, f"quantize-weights{{bits=4 rounding={rounding}{more}}}")
        rows.add(f"W4A8 {rounding}", *then(low, "quantize-int8"))
        if rounding != "adaquant":
            grouped = then(plain, f"quantize-weights{{bits=4 group=64 rounding={rounding}}}")
            rows.add(f"weights alone, int4 in groups of 64, {rounding}", *grouped)
            found = then(grouped, "dynamic-quantize")
            rows.add(f"the same, activations s8 by row at run time, {rounding}", *found, run=rounding == "gptq")
    ranged = start(subject, "observe-ranges")
    mixed(rows, (ranged[0], replace(ranged[1], calibration=ranged[1].calibration[:1])), "s8|s4", "W4/W8, A8", "")
    return rows


# --- tables ----------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Mapping[str, float]], quality: str, digits_: int) -> str:
    """One Markdown row per row."""
    heads = ["format", quality, "signal over noise of the output", "compiled"]
    rows = [
        [
            name, f"{r['quality']:.{digits_}f}", f"{r['snr']:.1f} dB" if "snr" in r else "",
            f"{r['kernels']:.{digits_}f}" if "kernels" in r else "",
        ]
        for name, r in found.items()
    ]  # fmt: skip
    text: str = tables.markdown(heads, rows)
    return text


def keep(title: str, section: Mapping[str, Any]) -> None:
    """Put one section into the results files; the others stay as they are, each with the run it is from."""
    file = tables.RESULTS / "precision_accuracy.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    results[title] = dict(section)
    env, quality = section["environment"], {"MiniLM": ("cosine", 4)}
    text = tables.heading("What number formats cost", env, METHOD)
    for name, part in results.items():
        made = f"`{part['environment']['command']}`, {part['environment']['date']}, {part['seconds']:.0f} s."
        text += f"\n## {name}\n\n{part['of']} {made}\n\n" + table(part["rows"], *quality.get(name, ("accuracy", 1)))
    tables.save("precision_accuracy", text, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("cnn", "transformer", "depthwise", "minilm"))
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for title, subject, rows in subjects():
        if args.only and args.only not in title.lower():
            continue
        print(title, flush=True)
        began, made = time.perf_counter(), subject()
        found = rows(made).found
        count = len(made.inputs[0])
        of = f"Percent of {count} test images told right (one image is {100 / count:.2f})."
        if title == "MiniLM":
            of = f"Mean cosine of {NEW} sentences' vectors to the float encoder's; calibrated on {CALIBRATION} others."
        section = {"of": of, "rows": found, "seconds": time.perf_counter() - began}
        env = tables.environment({"torch": torch.__version__, "bitwright": bw.__version__})
        print(table(found, "quality", 4))
        if args.write:
            keep(title, {**section, "environment": env})


if __name__ == "__main__":
    main()
