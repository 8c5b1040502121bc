"""How ``wgmma`` wants its operands in shared memory, and weights packed so: swizzled tiles, 2:4 values and metadata.

A k-step is 128 bytes of a row of activations. Dense weights take 128 bytes of it, too; 2:4 weights 64 bytes of values
and their metadata words in the order in which threads read them. All of one tile of outputs and one k-step is
contiguous: one bulk copy fetches it.
"""

from __future__ import annotations

import numpy as np

from bitwright.ir.weights import Array

STEP = 128
"""Bytes of a row of activations in a k-step."""
ROWS = 64
"""Rows of A of one instruction."""


def swizzle(row: int, unit: int, pitch: int) -> int:
    """Where 16-byte unit ``unit`` of a row lies among the units of its row of ``pitch`` (16, 32, 64, 128) bytes.

    >>> [swizzle(3, u, 128) for u in range(8)], [swizzle(3, u, 64) for u in range(4)]
    ([3, 2, 1, 0, 7, 6, 5, 4], [1, 0, 3, 2])
    """
    return unit ^ ((row * pitch >> 7) & (pitch // 16 - 1))


def swizzled(rows: Array) -> Array:
    """``rows`` (.., r, pitch) bytes with the units of every row in their places; applied again, it undoes itself."""
    count, pitch = rows.shape[-2:]
    units = rows.reshape(*rows.shape[:-1], pitch // 16, 16)
    place = np.array([[swizzle(r, u, pitch) for u in range(pitch // 16)] for r in range(count)])
    index = place.reshape((1,) * (units.ndim - 3) + (*place.shape, 1))  # its own inverse
    moved: Array = np.take_along_axis(units, index, axis=-2)
    return moved.reshape(rows.shape)


def compressed(weight: Array) -> tuple[Array, Array]:
    """2:4 rows (.., K), K a multiple of 4: values (.., K / 2), and the places of pairs, first + 4 second, (.., K / 4).

    Places ascend. Groups with fewer than two non-zeros keep zeros, too: the first free places.
    """
    groups = weight.reshape(*weight.shape[:-1], -1, 4)
    nonzero = np.asarray(groups, np.float32 if groups.dtype.itemsize == 2 else groups.dtype) != 0
    if groups.dtype == np.uint16:
        nonzero = (groups & 0x7FFF) != 0
    if (nonzero.sum(-1) > 2).any():
        raise ValueError("more than two of four weights are not zero")
    two = np.sort(np.argsort(~nonzero, axis=-1, kind="stable")[..., :2], axis=-1)
    values: Array = np.take_along_axis(groups, two, axis=-1).reshape(*weight.shape[:-1], -1)
    return values, (two[..., 0] | two[..., 1] << 2).astype(np.uint8)


def expanded(values: Array, places: Array) -> Array:
    """The inverse of :func:`compressed`."""
    pairs = values.reshape(*places.shape, 2)
    out: Array = np.zeros((*places.shape, 4), values.dtype)
    np.put_along_axis(out, (places & 3)[..., None].astype(np.int64), pairs[..., :1], axis=-1)
    np.put_along_axis(out, (places >> 2)[..., None].astype(np.int64), pairs[..., 1:], axis=-1)
    return out.reshape(*places.shape[:-1], -1)


def _word_places(size: int) -> tuple[Array, Array, Array, Array]:
    """Of each nibble of the words of 64 rows and a k-step: word, nibble in it, row, group (of four in the k-step)."""
    found = []
    for lane in range(128):
        row, j = lane // 32 * 16 + lane % 32 // 4, lane % 4
        for nibble in range(8):
            if size == 2:  # word of lane: the instruction of its half of the quad
                found.append((lane, nibble, row + nibble // 4 * 8, 8 * (j // 2) + 4 * (j % 2) + nibble % 4))
            else:
                for i in (0, 1):
                    found.append((128 * i + lane, nibble, row + 8 * (j % 2), 16 * i + 8 * (j // 2) + nibble))
    word, nibble, row, group = np.array(found).T
    return word, nibble, row, group


def metadata(places: Array, size: int) -> Array:
    """Words of metadata (.., 128 or 256) u32 of 64 rows and a k-step: ``places`` (.., 64, groups) u8; see hopper.h."""
    word, nibble, row, group = _word_places(size)
    out: Array = np.zeros((*places.shape[:-2], 256 // size), np.uint32)
    for n in range(8):
        at = nibble == n
        out[..., word[at]] |= places[..., row[at], group[at]].astype(np.uint32) << np.uint32(4 * n)
    return out


def places_of(words: Array, size: int) -> Array:
    """The inverse of :func:`metadata`."""
    word, nibble, row, group = _word_places(size)
    out: Array = np.zeros((*words.shape[:-1], ROWS, STEP // size // 4), np.uint8)
    out[..., row, group] = (words[..., word] >> (4 * nibble).astype(np.uint32)) & 15
    return out


def blob_bytes(tile: int, size: int, sparse: bool) -> int:
    """Bytes of the packed weights of one tile and one k-step."""
    return tile * STEP if not sparse else tile * STEP // 2 + tile // ROWS * (256 // size) * 4


def pack(weight: Array, tile: int, sparse: bool) -> Array:
    """``weight`` (O, K) of 1 or 2 bytes an element: bytes (tiles, steps, :func:`blob_bytes`); zeros fill the edges."""
    size = weight.dtype.itemsize
    elements = STEP // size
    outs, steps = -(-weight.shape[0] // tile), -(-weight.shape[1] // elements)
    full: Array = np.zeros((outs * tile, steps * elements), weight.dtype)
    full[: weight.shape[0], : weight.shape[1]] = weight
    cut = np.ascontiguousarray(full.reshape(outs, tile, steps, elements).swapaxes(1, 2))
    if not sparse:
        return swizzled(cut.view(np.uint8)).reshape(outs, steps, -1)
    values, places = compressed(cut)
    bytes_ = swizzled(np.ascontiguousarray(values).view(np.uint8)).reshape(outs, steps, -1)
    words = metadata(places.reshape(outs, steps, tile // ROWS, ROWS, -1), size)
    return np.concatenate([bytes_, words.view(np.uint8).reshape(outs, steps, -1)], axis=-1)


def unpack(packed: Array, tile: int, sparse: bool, shape: tuple[int, int], dtype: np.dtype[np.generic]) -> Array:
    """The weights again. Places that repeat or do not ascend are an error."""
    outs, steps = packed.shape[:2]
    row = STEP // 2 if sparse else STEP
    body = swizzled(np.ascontiguousarray(packed[..., : tile * row]).reshape(outs, steps, tile, row)).view(dtype)
    if sparse:
        words = np.ascontiguousarray(packed[..., tile * row :]).view(np.uint32)
        places = places_of(words.reshape(outs, steps, tile // ROWS, -1), dtype.itemsize)
        places = places.reshape(outs, steps, tile, -1)
        if ((places & 3) >= (places >> 2)).any():
            raise ValueError("metadata whose places do not ascend")
        body = expanded(body, places)
    flat = body.swapaxes(1, 2).reshape(outs * tile, -1)
    return np.ascontiguousarray(flat[: shape[0], : shape[1]])
