"""The standard pipelines on the shared models: levels, structure, and what int8 costs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Level
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.patterns import violation
from bitwright.ir.verify import verify
from bitwright.passes import Context, Pass, PipelineReport, run_pipeline
from bitwright.passes.pipelines import RECIPES, standard
from tests.zoo import ZOO

Batch = list[np.ndarray[Any, Any]]


@cache
def captured(name: str) -> tuple[Graph, tuple[Any, ...]]:
    from bitwright.frontends.torch_export import capture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, inputs = ZOO[name]()
        return capture(module, inputs), tuple(x.numpy() for x in inputs)


def worst(a: Graph, b: Graph, batch: Batch) -> float:
    """Largest difference over the range of the output."""
    out = 0.0
    for p, q in zip(evaluate(a, batch), evaluate(b, batch), strict=True):
        u, v = to_numpy(p).astype(np.float64), to_numpy(q).astype(np.float64)
        out = max(out, float(np.abs(u - v).max() / max(v.max() - v.min(), 1e-9)))
    return out


def run(name: str, recipe: str) -> tuple[Graph, Graph, Batch, PipelineReport]:
    graph, inputs = captured(name)
    batch = list(inputs)
    after, report = run_pipeline(graph, standard(recipe), Context(calibration=[batch]), crash_dir=None)
    verify(after, "integer")
    return graph, after, batch, report


def ops_of(graph: Graph) -> Counter[str]:
    return Counter(n.op.spelling for n in graph.nodes)


CANONICAL_FORM = {
    "resnet18": {"batch_norm": 0, "conv": 12, "relu": 9, "mul": 0},
    "mobilenet_v2": {"batch_norm": 0, "clamp": 9, "mul": 0},
    "bert_eager": {"attention": 2, "softmax": 0, "matmul": 0, "gelu": 2, "layer_norm": 5},
    "gpt2_small": {"attention": 2, "gelu_tanh": 2, "tanh": 0},
    "llama": {"rms_norm": 5, "silu": 2, "rsqrt": 0, "sigmoid": 0},
}


@pytest.mark.parametrize("name", CANONICAL_FORM)
def test_canonical_form_of_models(name: str) -> None:
    graph, after, batch, _ = run(name, "float")
    found = ops_of(after)
    assert {k: found[k] for k in CANONICAL_FORM[name]} == CANONICAL_FORM[name]
    assert worst(after, graph, batch) < 1e-4


@pytest.mark.parametrize("name", ["digits", "resnet18", "mobilenet_v2", "bert_base", "vit_small", "convnext_tiny"])
def test_int8_costs_less_than_two_percent_of_the_output_range(name: str) -> None:
    graph, after, batch, report = run(name, "int8")
    assert worst(after, graph, batch) < 0.02
    assert {"linear", "conv"} & set(ops_of(after)) == set()
    measured = {r.name: r.output_error for r in report.rows if r.output_error is not None}
    assert set(measured) == {"quantize-int8", "lower-to-integer"}
    assert abs(measured["quantize-int8"] - measured["lower-to-integer"]) < 0.005


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_convolutional_networks_are_integer_from_end_to_end(name: str) -> None:
    found = ops_of(run(name, "int8")[1])
    assert (found["quantize"], found["dequantize"]) == (1, 1)
    assert found["relu"] + found["clamp"] == 0


def test_masks_reach_the_integer_level() -> None:
    _, after, _, report = run("resnet18", "nm-mask{pattern=2:4 skip_first=true}, int8")
    masked = [n for n in after.nodes if n.type.encoding is not None]
    assert len(masked) == 12  # 11 convolutions of 12 and the head
    for n in masked:
        assert str(n.type).startswith("s8")
        assert violation(after.weights[n.op.ref].array, n.type.encoding) == ""  # type: ignore[attr-defined, arg-type]
    assert [r.reason for r in report.why("nm-mask")] == ["first layer stays dense (skip_first)"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds_and_gives_the_integer_level(recipe: str) -> None:
    assert standard(recipe).gives == "integer"


@dataclass(frozen=True)
class Late(Pass):
    """Works on the integer level."""

    name: ClassVar[str] = "late"
    takes: ClassVar[Level] = "integer"
    gives: ClassVar[Level] = "integer"

    def run(self, graph: Graph, context: Context) -> Graph:
        return graph


@dataclass(frozen=True)
class Kernel(Late):
    """Works on the kernel level."""

    gives: ClassVar[Level] = "kernel"


def test_passes_of_a_recipe_run_at_their_level() -> None:
    names = [p.name for p in standard([Late()]).passes]
    assert names.index("late") == names.index("lower-to-integer") + 1
    with pytest.raises(InvalidInput, match="kernel level"):
        standard([Kernel()])


def test_symbolic_batches(read: Callable[..., Graph]) -> None:
    graph = read("""
        graph @g (%x: f32[b, 4, 6, 6]) -> (y = %y) level=graph {
          %w = weight {ref="c.weight"} : f32[8, 4, 3, 3]
          %v = weight {ref="fc.weight"} : f32[3, 8]
          %h = conv(%x, %w) : f32[b, 8, 4, 4]
          %r = relu(%h) : f32[b, 8, 4, 4]
          %m = reduce_mean(%r) {axes=[2, 3], keepdim=true} : f32[b, 8, 1, 1]
          %f = reshape(%m) {shape=["b", 8]} : f32[b, 8]
          %y = linear(%f, %v) : f32[b, 3]
        }
    """)
    batch = [np.random.default_rng(0).standard_normal((5, 4, 6, 6)).astype(np.float32)]
    after, _ = run_pipeline(graph, standard("int8"), Context(calibration=[batch]))
    assert ops_of(after)["int_conv"] == ops_of(after)["int_linear"] == 1
    assert worst(after, graph, batch) < 0.02
    assert worst(replace(after, name="other"), graph, [b[:1] for b in batch]) < 0.05
