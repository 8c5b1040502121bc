"""Every pass by name: one explicit table, imported when somebody asks."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

from bitwright.ir.errors import InvalidInput, did_you_mean
from bitwright.passes._pass import Pass

PASSES: Mapping[str, str] = {
    "simplify": "canonical.simplify:Simplify",
    "fold-batch-norm": "canonical.fold_batch_norm:FoldBatchNorm",
    "fold-constants": "canonical.fold_constants:FoldConstants",
    "common-subexpressions": "canonical.common_subexpressions:CommonSubexpressions",
    "recognize-activations": "canonical.recognize_activations:RecognizeActivations",
    "recognize-norms": "canonical.recognize_norms:RecognizeNorms",
    "recognize-attention": "canonical.recognize_attention:RecognizeAttention",
    "permute-channels": "sparsity.permute_channels:PermuteChannels",
    "prune-structures": "sparsity.prune_structures:PruneStructures",
    "nm-mask": "sparsity.nm_mask:NMMask",
    "transposable-mask": "sparsity.transposable_mask:TransposableMask",
    "fixed-count-mask": "sparsity.fixed_count_mask:FixedCountMask",
    "magnitude-mask": "sparsity.magnitude_mask:MagnitudeMask",
    "convert-unstructured": "sparsity.convert_unstructured:ConvertUnstructured",
    "reconstruct": "sparsity.reconstruct:Reconstruct",
    "unbiased-mask": "sparsity.unbiased_mask:UnbiasedMask",
    "detect-sparsity": "sparsity.detect_sparsity:DetectSparsity",
    "synthesize-calibration": "precision.synthesize_calibration:SynthesizeCalibration",
    "observe-ranges": "precision.observe_ranges:ObserveRanges",
    "equalize-layers": "precision.equalize_layers:EqualizeLayers",
    "assign-precision": "precision.assign_precision:AssignPrecision",
    "quantize-weights": "precision.quantize_weights:QuantizeWeights",
    "codebook-weights": "precision.codebook_weights:CodebookWeights",
    "quantize-channels": "precision.quantize_channels:QuantizeChannels",
    "dynamic-quantize": "precision.dynamic_quantize:DynamicQuantize",
    "quantize-floats": "precision.quantize_floats:QuantizeFloats",
    "quantize-int8": "precision.quantize_int8:QuantizeInt8",
    "smooth-quant": "precision.smooth_quant:SmoothQuant",
    "correct-bias": "precision.correct_bias:CorrectBias",
    "retune-norms": "precision.retune_norms:RetuneNorms",
    "lower-to-integer": "lowering.to_integer:LowerToInteger",
    "bound-accumulators": "accumulators.bound_accumulators:BoundAccumulators",
    "lower-accumulators": "accumulators.lower_accumulators:LowerAccumulators",
    "observe-accumulators": "accumulators.observe_accumulators:ObserveAccumulators",
    "constrain-weights": "accumulators.constrain_weights:ConstrainWeights",
    "small-float-sums": "accumulators.small_float_sums:SmallFloatSums",
    "lower-contractions": "lowering.lower_contractions:LowerContractions",
    "lower-attention": "lowering.lower_attention:LowerAttention",
    "channels-last": "lowering.channels_last:ChannelsLast",
    "fold-views": "lowering.fold_views:FoldViews",
    "fuse": "lowering.fuse:Fuse",
}
"""Pass name -> module (below ``bitwright.passes``) and class."""


def load(name: str) -> type[Pass]:
    """The class of a pass: a name of the table, or ``path/to/file.py:Class``; raises :class:`InvalidInput`."""
    if name in PASSES:
        module, _, cls = PASSES[name].partition(":")
        return _checked(getattr(importlib.import_module(f"bitwright.passes.{module}"), cls), name)
    path, _, cls = name.rpartition(":")
    if not path.endswith(".py"):
        raise InvalidInput(f"no pass is called {name!r}{did_you_mean(name, PASSES)}")
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise InvalidInput(f"{path}: no such file (a pass of yours is given as path/to/file.py:Class)")
    found = getattr(_module(file, file.stat().st_mtime_ns), cls, None)
    if found is None:
        raise InvalidInput(f"{path} has no class {cls!r}")
    found = _checked(found, name)
    found.source = name
    return found


def _checked(found: object, name: str) -> type[Pass]:
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise InvalidInput(f"{name} is not a pass: it must be a frozen dataclass derived from bitwright.passes.Pass")
    return found


@cache
def _module(file: Path, stamp: int) -> ModuleType:
    """The module of a user's file; loaded again when the file changed."""
    name = f"bitwright_user_{file.stem}_{abs(hash((file, stamp)))}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[name]
        raise InvalidInput(f"{file} cannot be loaded: {type(e).__name__}: {e}") from e
    return module


def describe(name: str) -> str:
    """The first sentence of a pass's docstring."""
    return (load(name).__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")


__all__ = ["PASSES", "describe", "load"]
