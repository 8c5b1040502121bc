"""The named pipelines, one page. Order is part of the meaning: each line says why it stands where it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import LEVELS
from bitwright.passes._manager import Pipeline
from bitwright.passes._pass import Pass
from bitwright.passes._spec import parse_passes

RECIPES: Mapping[str, str] = {
    "none": "",
    "float": "",
    "int8": "observe-ranges, quantize-int8, lower-attention",
    "bf16": "lower-contractions, lower-attention",
    "f16": "lower-contractions{format=f16}, lower-attention{format=f16}",
    "sparse": "nm-mask{pattern=2:4}, reconstruct",
    "sparse-int8": "nm-mask{pattern=2:4}, reconstruct, observe-ranges, quantize-int8, lower-attention",
    "transposable": "transposable-mask{pattern=4:8}, reconstruct",
    # the norms come last: they mend what the formats that were chosen did
    "ptq-light": "observe-ranges{method=mse also=4}, assign-precision, retune-norms",
    # biases last and learnt: the norms have given every channel its mean, so that a measured correction finds nothing
    "ptq-advanced": (
        "observe-ranges{method=mse also=4}, assign-precision{rounding=adaquant}, retune-norms, "
        "correct-bias{method=tuned}"
    ),
    # activations in 8 bits found at run time: products of integers are what makes few bits fast
    "weight-only": "quantize-weights{bits=4 group=64}, dynamic-quantize",
    # data before equalizing, which moves what batch norms remember; ranges after it, for the channels have changed
    "data-free": "synthesize-calibration, equalize-layers, observe-ranges, quantize-int8, correct-bias",
}
"""Names a user may write for a list of passes."""

CANONICAL = ", ".join(
    (
        "fold-constants",  # shapes and scales that exporters compute
        "simplify",  # one spelling for each computation
        "fold-batch-norm",  # needs biases inside the contractions
        "fold-constants",  # what folding left behind
        "common-subexpressions",  # norms read x - mean twice
        "recognize-activations",
        "recognize-norms",
        "recognize-attention",
        "simplify",  # transposes meet where attention took a transposed key
        "detect-sparsity",  # needs the weights in their final orientation
    )
)
"""One spelling for each computation; part of every pipeline."""


def standard(recipe: str | Iterable[Pass] = "") -> Pipeline:
    """Canonical passes, the recipe, and lowering to the integer level.

    Passes of the recipe that take the integer level run after the lowering. Raises :class:`InvalidInput` when
    the recipe does not fit.
    """
    passes = parse_passes(recipe) if isinstance(recipe, str) else tuple(recipe)
    for p in passes:
        if p.takes == "kernel" or LEVELS.index(p.gives) > LEVELS.index("integer"):
            raise InvalidInput(f"{p.name} works on the kernel level; a recipe holds graph and integer passes")
    early = [p for p in passes if p.takes == "graph"]
    late = [p for p in passes if p.takes == "integer"]
    lowers = any(p.gives == "integer" for p in early)
    return Pipeline(
        (*parse_passes(CANONICAL), *early, *(() if lowers else parse_passes("lower-to-integer")), *late), "graph"
    )


__all__ = ["CANONICAL", "RECIPES", "standard"]
