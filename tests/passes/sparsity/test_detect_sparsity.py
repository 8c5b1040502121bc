"""detect-sparsity: patterns that are already there are found, the tightest one; nothing is invented."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.codegen.targets import BUILTIN
from bitwright.ir.graph import Graph
from bitwright.ir.patterns import density, tightest_keeps, violation
from bitwright.ir.target import Target
from bitwright.ir.types import F32, NM, U8, Unstructured
from bitwright.passes import Context
from bitwright.passes.pipelines import RECIPES, standard
from bitwright.passes.sparsity._recognize import GROUPS, recognize, unordered
from bitwright.passes.sparsity.detect_sparsity import DetectSparsity
from bitwright.passes.sparsity.magnitude_mask import unstructured_mask_array
from bitwright.passes.sparsity.masks import nm_mask_array
from bitwright.passes.sparsity.transposable_mask import TransposableMask

Read = Callable[..., Graph]
Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
AVX512, AVX2 = BUILTIN["x86-avx512-vnni"], BUILTIN["x86-avx2"]
EVERY = [(keep, group) for group in GROUPS for keep in (1, 2, group // 2, group - 1) if 0 < keep < group]


def tightest(weight: Array, axis: int = 1, target: Target | None = None) -> NM | None:
    return recognize(weight, axis, density(weight), target, (U8,))


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("keep", "group"), dict.fromkeys(EVERY))
@pytest.mark.parametrize("axis", [0, 1])
def test_every_keep_of_every_group_is_found(keep: int, group: int, axis: int) -> None:
    weight = normal(3 * group, 4 * group) if axis else normal(4 * group, 3 * group)
    assert tightest(weight * nm_mask_array(weight, keep, group, axis), axis) == NM(keep, group, axis)


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 8), (3, 7), (5, 16)])
@pytest.mark.parametrize("tail", [1, 2, 3])
def test_a_shorter_last_group_holds_its_share(keep: int, group: int, tail: int) -> None:
    weight = normal(64, 3 * group + tail)
    masked = weight * nm_mask_array(weight, keep, group, 1)
    assert tightest_keeps(masked, [group], 1) == {group: keep}
    masked[0, -tail:] = 1.0  # one row's tail is full
    wanted = next(k for k in range(keep, group + 1) if -(-k * tail // group) >= tail)
    assert tightest_keeps(masked, [group], 1) == ({group: wanted} if wanted < group else {})


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 70), st.floats(0.0, 1.0), st.sampled_from([1, 2, 4]), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_keeps_are_the_smallest_that_the_verifier_accepts(
    rows: int, columns: int, zeros: float, block: int, conv: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (rows, columns, 2, 1) if conv else (rows, columns)
    weight = (rng.random(shape) >= zeros).astype(np.float32)
    held = tightest_keeps(weight, GROUPS, 1, block)
    for group in GROUPS:
        fits = [k for k in range(1, group) if not violation(weight, NM(k, group, 1, block=block))]
        wanted = fits[0] if fits and weight.any() and group <= -(-columns // block) else None
        assert held.get(group) == wanted


@pytest.mark.parametrize(
    "weight",
    [
        normal(8, 32),
        np.zeros((8, 32)),
        np.ones((4, 1)),
        normal(256, 256) * (RNG.random((256, 256)) > 0.5),  # half are zero, in no order
        np.where(RNG.random((64, 64)) > 0.02, RNG.integers(-127, 127, (64, 64)), 0),
    ],
)
def test_nothing_is_invented(weight: Array) -> None:
    for target in (None, AVX512, AVX2):
        assert tightest(weight.astype(np.float32), target=target) is None


def test_what_holds_by_chance_counts_if_it_pays() -> None:
    """90 % zeros in no order obey 8:16 or so; that has kernels twice as fast as dense."""
    weight = normal(256, 256) * (RNG.random((256, 256)) > 0.9)
    nm = tightest(weight, target=AVX512)
    assert nm is not None
    assert violation(weight, nm) == ""
    assert max(AVX512.sparse_gain(U8, nm), AVX512.sparse_gain(F32, nm)) > 2


@pytest.mark.parametrize("shared", [1, 4, 16, 32, 64])
@pytest.mark.parametrize("block", [1, 4])
def test_blocks_and_outputs_that_share_a_pattern(shared: int, block: int) -> None:
    weight = normal(256, 1024)
    masked = weight * nm_mask_array(weight, 1, 4, 1, shared, block)
    for target in (None, AVX512, AVX2):
        assert tightest(masked, target=target) == NM(1, 4, 1, shared, block)


def test_a_rounded_up_tail_does_not_make_a_pattern_tighter() -> None:
    """Two of the first ten and two of the six behind them obey 2:10, which allows as much of a row as 1:4 does."""
    weight = np.zeros((2, 16), np.float32)
    weight[:, [3, 4, 11, 12]] = 1.0
    assert tightest_keeps(weight, [4, 10], 1) == {4: 1, 10: 2}
    assert tightest(weight) == NM(1, 4, 1)


def test_shared_needs_whole_sets_of_outputs() -> None:
    weight = normal(72, 64)  # 72 outputs: no multiple of 64, 32 or 16
    assert tightest(weight * nm_mask_array(weight, 1, 4, 1, 64)) == NM(1, 4, 1, shared=4)
    weight = normal(6, 64)
    assert tightest(weight * nm_mask_array(weight, 1, 4, 1, 2)) == NM(1, 4, 1)


@pytest.mark.parametrize("shape", [(64, 64), (32, 64, 3, 3)])
def test_both_axes(shape: tuple[int, ...]) -> None:
    weight, nm = normal(*shape), NM(4, 8, 1, transposable=True)
    masked = weight * TransposableMask(method="exact").mask(weight, nm, "w")
    assert tightest(masked) == nm
    rows_only = weight * nm_mask_array(weight, 4, 8, 1)
    assert tightest(rows_only) == NM(4, 8, 1)


def test_equally_tight_patterns() -> None:
    """1:4 is 2:8 as well: the smaller group says more, unless the larger is clearly faster on the target."""
    weight = normal(32, 64)
    masked = weight * nm_mask_array(weight, 1, 4, 1)
    rates = tuple(
        replace(s, gain=3.2) if (s.x, s.keep, s.group) in ((U8, 2, 8), (F32, 2, 8)) else s for s in AVX512.sparse
    )
    for target, found in ((None, (1, 4)), (AVX512, (1, 4)), (replace(AVX512, sparse=rates), (2, 8))):
        nm = tightest(masked, target=target)
        assert nm is not None
        assert (nm.keep, nm.group) == found


TEXT = """
graph @g (%x: f32[1, 8, 4, 4]) -> (y = %z) level=graph {
  %w = weight {ref="conv.weight"} : f32[8, 8, 3, 3]
  %q = weight {ref="q.weight"} : s8[4, 16]
  %d = weight {ref="dw.weight"} : f32[8, 1, 1, 1]
  %s = constant {values=[0.5]} : f32[]
  %h = conv(%x, %w) : f32[1, 8, 2, 2]
  %i = conv(%h, %d) {groups=8} : f32[1, 8, 2, 2]
  %r = reshape(%i) {shape=[2, 16]} : f32[2, 16]
  ZERO%l = dequantize(%q, %s) : f32[4, 16]
  %z = linear(%r, %l) : f32[2, 4]
}
"""


def sparse_weights() -> dict[str, object]:
    conv, q = normal(8, 8, 3, 3), RNG.integers(1, 100, (4, 16))
    return {
        "conv.weight": conv * nm_mask_array(conv, 2, 4, 1),
        "q.weight": (q * nm_mask_array(q.astype(np.float32), 1, 4, 1)).astype(np.int8),
        "dw.weight": np.zeros((8, 1, 1, 1), np.float32),
    }


@pytest.mark.parametrize("zero", [None, 0, 3])
def test_convolutions_and_quantized_weights(read: Read, difference: Callable[..., float], zero: int | None) -> None:
    text = TEXT.replace("ZERO", "" if zero is None else f"%o = constant {{values=[{zero}]}} : s8[]\n  ")
    text = text if zero is None else text.replace("(%q, %s)", "(%q, %s, %o)")
    graph, context = read(text, sparse_weights()), Context()
    after = DetectSparsity().run(graph, context)
    q = "s8[4, 16]" if zero else "s8[4, 16] nm<1:4, axis=1>"  # with a zero point of 3, zeros are not zero
    assert {n.output: str(n.type) for n in after.nodes if n.op.name == "weight"} == {
        "w": "f32[8, 8, 3, 3] nm<2:4, axis=1>",
        "q": q,
        "d": "f32[8, 1, 1, 1]",
    }
    told = [
        ("detect-sparsity", "conv", {"pattern": "2:4", "axis": 1, "density": 0.5}),
        ("detect-sparsity", "q", {"pattern": "1:4", "axis": 1, "density": 0.25}),
    ]
    assert context.remarks == told[: 1 if zero else 2]
    assert difference(graph, after) == 0.0
    assert all(after.weights[k] is graph.weights[k] for k in graph.weights)
    assert not DetectSparsity().run(after, Context()).changed_from(after)


LINEAR = """
    graph @g (%x: f32[2, 64]) -> (y = %y) level=graph {
      %w = weight {ref="fc.weight"} : f32[64, 64]
      %y = linear(%x, %w) : f32[2, 64]
    }
"""


@pytest.mark.parametrize(
    ("zeros", "facts"),
    [
        (0.05, None),
        (0.2, {"pattern": "unstructured", "density": 0.8}),
        (0.35, {"pattern": "unstructured", "density": 0.65, "cure": "convert-unstructured"}),
    ],
)
def test_zeros_without_a_pattern_are_told(read: Read, zeros: float, facts: dict[str, Any] | None) -> None:
    weight = normal(64, 64)
    weight.reshape(-1)[RNG.permutation(4096)[: round(4096 * zeros)]] = 0.0
    graph, context = read(LINEAR, {"fc.weight": weight}), Context(target=AVX512)
    assert not DetectSparsity().run(graph, context).changed_from(graph)
    if facts is None:
        assert context.remarks == []
    else:
        ((_, place, told),) = context.remarks
        assert (place, told | {"density": round(told["density"], 2)}) == ("fc", facts)


def test_remarks_tell_everything_that_holds(read: Read) -> None:
    weight = normal(64, 64)
    for mask, facts in (
        (
            nm_mask_array(weight, 1, 4, 1, 16, 4),
            {"pattern": "1:4", "axis": 1, "density": 0.25, "block": 4, "shared": 16},
        ),
        (
            TransposableMask(method="exact").mask(weight, NM(4, 8, 1), "w"),
            {"pattern": "4:8", "axis": 1, "density": 0.5, "transposable": True},
        ),
    ):
        context = Context()
        DetectSparsity().run(read(LINEAR, {"fc.weight": weight * mask}), context)
        assert context.remarks == [("detect-sparsity", "fc", facts)]


def test_embeddings_are_left(read: Read) -> None:
    graph = read("""
        graph @g (%i: s64[2], %x: f32[2, 8]) -> (e = %e, y = %y) level=graph {
          %w = weight {ref="tied"} : f32[4, 8]
          %e = gather(%w, %i) : f32[2, 8]
          %y = linear(%x, %w) : f32[2, 4]
        }
    """, {"tied": np.eye(4, 8, dtype=np.float32)})  # fmt: skip
    assert DetectSparsity().run(graph, Context()) == graph


@pytest.mark.parametrize("recipe", [*RECIPES, "nm-mask", "float, bound-accumulators"])
def test_part_of_every_pipeline(recipe: str) -> None:
    """Once, after the weights have their final orientation and before anything the recipe does."""
    names = [p.name for p in standard(recipe).passes]
    assert names.count("detect-sparsity") == 1
    early = {"nm-mask", "quantize-int8", "lower-to-integer"} & set(names)
    assert all(names.index("detect-sparsity") < names.index(n) for n in early)


def test_dense_weights_cost_next_to_nothing() -> None:
    """A ResNet-50 has 25.5 million weights; its dense ones are looked at within 0.3 s of one core."""
    weights = [normal(512, 512, 3, 3)] * 10 + [np.clip(np.round(20 * normal(1000, 2048)), -127, 127).astype(np.int8)]
    assert sum(w.size for w in weights) > 25e6
    start = time.process_time()
    assert all(tightest(w, target=AVX512) is None for w in weights)
    assert time.process_time() - start < 0.3


def zeros_anywhere(share: float, block: int = 1) -> Array:
    weight = np.random.default_rng(7).standard_normal((128, 256)).astype(np.float32)
    encoding = Unstructured(0, 0, 1, block, round(1.0 - share, 4))
    return (weight * unstructured_mask_array(weight, encoding)).astype(np.float32)


@pytest.mark.parametrize(("share", "block"), [(0.9, 1), (0.8, 1), (0.8, 4)])
@pytest.mark.parametrize("target", [AVX512, AVX2, None])
def test_zeros_in_no_order_get_their_share(share: float, block: int, target: Target | None) -> None:
    weight = zeros_anywhere(share, block)
    found = unordered(weight, 1, None, target, (U8,))
    assert found is not None
    assert (found.count, found.axis, found.block) == (0, 1, block)
    assert violation(weight, found) == ""
    assert abs(found.kept - (1.0 - share)) < 1e-3


def test_zeros_that_are_too_few_or_in_a_faster_pattern_get_no_share() -> None:
    assert unordered(zeros_anywhere(0.1), 1, None, AVX512, (U8,)) is None
    assert unordered(zeros_anywhere(0.3), 1, None, None, (U8,)) is None
    weight = normal(64, 64)
    masked = weight * nm_mask_array(weight, 2, 16, 1)
    assert unordered(masked, 1, NM(2, 16, 1), AVX512, (U8,)) is None
    assert unordered(np.zeros((8, 8), np.float32), 1, None, AVX512, (U8,)) is None


def test_the_pass_writes_the_share(read: Read) -> None:
    text = """
        graph @g (%x: f32[64, 256]) -> (y = %y) level=graph {
          %w = weight {ref="w"} : f32[128, 256]
          %y = linear(%x, %w) : f32[64, 128]
        }
    """
    context = Context(target=AVX512)
    after = DetectSparsity().run(read(text, {"w": zeros_anywhere(0.8, 4)}), context)
    assert str(after.types["w"].encoding) == "unstructured<0 per 0, axis=1, block=4, kept=0.2>"
    assert context.remarks[0][2] == {"pattern": "unstructured", "axis": 1, "density": 0.2, "block": 4}
