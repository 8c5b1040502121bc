"""The padded copy of the input images in scratch; a task range copies the rows it needs."""

from __future__ import annotations

from bitwright.codegen.tvm.contract.spec import Conv, Image
from bitwright.codegen.tvm.memory import copy, fill
from bitwright.codegen.tvm.tir import Builder, Index, Number, Pointer, both, either


def emit_padded(
    b: Builder, conv: Conv, image: Image, x: Pointer, out: Pointer, value: Number, first: Index, last: Index
) -> None:
    """Write rows ``first`` to ``last`` (exclusive) of the padded images, all images one after the other."""
    c, (top, left, _, _) = conv.channels, conv.padding
    inside = max(0, min(conv.width, image.width - left))
    pitch, before = image.width * c, min(left, image.width) * c
    with b.loop(last, first, name="row") as flat:
        here = b.index(flat * pitch)
        y = b.index(flat % image.height - top)
        with b.when(both(y >= 0, y < conv.height)):
            source = b.index((flat // image.height * conv.height + y) * (conv.width * c))
            fill(b, out, here, before, value)
            copy(b, x, source, out, here + before, inside * c)
            fill(b, out, here + before + inside * c, pitch - before - inside * c, value)
        with b.when(either(y < 0, y >= conv.height)):
            fill(b, out, here, pitch, value)


def padded_elements(conv: Conv, image: Image) -> int:
    """Elements of the padded copies of all images."""
    return conv.batch * image.height * image.width * conv.channels
