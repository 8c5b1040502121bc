"""Accuracy against the width of the accumulator: integer registers and small floats, on digits networks trained here.

    python benchmarks/accumulator_accuracy.py [--only cnn|transformer] [--steps 24] [--images 450] [--write]

Integer registers: the int8 program with P-bit sums, wrapping and saturating, as it is and after
`constrain-weights{bits=P}` (A2Q+, AXE with GPTQ; A2Q+ after some steps of `constrained_training`), whose sums are
checked to fit. Small floats: the float network (batch norms folded, as compiled programs have them) with
`small-float-sums`, at once and after a few steps of `small_float_training` (two stages). Everything is emulated bit
for bit by the reference. ``--write`` keeps tables and plot in benchmarks/results/accumulator_accuracy.*.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

import digits
import digits_transformer
import tables
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bitwright as bw
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.passes.accumulators.registers import evaluate_in_registers
from bitwright.passes.pipelines import CANONICAL

WIDTHS = (32, 16, 14, 12, 10)
LABELS = {"a2q+": "constrained (A2Q+)", "axe-gptq": "constrained (AXE)", "trained": "trained (A2Q+)"}
BATCH = 64


@dataclass(frozen=True)
class Sums:
    """A small-float accumulator; ``estimators`` to fine-tune with."""

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
KINDS = "integers", "floats"


@dataclass
class Results:
    """Percent of the test images told right."""

    float_: float = 0.0
    tuned_float: float = 0.0
    integers: dict[int, dict[str, float]] = field(default_factory=dict)
    floats: dict[str, dict[str, float]] = field(default_factory=dict)


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


def integer_rows(net: nn.Module, data: digits.Digits, images: int, steps: int, out: Results) -> None:
    """The int8 program in registers of every width: weights as they are, constrained to it, and trained under it."""
    calibration = [(part.numpy(),) for part in data.x[:256].split(64)]
    x = [data.test_x[:images]]

    def lowered(module: nn.Module, extra: str) -> Graph:
        recipe = f"{CANONICAL}, int8, {extra}lower-to-integer"
        graph = bw.capture(module.eval(), (data.x[:2],), dynamic_batch=True)
        return bw.optimize(graph, recipe, calibration=calibration, target="host")[0]

    def constrained(module: nn.Module, bits: int, method: str) -> float:
        graph = lowered(module, f"constrain-weights{{bits={bits} method={method}}}, ")
        exact = evaluate(graph, x)[0]
        for register in ("wrap", "saturate"):
            if not torch.equal(evaluate_in_registers(graph, x, bits, register)[0], exact):
                raise AssertionError(f"constrained to {bits} bits, and a sum left them")
        return right(exact, data)

    plain = lowered(net, "")
    for bits in WIDTHS:
        start = time.perf_counter()
        row = out.integers[bits] = {
            r: right(evaluate_in_registers(plain, x, bits, r)[0], data) for r in ("wrap", "saturate")
        }
        row["a2q+"] = constrained(net, bits, "a2q+")
        row["axe-gptq"] = constrained(net, bits, "axe-gptq")
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


def part(key: str, kind: str, images: int, steps: int) -> Results:
    """One model's results, of integer registers or of small floats; runs in a process of its own."""
    torch.set_num_threads(1)
    model, data, out = MODELS[key], digits.load(), Results()
    torch.manual_seed(0)
    net = model.make()
    digits.train(net, data, model.epochs, model.rate, lambda: None, lambda e, x: None)
    with torch.no_grad():
        out.float_ = right(net.eval()(data.test_x[:images]), data)
    if kind == "integers":
        integer_rows(folded(net), data, images, model.steps, out)
    else:
        small_float_rows(folded(net), data, images, steps, key == "transformer", out)
    return out


def text_of(title: str, r: Results, images: int, steps: int) -> str:
    """Two Markdown tables."""
    columns = ["wrap", "saturate", "a2q+", "axe-gptq", "trained"]
    integers = tables.markdown(
        ["int8, bits of the sums", *(LABELS.get(c, c) for c in columns)],
        [[b, *(f"{row[c]:.1f}" for c in columns)] for b, row in r.integers.items()],
    )
    kinds = list(dict.fromkeys(k for row in r.floats.values() for k in row))
    widths = {s.name: s.bits for s in FORMATS}
    floats = tables.markdown(
        ["small-float sums", "bits", *kinds],
        [[n, widths[n], *(f"{row[k]:.1f}" if k in row else "" for k in kinds)] for n, row in r.floats.items()],
    )
    return (
        f"## {title}\n\nPercent of {images} test images told right (one image is {100 / images:.2f}); float: "
        f"{r.float_:.1f}, and {r.tuned_float:.1f} after the same {steps} steps of fine-tuning with exact sums.\n\n"
        f"{integers}\n{floats}"
    )


def plot(results: dict[str, Results], path: Path) -> None:
    """Accuracy against bits of the accumulator, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.2 * len(results), 4), squeeze=False, sharey=True)
    styles = {"wrap": "o--", "saturate": "s--", "a2q+": "^-", "axe-gptq": "v-", "trained": "d-"}
    for axis, (title, r) in zip(axes[0], results.items(), strict=True):
        bits = sorted(b for b in r.integers if b <= 16)
        for name, style in styles.items():
            axis.plot(bits, [r.integers[b][name] for b in bits], style, label=f"int8, {LABELS.get(name, name)}")
        for kind, marker in (("zero-shot", "x"), ("fine-tuned", "*")):
            spots = [(s.bits, r.floats[s.name][kind]) for s in FORMATS if s.name in r.floats]
            axis.scatter(*zip(*spots, strict=True), marker=marker, s=70, zorder=3, label=f"small float, {kind}")
        axis.axhline(r.float_, color="grey", linewidth=0.8, label="float")
        axis.set(title=title, xlabel="bits of the accumulator", xticks=[8, 10, 12, 14, 16])
    axes[0][0].set_ylabel("test images told right, %")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("cnn", "transformer"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--images", type=int, default=450)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    results: dict[str, Results] = {}
    began = time.perf_counter()
    keys = [k for k in MODELS if args.only in (None, k)]
    with ProcessPoolExecutor(2 * len(keys), get_context("spawn")) as pool:
        jobs = {(k, kind): pool.submit(part, k, kind, args.images, args.steps) for k in keys for kind in KINDS}
        for k in keys:
            integers, results[MODELS[k].title] = (jobs[k, kind].result() for kind in KINDS)
            results[MODELS[k].title].integers = integers.integers
    env = tables.environment({"torch": torch.__version__, "bitwright": bw.__version__})
    method = (
        "Accuracy, not speed: sums emulated bit for bit; seeds fix every figure. Integer registers start from the zero "
        "point's share and add products of codes. Attention stays float; products of M10E5 and M6E5 have the sums' "
        f"format. {args.steps} steps of {BATCH} images, the last quarter with underflow. "
        f"Took {(time.perf_counter() - began) / 60:.0f} minutes."
    )
    text = tables.heading("Accuracy and accumulators", env, method) + "\n"
    text += "\n".join(text_of(t, r, args.images, args.steps) for t, r in results.items())
    print(text)
    if args.write:
        stem = "accumulator_accuracy"
        text += f"\n![accuracy against bits]({stem}.png)\n"
        tables.save(stem, text, {"environment": env, "results": {t: vars(r) for t, r in results.items()}})
        plot(results, tables.RESULTS / f"{stem}.png")


if __name__ == "__main__":
    main()
