"""Transposable masks: valid on both axes of the true matrix, as heavy as promised, the same every time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.ir.errors import InvalidInput
from bitwright.passes.sparsity._transposable import Method
from bitwright.passes.sparsity.masks import nm_mask, transposable_mask

METHODS: tuple[Method, ...] = get_args(Method)
CASES = [(2, 4, "normal"), (2, 4, "uniform"), (4, 8, "normal"), (4, 8, "uniform"), (2, 8, "normal"), (8, 16, "normal")]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many small tensor operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(kind: str, size: int = 256, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    shape = (size, size)
    match kind:
        case "normal":
            made = rng.standard_normal(shape)
        case "uniform":
            made = rng.random(shape)
        case _:
            made = rng.laplace(size=shape)
    return torch.from_numpy(made.astype(np.float32))


def blocks(w: torch.Tensor, group: int) -> torch.Tensor:
    return w.reshape(w.shape[0] // group, group, -1, group).transpose(1, 2).reshape(-1, group, group)


def kept(w: torch.Tensor, mask: torch.Tensor, group: int) -> torch.Tensor:
    return blocks((w.abs() * mask).double(), group).sum((1, 2))


def share_kept(w: torch.Tensor, mask: torch.Tensor) -> float:
    return float((w.abs() * mask).double().sum() / w.abs().double().sum())


def limits(mask: np.ndarray, keep: int, group: int) -> None:
    """At most ``keep`` of every group along both axes; a shorter last group keeps its share rounded up."""
    for m in (mask, mask.T):
        for start in range(0, m.shape[1], group):
            part = m[:, start : start + group]
            assert int(part.sum(1).max()) <= -(-keep * part.shape[1] // group)


# -- any matrix -------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 25),
    st.integers(1, 25),
    st.sampled_from(METHODS),
    st.sampled_from(["ties", "zeros", "normal", "bf16", "f16", "transposed", "tiny", "huge"]),
    st.integers(0, 2**31),
)
def test_valid_on_both_axes(
    keep: int, group: int, rows: int, columns: int, method: Method, kind: str, seed: int
) -> None:
    keep, group = sorted((keep, group))
    rng = np.random.default_rng(seed)
    w = torch.from_numpy(rng.standard_normal((rows, columns)).astype(np.float32))
    match kind:
        case "ties":
            w = w.round()
        case "zeros":
            w = torch.where(w.abs() < 1.2, 0.0, w)
        case "bf16":
            w = w.bfloat16()
        case "f16":
            w = w.half()
        case "transposed":
            w = w.T.contiguous().T
        case "tiny":
            w = w * 1e-40
        case "huge":
            w = w * 5e37
    mask = transposable_mask(w, keep, group, method)
    assert mask.shape == w.shape
    assert mask.dtype == torch.bool
    limits(mask.numpy(), keep, group)
    assert torch.equal(mask, transposable_mask(w.contiguous(), keep, group, method))
    full = mask[: rows // group * group, : columns // group * group]
    if method == "exact" and full.numel():
        assert int(blocks(full, group).sum(1).min()) == keep
        assert int(blocks(full, group).sum(2).min()) == keep


@pytest.mark.parametrize("method", METHODS)
def test_both_axes_of_the_matrix_and_not_of_flat_memory(method: Method) -> None:
    """The published code cuts blocks from one row's memory: a third of the groups down the matrix break."""
    limits(transposable_mask(weights("normal", 64), 4, 8, method).numpy(), 4, 8)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_does_not_depend_on_what_else_is_in_the_matrix(method: Method) -> None:
    w = weights("normal", 64)
    whole = transposable_mask(w, 4, 8, method)
    assert torch.equal(whole[8:16, 24:32], transposable_mask(w[8:16, 24:32], 4, 8, method))


@pytest.mark.parametrize("method", METHODS)
def test_pattern_that_keeps_all_and_empty_weights(method: Method) -> None:
    assert bool(transposable_mask(weights("normal", 9), 4, 4, method).all())
    assert transposable_mask(torch.zeros(0, 4), 2, 4, method).shape == (0, 4)
    assert not bool(transposable_mask(torch.zeros(8, 8), 2, 4, method).sum(0).gt(4).any())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4, 4, dtype=torch.int8), r"fc is torch.int8: masks are made on float weights"),
        (torch.tensor([[1.0, float("nan")]]), "fc contains NaN"),
        (torch.tensor([[1.0, float("-inf")]]), "fc contains an infinity"),
        (torch.ones(4), "fc has rank 1: a transposable mask is made on a matrix"),
    ],
)
def test_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        transposable_mask(weight, 2, 4, name="fc")


def test_refused_patterns_and_methods() -> None:
    for keep, group in ((0, 4), (5, 4), (2, 65)):
        with pytest.raises(InvalidInput, match="1 <= keep <= group <= 64"):
            transposable_mask(torch.ones(4, 4), keep, group)
    with pytest.raises(InvalidInput, match="method is one of exact, fast, greedy, two-approx, not 'best'"):
        transposable_mask(torch.ones(4, 4), 2, 4, "best")  # type: ignore[arg-type]


# -- how heavy --------------------------------------------------------------------------------------------------


def test_exact_two_of_four_equals_brute_force_over_the_90_patterns() -> None:
    lines = [sum(1 << j for j in pair) for pair in itertools.combinations(range(4), 2)]
    found = [p for p in itertools.product(lines, repeat=4) if all(sum(r >> j & 1 for r in p) == 2 for j in range(4))]
    patterns = np.array([[[r >> j & 1 for j in range(4)] for r in p] for p in found])
    assert len(patterns) == 90
    w = weights("normal", 64)
    best = np.einsum("bij,pij->bp", np.abs(blocks(w, 4).numpy()).astype(np.float64), patterns).max(1)
    assert kept(w, transposable_mask(w, 2, 4, "exact"), 4).numpy() == pytest.approx(best, rel=1e-6)


def linear_program(w: np.ndarray, across: int, down: int) -> float:
    """The optimum of the linear relaxation, which is integral: every line of a square block at its number."""
    import highspy

    h = highspy.Highs()  # type: ignore[no-untyped-call]
    h.silent()
    x = [[h.addVariable(0.0, 1.0) for _ in range(w.shape[1])] for _ in range(w.shape[0])]
    for line in x:
        h.addConstr(h.qsum(line) == across)
    for column in zip(*x, strict=True):
        h.addConstr(h.qsum(column) == down if len(w) == w.shape[1] else h.qsum(column) <= down)
    h.maximize(h.qsum([float(w[i, j]) * v for i, line in enumerate(x) for j, v in enumerate(line)]))
    return float(h.getObjectiveValue())


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (3, 5), (4, 8), (2, 8), (7, 8), (8, 16), (5, 13), (3, 24)])
@pytest.mark.parametrize("kind", ["normal", "uniform", "ties", "sparse", "wide"])
def test_exact_equals_the_linear_program(keep: int, group: int, kind: str) -> None:
    w = weights("uniform" if kind == "uniform" else "normal", 2 * group, seed=group)
    match kind:
        case "ties":
            w = w.round()
        case "sparse":
            w = torch.where(w.abs() < 1.0, 0.0, w)
        case "wide":
            w = (3 * w).exp()
    got = kept(w, transposable_mask(w, keep, group, "exact"), group)
    best = [linear_program(b, keep, keep) for b in blocks(w.abs(), group).double().numpy()]
    assert got.numpy() == pytest.approx(np.array(best), rel=1e-6)


def test_exact_at_a_cut_edge_equals_the_linear_program() -> None:
    w = weights("normal", 8)[:5]  # rows keep 4 of 8, columns at most 3 of 5
    got = float((w.abs() * transposable_mask(w, 4, 8, "exact")).double().sum())
    assert got == pytest.approx(linear_program(w.abs().double().numpy(), 4, 3), rel=1e-6)


TABLE = {  # algorithms.md 1.2: K kept/optimal, K fill, P kept/optimal, P fill, P pruned/optimal pruned
    (2, 4, "normal"): (0.985, 0.980, 0.895, 0.744, 1.24),
    (2, 4, "uniform"): (0.972, 0.980, 0.858, 0.735, 1.27),
    (4, 8, "normal"): (0.988, 0.982, 0.924, 0.812, 1.22),
    (4, 8, "uniform"): (0.981, 0.980, 0.895, 0.805, 1.24),
    (2, 8, "normal"): (0.975, 0.994, 0.811, 0.680, 1.16),
    (8, 16, "normal"): (0.991, 0.987, 0.941, 0.861, 1.20),
}


@pytest.mark.parametrize(("keep", "group", "kind"), CASES)
def test_greedy_and_two_approx_reproduce_table_1_2_and_their_guarantees(keep: int, group: int, kind: str) -> None:
    w = weights(kind, 256, seed=1)
    all_ = blocks(w.abs().double(), group).sum((1, 2))
    best = kept(w, transposable_mask(w, keep, group, "exact"), group)
    k, p = transposable_mask(w, keep, group, "greedy"), transposable_mask(w, keep, group, "two-approx")
    k_ratio, p_ratio = kept(w, k, group) / best, kept(w, p, group) / best
    pruned = (all_ - kept(w, p, group)) / (all_ - best)
    slots = w.numel() * keep / group
    got = (k_ratio.mean(), k.sum() / slots, p_ratio.mean(), p.sum() / slots, pruned.mean())
    wanted = TABLE[keep, group, kind]
    # The printed means are of 60 to 400 blocks. Fills depend on ranks alone, so that normal and uniform must agree:
    # that they differ by .009 in print (.744, .735) shows how far printed means are off.
    assert [float(x) for x in got] == pytest.approx(wanted, abs=0.01)
    assert [float(x) for x in got[::2][:2]] == pytest.approx(wanted[::2][:2], abs=0.006)
    assert float(k_ratio.min()) >= 0.5
    assert float(pruned.max()) <= 2.0


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(2, 8), st.sampled_from([1.0, 4.0, 12.0]), st.integers(0, 2**31))
def test_guarantees_on_any_block(keep: int, group: int, spread: float, seed: int) -> None:
    keep = min(keep, group)
    w = torch.from_numpy(np.random.default_rng(seed).random((group, group)) ** spread)
    best = kept(w, transposable_mask(w, keep, group, "exact"), group).item()
    assert kept(w, transposable_mask(w, keep, group, "greedy"), group).item() >= 0.5 * best - 1e-9
    left = float(w.sum()) - kept(w, transposable_mask(w, keep, group, "two-approx"), group).item()
    assert left <= 2 * (float(w.sum()) - best) + 1e-9


@pytest.mark.parametrize(("keep", "group", "kind"), [*CASES, (4, 8, "Laplace")])
def test_fast_is_near_the_optimum(keep: int, group: int, kind: str) -> None:
    """At least .998 at 4:8; the published recipe, measured, reaches .999 there, .997 at 2:8 and .999 at 8:16."""
    w = weights(kind, 256, seed=2)
    ratio = kept(w, transposable_mask(w, keep, group), group) / kept(
        w, transposable_mask(w, keep, group, "exact"), group
    )
    floor = {(2, 4): 0.999, (4, 8): 0.998, (2, 8): 0.997, (8, 16): 0.997}[keep, group]
    assert float(ratio.mean()) >= floor
    assert float(ratio.min()) > 0.8


def test_retained_magnitude_reproduces_table_1_3() -> None:
    columns = ("8:16", "4:8", "2:4", "1:2", "T 8:16", "T 4:8", "T 4:8 K", "T 2:4", "T 2:4 K")
    table = {
        "normal": (0.782, 0.768, 0.745, 0.707, 0.767, 0.742, 0.733, 0.702, 0.691),
        "Laplace": (0.831, 0.817, 0.792, 0.750, 0.817, 0.791, 0.785, 0.747, 0.741),
        "uniform": (0.736, 0.723, 0.701, 0.668, 0.722, 0.699, 0.686, 0.662, 0.646),
    }
    for kind, wanted in table.items():
        w = weights(kind, 256, seed=3)
        for column, value in zip(columns, wanted, strict=True):
            keep, group = (int(x) for x in column.removeprefix("T ").removesuffix(" K").split(":"))
            how: Method = "greedy" if column.endswith("K") else "exact"
            mask = transposable_mask(w, keep, group, how) if column[0] == "T" else nm_mask(w, keep, group)
            assert share_kept(w, mask) == pytest.approx(value, abs=0.006), (kind, column)


def test_the_greedy_fixture_of_pytorch() -> None:
    w = torch.tensor([[4.0, 3, 2, 1], [-1, -3, 0.6, 0.5], [1, 2, 3, 4], [10, 2, -1, 5]])
    wanted = [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]
    for method in ("greedy", "exact", "fast"):
        mask = transposable_mask(w, 2, 4, method)
        assert mask.int().tolist() == wanted
        assert float((w.abs() * mask).sum()) == pytest.approx(32.6)
