"""The demo behind ``make demo``: two real models made sparse and low-bit, with what it gains and what it does not.

First a small residual network, trained here on scikit-learn's images of digits; then the MiniLM sentence encoder.
Everything runs on one thread. Latencies are processor time of that thread, the median of interleaved rounds, so that
all contenders see the same machine and other programs on it count less.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digits
import numpy as np
import peers
import sentences
import torch
from rich.console import Console
from rich.table import Table

import bitwright as bw
from bitwright import cli_show
from bitwright.runtime import units
from bitwright.runtime.bench import Timings, measure
from bitwright.runtime.html import write_html
from bitwright.runtime.program import Program

OUT = Path("demo-out")
SPARSE = "nm-mask{pattern=2:4}, int8"
SMOOTH = "smooth-quant{insert=true}, int8"
console: Console = cli_show.console()
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Contender:
    """One row of a result table: how to call it, and what its results are worth."""

    name: str
    call: Callable[..., Array]
    quality: str


def say(text: str) -> None:
    console.print(text, markup=False)


def heading(text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


@contextmanager
def step(text: str) -> Iterator[None]:
    """Print what is being done and how long it took."""
    start = time.perf_counter()
    with console.status(text):
        yield
    say(f"  {text}: {time.perf_counter() - start:.1f} s")


# --- one: the digits ------------------------------------------------------------------------------------------


def accuracy(call: Callable[..., Array], data: digits.Digits) -> float:
    """Share of the test images that are told right."""
    found = np.concatenate([call(part) for part in np.array_split(data.test_x.numpy(), 15)]).argmax(1)
    return float((found == data.test_y.numpy()).mean())


def trained(data: digits.Digits) -> tuple[digits.Net, digits.Net]:
    """The network as trained, and a copy pruned to 2:4 and trained on under its mask."""
    torch.manual_seed(0)
    dense = digits.Net()
    with step(f"train on {len(data.y)} images of 16 x 16, 5 epochs"):
        digits.train(dense, data, 5, 4e-3, lambda: None, lambda epoch, loss: None)
    sparse = copy.deepcopy(dense)
    masks = digits.masks_2_4(sparse)
    digits.apply_masks(sparse, masks)
    pruned = accuracy(peers.eager(sparse), data)
    with step("prune to 2:4 and train on under the mask, 2 epochs"):
        digits.train(sparse, data, 2, 1e-3, lambda: digits.apply_masks(sparse, masks), lambda epoch, loss: None)
    say(
        f"  accuracy: {units.accuracy(accuracy(peers.eager(dense), data))} dense,"
        f" {units.accuracy(pruned)} just pruned, {units.accuracy(accuracy(peers.eager(sparse), data))} trained on"
    )
    return dense, sparse


def digits_demo() -> Program:
    """Train, compile three ways, compare with onnxruntime; returns the sparse program."""
    heading("1. A residual network for digits: float, dense int8, 2:4 sparse int8")
    data = digits.load()
    dense, sparse = trained(data)
    example = data.x[:2]
    calibration = [part.numpy() for part in data.x[:256].split(32)]
    programs = {}
    with step("compile float, int8 and 2:4 int8 with bitwright"):
        for name, net, recipe in (("float", dense, "float"), ("int8", dense, "int8"), ("2:4 int8", sparse, SPARSE)):
            graph = bw.capture(net, (example,), dynamic_batch=True, name=f"digits, {name}")
            programs[name] = bw.compile(graph, recipe=recipe, calibration=calibration, measure=True)
    programs["2:4 int8"].save(OUT / "digits.bw")
    with step("export and quantize with onnxruntime"):
        path = peers.export(dense, (example,), ["image"], OUT / "digits.onnx")
        low = peers.quantize(path, [{"image": batch} for batch in calibration], OUT / "digits-int8.onnx")
    calls: dict[str, Callable[..., Array]] = {"torch float": peers.eager(dense)}
    calls |= {"onnxruntime float": peers.session(path), "onnxruntime int8": peers.session(low)}
    calls |= {f"bitwright {name}": program for name, program in programs.items()}
    rows = [Contender(name, call, units.accuracy(accuracy(call, data))) for name, call in calls.items()]
    images = data.test_x.numpy()
    print_latencies(rows, {"1 image": (images[:1],), "32 images": (images[:32],)}, "accuracy")
    heading("What was done to each layer of the 2:4 int8 program, and why")
    report = programs["2:4 int8"].report
    cli_show.print_report(report, with_passes=False)
    return programs["2:4 int8"]


# --- two: the sentences ---------------------------------------------------------------------------------------


def sentences_demo() -> Program:
    """MiniLM in int8: how well its vectors agree with the float model's, and how long one sentence takes."""
    heading(f"2. The MiniLM sentence encoder (22.7 million weights), {sentences.LENGTH} tokens: int8")
    with step("load the model and the sentences"):
        texts = sentences.sentences(192)
        ids, mask = sentences.tokens(texts)
        known, new = (ids[:64], mask[:64]), (ids[64:], mask[64:])
        module = sentences.Encoder().eval()
    examples = tuple(torch.from_numpy(v[:2]) for v in known)
    calibration = [(known[0][i : i + 8], known[1][i : i + 8]) for i in range(0, 64, 8)]
    programs = {}
    with step("compile float and int8 with bitwright"):
        for name, recipe in (("float", "float"), ("int8", SMOOTH)):
            graph = bw.capture(module, examples, dynamic_batch=True, name=f"MiniLM, {name}")
            programs[name] = bw.compile(graph, recipe=recipe, calibration=calibration, measure=True)
    programs["int8"].save(OUT / "minilm.bw")
    with step("export and quantize with onnxruntime"):
        path = peers.export(module, examples, ["ids", "mask"], OUT / "minilm.onnx")
        low = peers.quantize_transformer(path, OUT / "minilm-int8.onnx")
    calls: dict[str, Callable[..., Array]] = {"torch float": peers.eager(module)}
    calls |= {"onnxruntime float": peers.session(path), "onnxruntime int8": peers.session(low)}
    calls |= {f"bitwright {name}": program for name, program in programs.items()}
    reference = sentences.encode(module, new)
    rows, details = [], {}
    with step(f"encode {len(new[0])} sentences that calibration has not seen"):
        for name, call in calls.items():
            made = np.concatenate([call(new[0][i : i + 1], new[1][i : i + 1]) for i in range(len(new[0]))])
            details[name] = sentences.agreement(made, reference)
            rows.append(Contender(name, call, f"{details[name]['mean cosine']:.4f}"))
    print_latencies(rows, {"1 sentence": (new[0][:1], new[1][:1])}, "cosine to torch")
    for name in ("onnxruntime int8", "bitwright int8"):
        text = ", ".join(f"{k} {v:.4f}" for k, v in details[name].items())
        say(f"  {name}: {text}")
    heading("The slowest layers of the int8 program")
    print_slowest(programs["int8"], 12)
    return programs["int8"]


# --- printing -------------------------------------------------------------------------------------------------


def print_latencies(rows: list[Contender], inputs: Mapping[str, tuple[Array, ...]], quality: str) -> None:
    """Latency of every contender on every input, from interleaved rounds; ends with the plain verdicts."""
    timings: dict[str, Timings] = {}
    for name, values in inputs.items():
        calls = {r.name: (lambda call=r.call, v=values: call(*v)) for r in rows}
        with console.status(f"measure {name}"):
            timings[name] = measure(calls, rounds=21, sample_seconds=0.01)
    table = Table("processor time, one thread", box=cli_show.SIMPLE_HEAD, pad_edge=False)
    for head in (quality, *inputs):
        table.add_column(head, justify="right")
    for r in rows:
        table.add_row(r.name, r.quality, *(units.seconds(t[r.name].cpu_median) for t in timings.values()))
    console.print(table)
    names = {r.name for r in rows}
    for name, t in timings.items():
        for ours, other in VERDICTS:
            if {ours, other} <= names:
                say(f"  {name}: {verdict(t, ours, other)}")


VERDICTS = (
    ("bitwright 2:4 int8", "bitwright int8"),
    ("bitwright int8", "bitwright float"),
    ("bitwright int8", "onnxruntime int8"),
    ("bitwright float", "onnxruntime float"),
)


def verdict(timings: Timings, ours: str, other: str) -> str:
    """``bitwright int8 is 1.62 times as fast as bitwright float (1.58 to 1.66)``; slower is said as slower."""
    ratio = timings.ratio(other, ours, cpu=True)
    if ratio.low <= 1 <= ratio.high:
        return f"{ours} and {other} are equally fast within the noise ({ratio.low:.2f} to {ratio.high:.2f})"
    if ratio.median > 1:
        return f"{ours} is {ratio.median:.2f} times as fast as {other} ({ratio.low:.2f} to {ratio.high:.2f})"
    slow = timings.ratio(ours, other, cpu=True)
    return f"{ours} is SLOWER than {other}: {slow.median:.2f} times the time ({slow.low:.2f} to {slow.high:.2f})"


def print_slowest(program: Program, count: int) -> None:
    """The layers that take the most time, and what they are together."""
    report = program.report
    slowest = sorted(report.layers, key=lambda x: -(x.measured_seconds or 0.0))[:count]
    kept = [x for x in report.layers if any(x is y for y in slowest)]
    console.print(cli_show.layers(report.model_copy(update={"layers": kept})))
    console.print(cli_show.reasons(report))
    console.print(cli_show.summary(report))


def main() -> None:
    """Both parts, then the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("digits", "sentences"), help="run one of the two parts")
    only = parser.parse_args().only
    start = time.perf_counter()
    OUT.mkdir(exist_ok=True)
    parts = {"digits": digits_demo, "sentences": sentences_demo}
    programs = [run() for name, run in parts.items() if only in (None, name)]
    write_html([p.report for p in programs], "report.html", title="bitwright demo")
    say(f"\nreport.html shows every layer, pass and refusal. The demo took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
