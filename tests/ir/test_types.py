"""Number formats, encodings and shapes print and parse; bad ones are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.ir.errors import InvalidInput
from bitwright.ir.patterns import density, kept_magnitude, violation
from bitwright.ir.types import NM, Block, Codebook, Unstructured, dtype_of, parse_dtype, parse_encoding, parse_type


@pytest.mark.parametrize("name", "f64 f32 f16 bf16 f4m3 f5m2 f2m1b3 s1 s4 s8 u3 u8 s64 bool ternary bipolar".split())
def test_formats_round_trip(name: str) -> None:
    assert str(parse_dtype(name)) == name


@pytest.mark.parametrize("name", ["s0", "s65", "float", "", "f32x", "u"])
def test_bad_formats(name: str) -> None:
    with pytest.raises(InvalidInput):
        parse_dtype(name)


def test_integer_limits() -> None:
    assert (parse_dtype("s4").lo, parse_dtype("s4").hi, parse_dtype("u3").hi) == (-8, 7, 7)
    assert (parse_dtype("ternary").lo, parse_dtype("bipolar").hi) == (-1, 1)
    assert dtype_of(np.uint16) == parse_dtype("u16")


@given(st.integers(1, 64), st.integers(1, 64), st.integers(-2, 3), st.sampled_from([1, 4, 64]), st.booleans())
def test_nm_encodings_round_trip(keep: int, group: int, axis: int, shared: int, transposable: bool) -> None:
    if keep > group:
        with pytest.raises(InvalidInput):
            NM(keep, group, axis)
        return
    nm = NM(keep, group, axis, shared, transposable=transposable)
    assert parse_encoding(str(nm)) == nm


@given(st.integers(0, 64), st.integers(0, 5000), st.integers(-3, 3), st.integers(1, 8))
def test_fixed_counts_round_trip(count: int, per: int, axis: int, block: int) -> None:
    if count > per or (count == 0) != (per == 0):
        with pytest.raises(InvalidInput, match="1 <= count <= per"):
            Unstructured(count, per, axis, block)
        return
    e = Unstructured(count, per, axis, block)
    assert parse_encoding(str(e)) == e
    assert parse_type(f"f32[8, 16] {e}").encoding == e
    assert e.density == (count / per if per else 1.0)


def test_other_encodings_round_trip() -> None:
    for e in (Block(4, 1), Unstructured(12, 64), Codebook(16), NM(1, 4, 0, 64, 4), NM(2, 4, 1, transposable=True)):
        assert parse_encoding(str(e)) == e
    assert str(Unstructured(12, 64)) == "unstructured<12 per 64>"
    assert str(Unstructured(12, 64, 1, 4)) == "unstructured<12 per 64, axis=1, block=4>"


@pytest.mark.parametrize(
    "text",
    [
        "nm<2:4>", "nm<5:4, axis=1>", "nm<1:4, axis=1, shared=0>", "nm<1:4, axis=1, block=0>", "nm<1:4, axis=1, wide>",
        "unstructured<9 per 8>", "unstructured<0 per 8>", "unstructured<2 per 8, block=0>", "unstructured<2>",
    ],
)  # fmt: skip
def test_bad_encodings(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_encoding(text)


def test_types_round_trip() -> None:
    for text in ("f32[]", "s8[b, 768]", "s8[3072, 768] nm<2:4, axis=1>", "f32[12*b, s*t]"):
        assert str(parse_type(text)) == text


def test_patterns_are_found_broken_where_they_are() -> None:
    w = np.zeros((4, 8), np.float32)
    w[2, 4:7] = 1
    assert "at [2, 1]" in violation(w, NM(2, 4, 1))
    assert violation(w, NM(3, 4, 1)) == ""
    assert violation(w, NM(1, 2, 0)) == ""
    assert violation(np.ones((2, 6), np.float32), NM(2, 4, 1, block=2))
    assert "3 non-zeros in the group at [2, 0], at most 2 of 8" in violation(w, Unstructured(2, 8))
    assert violation(w, Unstructured(3, 8)) == violation(w, Unstructured()) == violation(w, Unstructured(1, 4, 0)) == ""
    assert violation(w, Unstructured(2, 4, block=2)) == "" != violation(w, Unstructured(1, 4, block=2))
    assert "axis 2 is outside" in violation(w, Unstructured(1, 4, 2))
    tail = np.ones((1, 6), np.float32) * [1, 0, 1, 0, 1, 1]
    assert "2 non-zeros in the group at [0, 1], at most 1 of 2" in violation(tail, NM(2, 4, 1))
    assert "at most 1 of 2" in violation(tail, Unstructured(2, 4, 1))
    assert density(w) == 3 / 32
    assert kept_magnitude(w, w * 0) == 0.0
