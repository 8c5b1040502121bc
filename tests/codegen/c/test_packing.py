"""Weights in flash: what is packed unpacks to the same, whatever the width and the pattern."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.codegen.c.packing import Form, form_of, pack, runs_of, unpack
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import NM, S8, TensorType, parse_dtype

Array = np.ndarray[Any, Any]
BITS = {"s8": 8, "s4": 4, "s3": 4, "s2": 2, "ternary": 2, "bipolar": 1}


def masked(w: Array, keep: int, group: int, rng: np.random.Generator) -> Array:
    """At most ``keep`` non-zeros of every ``group`` along axis 1, sometimes fewer."""
    w = w.copy()
    for start in range(0, w.shape[1], group):
        part = w[:, start : start + group]
        order = rng.permuted(np.broadcast_to(np.arange(part.shape[1]), (w.shape[0], part.shape[1])), axis=1)
        for o in range(w.shape[0]):
            part[o, order[o, keep:]] = 0
    return w


def drawn(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    t = parse_dtype(dtype)
    if dtype == "bipolar":
        return rng.choice([-1, 1], shape).astype(np.int8)
    w = rng.integers(t.lo, t.hi + 1, shape).astype(np.int8)
    w.reshape(-1)[0], w.reshape(-1)[-1] = t.lo, t.hi  # the extremes are in
    return w


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(BITS)), st.integers(1, 5), st.integers(1, 19), st.sampled_from([(), (3,), (3, 3), (1, 1)]),
    st.sampled_from([None, (2, 4), (1, 4), (4, 8), (1, 16), (3, 5)]), st.integers(0, 1 << 30),
)  # fmt: skip
def test_round_trip(
    dtype: str, rows: int, length: int, kernel: tuple[int, ...], nm: tuple[int, int] | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w = drawn(dtype, (rows, length, *kernel), rng)
    if nm:
        w = masked(w, *nm, rng)
    t = TensorType(parse_dtype(dtype), w.shape, NM(*nm, 1) if nm else None)
    form = form_of(t, w)
    values, indices = pack(w, form)
    assert np.array_equal(unpack(values, indices, form), runs_of(w, form))
    assert values.nbytes + (0 if indices is None else indices.nbytes) == form.nbytes


@pytest.mark.parametrize(("dtype", "bits"), BITS.items())
def test_widths(dtype: str, bits: int) -> None:
    w = drawn(dtype, (4, 64), np.random.default_rng(0))
    form = form_of(TensorType(parse_dtype(dtype), w.shape), w)
    assert form.bits == bits
    assert form.nbytes == 4 * 64 * bits // 8


@pytest.mark.parametrize(
    ("nm", "dtype", "nbytes"),
    [((2, 4), "s8", 32 * (8 + 2) // 8), ((2, 4), "s4", 32 * (4 + 2) // 8), ((1, 16), "s8", 4 * (8 + 4) // 8)],
)
def test_masks_save_bytes(nm: tuple[int, int], dtype: str, nbytes: int) -> None:
    w = masked(drawn(dtype, (1, 64), np.random.default_rng(1)), *nm, np.random.default_rng(2))
    assert form_of(TensorType(parse_dtype(dtype), w.shape, NM(*nm, 1)), w).nbytes == nbytes


def test_a_mask_that_saves_nothing_is_not_stored() -> None:
    w = masked(drawn("s2", (4, 64), np.random.default_rng(1)), 2, 4, np.random.default_rng(2))
    assert not form_of(TensorType(parse_dtype("s2"), w.shape, NM(2, 4, 1)), w).sparse


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(InvalidInput, match="more than 1 non-zeros"):
        pack(np.ones((1, 4), np.int8), Form(1, 1, 4, 8, 0, 1, 4, 2))


def test_an_s8_that_happens_to_be_narrow_takes_few_bits() -> None:
    w = np.array([[1, -1, 0, 1]], np.int8)
    assert form_of(TensorType(S8, w.shape), w).bits == 2
