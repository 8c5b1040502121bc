"""Accuracy against the width of the accumulator: digits networks trained here, and the MiniLM sentence encoder.

    python benchmarks/accumulator_accuracy.py [--only cnn transformer w4a4 minilm] [--widths 16 12] [--write]

Integer registers: the int8 program with P-bit sums, wrapping and saturating, as it is and after
`constrain-weights{bits=P}` (A2Q+, AXE with GPTQ; A2Q+ after some steps of `constrained_training`), whose sums are
checked to fit. Small floats: the float network (batch norms folded, as compiled programs have them) with
`small-float-sums`, at once and after a few steps of `small_float_training` (two stages). ``w4a4``: the digits networks
with weights and activations of 4 bits, as the papers on constrained weights have them. Everything is emulated bit for
bit by the reference. ``--write`` keeps tables and plot in benchmarks/results/accumulator_accuracy.*; parts that were
not run keep the figures they have there.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

import digits
import digits_transformer
import torch
from accumulator_tables import (
    BATCH,
    CALIBRATION,
    CONSTRAINED_ENCODER,
    ENCODER,
    ENCODER_WIDTHS,
    FORMATS,
    NEW,
    SCHEMES,
    WIDTHS,
    Results,
    Sums,
    merged,
    stored,
    text_of,
    write,
)
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bitwright as bw
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.passes.accumulators.registers import evaluate_in_registers
from bitwright.passes.pipelines import CANONICAL

ENCODER_FORMATS = FORMATS[:2]
CHECKED = 64
"""Images on which constrained weights are run in registers too."""


@dataclass(frozen=True)
class Model:
    """How a network is made and trained; ``steps`` of training under an integer accumulator."""

    title: str
    make: Callable[[], nn.Module]
    epochs: int
    rate: float
    steps: int


MODELS = {
    "transformer": Model("Digits transformer", digits_transformer.Transformer, 25, 3e-3, 210),
    "cnn": Model("Digits CNN", digits.Net, 5, 4e-3, 42),
}
PARTS = {
    "transformer": [("transformer", "integers"), ("transformer", "floats")],
    "cnn": [("cnn", "integers"), ("cnn", "floats")],
    "w4a4": [("transformer", "W4A4"), ("cnn", "W4A4")],
    "minilm": [("minilm", "integers"), ("minilm", "a2q+"), ("minilm", "axe-gptq"), ("minilm", "floats")],
}
"""What runs in one process each."""


def right(logits: torch.Tensor, data: digits.Digits) -> float:
    """Percent of the test images told right."""
    return 100 * float((logits.argmax(1) == data.test_y[: len(logits)]).float().mean())


def folded(net: nn.Module) -> nn.Module:
    """A copy of the network with its batch norms in the convolutions before them."""
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        names = list(module._modules)
        for conv, norm in pairwise(names):
            first, second = module._modules[conv], module._modules[norm]
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                module._modules[conv], module._modules[norm] = fuse_conv_bn_eval(first, second), nn.Identity()
    return net


def tune(
    net: nn.Module,
    data: digits.Digits,
    steps: int,
    before: Callable[[int], object],
    penalty: Callable[[], torch.Tensor] = lambda: torch.zeros(()),
) -> nn.Module:
    """A few steps of AdamW; ``before(step)`` runs before each step."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-4, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=steps)
    order = torch.cat([torch.randperm(len(data.y)) for _ in range(-(-steps * BATCH // len(data.y)))])
    for step in range(steps):
        before(step)
        rows = order[step * BATCH : (step + 1) * BATCH]
        optimizer.zero_grad()
        (functional.cross_entropy(net(data.x[rows]), data.y[rows]) + 1e-3 * penalty()).backward()
        optimizer.step()
        schedule.step()
    return net


def integer_rows(
    net: nn.Module, data: digits.Digits, images: int, steps: int, widths: Sequence[int], out: Results
) -> None:
    """The program in registers of every width: weights as they are, constrained to it, and trained under it."""
    calibration = [(part.numpy(),) for part in data.x[:256].split(64)]
    x = [data.test_x[:images]]

    def lowered(module: nn.Module, extra: str) -> Graph:
        recipe = f"{CANONICAL}, {SCHEMES[out.scheme]}, {extra}lower-to-integer"
        graph = bw.capture(module.eval(), (data.x[:2],), dynamic_batch=True)
        return bw.optimize(graph, recipe, calibration=calibration, target="host")[0]

    def constrained(module: nn.Module, bits: int, method: str) -> float:
        graph = lowered(module, f"constrain-weights{{bits={bits} method={method}}}, ")
        few = [x[0][:CHECKED]]
        for register in ("wrap", "saturate"):
            if not torch.equal(evaluate_in_registers(graph, few, bits, register)[0], evaluate(graph, few)[0]):
                raise AssertionError(f"constrained to {bits} bits, and a sum left them")
        return right(evaluate(graph, x)[0], data)

    plain = lowered(net, "")
    for bits in widths:
        start = time.perf_counter()
        row = out.integers[bits] = {
            r: right(evaluate_in_registers(plain, x, bits, r)[0], data) for r in ("wrap", "saturate")
        }
        row["a2q+"] = constrained(net, bits, "a2q+")
        row["axe-gptq"] = constrained(net, bits, "axe-gptq")
        if steps:
            tuned = copy.deepcopy(net)
            training = bw.constrained_training(tuned, bits=bits)
            tune(tuned, data, steps, lambda step: None, training.penalty)
            row["trained"] = constrained(training.finish(), bits, "a2q+")
        print(f"  {bits} bits: {row} in {time.perf_counter() - start:.0f} s", flush=True)


def small_float_rows(net: nn.Module, data: digits.Digits, images: int, steps: int, small: bool, out: Results) -> None:
    """Every small-float format at once, and fine-tuned."""
    x = data.test_x[:images]

    def accuracy(module: nn.Module, sums: Sums) -> float:
        graph = bw.capture(module.eval(), (data.x[:2],), dynamic_batch=True)
        recipe = f"{CANONICAL}, small-float-sums{{acc={sums.acc} product={sums.product}}}"
        return right(evaluate(bw.optimize(graph, recipe, target="host")[0], [x])[0], data)

    tuned = tune(copy.deepcopy(net), data, steps, lambda step: None)
    with torch.no_grad():
        out.tuned_float = right(tuned(x), data)
    for sums in FORMATS:
        start, row = time.perf_counter(), {}
        row["zero-shot"] = accuracy(net, sums)
        for estimator in ("identity", "recursive") if small and sums.bits < 12 else ("identity",):
            tuned = copy.deepcopy(net)
            training = bw.small_float_training(tuned, acc=sums.acc, product=sums.product, estimator=estimator)
            last = steps - max(1, steps // 4)
            tune(tuned, data, steps, lambda step: training.advance() if step == last else None)  # noqa: B023
            row["fine-tuned" if estimator == "identity" else f"fine-tuned, {estimator}"] = accuracy(
                training.finish(), sums
            )
        out.floats[sums.name] = row
        print(f"  {sums.name}: {row} in {time.perf_counter() - start:.0f} s", flush=True)


def encoder_rows(kind: str, out: Results) -> None:
    """MiniLM in integer registers (as it is, or constrained by a method), or with small floats at once."""
    import sentences

    ids, mask = sentences.tokens(sentences.sentences(NEW + CALIBRATION))
    module = sentences.Encoder().eval()
    graph = bw.capture(module, tuple(torch.from_numpy(v[:2]) for v in (ids, mask)), dynamic_batch=True, name="MiniLM")
    calibration = [(ids[i : i + 16], mask[i : i + 16]) for i in range(NEW, NEW + CALIBRATION, 16)]
    x, reference = [ids[:NEW], mask[:NEW]], torch.from_numpy(sentences.encode(module, (ids[:NEW], mask[:NEW])))

    def cosine(vectors: torch.Tensor) -> float:
        return float((vectors * reference).sum(1).mean())

    def lowered(extra: str) -> Graph:
        recipe = f"{CANONICAL}, int8, {extra}lower-to-integer"
        return bw.optimize(graph, recipe, calibration=calibration, target="host")[0]

    def row(bits: int) -> dict[str, float]:
        if kind == "integers":
            return {r: cosine(evaluate_in_registers(plain, x, bits, r)[0]) for r in ("wrap", "saturate")}
        made = lowered(f"constrain-weights{{bits={bits} method={kind}}}, ")
        exact = evaluate(made, x)[0]
        if not torch.equal(evaluate_in_registers(made, x, bits, "wrap")[0], exact):
            raise AssertionError(f"constrained to {bits} bits, and a sum left them")
        return {kind: cosine(exact)}

    out.float_, plain = 1.0, lowered("") if kind == "integers" else graph
    if kind == "floats":
        for sums in ENCODER_FORMATS:
            recipe = f"{CANONICAL}, small-float-sums{{acc={sums.acc} product={sums.product}}}"
            made = bw.optimize(graph, recipe, target="host")[0]
            out.floats[sums.name] = {"zero-shot": cosine(evaluate(made, x)[0])}
    else:
        out.integers = {b: row(b) for b in (ENCODER_WIDTHS if kind == "integers" else CONSTRAINED_ENCODER)}
    print(f"  MiniLM: {out.integers} {out.floats}", flush=True)


def part(key: str, kind: str, images: int, steps: int, widths: Sequence[int]) -> Results:
    """One model's results, of integer registers or of small floats; runs in a process of its own."""
    torch.set_num_threads(1)
    scheme = kind if kind in SCHEMES else "int8"
    began, out = time.perf_counter(), Results(scheme, images, steps)
    if key == "minilm":
        out.images = NEW
        encoder_rows(kind, out)
    else:
        model, data = MODELS[key], digits.load()
        torch.manual_seed(0)
        net = model.make()
        digits.train(net, data, model.epochs, model.rate, lambda: None, lambda e, x: None)
        with torch.no_grad():
            out.float_ = right(net.eval()(data.test_x[:images]), data)
        if kind == "floats":
            small_float_rows(folded(net), data, images, steps, key == "transformer", out)
        else:
            integer_rows(folded(net), data, images, model.steps if kind == "integers" else 0, widths, out)
    out.date, out.minutes = datetime.now().isoformat(timespec="seconds"), (time.perf_counter() - began) / 60
    return out


def title_of(key: str, kind: str) -> str:
    return ENCODER if key == "minilm" else MODELS[key].title + (f", {kind}" if kind == "W4A4" else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--images", type=int, default=450)
    parser.add_argument("--widths", nargs="+", type=int, help="only these rows of the digits networks' registers")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    kept = stored() if args.write else {}
    results: dict[str, Results] = {}
    order = dict.fromkeys(title_of(*job) for jobs in PARTS.values() for job in jobs)
    todo = [job for key in PARTS if key in args.only for job in PARTS[key]]
    if args.widths:
        todo = [job for job in todo if job[1] in ("integers", "W4A4") and job[0] != "minilm"]
    with ProcessPoolExecutor(len(todo), get_context("spawn")) as pool:
        jobs = {pool.submit(part, *job, args.images, args.steps, args.widths or WIDTHS): job for job in todo}
        for done in as_completed(jobs):
            title, made = title_of(*jobs[done]), done.result()
            made.minutes = 0 if args.widths else made.minutes  # not those of the whole section
            before = results.get(title, kept.get(title) if args.widths else None)
            results[title] = made if before is None else merged(before, made)
            if args.write:  # what is there stays, should a later part fail
                known = kept | results
                write({t: known[t] for t in order if t in known})
    print("\n".join(text_of(t, r) for t, r in results.items()))


if __name__ == "__main__":
    main()
