"""Rules of simplify for attention: masks that say causal, key heads that are only repeated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import Dim
from bitwright.passes._match import array, made_by

NEVER = -1e30
"""A score this low (added or put in place) is minus infinity whatever the other scores are."""


def causal_mask(rw: Rewriter, node: Node) -> bool:
    """attention(q, k, v, lower triangle) = causal attention(q, k, v); a mask that hides nothing is dropped."""
    op, g = node.op, rw.graph
    if not isinstance(op, ops.Attention) or len(node.inputs) < 4:
        return False
    scores = (g.types[node.inputs[0]].shape[-2], g.types[node.inputs[1]].shape[-2])
    causal = is_triangle(g, node.inputs[3], scores)
    if not causal and not is_triangle(g, node.inputs[3], scores, full=True):
        return False
    rw.keep_as(node, replace(op, causal=op.causal or causal), rw.of(*node.inputs[:3]))
    return True


def is_triangle(graph: Graph, value: str, scores: tuple[Dim, ...], full: bool = False) -> bool:
    """True for a constant mask of the scores' size that hides what lies above the diagonal (``full``: nothing)."""
    a = array(graph, value)
    if a is None or a.shape[-2:] != scores or not a.size or (a.shape[-1] < 2 and not full):
        return False
    shown = a if a.dtype.kind == "b" else a == 0
    hidden = ~a if a.dtype.kind == "b" else a <= NEVER
    lower = np.ones(a.shape[-2:]) if full else np.tri(a.shape[-2], a.shape[-1])
    return bool((shown == (lower == 1)).all() and (hidden == (lower == 0)).all())


def shared_heads(rw: Rewriter, node: Node) -> bool:
    """attention(q, repeat(k), repeat(v)) = attention(q, k, v) with kv_groups; repeat is expand and reshape."""
    op = node.op
    assert isinstance(op, ops.Attention)
    key, value = _unrepeated(rw.graph, node.inputs[1]), _unrepeated(rw.graph, node.inputs[2])
    if key is None or value is None or key[1] != value[1] or op.kv_groups != 1:
        return False
    inner = [rw.graph.producers[v].inputs[0] for v in (key[0], value[0])]
    heads = [rw.graph.types[v].shape for v in inner]
    want = [rw.graph.types[v].shape for v in (key[0], value[0])]
    if any(h != (*w[:-3], *w[-2:]) for h, w in zip(heads, want, strict=True)):
        return False
    rw.keep_as(node, replace(op, kv_groups=key[1]), rw.of(node.inputs[0], *inner, *node.inputs[3:]))
    return True


def _unrepeated(graph: Graph, value: str) -> tuple[str, int] | None:
    """(value of shape [..., H, 1, S, D], count) behind reshape(expand(.)) to [..., H * count, S, D], or None."""
    view = made_by(graph, value, ops.Reshape)
    wide = made_by(graph, view.inputs[0], ops.Expand) if view is not None else None
    if view is None or wide is None or wide.type.rank != view.type.rank + 1 or view.type.rank < 3:
        return None
    thin = graph.types[wide.inputs[0]].shape
    count, heads = wide.type.shape[-3], wide.type.shape[-4]
    if (
        not isinstance(count, int)
        or not isinstance(heads, int)
        or thin != (*wide.type.shape[:-3], 1, *wide.type.shape[-2:])
    ):
        return None
    if view.type.shape != (*wide.type.shape[:-4], heads * count, *wide.type.shape[-2:]):
        return None
    return (wide.inputs[0], count) if made_by(graph, wide.inputs[0], ops.Reshape) is not None else None
