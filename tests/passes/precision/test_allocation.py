"""allocate: published solutions, brute force, budgets that nothing meets, ties, the front."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.ir.errors import InvalidInput
from bitwright.passes.precision.allocation import Allocation, allocate, pareto

# HAWQ-V3 (arXiv 2011.10680), ResNet-18 without first and last layer, in the order of its repository.
TRACE = """.06857826 .03162379 .03298575 .01205663 .02222431 .00596336 .06931772 .00807129 .00372905 .00530698 .00209011
    .00737569 .00210454 .00151197 .00158041 .00078146 .00451841 .00098745 .00072944"""
ERROR_8 = """.0235 .0125 .0102 .0082 .0145 .0344 .0023 .0287 .0148 .0333 .0682 .0027 .0448 .0336 .0576 .1130 .0102
    .0947 .0532"""
ERROR_4 = """6.7430 3.9691 3.3281 2.6796 4.7277 10.5966 .6827 9.0942 4.8857 10.7599 21.7546 .8603 14.5324 10.9651
    18.7706 36.4044 3.1572 29.6994 17.4016"""
MS_4 = """.21094404 .21092674 .21104113 .21086851 .13642465 .19167506 .02532183 .19148203 .19142914 .11395316 .20556011
    .01917474 .20566918 .20566509 .13185102 .22287786 .01790088 .22304611 .22286099"""
MS_8 = """.36189111 .36211718 .31141909 .30454471 .19184896 .38948934 .0334169 .38904905 .3892859 .19134735 .34307431
    .02802354 .34313329 .34310756 .21117103 .37376585 .02896843 .37398187 .37405185"""
SIZE = np.array(
    [36864] * 4 + [73728, 147456, 8192, 147456, 147456, 294912, 589824, 32768, 589824, 589824]
    + [1179648, 2359296, 131072, 2359296, 2359296]
)  # fmt: skip
MACS = np.array([115.605504] * 4 + [57.802752, 115.605504, 6.422528, 115.605504, 115.605504] * 3)
TIED = ((4, 6), (9, 11), (14, 16))
PUBLISHED = [
    ("size", 0.25, "8888888888888844444", -1.189414, 6.6406, 6.6504),
    ("size", 0.50, "8888888888888884844", -1.233207, 7.2656, 7.9805),
    ("size", 0.75, "8888888888888488884", -1.274273, 9.2344, 9.3105),
    ("bops", 0.25, "8884848444444444444", -0.847289, 45.7605, 46.3626),
    ("bops", 0.50, "8884888848884444444", -1.092024, 65.0281, 66.2323),
    ("bops", 0.75, "8888888848888484884", -1.227748, 84.2957, 86.1020),
    ("latency", 0.25, "8884848444444444444", -0.847289, 3.6147, 3.6974),
    ("latency", 0.50, "8888848848884484844", -1.105039, 4.2201, 4.2462),
    ("latency", 0.75, "8888888848888484884", -1.227748, 4.7063, 4.7949),
]


def numbers(text: str) -> Any:
    return np.array([float(v) for v in text.split()])


def hawq(limit: str, share: float) -> tuple[Any, Any, float]:
    """Losses and costs of [4 bits, 8 bits] for each layer, and the budget a share of the way from all-4 to all-8."""
    trace = numbers(TRACE)
    losses = np.stack([trace * numbers(ERROR_4), trace * numbers(ERROR_8)], 1)
    low, high = {
        "size": (SIZE / 2**21, SIZE / 2**20),
        "bops": (MACS / 64, MACS / 16),
        "latency": (numbers(MS_4), numbers(MS_8)),
    }[limit]
    return losses, np.stack([low, high], 1), float(low.sum() + share * (high.sum() - low.sum()))


@pytest.mark.parametrize(("limit", "share", "bits", "objective", "used", "budget"), PUBLISHED)
def test_published_solutions(limit: str, share: float, bits: str, objective: float, used: float, budget: float) -> None:
    losses, costs, given_budget = hawq(limit, share)
    a = allocate(losses, costs, given_budget, ties=TIED)
    assert "".join("48"[c] for c in a.choice) == bits
    assert a.loss - losses[:, 0].sum() == pytest.approx(objective, abs=6e-7)
    assert a.cost == pytest.approx(used, abs=6e-5)
    assert a.budget == pytest.approx(budget, abs=6e-5)
    assert (a.gap, a.bound, a.optimal) == (0.0, a.loss, True)


def test_losses_may_be_differences() -> None:
    """Losses relative to 4 bits are below zero: the same solution, and the published objective itself."""
    losses, costs, budget = hawq("bops", 0.5)
    a = allocate(losses - losses[:, :1], costs, budget, ties=TIED)
    assert "".join("48"[c] for c in a.choice) == "8884888848884444444"
    assert a.loss == pytest.approx(-1.092024, abs=6e-7)


# CalibTIP (arXiv 2006.10518): weights of ResNet-18 and its published lists of 4-bit layers.
RESNET18 = {"conv1": 9408, "fc": 512000} | {
    f"layer{s}.{u}.{c}": n
    for s, width in ((1, 64), (2, 128), (3, 256), (4, 512))
    for u in (0, 1)
    for c, n in (
        ("conv1", 9 * width * (width // 2 if s > 1 and u == 0 else width)),
        ("conv2", 9 * width * width),
        *((("downsample", width * width // 2),) if s > 1 and u == 0 else ()),
    )
}
FOUR = ["layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]
THREE = ["layer3.0.conv2", "layer3.1.conv1", "layer3.1.conv2"]
LISTS = [
    ((0.13,), 0.1293, ["layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2", "layer3.0.conv1", *THREE, *FOUR, "fc"]),
    ((0.14,), 0.1372, [*THREE, *FOUR, "fc"]),
    ((0.15,), 0.1490, [*THREE[:2], *FOUR]),
    ((0.16,), 0.1553, [THREE[0], *FOUR]),
    ((0.17,), 0.1616, FOUR),
    ((0.18, 0.19), 0.1742, FOUR[1:]),
    ((0.20, 0.21, 0.22), 0.1995, FOUR[1:3]),
    ((0.23, 0.24), 0.2247, FOUR[1:2]),
]


@pytest.mark.parametrize(("sizes", "fraction", "four"), LISTS)
def test_published_lists_are_feasible(sizes: tuple[float, ...], fraction: float, four: list[str]) -> None:
    """Losses that want exactly the published list get it within its size, and it has the published fraction."""
    weights = sum(RESNET18.values())
    assert weights == 11_678_912
    losses = [[0.0, 0.1] if name in four else [1.0, 0.0] for name in RESNET18]
    costs = [[4 * n, 8 * n] for n in RESNET18.values()]
    for size in sizes:
        a = allocate(losses, costs, size * 32 * weights)
        if size == 0.13:
            assert a.cost / (32 * weights) == pytest.approx(fraction, abs=5e-5)
        exact = sum(4 * n if name in four else 8 * n for name, n in RESNET18.items())
        assert a.loss == 0.0
        assert [name for name, c in zip(RESNET18, a.choice, strict=True) if c == 0] == [
            n for n in RESNET18 if n in four
        ]
        assert a.cost == exact
        assert exact / (32 * weights) == pytest.approx(fraction, abs=5e-5)


def brute_force(losses: Any, costs: Any, budget: float, ties: Any = ()) -> float:
    best = np.inf
    for choice in itertools.product(*(range(len(r)) for r in losses)):
        if any(len({choice[i] for i in t}) > 1 for t in ties):
            continue
        if sum(r[c] for r, c in zip(costs, choice, strict=True)) <= budget + 1e-12 * abs(budget):
            best = min(best, sum(r[c] for r, c in zip(losses, choice, strict=True)))
    return float(best)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000), st.floats(0.0, 1.0), st.sampled_from(["real", "whole", "equal"]))
def test_brute_force_agrees(layers: int, seed: int, share: float, kind: str) -> None:
    rng = np.random.default_rng(seed)
    most = 5 if layers <= 5 else 3 if layers <= 8 else 2
    losses: list[Any]
    costs: list[Any]
    shapes = [int(rng.integers(1, most + 1)) for _ in range(layers)]
    if kind == "real":
        losses, costs = ([rng.lognormal(0, 3, n) for n in shapes] for _ in range(2))
    else:
        top = 4 if kind == "equal" else 10**7
        losses, costs = ([rng.integers(0, top, n) for n in shapes] for _ in range(2))
    low, high = sum(float(min(c)) for c in costs), sum(float(max(c)) for c in costs)
    budget = low + share * (high - low)
    a = allocate(losses, costs, budget)
    assert a.cost == pytest.approx(sum(float(r[c]) for r, c in zip(costs, a.choice, strict=True)), rel=1e-12)
    assert a.loss == pytest.approx(sum(float(r[c]) for r, c in zip(losses, a.choice, strict=True)), rel=1e-12)
    assert a.cost <= budget + 1e-12 * budget
    assert a.loss == pytest.approx(brute_force(losses, costs, budget), rel=1e-9)
    assert a.bound <= a.loss
    assert a == allocate(losses, costs, budget)
    mirrored = allocate(losses, costs, a.loss, minimise="cost")
    assert mirrored.cost == pytest.approx(brute_force(costs, losses, a.loss), rel=1e-9)


def random_problem(layers: int, choices: int, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    bits = np.sort(rng.choice(np.arange(2, 33), choices, replace=False))
    size = rng.integers(1000, 1000000, layers)[:, None]
    return rng.lognormal(0, 2, (layers, 1)) * 4.0**-bits * rng.uniform(0.5, 2, (layers, choices)), size * bits


def test_ties_choose_the_same_column() -> None:
    for seed in range(5):
        losses, costs = random_problem(6, 4, seed)
        ties = ((0, 3), (3, 5), (1,), (2, 4))
        budget = float(costs.min(1).sum() + 0.3 * np.ptp(costs, 1).sum())
        a = allocate(losses, costs, budget, ties)
        assert a.choice[0] == a.choice[3] == a.choice[5]
        assert a.choice[2] == a.choice[4]
        assert a.loss == pytest.approx(brute_force(losses, costs, budget, ties), rel=1e-9)


def test_loss_is_monotone_in_the_budget() -> None:
    losses, costs = random_problem(60, 6)
    low, high = costs.min(1).sum(), costs.max(1).sum()
    found = [allocate(losses, costs, float(b)) for b in np.linspace(low, high, 25)]
    assert all(b.loss <= a.loss for a, b in itertools.pairwise(found))
    assert found[0].cost == low
    assert found[-1].loss == pytest.approx(losses.min(1).sum(), rel=1e-12)
    assert len({a.loss for a in found}) > 10


def test_the_front_has_no_dominated_point() -> None:
    losses, costs = random_problem(20, 5)
    front = pareto(losses, costs, ties=((0, 1),), points=15)
    assert len(front) >= 10
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(front))
    assert front[0].cost == costs.min(1).sum()
    some = pareto(losses, costs, points=[1.0, front[3].cost, float("inf")])
    assert [a.optimal for a in some] == [True, True]  # a budget of 1 is met by nothing
    assert some[-1].loss == pytest.approx(losses.min(1).sum(), rel=1e-12)
    with pytest.raises(InvalidInput, match="at least 1, not 0"):
        pareto(losses, costs, points=0)


def test_of_equal_losses_the_cheaper_choice() -> None:
    assert allocate([[1.0, 1.0, 1.0]], [[3, 1, 1]], 10).choice == (1,)


def test_a_time_limit_gives_a_bound() -> None:
    rng = np.random.default_rng(0)
    costs = rng.integers(10**6, 2 * 10**6, (400, 12))
    a = allocate(-(costs + rng.integers(0, 3, costs.shape)), costs, float(1.6e6 * 400), time_limit=1e-3)
    assert not a.optimal
    assert a.bound < a.loss
    assert a.gap == pytest.approx((a.loss - a.bound) / abs(a.loss))
    assert a.cost <= 1.6e6 * 400


@pytest.mark.parametrize(
    ("minimise", "smallest"),
    [
        ("loss", "a cost of 0 or less: the smallest possible is 5"),
        ("cost", "a loss of 0 or less: the smallest possible is 1.5"),
    ],
)
def test_infeasible_budgets_name_the_smallest(minimise: Any, smallest: str) -> None:
    with pytest.raises(InvalidInput, match=smallest):
        allocate([[1.0, 2.0], [0.5, 0.75]], [[3, 2], [4, 3]], 0, minimise=minimise)
    enough = float(smallest.rsplit(" ", 1)[1])
    assert isinstance(allocate([[1.0, 2.0], [0.5, 0.75]], [[3, 2], [4, 3]], enough, minimise=minimise), Allocation)


@pytest.mark.parametrize(
    ("losses", "costs", "more", "message"),
    [
        ([], [], {}, "there are no layers"),
        ([[1.0]], [[1.0], [2.0]], {}, "losses has 1 layers, costs has 2"),
        ([[1.0, 2.0]], [[1.0]], {}, "layer 0 has 2 losses and 1 costs"),
        ([[]], [[]], {}, r"layer 0: its loss is an array of shape \[0\]"),
        ([[1.0], 2.0], [[1.0], 2.0], {}, r"layer 1: its loss is an array of shape \[\]"),
        ([["many"]], [[1.0]], {}, "layer 0: its loss is not an array of numbers"),
        ([[1.0, float("nan")]], [[1.0, 2.0]], {}, "layer 0: the loss of choice 1 is nan; leave the choice out"),
        ([[1.0]], [[float("inf")]], {}, "layer 0: the cost of choice 0 is inf"),
        ([[1.0, 2.0]], [[1.0, -2.0]], {}, "layer 0: the cost of choice 1 is -2; costs are not negative"),
        ([[1.0]], [[1.0]], {"budget": float("nan")}, "the budget is NaN"),
        ([[1.0]], [[1.0]], {"budget": "much"}, "a budget is a number, not 'much'"),
        ([[1.0]], [[1.0]], {"ties": [(0, 1)]}, "layer indices from 0 to 0, not 1"),
        ([[1.0], [1.0, 2.0]], [[1.0], [1.0, 2.0]], {"ties": [(0, 1)]}, "layers 0 and 1 are tied but have 1 and 2"),
        ([[1.0]], [[1.0]], {"minimise": "time"}, "minimise is 'loss' or 'cost', not 'time'"),
        ([[1.0]], [[1.0]], {"time_limit": 0.0}, "time_limit is a number of seconds above zero"),
    ],
)
def test_bad_input(losses: Any, costs: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        allocate(losses, costs, **{"budget": 10.0, **more})
