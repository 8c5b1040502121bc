"""Where a kernel reads its activations: the input itself or a padded copy of it, and the first one of every row."""

from __future__ import annotations

from math import ceil

from bitwright.codegen.tvm.contract.nest import Nest
from bitwright.codegen.tvm.contract.padding import emit_padded, padded_elements
from bitwright.codegen.tvm.contract.spec import ContractSpec, Conv, Image, Matrix, image_of
from bitwright.codegen.tvm.contract.tile import LINE
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, choose, minimum, width


def image_bytes(spec: ContractSpec) -> int:
    """Scratch that the padded copy of a convolution's input takes, whole cache lines; 0 if none is made."""
    g = spec.geometry
    if not isinstance(g, Conv) or not image_of(g).copied:
        return 0
    return ceil((padded_elements(g, image_of(g)) * width(spec.input_dtype) + 64) / LINE) * LINE


def emit_image(b: Builder, spec: ContractSpec, nest: Nest, memory: Pointer | None, x: Pointer) -> Pointer:
    """The activations that tasks [begin, end) read: ``x``, or its padded copy made at the start of ``memory``."""
    g = spec.geometry
    if not isinstance(g, Conv) or not image_of(g).copied or memory is None:
        return x
    padded = b.view(memory, spec.input_dtype)
    first, last = _rows_needed(b, g, image_of(g), nest)
    emit_padded(b, g, image_of(g), x, padded, spec.pad_value, first, last)
    return padded


def _rows_needed(b: Builder, conv: Conv, image: Image, nest: Nest) -> tuple[Index, Index]:
    """The padded rows that tasks [begin, end) read: part of the images if they share one panel, else all."""
    everything, (oh, ow) = conv.batch * image.height, conv.output
    if nest.blocks == 1:
        return 0, everything
    if nest.panels:
        whole, begin, final = False, b.index(b.begin // nest.panels), b.index((b.end - 1) // nest.panels)
    else:
        whole = b.begin // nest.blocks != (b.end - 1) // nest.blocks
        begin, final = b.begin % nest.blocks, (b.end - 1) % nest.blocks

    def padded_row(flat: Index) -> Index:
        return flat // (oh * ow) * image.height + flat % (oh * ow) // ow * conv.stride[0]

    step = nest.per_block * nest.tile
    first = padded_row(begin * step)
    span = (conv.kernel[0] - 1) * conv.dilation[0] + 1
    flat = choose(final == nest.blocks - 1, nest.rows - 1, (final + 1) * step - 1)
    last = padded_row(b.index(minimum(flat, nest.rows - 1))) + span
    return b.index(choose(whole, 0, first)), b.index(choose(whole, everything, last))


def row_bases(b: Builder, spec: ContractSpec, tile: int, group: Index, row: Index, rows: int) -> list[Index]:
    """First activation of each of ``rows`` output rows from ``row`` on, a multiple of ``tile``."""
    g = spec.geometry
    if isinstance(g, Matrix):
        base = b.index(row * g.depth)
        return [base + i * g.depth for i in range(rows)]
    image, (oh, ow) = image_of(g), g.output
    shift = group * (g.channels // g.groups)
    down, across = g.stride[0] * image.width * g.channels, g.stride[1] * g.channels
    if down == ow * across and (g.batch == 1 or image.height * image.width * g.channels == oh * down):
        base = b.index(row * across + shift)
        return [base + i * across for i in range(rows)]

    def base_of(flat: Index) -> Index:
        n, y, x = flat // (oh * ow), flat % (oh * ow) // ow, flat % ow
        return b.index(n * (image.height * image.width * g.channels) + y * down + x * across + shift)

    if ow % tile == 0:
        base = base_of(row)
        return [base + i * across for i in range(rows)]
    return [base_of(row + i) for i in range(rows)]
