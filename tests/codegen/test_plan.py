"""The planner: placement, sharing, copies, barriers; and random programs run against NumPy."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.codegen.packing import Span, lower_bound, pack
from bitwright.codegen.plan import ALIGN, COPY, PAD, Arg, Buffer, Plan, Step, place_weights, plan
from bitwright.ir.errors import VerifyError


def unary(out: str, src: str, *, inplace: bool = False, label: str = "") -> Step:
    return Step("k", 4, (Arg(src), Arg(out, access="w")), label=label, inplace=((1, 0),) if inplace else ())


def binary(out: str, a: str, b: str, *, inplace: tuple[int, ...] = ()) -> Step:
    return Step("k2", 4, (Arg(a), Arg(b), Arg(out, access="w")), inplace=tuple((2, i) for i in inplace))


def values(*names: str, nbytes: int = 256) -> list[Buffer]:
    return [Buffer(n, nbytes) for n in names]


X = Buffer("x", 256, "input")


def place_of(p: Plan, step: int, arg: int) -> tuple[str, int, int]:
    spot = p.places[step][arg]
    return spot.space, spot.index, spot.offset


def test_a_chain_needs_two_places_whatever_its_length() -> None:
    names = [f"v{i}" for i in range(50)]
    steps = [unary(n, p) for n, p in zip([*names, "y"], ["x", *names], strict=True)]
    p = plan(steps, [X, *values(*names, "y")], ["y"])
    assert p.arena_bytes == p.bound_bytes == 2 * (256 + PAD)
    assert place_of(p, 50, 1) == ("output", 0, 0)


def test_in_place_steps_of_a_chain_run_in_the_output_itself() -> None:
    steps = [unary("a", "x", inplace=True), unary("b", "a", inplace=True), unary("y", "b", inplace=True)]
    p = plan(steps, [X, *values("a", "b", "y")], ["y"])
    assert p.arena_bytes == 0
    assert [place_of(p, i, 1) for i in range(3)] == [("output", 0, 0)] * 3
    assert place_of(p, 0, 0) == ("input", 0, 0)


def test_in_place_is_not_used_while_the_value_is_needed_later() -> None:
    steps = [unary("a", "x"), unary("b", "a", inplace=True), binary("y", "a", "b")]
    p = plan(steps, [X, *values("a", "b", "y")], ["y"])
    assert p.offsets["a"] != p.offsets["b"]


def test_in_place_is_not_used_when_an_undeclared_argument_reads_the_value() -> None:
    steps = [unary("a", "x"), binary("b", "a", "a", inplace=(0,)), unary("y", "b")]
    p = plan(steps, [X, *values("a", "b", "y")], ["y"])
    assert p.offsets["a"] != p.offsets["b"]
    steps[1] = binary("b", "a", "a", inplace=(0, 1))
    p = plan(steps, [X, *values("a", "b", "y")], ["y"])
    assert p.offsets["a"] == p.offsets["b"]


def test_concat_and_slice_are_views() -> None:
    views = [Buffer("l", 128, "alias", "both", 0), Buffer("r", 128, "alias", "both", 128)]
    inner = Buffer("rr", 64, "alias", "r", 64)
    steps = [unary("l", "x"), unary("r", "x"), unary("y", "rr")]
    p = plan(steps, [X, Buffer("both", 256), *views, inner, *values("y")], ["y"])
    at = p.offsets["both"]
    assert [p.places[i][a].offset - at for i, a in ((0, 1), (1, 1), (2, 0))] == [0, 128, 192]
    assert p.barriers == (False, False, True)


def test_a_view_keeps_its_value_alive() -> None:
    steps = [unary("a", "x"), unary("b", "x"), binary("y", "half", "b")]
    p = plan(steps, [X, *values("a", "b", "y"), Buffer("half", 128, "alias", "a", 128)], ["y"])
    assert p.offsets["a"] != p.offsets["b"]


@pytest.mark.parametrize(
    ("outputs", "copies"),
    [
        (["a"], 0),
        (["a", "a"], 1),
        (["x"], 1),
        (["w", "a"], 1),
        (["flat"], 0),
        (["flat", "a"], 1),
        (["half", "a"], 1),
        (["x", "x"], 2),
    ],
)
def test_outputs_are_written_directly_or_copied(outputs: list[str], copies: int) -> None:
    views = [Buffer("flat", 256, "alias", "a", 0), Buffer("half", 128, "alias", "a", 64)]
    p = plan([unary("a", "x")], [X, *values("a"), Buffer("w", 64, "weight"), *views], outputs)
    assert [s.kernel_symbol for s in p.steps].count(COPY) == copies
    assert len(p.outputs) == len(outputs)
    written = {spot.index for spots in p.places for spot in spots if spot.space == "output"}
    assert written == set(range(len(outputs)))


def test_declared_outputs_are_taken_in_order() -> None:
    p = plan([unary("b", "x"), unary("a", "x")], [X, Buffer("a", 256, "output"), Buffer("b", 256, "output")])
    assert p.outputs == ("a", "b")
    assert place_of(p, 0, 1) == ("output", 1, 0)


def test_barriers_only_where_something_depends_on_something() -> None:
    steps = [unary("a", "x"), unary("b", "x"), binary("c", "a", "b"), unary("z", "b"), unary("y", "c")]
    p = plan(steps, [X, *values("a", "b", "c", "y", "z")], ["y", "z"])
    assert p.barriers == (False, False, True, False, True)


def test_reused_memory_costs_a_barrier() -> None:
    steps = [unary("a", "x"), unary("b", "a"), unary("c", "b"), unary("y", "c")]
    p = plan(steps, [X, *values("a", "b", "c", "y")], ["y"])
    assert p.offsets["a"] == p.offsets["c"]
    assert p.barriers == (False, True, True, True)


def test_weights_are_aligned_and_padded() -> None:
    buffers = [X, Buffer("w", 100, "weight"), Buffer("v", 10, "weight"), *values("y")]
    p = plan([Step("k3", 1, (Arg("x"), Arg("v"), Arg("w", 36), Arg("y", access="w")))], buffers, ["y"])
    assert p.weight_offsets == {"w": 0, "v": 128}
    assert p.weights_bytes == 192 + PAD
    assert (p.places[0][1].offset, p.places[0][2].offset) == (128, 36)
    offsets, size = place_weights({"w": 100, "v": 10})
    given = [Buffer(n, b, "weight", offset=offsets[n]) for n, b in (("v", 10), ("w", 100))]
    q = plan([unary("y", "x")], [X, *given, *values("y")], ["y"])
    assert q.weight_offsets == offsets
    assert q.weights_bytes == size


def test_scratch_is_the_largest_of_all_steps() -> None:
    steps = [Step("k", 1, (Arg("x"), Arg("y", access="w")), scratch_bytes=100)]
    assert plan(steps, [X, *values("y")], ["y"]).scratch_bytes == 128


@pytest.mark.parametrize(
    ("steps", "buffers", "outputs", "message"),
    [
        ([unary("y", "a")], values("a", "y"), ["y"], "reads 'a' before anything wrote it"),
        ([unary("y", "nope")], values("y"), ["y"], "no buffer 'nope'"),
        ([unary("x", "x")], [], ["x"], "writes 'x', which is a graph input"),
        ([], values("y"), ["y"], "nothing writes output 'y'"),
        ([Step("k", -1, ())], [], [], "-1 tasks"),
        ([Step("k", 1, (Arg("x", 200, "r", 100),))], [], [], "uses bytes up to 300 of 'x', which has 256"),
        ([], [Buffer("a", 300, "alias", "x", 0)], [], r"leaves 'x' \(256 bytes\)"),
        ([], [Buffer("a", 1, "alias", "b"), Buffer("b", 1, "alias", "a")], [], "view of itself"),
        ([], [X], [], "declared twice"),
        ([], [Buffer("w", 1, "weight", offset=3)], [], "not a multiple of 64"),
    ],
)
def test_wrong_programs_are_errors(steps: list[Step], buffers: list[Buffer], outputs: list[str], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        plan(steps, [X, *buffers], outputs)


spans = st.lists(
    st.builds(
        lambda size, first, length: Span(64 * size, first, first + length),
        st.integers(1, 40), st.integers(0, 30), st.integers(0, 12),
    ),
    max_size=40,
)  # fmt: skip


@given(spans)
@settings(max_examples=150, deadline=None)
def test_no_two_live_spans_overlap(items: list[Span]) -> None:
    offsets, size = pack(items)
    assert lower_bound(items) <= size
    for i, (a, at) in enumerate(zip(items, offsets, strict=True)):
        assert 0 <= at <= at + a.nbytes <= size
        for b, bt in list(zip(items, offsets, strict=True))[:i]:
            if a.first <= b.last and b.first <= a.last:
                assert at + a.nbytes <= bt or bt + b.nbytes <= at


def test_packing_is_near_the_lower_bound_and_quick() -> None:
    rng = random.Random(1)
    excess = []
    for _ in range(20):
        items = []
        for step in range(120):
            items.append(Span(64 * rng.choice([1, 4, 16, 64, 100]), step, step + rng.choice([1, 1, 2, 3, 20])))
        excess.append(pack(items)[1] / lower_bound(items))
    assert sum(excess) / len(excess) < 1.03
    chain = [Span(64 * rng.randint(1, 99), i, i + rng.randint(1, 9)) for i in range(1500)]
    start = time.process_time()
    pack(chain)
    assert time.process_time() - start < 3


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Step], list[Buffer], list[str]]:
    """Random steps over values of various sizes, with in-place declarations, views and odd outputs."""
    buffers = [Buffer("x0", 256, "input"), Buffer("x1", 128, "input"), Buffer("w", 192, "weight")]
    steps: list[Step] = []
    readable = [b.name for b in buffers]
    size = {b.name: b.nbytes for b in buffers}
    for i in range(draw(st.integers(1, 12))):
        sources = draw(st.lists(st.sampled_from(readable), min_size=1, max_size=3))
        n = min(size[s] for s in sources)
        n = draw(st.sampled_from([n, n, max(16, n // 2)]))
        name = f"v{i}"
        buffers.append(Buffer(name, n))
        args = (*(Arg(s, 0, "r", n) for s in sources), Arg(name, 0, "w"))
        pairs = tuple((len(sources), j) for j in range(len(sources))) if draw(st.booleans()) else ()
        steps.append(Step("sum", -(-n // 16), args, inplace=pairs))
        size[name] = n
        readable.append(name)
        if n >= 64 and draw(st.booleans()):
            view = f"{name}.view"
            buffers.append(Buffer(view, n // 2, "alias", name, draw(st.sampled_from([0, n // 4, n // 2]))))
            size[view] = n // 2
            readable.append(view)
    outputs = draw(st.lists(st.sampled_from(readable), min_size=1, max_size=4))
    return steps, buffers, outputs


def simulate(p: Plan, inputs: list[np.ndarray], weights: np.ndarray, threads: int, seed: int) -> list[np.ndarray]:
    """Run a plan on bytes: between barriers the shares of all threads run in a random order."""
    rng = random.Random(seed)
    arena = np.full(p.arena_bytes, 170, np.uint8)
    outputs = [np.full(p.sizes[n], 85, np.uint8) for n in p.outputs]
    spaces = {"input": inputs, "output": outputs, "arena": [arena], "weight": [weights]}

    def share(index: int, t: int) -> None:
        step = p.steps[index]
        unit = 65536 if step.kernel_symbol == COPY else 16
        low = step.tasks * t // threads * unit
        high = step.tasks * (t + 1) // threads * unit
        views = []
        for arg, spot in zip(step.args, p.places[index], strict=True):
            n = arg.nbytes if arg.nbytes >= 0 else p.sizes[arg.buffer] - arg.offset
            views.append(spaces[spot.space][spot.index][spot.offset : spot.offset + n][low:high])
        total = np.zeros(len(views[0]), np.uint8) if step.kernel_symbol != COPY else views[1].copy()
        if step.kernel_symbol != COPY:
            for v in views[:-1]:
                total = total * np.uint8(3) + v
            views[-1][:] = total
        else:
            views[0][:] = total

    epoch: list[int] = []
    for index in range(len(p.steps) + 1):
        if index == len(p.steps) or p.barriers[index]:
            queues = [[(i, t) for i in epoch] for t in range(threads)]
            while any(queues):
                share(*rng.choice([q for q in queues if q]).pop(0))
            epoch = []
        epoch.append(index)
    return outputs


@given(programs(), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_planned_programs_compute_what_unplanned_ones_do(
    program: tuple[list[Step], list[Buffer], list[str]], threads: int, seed: int
) -> None:
    steps, buffers, names = program
    rng = np.random.default_rng(seed)
    inputs = [rng.integers(0, 256, 256, np.uint8), rng.integers(0, 256, 128, np.uint8)]
    weight = rng.integers(0, 256, 192 + PAD, np.uint8)
    held = {"x0": inputs[0], "x1": inputs[1], "w": weight[:192]}
    views = {b.name: b for b in buffers if b.kind == "alias"}

    def value(name: str) -> np.ndarray:
        if name not in views:
            return held[name]
        b = views[name]
        return value(b.alias_of)[b.offset : b.offset + b.nbytes]

    for step in steps:
        out = step.args[-1].buffer
        n = next(b.nbytes for b in buffers if b.name == out)
        total = np.zeros(n, np.uint8)
        for arg in step.args[:-1]:
            total = total * np.uint8(3) + value(arg.buffer)[:n]
        held[out] = total
    p = plan(steps, buffers, names)
    assert p.arena_bytes >= p.bound_bytes
    assert all(at % ALIGN == 0 for at in p.offsets.values())
    before = [x.copy() for x in inputs]
    for got, name in zip(simulate(p, inputs, weight, threads, seed), names, strict=True):
        np.testing.assert_array_equal(got, value(name))
    for x, old in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(x, old)
