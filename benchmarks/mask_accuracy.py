"""What each mask costs in accuracy: digits CNN and transformer trained here, and the MiniLM sentence encoder.

    python benchmarks/mask_accuracy.py [--only digits|minilm] [--seeds 3] [--write]

Columns: the mask alone on the trained weights (one-shot); then `reconstruct` on calibration data the accuracy is not
measured on; then two epochs of sparse training in torch, the masks refreshed every step and frozen for the second.
Every graph goes through the passes a user would name and is evaluated by the reference interpreter, so the figures
are those of the masks, not of a number format. ``--write`` keeps the tables in benchmarks/results/mask_accuracy.md
and .json.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

import digits
import digits_transformer
import numpy as np
import tables
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.ops import Weight
from bitwright.passes._layers import stem
from bitwright.passes.pipelines import CANONICAL

RATE, EPOCHS = 1e-3, 2
NEW, CALIBRATION, TRAINING = 64, 64, 224
"""Sentences: to judge by, to calibrate with, and to train on beside those."""
UNSTRUCTURED = 0.7
"""Zero share of the network that `convert-unstructured` starts from."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Row:
    """One mask: the pass, and how to train under it (None: under the pass's own mask, frozen)."""

    name: str
    recipe: str
    training: Mapping[str, Any] | None = None
    pruned: bool = False
    """Start from a network pruned without structure."""


def nm(pattern: str, name: str = "", **more: Any) -> Row:
    options = " ".join(f"{k}={v}" for k, v in more.items())
    recipe = f"nm-mask{{pattern={pattern}{' ' + options if options else ''}}}"
    return Row(name or pattern, recipe, {"pattern": pattern, **more})


ROWS = (
    nm("2:4"),
    nm("4:8"),
    Row("4:8 transposable", "transposable-mask{pattern=4:8}", {"pattern": "4:8", "transposable": True}),
    nm("2:4", "2:4 shared by 4 outputs", shared=4),
    nm("2:4", "2:4 shared by 64 outputs", shared=64),
    nm("2:4", "2:4 of 1x4 blocks", block=4),
    Row("32 of 64, fixed count", "fixed-count-mask{count=32 per=64}"),
    nm("1:4"),
    nm("2:8"),
    Row("16 of 64, fixed count", "fixed-count-mask{count=16 per=64}"),
    Row(f"converted from {UNSTRUCTURED:.0%} unstructured", "convert-unstructured{group=8}", pruned=True),
)
WANDA = (
    Row("2:4 by Wanda score", "nm-mask{pattern=2:4 score=wanda}"),
    Row("2:8 by Wanda score", "nm-mask{pattern=2:8 score=wanda}"),
)


@dataclass
class Cells:
    """Quality of one row, by column, one number a seed."""

    one_shot: list[float] = field(default_factory=list)
    sparsegpt: list[float] = field(default_factory=list)
    reconstruct: list[float] = field(default_factory=list)
    trained: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    refused: int = 0


def masked(graph: Graph, recipe: str, calibration: Sequence[Any]) -> tuple[Graph, Any]:
    """The graph after canonical passes and a recipe, and the report."""
    return bw.optimize(graph, f"{CANONICAL}, {recipe}", calibration=calibration, target="host")


def kept(report: Any) -> float:
    """Kept magnitude over the masked layers: the mean of their shares."""
    shares = [f["kept_magnitude"] for _, _, f in report.remarks if "kept_magnitude" in f]
    return statistics.fmean(shares) if shares else float("nan")


def masks_of(graph: Graph) -> dict[str, Tensor]:
    """Non-zero positions of every weight that carries an encoding, by parameter name."""
    found = {}
    for node in graph.nodes:
        if isinstance(node.op, Weight) and node.type.encoding is not None:
            found[stem(node.op.ref)] = torch.from_numpy(np.asarray(graph.weights[node.op.ref].array) != 0)
    return found


# --- digits ----------------------------------------------------------------------------------------------------


def capture(net: nn.Module, data: digits.Digits) -> Graph:
    return bw.capture(net.eval(), (data.x[:2],), dynamic_batch=True)


def accuracy(graph: Graph, data: digits.Digits) -> float:
    """Percent of the test images told right."""
    (logits,) = evaluate(graph, [data.test_x])
    return 100 * float((logits.argmax(1) == data.test_y).float().mean())


def fine_tune(net: nn.Module, data: digits.Digits, row: Row, masks: Mapping[str, Tensor]) -> nn.Module:
    """Two epochs under the masks of a row; the masks hold exactly afterwards."""
    net = copy.deepcopy(net)
    if row.training is None:
        digits.apply_masks(net, dict(masks))
        digits.train(net, data, EPOCHS, RATE, lambda: digits.apply_masks(net, dict(masks)), lambda e, x: None)
        return net
    trainer = bw.sparse_training(net, **row.training, refresh_every=1)  # 21 steps an epoch: 40 would be one refresh

    def epoch_over(epoch: int, loss: float) -> None:
        if epoch == 0:
            trainer.freeze()

    digits.train(net, data, EPOCHS, RATE, trainer.step, epoch_over)
    trainer.finish()
    return net


def prune_globally(net: nn.Module, data: digits.Digits) -> nn.Module:
    """The network with its smallest weights, over all layers, at zero; one epoch of training under that mask."""
    net = copy.deepcopy(net)
    weights = {n: p.detach().abs() for n, p in net.named_parameters() if p.ndim > 1}
    cut = torch.cat([w.flatten() for w in weights.values()]).quantile(UNSTRUCTURED)
    masks = {n: (w > cut).float() for n, w in weights.items()}
    digits.apply_masks(net, masks)
    digits.train(net, data, 1, RATE, lambda: digits.apply_masks(net, masks), lambda e, x: None)
    return net


def digits_rows(
    make: Callable[[], nn.Module], epochs: int, rate: float, seeds: int
) -> tuple[list[float], dict[str, Cells]]:
    """Accuracy of the dense network, and of every row."""
    data = digits.load()
    calibration = [(part.numpy(),) for part in data.x[:256].split(64)]
    dense, cells = [], {row.name: Cells() for row in (*ROWS, *WANDA)}
    for seed in range(seeds):
        torch.manual_seed(seed)
        net = make()
        digits.train(net, data, epochs, rate, lambda: None, lambda e, x: None)
        pruned = prune_globally(net, data)
        dense.append(accuracy(capture(net, data), data))
        for row in (*ROWS, *WANDA):
            start, c = (pruned if row.pruned else net), cells[row.name]
            graph = capture(start, data)
            shot, report = masked(graph, row.recipe, calibration)
            c.kept.append(kept(report))
            c.refused = len(report.refusals)
            c.one_shot.append(accuracy(shot, data))
            c.reconstruct.append(accuracy(masked(graph, f"{row.recipe}, reconstruct", calibration)[0], data))
            if row in WANDA:
                continue
            tuned = capture(fine_tune(start, data, row, masks_of(shot)), data)
            c.trained.append(accuracy(masked(tuned, row.recipe, calibration)[0], data))
            print(
                f"  seed {seed} {row.name}: {c.one_shot[-1]:.1f} {c.reconstruct[-1]:.1f} {c.trained[-1]:.1f}",
                flush=True,
            )
    return dense, cells


# --- MiniLM ----------------------------------------------------------------------------------------------------


def library_sentences(count: int) -> list[str]:
    """Sentences of 8 to 40 words from the docstrings of the Python standard library."""
    found: dict[str, None] = {}
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                parts = re.findall(r"[A-Z][a-z][^.<>{}|=_]*\.", text)
                found.update(dict.fromkeys(s for s in parts if 8 <= len(s.split()) <= 40))
    order = np.random.default_rng(0).permutation(len(found))
    return [list(found)[i] for i in order[:count]]


def minilm_rows(train: bool) -> tuple[dict[str, Cells], int]:
    """Mean cosine of sentence vectors to the dense encoder's, on sentences no pass has seen."""
    import sentences

    ids, mask = sentences.tokens(sentences.sentences(NEW + CALIBRATION) + library_sentences(TRAINING))
    new, known, rest = slice(0, NEW), slice(NEW, NEW + CALIBRATION), slice(NEW, None)
    module = sentences.Encoder().eval()
    graph = bw.capture(module, tuple(torch.from_numpy(v[:2]) for v in (ids, mask)), dynamic_batch=True, name="MiniLM")
    calibration = [(ids[known][i : i + 16], mask[known][i : i + 16]) for i in range(0, CALIBRATION, 16)]
    reference = sentences.encode(module, (ids[new], mask[new]))

    def cosine(g: Graph) -> float:
        (made,) = evaluate(g, [ids[new], mask[new]])
        return float((made.numpy() * reference).sum(1).mean())

    cells = {}
    for row in (*(r for r in ROWS if not r.pruned), *WANDA):
        start, c = time.perf_counter(), Cells()
        shot, report = masked(graph, row.recipe, calibration)
        c.kept.append(kept(report))
        c.refused = len(report.refusals)
        c.one_shot.append(cosine(shot))
        c.reconstruct.append(cosine(masked(graph, f"{row.recipe}, reconstruct", calibration)[0]))
        if row.name in ("2:4", "2:8"):
            recipe = f"{row.recipe}, reconstruct{{method=sparsegpt mask=update}}"
            c.sparsegpt.append(cosine(masked(graph, recipe, calibration)[0]))
        if train and row not in WANDA:
            tuned = distil(module, row, masks_of(shot), (ids[rest], mask[rest]))
            again = bw.capture(tuned, tuple(torch.from_numpy(v[:2]) for v in (ids, mask)), dynamic_batch=True)
            c.trained.append(cosine(masked(again, row.recipe, calibration)[0]))
        cells[row.name] = c
        took = time.perf_counter() - start
        print(f"  {row.name}: {c.one_shot} {c.sparsegpt} {c.reconstruct} {c.trained} in {took:.0f} s", flush=True)
    return cells, len(ids[rest])


def distil(module: nn.Module, row: Row, masks: Mapping[str, Tensor], batch: tuple[Array, Array]) -> nn.Module:
    """Two epochs that pull the masked encoder's sentence vectors to the dense encoder's."""
    import sentences

    target = torch.from_numpy(sentences.encode(module, batch))
    net = copy.deepcopy(module).train(False)
    trainer = None if row.training is None else bw.sparse_training(net, **row.training, refresh_every=1)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    frozen = {n: m for n, m in masks.items() if n in dict(net.named_parameters())}
    torch.manual_seed(0)
    for epoch in range(EPOCHS):
        if trainer is not None and epoch == 1:
            trainer.freeze()
        for part in torch.randperm(len(target)).split(16):
            ids, mask = (torch.from_numpy(v)[part] for v in batch)
            loss = 1 - (net(ids, mask) * target[part]).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if trainer is not None:
                trainer.step()
            else:
                digits.apply_masks(net, frozen)
    if trainer is not None:
        trainer.finish()
    return net


# --- tables ----------------------------------------------------------------------------------------------------


def shown(values: Sequence[float], digits_: int) -> str:
    return f"{statistics.fmean(values):.{digits_}f}" if values else ""


def table(cells: Mapping[str, Cells], digits_: int) -> str:
    """One Markdown row per mask."""
    heads = ["mask", "magnitude kept", "one-shot", "SparseGPT", "reconstruct", "trained 2 epochs", "layers left dense"]
    rows = [
        [
            name, f"{100 * statistics.fmean(c.kept):.1f} %", shown(c.one_shot, digits_), shown(c.sparsegpt, digits_),
            shown(c.reconstruct, digits_), shown(c.trained, digits_), c.refused,
        ]
        for name, c in cells.items()
    ]  # fmt: skip
    used = [i for i in range(len(heads)) if any(str(r[i]) for r in rows)]
    text: str = tables.markdown([heads[i] for i in used], [[r[i] for i in used] for r in rows])
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("digits", "minilm"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-distil", action="store_true", help="leave out the training of MiniLM, the slow part")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts, data = [], {}
    if args.only in (None, "digits"):
        for title, make, epochs, rate in (
            ("Digits CNN", digits.Net, 5, 4e-3),
            ("Digits transformer", digits_transformer.Transformer, 25, 3e-3),
        ):
            print(title)
            dense, cells = digits_rows(make, epochs, rate, args.seeds)
            parts.append(
                f"## {title}\n\nPercent of 450 test images told right (one image is 0.22), mean of {args.seeds} seeds; "
                f"dense: {shown(dense, 1)}.\n\n{table(cells, 1)}"
            )
            data[title] = {"dense": dense, "rows": {n: vars(c) for n, c in cells.items()}}
    if args.only in (None, "minilm"):
        print("MiniLM")
        cells, count = minilm_rows(not args.no_distil)
        parts.append(
            "## MiniLM sentence encoder\n\nMean cosine of 64 sentences' vectors to the dense encoder's. Calibration: "
            f"{CALIBRATION} other sentences; training: two epochs on {count} sentences towards the dense vectors.\n\n"
            f"{table(cells, 4)}"
        )
        data["MiniLM"] = {n: vars(c) for n, c in cells.items()}
    env = tables.environment({"torch": torch.__version__, "bitwright": bw.__version__})
    method = "Accuracy, not speed: the reference interpreter on the masked graphs; seeds fix every figure."
    text = tables.heading("What masks cost", env, method) + "\n" + "\n".join(parts)
    print(text)
    if args.write:
        stem_ = "mask_accuracy" + (f"_{args.only}" if args.only else "")
        tables.save(stem_, text, {"environment": env, "results": data})


if __name__ == "__main__":
    main()
