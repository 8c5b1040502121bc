"""Which candidates look promising: the logarithm of their time over that of the default, by ridge regression, corrected
by what it misses at the nearest known candidates.

It is fitted anew to all good records before each batch, in milliseconds and without a library; in rank it comes near
boosted trees (benchmarks/tuner_model.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.tuning.space import Point

Row = dict[str, float]
_PENALTY = 0.3
_NEIGHBOURS, _CORRECTED, _REMEMBERED = 5, 256, 1000
"""Neighbours that correct a prediction, predictions (the best ones) that are corrected, candidates to be neighbours."""
_LARGEST = 2.0
"""Logarithms beyond this all mean "bad"; their size would only disturb the fit."""


def columns(template: str, point: Point, features: Mapping[str, float]) -> Row:
    """The row of a candidate: its settings, what the tile leaves over, and products with the workload's sizes."""
    out: Row = {"": 1.0, f"t.{template}": 1.0}
    sizes = {k: features.get(k, 0.0) / 10 for k in ("rows", "cols", "depth")}
    numbers: Row = {}
    for name, value in point.items():
        if isinstance(value, bool):
            numbers[name] = float(value)
        elif isinstance(value, int):
            numbers[name] = math.log2(1 + abs(value))
            out[f"{name}={value}"] = 1.0
        else:
            out[f"{name}={value}"] = 1.0
    out |= numbers
    out |= {f"{n}^2": v * v for n, v in numbers.items()}
    out |= {f"{n}*{s}": v * w for n, v in numbers.items() for s, w in sizes.items()}
    names = sorted(numbers)
    out |= {f"{a}*{b}": numbers[a] * numbers[b] for i, a in enumerate(names) for b in names[i + 1 :]}
    for knob, size in (("rows", "rows"), ("vectors", "cols")):
        if isinstance(point.get(knob), int) and size in features:
            unit = int(point[knob]) * (16 if knob == "vectors" else 1)
            whole = max(1.0, 2 ** features[size])
            out[f"left over {knob}"] = math.ceil(whole / unit) * unit / whole - 1
    return out


@dataclass
class Model:
    """Predicts log(time / default's time) from :func:`columns`; without rows it predicts 0 for all."""

    names: dict[str, int] = field(default_factory=dict)
    weights: NDArray[Any] = field(default_factory=lambda: np.zeros(0))
    scale: NDArray[Any] = field(default_factory=lambda: np.ones(0))
    known: NDArray[Any] = field(default_factory=lambda: np.zeros((0, 0)))
    missed: NDArray[Any] = field(default_factory=lambda: np.zeros(0))
    """Of the known candidates: measured less predicted."""

    @staticmethod
    def fit(rows: Sequence[Row], ratios: Sequence[float], importance: Sequence[float] | None = None) -> Model:
        """The model of these candidates; ``importance``: how much each counts (1.0 unless given)."""
        if not rows:
            return Model()
        names = {name: i for i, name in enumerate(dict.fromkeys(n for r in rows for n in r))}
        x = _matrix(rows, names)
        y = np.clip(np.log(np.asarray(ratios)), -_LARGEST, _LARGEST)
        w = np.sqrt(np.asarray(importance if importance is not None else np.ones(len(rows))))[:, None]
        a = x * w
        weights = np.linalg.solve(a.T @ a + _PENALTY * np.eye(len(names)), a.T @ (y * w[:, 0]))
        scale, last = x.std(0) + 1e-6, slice(-_REMEMBERED, None)
        return Model(names, weights, scale, x[last] / scale, (y - x @ weights)[last])

    def predict(self, rows: Sequence[Row]) -> NDArray[Any]:
        """Predicted log ratios; of many rows only the most promising ones are corrected."""
        if not self.names or not rows:
            return np.zeros(len(rows))
        x = _matrix(rows, self.names)
        out: NDArray[Any] = x @ self.weights
        for i in np.argsort(out)[:_CORRECTED]:
            away = np.abs(self.known - x[i] / self.scale).sum(1)
            near = np.argsort(away)[:_NEIGHBOURS]
            share = 1 / (1 + away[near])
            out[i] += (share * self.missed[near]).sum() / share.sum()
        return out


def _matrix(rows: Sequence[Row], names: Mapping[str, int]) -> NDArray[Any]:
    out = np.zeros((len(rows), len(names)))
    for i, row in enumerate(rows):
        for name, value in row.items():
            if name in names:
                out[i, names[name]] = value
    return out


def distance(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """How unlike two workloads are: the sum of the differences of their features."""
    return sum(abs(a.get(k, 0.0) - b.get(k, 0.0)) for k in a.keys() | b.keys())
