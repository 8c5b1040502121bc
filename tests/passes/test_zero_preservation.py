"""What a mask made zero stays zero: every mask followed by every registered pass, the encoding still on the type.

A pass that is added to the registry is covered without a word. What it needs is established by the passes that do
so; one that cannot run here must be named in ``EXEMPT`` with the reason.
"""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest

from bitwright.codegen.targets import BUILTIN
from bitwright.ir import ops
from bitwright.ir.graph import LEVELS, Graph
from bitwright.ir.patterns import density, violation
from bitwright.ir.types import Encoding
from bitwright.ir.verify import verify
from bitwright.ir.weights import Array
from bitwright.passes import Context, Pass
from bitwright.passes._layers import stem
from bitwright.passes._spec import parse_pass, parse_passes
from bitwright.passes.registry import PASSES, load
from bitwright.passes.sparsity._masking import MaskingPass
from tests.conftest import read_graph

MODEL = """
    graph @g (%x: f32[2, 16, 6, 6]) -> (y = %y) level=graph {
      %w1 = weight {ref="conv1.weight"} : f32[16, 16, 3, 3]
      %g = weight {ref="norm.weight"} : f32[16]
      %b = weight {ref="norm.bias"} : f32[16]
      %m = weight {ref="norm.mean"} : f32[16]
      %v = weight {ref="norm.var"} : f32[16]
      %w2 = weight {ref="conv2.weight"} : f32[32, 16, 1, 1]
      %w3 = weight {ref="fc1.weight"} : f32[64, 32]
      %b3 = weight {ref="fc1.bias"} : f32[64]
      %w4 = weight {ref="fc2.weight"} : f32[16, 64]
      %c1 = conv(%x, %w1) {padding=[1, 1, 1, 1]} : f32[2, 16, 6, 6]
      %n1 = batch_norm(%c1, %g, %b, %m, %v) : f32[2, 16, 6, 6]
      %r1 = relu(%n1) : f32[2, 16, 6, 6]
      %c2 = conv(%r1, %w2) : f32[2, 32, 6, 6]
      %r2 = relu(%c2) : f32[2, 32, 6, 6]
      %p = reduce_mean(%r2) {axes=[2, 3]} : f32[2, 32]
      %h = linear(%p, %w3, %b3) : f32[2, 64]
      %a = relu(%h) : f32[2, 64]
      %y = linear(%a, %w4) : f32[2, 16]
    }
"""
LAYERS = {"conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"}
VARIANTS = {
    "nm-mask": ("nm-mask", "nm-mask{pattern=1:4 shared=4}", "nm-mask{pattern=1:2 block=4}"),
    "transposable-mask": ("transposable-mask", "transposable-mask{pattern=2:4 method=exact}"),
    "fixed-count-mask": ("fixed-count-mask{count=5 per=16}",),
    "convert-unstructured": ("convert-unstructured", "convert-unstructured{transposable=true}"),
}
"""Masks by pass; a mask pass that is not named is taken with its defaults."""
OPTIONS: dict[str, str] = {}
"""Text of later passes whose defaults do not fit here."""
INT8 = "observe-ranges, quantize-int8"
BEFORE = {n: INT8 for n in ("constrain-weights", "correct-bias", "retune-norms") if n in PASSES}
"""What passes that leave floating-point weights alone must follow."""
EXEMPT: dict[str, str] = {}
"""Passes that cannot run here, each with the reason."""
REWRITES = {"fold-batch-norm", "quantize-int8", "reconstruct", "equalize-layers", "smooth-quant", "constrain-weights"}
"""Passes known to rewrite weights of this model: the test would be empty if they did not."""
LOWER = "observe-ranges, quantize-int8, lower-to-integer"

MASKS = [text for n in PASSES if issubclass(load(n), MaskingPass) for text in VARIANTS.get(n, (n,))]


SLOW = {"assign-precision"}
"""Passes that search for seconds: they follow the first mask only."""
PAIRS = [(name, mask) for name in PASSES if name not in EXEMPT for mask in MASKS[: 1 if name in SLOW else None]]


def weights(sparse: bool) -> dict[str, Array]:
    """Normal values, of which four fifths are zero without structure if ``sparse``; a variance is positive."""
    rng = np.random.default_rng(7)
    out = {
        n.op.ref: rng.standard_normal(n.type.static_shape)
        for n in read_graph(MODEL).nodes
        if isinstance(n.op, ops.Weight)
    }
    for key in LAYERS if sparse else ():
        out[key] = out[key] * (np.abs(out[key]) > 1.2816)
    out["norm.var"] = np.abs(out["norm.var"]) + 0.5
    return {k: a.astype(np.float32) for k, a in out.items()}


@cache
def masked(text: str) -> tuple[Graph, Context]:
    """The model after a mask, and the context of the run."""
    rng = np.random.default_rng(3)
    batches = [[rng.standard_normal((2, 16, 6, 6)).astype(np.float32)] for _ in range(8)]
    context = Context(target=BUILTIN["x86-avx512-vnni"], calibration=batches)
    p = parse_pass(text)
    graph = p.run(read_graph(MODEL, weights(sparse=p.name == "convert-unstructured")), context)
    verify(graph)
    return graph, context


def layers_of(graph: Graph) -> dict[str, tuple[Array, Encoding | None]]:
    """Values and encoding of the four layers, by the name the model gave the weight."""
    nodes = [n for n in graph.nodes if isinstance(n.op, ops.Weight) and stem(n.op.ref) in LAYERS]
    return {stem(n.op.ref): (graph.weights[n.op.ref].array, n.type.encoding) for n in nodes}  # type: ignore[attr-defined]


def provider(fact: str, later: str) -> str:
    """The registered pass, not a mask, that establishes a fact."""
    makers = [n for n in PASSES if fact in load(n).establishes and not issubclass(load(n), MaskingPass)]
    assert makers, f"{later} needs {fact!r}, which no pass establishes: name it in EXEMPT with the reason"
    return makers[0]


def prepared(text: str, later: Pass) -> tuple[Graph, Context]:
    """The masked model at the level a pass takes, with the facts it needs."""
    graph, given = masked(text)
    context = copy.copy(given)
    context.facts = copy.deepcopy({k: v for k, v in given.facts.items() if k != "dense"})
    context.facts["dense"] = dict(given.facts["dense"])
    before = parse_passes(LOWER if LEVELS.index(later.takes) > 0 else BEFORE.get(later.name, ""))
    missing = [f for f in later.needs if f not in context.facts and not any(f in p.establishes for p in before)]
    for p in (*before, *(parse_pass(provider(f, later.name)) for f in missing)):
        graph = p.run(graph, context)
        verify(graph, p.gives)
    return graph, context


def run(text: str, name: str) -> tuple[dict[str, tuple[Array, Encoding | None]], bool]:
    """The layers after a mask and a later pass, and whether that changed any of their values."""
    later = parse_pass(OPTIONS.get(name, name))
    graph, context = prepared(text, later)
    after = later.run(graph, context)
    verify(after, later.gives)
    was, now = layers_of(graph), layers_of(after)
    return now, any(k not in now or not np.array_equal(now[k][0], a) for k, (a, _) in was.items())


@pytest.mark.parametrize(("name", "mask"), PAIRS)
def test_zeros_stay(name: str, mask: str) -> None:
    before = layers_of(masked(mask)[0])
    assert set(before) == LAYERS
    after, _ = run(mask, name)
    assert set(after) == LAYERS, f"{name} lost or renamed {LAYERS - set(after)}"
    for key, (array, encoding) in after.items():
        was, wanted = before[key]
        assert wanted is not None
        assert encoding is not None, f"{name} dropped {wanted} from {key}"
        assert encoding == wanted or issubclass(load(name), MaskingPass), f"{key}: {wanted} became {encoding}"
        assert violation(array, encoding) == ""
        assert array.shape == was.shape
        revived = np.argwhere((was == 0) & (array != 0))
        assert len(revived) == 0, f"{name} made {len(revived)} zeros of {key} non-zero, the first at {revived[0]}"
        assert density(array) > 0.2 * density(was)


@pytest.mark.parametrize("name", sorted(REWRITES))
def test_the_passes_do_rewrite_weights_here(name: str) -> None:
    assert run("nm-mask", name)[1]


def test_exceptions_are_passes() -> None:
    assert {*EXEMPT, *OPTIONS, *BEFORE, *REWRITES, *VARIANTS} <= set(PASSES)
