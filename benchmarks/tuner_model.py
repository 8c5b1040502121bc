"""Which model ranks the tuner's candidates best: leave one workload out, or learn from half of it.

    python benchmarks/tuner_model.py tuning.sqlite

Prints the rank correlation of predicted and measured times within a workload (1 is perfect, random order is 0), and how
much slower the best of the four candidates ranked first is than the best of all. xgboost runs where it is installed.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.codegen.tuning.model import Model, Row, columns
from bitwright.codegen.tuning.records import Database

LEAST, FIRST = 8, 4
Fit = Callable[[Sequence[Row], Sequence[float], Sequence[Row]], Any]


def ours(rows: Sequence[Row], ratios: Sequence[float], new: Sequence[Row]) -> Any:
    """Ridge regression corrected by neighbours."""
    return Model.fit(rows, ratios).predict(new)


def nearest(rows: Sequence[Row], ratios: Sequence[float], new: Sequence[Row]) -> Any:
    """The mean of the three most alike candidates."""
    names = sorted({n for r in [*rows, *new] for n in r})
    known, asked = (np.array([[r.get(n, 0.0) for n in names] for r in some]) for some in (rows, new))
    y = np.log(np.asarray(ratios))
    return np.array([y[np.argsort(np.abs(known - a).sum(1))[:3]].mean() for a in asked])


def trees(rows: Sequence[Row], ratios: Sequence[float], new: Sequence[Row]) -> Any:
    """Gradient-boosted trees of xgboost."""
    import xgboost  # type: ignore[import-not-found]

    names = sorted({n for r in rows for n in r})
    x, asked = (np.array([[r.get(n, 0.0) for n in names] for r in some]) for some in (rows, new))
    model = xgboost.XGBRegressor(n_estimators=100, max_depth=4, learning_rate=0.15, n_jobs=1)
    return model.fit(x, np.clip(np.log(ratios), -2, 2)).predict(asked)


def shuffled(_: Sequence[Row], __: Sequence[float], new: Sequence[Row]) -> Any:
    """Random order: the line every search has to beat."""
    return np.random.default_rng(0).random(len(new))


def correlation(a: Any, b: Any) -> float:
    """Spearman's rank correlation."""
    first, second = (np.argsort(np.argsort(v)).astype(np.float64) for v in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def main() -> None:
    """Read a database and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("database", type=Path)
    with Database(parser.parse_args().database, write=False) as database:
        known = database.workloads()
        good = [r for r in database.records() if r.status == "ok" and not r.confirmed and r.workload in known]
    rows = [(r.workload, columns(r.template, r.point, known[r.workload][1]), r.ratio) for r in good]
    counts = {w: sum(x[0] == w for x in rows) for w in {x[0] for x in rows}}
    chosen = sorted(w for w, n in counts.items() if n >= LEAST)
    print(f"{len(rows)} candidates, {len(chosen)} workloads with at least {LEAST}\n")
    print("| model | own share | rank correlation (median) | best of first four (mean) |\n|---|---|---|---|")
    models: dict[str, Fit] = {"the tuner's": ours, "3 nearest": nearest, "xgboost": trees, "random": shuffled}
    for name, fit in models.items():
        for share in (0.0, 0.5):
            try:
                found = [evaluate(fit, rows, w, share) for w in chosen]
            except ImportError:
                continue
            ranks, losses = zip(*found, strict=True)
            print(f"| {name} | {share:.0%} | {statistics.median(ranks):.2f} | {statistics.mean(losses):.3f}x |")


def evaluate(fit: Fit, rows: list[tuple[str, Row, float]], workload: str, share: float) -> tuple[float, float]:
    """Rank correlation and loss on candidates of one workload that the model has not seen."""
    own = [x for x in rows if x[0] == workload]
    random.Random(0).shuffle(own)
    cut = int(len(own) * share)
    seen, new = [x for x in rows if x[0] != workload] + own[:cut], own[cut:]
    ratios = np.array([x[2] for x in new])
    predicted = fit([x[1] for x in seen], [x[2] for x in seen], [x[1] for x in new])
    first = ratios[np.argsort(predicted)[:FIRST]]
    return correlation(predicted, ratios), float(first.min() / ratios.min())


if __name__ == "__main__":
    main()
