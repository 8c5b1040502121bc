"""Masks, reconstruction and int8 in one recipe: the kernels use the pattern, the outputs come closer to the model's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bitwright as bw
from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.targets.machine import cpu_flags
from tests import zoo

BEST = next(t for t in BUILTIN.values() if {f.replace("avxvnni", "avx_vnni") for f in t.features} <= cpu_flags())


def far(program: bw.Program, module: torch.nn.Module, batches: list[tuple[torch.Tensor, ...]]) -> float:
    """Relative RMS of the outputs against the module's."""
    square = norm = 0.0
    for batch in batches:
        with torch.no_grad():
            want: Any = module(*batch)
        got: Any = program(*batch)
        pair = [x[0] if isinstance(x, (tuple, list)) else x for x in (got, want)]
        a, b = (np.asarray(x, np.float64) for x in pair)
        square, norm = square + float(((a - b) ** 2).sum()), norm + float((b**2).sum())
    return float(np.sqrt(square / norm))


def images(seed: int) -> tuple[torch.Tensor, ...]:
    """Smooth pictures of 8 x 8, as correlated as digits are."""
    g = torch.Generator().manual_seed(seed)
    small = torch.randn(16, 1, 4, 4, generator=g)
    return (torch.nn.functional.interpolate(small, size=(8, 8), mode="bilinear", align_corners=False),)


def sentences(seed: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, zoo.VOCABULARY["tiny"], (2, 12), generator=g)
    return ids, torch.ones_like(ids)


@pytest.mark.parametrize("recipe", ["nm-mask{pattern=4:8}, reconstruct, int8", "transposable-mask, reconstruct"])
@pytest.mark.parametrize("model", ["digits", "bert_base"])
def test_kernels_use_the_pattern_and_outputs_come_closer(model: str, recipe: str) -> None:
    module, inputs = getattr(zoo, model)("tiny")
    make = images if model == "digits" else sentences
    made = [make(seed) for seed in range(12)]
    assert [a.shape[1:] for a in made[0]] == [a.shape[1:] for a in inputs]
    data, unseen = made[:8], made[8:]

    def compiled(spec: str) -> bw.Program:
        return bw.compile(module, example_inputs=data[0], recipe=spec, calibration=data, target=BEST)

    program, masked = compiled(recipe), compiled(recipe.replace(", reconstruct", ""))
    assert "reconstruct" not in masked.report.pipeline
    layers = [x for x in program.report.layers if x.formats.w and x.pattern]
    assert len(layers) >= 2
    for x in layers:
        assert x.kernel == "contract"
        assert x.reason.startswith("4:8 kernel")
        before, after = x.figure("error_before"), x.figure("error_after")
        assert before is not None
        assert after is not None
        assert after < before
    assert far(program, module, unseen) < 0.8 * far(masked, module, unseen)
