"""Packed weights of wgmma: what is packed unpacks again, metadata of every row and group, what is no 2:4 is refused."""

import numpy as np
import pytest

from bitwright.codegen.tvm.cuda import wgmma_layout as layout
from bitwright.ir.weights import Array


def sparse(rng: np.random.Generator, rows: int, depth: int, dtype: str) -> Array:
    """0, 1 or 2 of every four are kept."""
    w = rng.integers(1, 100, (rows, depth)).astype(dtype)
    order = np.argsort(np.argsort(rng.random((rows, depth // 4, 4)), -1), -1)
    w.reshape(rows, -1, 4)[order >= rng.integers(0, 3, (rows, depth // 4, 1))] = 0
    return w


@pytest.mark.parametrize("dtype", ["int8", "uint16"])
@pytest.mark.parametrize("tile", [64, 128, 256])
def test_packed_weights_unpack(dtype: str, tile: int) -> None:
    rng = np.random.default_rng(0)
    for rows, depth in ((1, 4), (70, 132), (300, 516)):
        for pattern in (False, True):
            w = sparse(rng, rows, depth, dtype) if pattern else rng.integers(1, 100, (rows, depth)).astype(dtype)
            packed = layout.pack(w, tile, pattern)
            assert packed.shape[-1] == layout.blob_bytes(tile, w.dtype.itemsize, pattern)
            again = layout.unpack(packed, tile, pattern, (rows, depth), w.dtype)
            np.testing.assert_array_equal(again, w)


@pytest.mark.parametrize("size", [1, 2])
def test_every_place_has_a_nibble_of_its_own(size: int) -> None:
    groups = layout.STEP // size // 4
    seen = set()
    for row in range(layout.ROWS):
        for group in range(groups):
            places = np.zeros((layout.ROWS, groups), np.uint8)
            places[row, group] = 15
            words = layout.metadata(places, size)
            at = np.flatnonzero(words)
            assert len(at) == 1
            seen.add((int(at[0]), int(words[at[0]])))
            np.testing.assert_array_equal(layout.places_of(words, size), places)
    assert len(seen) == layout.ROWS * groups == 8 * 256 // size


def test_places_ascend_whatever_is_kept() -> None:
    for bits in range(16):
        w = np.array([[bits >> i & 1 for i in range(4)]], np.int8)
        if bin(bits).count("1") > 2:
            with pytest.raises(ValueError, match="more than two of four"):
                layout.compressed(w)
            continue
        values, places = layout.compressed(w)
        assert places[0, 0] & 3 < places[0, 0] >> 2
        np.testing.assert_array_equal(layout.expanded(values, places), w)


def test_metadata_that_do_not_ascend_are_an_error() -> None:
    packed = layout.pack(np.zeros((64, 128), np.int8), 64, True)
    packed[..., -1] = 0
    with pytest.raises(ValueError, match="do not ascend"):
        layout.unpack(packed, 64, True, (64, 128), np.dtype(np.int8))


def test_eight_rows_of_one_unit_lie_in_all_banks() -> None:
    for pitch in (64, 128):
        places = {(row * pitch + 16 * layout.swizzle(row, 1, pitch)) % 128 for row in range(8)}
        assert len(places) == 8
