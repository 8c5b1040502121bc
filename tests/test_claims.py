"""What a benchmark's claim says of a race: ratios, shares, quoted peers, and rows for what could not be measured."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
claims: Any = import_module("claims")
tables: Any = import_module("tables")
Claim = claims.Claim

RACE = {
    "ours dense": (4.0, 4.0, 4.2), "ours dense: contraction": (3.0, 3.0, 3.0), "ours 2:4": (2.0, 2.0, 2.0),
    "peer int8 (a)": (6.0, 6.0, 6.0), "peer int8 (b)": (5.0, 5.4, 5.0), "peer sparse": (3.0, 3.0, 3.0),
}  # fmt: skip


def group(**more: object) -> Any:
    return claims.Group(tables.Times(RACE, {}), **more)


def test_whole_calls_are_compared_with_the_fastest_peer() -> None:
    row = group().settle(Claim("work", "ours dense", ("peer int8",), 1.3))
    assert (row.ours, row.against, row.ours_ms, row.against_ms) == ("ours dense", "peer int8 (b)", 4e3, 5e3)
    assert (row.ratio, row.inner) == (pytest.approx(5 / 4), pytest.approx(5 / 3))
    assert row.status == "MISSED"  # the contraction alone would reach it
    assert group().settle(Claim("work", "ours dense", ("peer int8",), 1.2)).status == "met"
    assert group().settle(Claim("work", "ours 2:4", ("peer int8",), 1.2)).inner is None


def test_shares_of_the_bound() -> None:
    row = group(work={"ours dense": 600.0}, bound=250.0).settle(Claim("work", "ours dense", (), 0.8))
    assert (row.share, row.ratio, row.status) == (pytest.approx(0.8), pytest.approx(0.8), "met")


def test_what_is_missing_is_a_row_with_the_reason() -> None:
    absent = group(missing={"ours 1:4": "no kernel", "gone": "not installed"})
    assert absent.settle(Claim("work", "ours 1:4", ("peer",), 1.0)).note == "no kernel"
    row = absent.settle(Claim("work", "ours 2:4", ("gone",), 1.0))
    assert (row.status, row.note, row.ratio) == ("not measured", "not installed", None)
    assert "not measured" in claims.table([row])


def test_a_quoted_peer_is_scaled_by_one_that_is_here() -> None:
    quoted = [claims.Quoted("ggml", 1.0, ("peer sparse",), 2.0)]
    row = group(quoted=quoted).settle(Claim("work", "ours 2:4", ("ggml",), 0.7))
    assert (row.against, row.against_ms, row.ratio) == ("ggml", 1500.0, 0.75)
    assert "quoted" in row.note
