"""Entries: what a group of outputs stores, in which order, and that nonsense does not unpack."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.codegen.tvm.contract import ContractSpec, Conv, Matrix
from bitwright.codegen.tvm.lanes.packing import counts_of, from_units, kept_of, pack, units_of, unpack
from bitwright.codegen.tvm.lanes.spec import LanesKnobs
from bitwright.ir.errors import InvalidInput


def test_units_of_a_convolution_run_over_taps_then_channels() -> None:
    spec = ContractSpec("u8s8", Conv(1, 4, 4, 8, 2, (1, 2)))
    weight = np.arange(32, dtype=np.int8).reshape(2, 8, 1, 2)
    units = units_of(spec, weight)
    assert units.shape == (2, 4, 4)
    assert units[0, 1].tolist() == [8, 10, 12, 14]  # first tap, channels 4 to 7
    assert units[0, 2].tolist() == [1, 3, 5, 7]
    np.testing.assert_array_equal(from_units(spec, units), weight)


def test_a_group_keeps_the_union_of_its_outputs() -> None:
    spec = ContractSpec("f32", Matrix(16, 3, 4))
    weight = np.array([[1, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 3]], np.float32)
    kept = kept_of(units_of(spec, weight), 2)
    assert kept.tolist() == [[True, False, True, False], [False, False, False, True]]
    assert counts_of(kept, 3).tolist() == [[2, 0], [0, 1]]


def test_row_pointers_sort_outputs_by_entries() -> None:
    spec = ContractSpec("f32", Matrix(16, 3, 4))
    weight = np.array([[0, 0, 0, 5], [1, 2, 3, 0], [0, 4, 0, 6]], np.float32)
    values, offsets, spans = pack(spec, LanesKnobs("avx512-vnni", 1, 1, 4, 64), weight)
    assert values.reshape(-1).tolist() == [1, 2, 3, 4, 6, 5]
    assert (offsets // 8).tolist() == [0, 1, 2, 1, 3, 3]
    assert spans[0, 0, :7].tolist() == [0, 1, 3, 2, 5, 0, 6]  # (first entry, output) pairs and the end


def test_a_fixed_count_is_filled_up_and_checked() -> None:
    spec = ContractSpec("f32", Matrix(16, 2, 4))
    weight = np.array([[0, 7, 0, 0], [1, 0, 2, 0]], np.float32)
    knobs = LanesKnobs("avx512-vnni", 1, 1, 4, 64, (2, 0))
    values, _ = pack(spec, knobs, weight)
    assert values.reshape(-1).tolist() == [7, 0, 1, 2]
    weight[0] = 1
    with pytest.raises(InvalidInput, match="more than 2 entries in K block 0"):
        pack(spec, knobs, weight)


def test_offsets_outside_the_reduction_do_not_unpack() -> None:
    spec = ContractSpec("f32", Matrix(16, 2, 4))
    knobs = LanesKnobs("avx512-vnni", 1, 1, 4, 64, (4, 0))
    packed = pack(spec, knobs, np.ones((2, 4), np.float32))
    packed[1][3] = 8 * 4
    with pytest.raises(InvalidInput, match="outside"):
        unpack(spec, knobs, packed)
