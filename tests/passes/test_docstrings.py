"""The rewrite a docstring shows is the rewrite the pass does."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bitwright.ir.text import parse
from bitwright.ir.weights import Weights
from bitwright.passes._instruments import random_weights
from bitwright.passes._pass import Context, Pass
from bitwright.passes.registry import PASSES, describe, load

RANGES = {"x": (-1.0, 3.0), "h": (0.0, 2.0), "y": (-2.0, 2.0)}

NEED_DATA = (
    "assign-precision",
    "observe-accumulators",
    "smooth-quant",
    "correct-bias",
    "retune-norms",
    "synthesize-calibration",
)


@pytest.mark.parametrize("name", [n for n in PASSES if n != "observe-ranges"])
def test_docstring_rewrite(
    name: str, example: Callable[[type[Pass]], tuple[str, str]], check: Any, inputs: Callable[..., Any]
) -> None:
    cls = load(name)
    before, after = example(cls)
    tolerance = None if cls.lossy or cls.takes != cls.gives else 1e-5
    context = Context(facts={"ranges": RANGES})
    if "dense" in cls.needs:  # what a mask before it tells: the weights without their pattern
        graph = parse(re.sub(r" nm<[^>]*>", "", textwrap.dedent(before).strip() + "\n"))
        context.facts["dense"] = dict(random_weights(graph))
        context.calibration = [inputs(graph, seed) for seed in range(4)]
    if name in NEED_DATA:
        graph = parse(textwrap.dedent(before).strip() + "\n")
        context.calibration = [inputs(graph, seed) for seed in range(4)]
        halved = {k: (h.array / 2).astype(h.array.dtype) for k, h in random_weights(graph).items()}
        context.facts["reference"] = replace(graph, weights=Weights(halved))  # a float model to be held against
    check(cls(), before=before, after=after, context=context, tolerance=tolerance)


@pytest.mark.parametrize("name", list(PASSES))
def test_name_and_description(name: str) -> None:
    assert load(name).name == name
    assert describe(name).endswith(".")
