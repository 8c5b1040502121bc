"""Weights, places, scales and zero points in the order in which lanes load them, and back."""

from __future__ import annotations

import numpy as np

from bitwright.codegen.tvm.cuda.lowbit.spec import CHUNK, TILE, LowbitSpec, place_of
from bitwright.ir.weights import Array

QUADS = CHUNK // 4


def order(spec: LowbitSpec) -> Array:
    """The input that stands at each physical place of a chunk, s64[64]."""
    at = [place_of(spec.piece, p // 4, p % 4) + e for p in range(QUADS) for e in range(4)]
    return np.array(at)


def pack(spec: LowbitSpec, codes: Array) -> Array:
    """Centred codes s8[outputs, depth] to u32[weight_words]."""
    physical = _physical(spec, codes)
    if spec.kept[0]:
        return _pack_places(spec, physical)
    if not spec.sparse:
        registers = _fragments(physical.reshape(*physical.shape[:3], CHUNK))
        return _streams(spec, registers, None)
    kept, places = compress(physical.reshape(*physical.shape[:3], QUADS, 4))
    return _streams(spec, _fragments(kept.reshape(*kept.shape[:3], CHUNK // 2)), _metadata(places))


def unpack(spec: LowbitSpec, words: Array) -> Array:
    """The codes out of what :func:`pack` made."""
    lines = _unpack_places(spec, words) if spec.kept[0] else _unpack_registers(spec, words)
    natural = np.empty_like(lines)
    natural[..., order(spec)] = lines
    whole = natural.transpose(0, 2, 1, 3).reshape(spec.tiles * TILE, -1)
    return whole[: spec.outputs, : spec.depth]


def _unpack_registers(spec: LowbitSpec, words: Array) -> Array:
    """[tiles, chunks, 16, 64] in the order of the instruction."""
    registers, meta = _split(spec, words)
    shape = (spec.tiles, spec.spans * spec.chunks, TILE)
    lines = _lines(registers, spec.spans * spec.chunks)
    if not spec.sparse:
        return lines
    assert meta is not None
    return expand(lines.reshape(*shape, QUADS, 2), _places(meta, shape)).reshape(*shape, CHUNK)


def _pack_places(spec: LowbitSpec, physical: Array) -> Array:
    """Values and places of a pattern: a lane has the groups of its output's 16 consecutive inputs, of both outputs."""
    n, m = spec.kept
    tiles, chunks = physical.shape[:2]
    lanes = physical.reshape(tiles, chunks, 2, 8, 4, 4, 4).swapaxes(4, 5)  # half of rows, g, t, register, byte
    groups = lanes.reshape(tiles, chunks, 2, 8, 4, 16 // m, m)
    first = np.argsort(groups == 0, axis=-1, kind="stable")[..., :n]
    values = np.take_along_axis(groups, first, -1)
    parts = []
    for part, bits in ((values.view(np.uint8), spec.bits), (first.astype(np.uint8), spec.place_bits)):
        by_lane = part.transpose(0, 1, 2, 5, 6, 3, 4).reshape(tiles, spec.spans, spec.values, 32)
        parts.append(_by_loads(_join(by_lane, bits)))
    return np.concatenate(parts, axis=2).reshape(-1)


def _unpack_places(spec: LowbitSpec, words: Array) -> Array:
    """The opposite of :func:`_pack_places`: [tiles, chunks, 16, 64] in the order of the instruction."""
    n, m = spec.kept
    values, places = (
        _cut(part, bits).reshape(spec.tiles, spec.spans * spec.chunks, 2, 16 // m, n, 8, 4)
        for part, bits in zip(_loads(spec, words), (spec.bits, spec.place_bits), strict=True)
    )
    signed = (values.astype(np.uint8) << spec.shift).view(np.int8) >> spec.shift
    out = np.zeros((*values.shape[:4], m, 8, 4), np.int8)
    np.put_along_axis(out, places[:, :, :, :, ::-1].astype(np.int64), signed[:, :, :, :, ::-1], 4)
    lanes = out.reshape(spec.tiles, spec.spans * spec.chunks, 2, 16, 8, 4).transpose(0, 1, 2, 4, 5, 3)
    cut = lanes.reshape(spec.tiles, spec.spans * spec.chunks, 2, 8, 4, 4, 4).swapaxes(4, 5)
    return np.ascontiguousarray(cut).reshape(spec.tiles, spec.spans * spec.chunks, TILE, CHUNK)


def _join(values: Array, bits: int) -> Array:
    """The lowest ``bits`` of values [tiles, spans, count, lanes], the first lowest: u32[tiles, spans, words, lanes]."""
    each = 32 // bits
    cut = (values & ((1 << bits) - 1)).astype(np.uint32).reshape(*values.shape[:2], -1, each, values.shape[3])
    joined: Array = np.bitwise_or.reduce(cut << (bits * np.arange(each, dtype=np.uint32)).reshape(-1, 1), axis=3)
    return joined


def _cut(words: Array, bits: int) -> Array:
    """The opposite of :func:`_join`."""
    shifts = (bits * np.arange(32 // bits, dtype=np.uint32)).reshape(-1, 1)
    cut = (words[:, :, :, None] >> shifts) & ((1 << bits) - 1)
    return cut.reshape(*words.shape[:2], -1, words.shape[3])


def _physical(spec: LowbitSpec, codes: Array) -> Array:
    """[tiles, chunks, 16, 64] in the order of the instruction, zeros where there is nothing."""
    whole = np.zeros((spec.tiles * TILE, spec.spans * spec.span), np.int8)
    whole[: spec.outputs, : spec.depth] = codes
    cut = whole.reshape(spec.tiles, TILE, -1, CHUNK).transpose(0, 2, 1, 3)
    return cut[..., order(spec)]


def compress(quads: Array) -> tuple[Array, Array]:
    """Codes [..., 4] of which at most two are not zero: those two, and their places ascending, u8[..., 2].

    Groups with fewer keep zeros beside what they have, so that both places always differ.
    """
    used = quads != 0
    first = np.where(used.any(-1), used.argmax(-1), 0)
    last = np.where(used.any(-1), 3 - used[..., ::-1].argmax(-1), 1)
    alone = first == last
    last = np.where(alone, np.where(first == 3, 3, first + 1), last)
    first = np.where(alone & (first == 3), 2, first)
    places = np.stack([first, last], -1).astype(np.uint8)
    return np.take_along_axis(quads, places.astype(np.int64), -1), places


def expand(kept: Array, places: Array) -> Array:
    """The opposite of :func:`compress`."""
    out = np.zeros((*kept.shape[:-1], 4), kept.dtype)
    np.put_along_axis(out, places.astype(np.int64), kept, -1)
    return out


def _fragments(lines: Array) -> Array:
    """[tiles, chunks, 16, k] to registers u8[tiles, chunks, k / 8, lanes, 4]: the left operand of the product."""
    tiles, chunks, _, k = lines.shape
    cut = lines.reshape(tiles, chunks, 2, 8, k // 32, 2, 4, 4)  # half of rows, g, step, half of k, t, byte
    registers = cut.transpose(0, 1, 4, 5, 2, 3, 6, 7)  # step, half of k, half of rows, lane
    return np.ascontiguousarray(registers).reshape(tiles, chunks, k // 8, 32, 4).view(np.uint8)


def _lines(registers: Array, chunks: int) -> Array:
    """The opposite of :func:`_fragments`, s8[tiles, chunks, 16, k]."""
    tiles = registers.shape[0]
    cut = registers.reshape(tiles, chunks, -1, 2, 2, 8, 4, 4)
    lines = np.ascontiguousarray(cut.transpose(0, 1, 4, 5, 2, 3, 6, 7))
    return lines.reshape(tiles, chunks, TILE, -1).view(np.int8)


def _metadata(places: Array) -> Array:
    """Places u8[tiles, chunks, 16, 16 groups, 2] to the word of each lane, u32[tiles, chunks, 32]."""
    fours = places[..., 0].astype(np.uint32) | places[..., 1].astype(np.uint32) << 2
    cut = fours.reshape(*fours.shape[:2], 2, 8, 2, 8)  # half of rows, g, half of k, group
    words = np.bitwise_or.reduce(cut << (4 * np.arange(8, dtype=np.uint32)), axis=-1)
    by_lane: Array = words.transpose(0, 1, 3, 4, 2).reshape(*fours.shape[:2], 32)
    return by_lane  # lane 4 g + 2 (half of k) + half of rows


def _places(meta: Array, shape: tuple[int, int, int]) -> Array:
    words = meta.reshape(*shape[:2], 8, 2, 2).transpose(0, 1, 4, 2, 3)
    fours = (words[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    fours = fours.reshape(*shape, QUADS)
    return np.stack([fours & 3, fours >> 2], -1).astype(np.uint8)


def _streams(spec: LowbitSpec, registers: Array, meta: Array | None) -> Array:
    """Registers of chunks as words of spans: [tile, span, stream, load, lane, word of the load]."""
    by_span = registers.reshape(spec.tiles, spec.spans, spec.registers, 32, 4)
    parts = [_squeeze(by_span >> (1 if spec.bits == 3 else 0), 2 if spec.bits == 3 else spec.bits)]
    if spec.bits == 3:
        parts.append(_squeeze(by_span, 1))
    if meta is not None:
        parts.append(meta.reshape(spec.tiles, spec.spans, spec.chunks, 32))
    return np.concatenate([_by_loads(p) for p in parts], axis=2).reshape(-1)


def _squeeze(registers: Array, bits: int) -> Array:
    """The lowest ``bits`` of every byte, 8 / bits registers a word, the first lowest: u32[tiles, spans, words, 32]."""
    each = 8 // bits
    cut = (registers & ((1 << bits) - 1)).reshape(*registers.shape[:2], -1, each, *registers.shape[3:])
    shifts = (bits * np.arange(each, dtype=np.uint8)).reshape(each, 1, 1)
    joined = np.bitwise_or.reduce(cut << shifts, axis=3).astype(np.uint8)
    return np.ascontiguousarray(joined).view(np.uint32)[..., 0]


def _by_loads(words: Array) -> Array:
    """[tiles, spans, words, lanes] in loads of up to four words: [tiles, spans, words * lanes]."""
    tiles, spans, count, lanes = words.shape
    each = min(count, 4)
    cut = words.reshape(tiles, spans, count // each, each, lanes).swapaxes(3, 4)
    return np.ascontiguousarray(cut).reshape(tiles, spans, count * lanes)


def _split(spec: LowbitSpec, words: Array) -> tuple[Array, Array | None]:
    """Registers u8[tiles, spans, registers, 32, 4] (signed codes) and metadata words out of the streams."""
    parts = _loads(spec, words)
    high = 2 if spec.bits == 3 else spec.bits
    codes = _spread(parts[0], high)
    if spec.bits == 3:
        codes = codes << 1 | _spread(parts[1], 1)
    signed = (codes << spec.shift).view(np.int8) >> spec.shift
    return signed.view(np.uint8), parts[-1] if spec.sparse else None


def _loads(spec: LowbitSpec, words: Array) -> list[Array]:
    """The streams out of the loads, u32[tiles, spans, words, lanes] each."""
    whole = words.reshape(spec.tiles, spec.spans, spec.span_words)
    parts, start = [], 0
    for count in spec.streams:
        each = min(count, 4)
        part = whole[:, :, start : start + 32 * count].reshape(spec.tiles, spec.spans, count // each, 32, each)
        parts.append(np.ascontiguousarray(part.swapaxes(3, 4)).reshape(spec.tiles, spec.spans, count, 32))
        start += 32 * count
    return parts


def _spread(words: Array, bits: int) -> Array:
    """The opposite of :func:`_squeeze`."""
    raw = np.ascontiguousarray(words)[..., None].view(np.uint8)
    shifts = (bits * np.arange(8 // bits, dtype=np.uint8)).reshape(-1, 1, 1)
    cut = (raw[:, :, :, None] >> shifts) & ((1 << bits) - 1)
    return cut.reshape(*raw.shape[:2], -1, *raw.shape[3:]).astype(np.uint8)


def pack_groups(spec: LowbitSpec, values: Array) -> Array:
    """Scales or zero points [outputs, groups] to [tiles, groups, 8, 2]: lane g loads those of outputs g and g + 8."""
    whole = np.zeros((spec.tiles * TILE, spec.groups), values.dtype)
    whole[: spec.outputs] = values
    cut = whole.reshape(spec.tiles, 2, 8, spec.groups).transpose(0, 3, 2, 1)
    return np.ascontiguousarray(cut).reshape(-1)


__all__ = ["compress", "expand", "order", "pack", "pack_groups", "unpack"]
