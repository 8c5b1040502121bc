"""The unbiased mask as an operator: counted random numbers, expectation, variance, determinism."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.infer import InferenceError, infer
from bitwright.ir.mvue import inclusion, two_draw_inclusion
from bitwright.ir.semantics import apply
from bitwright.ir.semantics_random import WORD, philox, uniform
from bitwright.ir.types import F32, S64, TensorType

DRAWS = 2000


def masked(op: ops.UnbiasedMask, x: torch.Tensor, draw: int) -> torch.Tensor:
    return apply(op, x, torch.tensor(draw))[0]


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_philox(counter: tuple[int, ...], key: tuple[int, int], want: tuple[int, ...]) -> None:
    a, b, c, d = (torch.tensor(w) for w in counter)
    assert tuple(int(w) for w in philox((a, b, c, d), key)) == want
    assert philox((counter[0], counter[1], counter[2], counter[3]), key) == want


def test_the_numbers_are_uniform_and_unrelated() -> None:
    count = 1 << 16
    by_block = uniform(count, torch.tensor(3), 1)
    by_draw = torch.stack([uniform(1, torch.tensor(i), 1)[0] for i in range(1 << 11)])
    for u in (by_block, by_draw):
        n = len(u)
        assert 0.0 <= float(u.min()) <= float(u.max()) < 1.0
        for k in (0, 1):
            filled = torch.histc(u[:, k], 64, 0, 1)
            square = float(((filled - n / 64) ** 2 / (n / 64)).sum())
            assert abs(square - 63) < 4 * (2 * 63) ** 0.5  # chi-squared of 63 degrees, four standard deviations
            assert abs(float(torch.corrcoef(torch.stack([u[1:, k], u[:-1, k]]))[0, 1])) < 4 / n**0.5
        assert abs(float(torch.corrcoef(u.T)[0, 1])) < 4 / n**0.5
    other = uniform(count, torch.tensor(3), 2)
    assert abs(float(torch.corrcoef(torch.stack([by_block[:, 0], other[:, 0]]))[0, 1])) < 4 / count**0.5


@pytest.mark.parametrize(
    ("keep", "group", "size", "method"),
    [(2, 4, 10, "optimal"), (2, 4, 10, "two-draw"), (1, 2, 3, "optimal"), (3, 8, 8, "optimal"), (2, 8, 12, "two-draw")],
)
def test_unbiased_with_the_variance_of_the_formula(keep: int, group: int, size: int, method: str) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(group), dtype=torch.float64)
    op = ops.UnbiasedMask(keep, group, -1, 17, method)
    got = torch.stack([masked(op, x, d) for d in range(DRAWS)])
    spread = got.std(0)
    error = (got.mean(0) - x).abs()
    assert bool((error <= 4 * spread / DRAWS**0.5 + 1e-12).all())
    for start in range(0, size, group):
        part, n = x[start : start + group].abs()[None], min(group, size - start)
        kept = -(-keep * n // group)
        two = method == "two-draw" and kept == 2
        p = two_draw_inclusion(part) if two else inclusion(part, kept)
        want = float((part * part / p).sum() - (part * part).sum())
        assert float(got[:, start : start + group].var(0).sum()) == pytest.approx(want, rel=0.12, abs=1e-9)
        assert int((got[:, start : start + group] != 0).sum(1).max()) == kept


def test_a_draw_is_a_function_of_its_number() -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    op = ops.UnbiasedMask(2, 4)
    assert torch.equal(masked(op, x, 5), masked(op, x, 5))
    different = [masked(op, x, d) for d in (0, 1, -1, 1 << 32, 1 << 62)] + [masked(ops.UnbiasedMask(seed=1), x, 0)]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    lead = masked(ops.UnbiasedMask(2, 4, 0), x.T.contiguous(), 5)
    assert torch.equal(lead.T, masked(op, x, 5))  # groups are numbered with their axis last
    same = x[:1].expand(6, 8)
    assert len({tuple(r.tolist()) for r in masked(op, same, 0)}) > 1  # groups have numbers of their own


def test_special_values_and_formats() -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[1.0, nan, 2, 3, 0, -0.0, 0, 4], [-inf, 1, 1, 0, 0, 0, 0, 0]])
    got = masked(ops.UnbiasedMask(2, 4), x, 0)
    assert bool(got[0, :4].isnan().all())
    assert got[0, 4:].tolist() == [0, 0, 0, 4]
    assert got[1, 0] == -inf
    assert sorted(got[1, 1:4].tolist()) == [0, 0, 2]
    big = torch.full((1, 4), 60000.0, dtype=torch.float16)
    assert sorted(masked(ops.UnbiasedMask(1, 4), big, 0)[0].tolist()) == [0, 0, 0, 65504]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert masked(ops.UnbiasedMask(2, 4), x.to(dtype), 0).dtype == dtype
    assert masked(ops.UnbiasedMask(2, 4), torch.zeros(0, 8), 0).shape == (0, 8)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (ops.UnbiasedMask(5, 4), "keep <= group"),
        (ops.UnbiasedMask(1, 4, method="two-draw"), "for keep 2, two-draw"),
        (ops.UnbiasedMask(method="best"), "method 'best'"),
        (ops.UnbiasedMask(seed=-1), "seed -1"),
        (ops.UnbiasedMask(axis=3), "out of range"),
    ],
)
def test_what_does_not_fit(op: ops.UnbiasedMask, message: str) -> None:
    x, draw = TensorType(F32, (2, 8)), TensorType(S64, ())
    assert infer(ops.UnbiasedMask(), [x, draw]) == (x,)
    with pytest.raises(InvalidInput, match=message):
        infer(op, [x, draw])
    for wrong in ([x, TensorType(S64, (1,))], [x, TensorType(F32, ())], [TensorType(S64, (2, 8)), draw]):
        with pytest.raises(InferenceError, match=r"the draw is s64\[\]"):
            infer(ops.UnbiasedMask(), wrong)
    assert infer(ops.UnbiasedMask(), [TensorType(F32, ("b", 8)), draw])[0].shape == ("b", 8)
    assert np.prod(infer(ops.UnbiasedMask(), [TensorType(F32, (0, 8)), draw])[0].static_shape) == 0
