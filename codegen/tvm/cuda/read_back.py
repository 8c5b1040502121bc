"""Weights packed for tensor cores read back from a program's bytes, to prove what its certificates say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitwright.codegen.cuda.fragments import expand, from_fragments, places_of
from bitwright.codegen.tvm.cuda import wgmma_layout
from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.weights import Array


def layout_of(root: Node, config: Any) -> dict[str, Any]:
    """How :func:`unpacked` reads the weights of a contraction that a configuration of ``mma`` or ``wgmma`` packed."""
    p = config.product
    order = "rows"
    if isinstance(root.op, ops.IntConv):
        order = "taps"  # channels behind the taps
    elif isinstance(root.op, ops.IntMatMul) and not root.op.transpose_b:
        order = "columns"
    told = {"order": order, "batch": p.batch, "outs": p.outs, "sparse": p.sparse, "size": p.size}
    told["signed"] = not p.element.startswith("u8")
    if hasattr(config, "cut"):
        cut = config.cut
        whole = [cut.tiles(p)[0] * cut.outs, cut.steps(p) * wgmma_layout.STEP // p.size]
        return told | {"form": "wgmma", "tile": cut.outs, "whole": whole}
    t = config.tile
    rows, turns = -(-p.outs // t.outs) * t.outs, t.turns(p) * t.depth
    return told | {"form": "mma", "whole": [rows, turns // (1 + p.sparse)]}


def unpacked(layout: Mapping[str, Any], packed: list[Array], shape: tuple[int, ...]) -> Array:
    """The weights of ``shape``; ``packed``: flat arrays in the order of packing."""
    batch, outs, sparse, size = (layout[k] for k in ("batch", "outs", "sparse", "size"))
    rows, columns = layout["whole"]
    kind = np.dtype(np.int8 if layout["signed"] else np.uint8)
    found = []
    for i, part in enumerate(packed[0].reshape(batch, -1)):
        if layout["form"] == "wgmma":
            tiles, row = rows // layout["tile"], wgmma_layout.STEP // size
            whole = part.view(np.uint8).reshape(tiles, columns // row, -1)
            each = wgmma_layout.unpack(whole, layout["tile"], sparse, (rows, columns), kind)
        else:
            each = from_fragments(part.view(np.uint8).reshape(rows // 16, columns // 32, 32, 16))
            if sparse:
                places = packed[1].reshape(batch, -1)[i]
                each = expand(each, places_of(places.reshape(rows // 64, columns // 32, 32, 4), size))
        found.append(each[:outs].view(kind))
    length = int(np.prod(shape)) // (batch * outs)
    w = np.stack([each[:, :length] for each in found])
    if layout["order"] == "taps":
        return np.moveaxis(w.reshape(shape[0], *shape[2:], shape[1]), -1, 1)
    if layout["order"] == "columns":
        return np.swapaxes(w.reshape(*shape[:-2], shape[-1], shape[-2]), -1, -2)
    return w.reshape(shape)
