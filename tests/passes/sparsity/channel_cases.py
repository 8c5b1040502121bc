"""Graphs with every kind of coupling, random moves and removals of channels, and what both must leave unchanged."""

from __future__ import annotations

import textwrap
from functools import lru_cache
from typing import Any

import numpy as np

import bitwright as bw
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.weights import Weights
from bitwright.passes import run_pipeline
from bitwright.passes._spec import parse_passes
from bitwright.passes.pipelines import CANONICAL
from bitwright.passes.sparsity._channels import Coupling
from tests.conftest import random_inputs, read_graph
from tests.zoo import ZOO

Array = np.ndarray[Any, Any]

BODIES = {
    "flatten": (
        "%x: f32[2, 3, 4, 4]",
        """
          %w = weight {ref="w"} : f32[8, 3, 3, 3]
          %b = weight {ref="b"} : f32[8]
          %v = weight {ref="v"} : f32[5, 32]
          %h = conv(%x, %w, %b) : f32[2, 8, 2, 2]
          %r = relu(%h) : f32[2, 8, 2, 2]
          %f = reshape(%r) {shape=[2, 32]} : f32[2, 32]
          %y = linear(%f, %v) : f32[2, 5]
        """,
    ),
    "residual": (
        "%x: f32[2, 3, 4, 4]",
        """
          %w = weight {ref="w"} : f32[8, 3, 1, 1]
          %a = conv(%x, %w) : f32[2, 8, 4, 4]
          %v = weight {ref="v"} : f32[8, 8, 1, 1]
          %t = relu(%a) : f32[2, 8, 4, 4]
          %b = conv(%t, %v) : f32[2, 8, 4, 4]
          %s = add(%a, %b) : f32[2, 8, 4, 4]
          %g = weight {ref="g"} : f32[8]
          %m = weight {ref="m"} : f32[8]
          %q = weight {ref="q"} : f32[8]
          %n = batch_norm(%s, %g, %m, %m, %q) {eps=9.0} : f32[2, 8, 4, 4]
          %p = max_pool(%n) {kernel=[2, 2], stride=[2, 2]} : f32[2, 8, 2, 2]
          %c = weight {ref="c"} : f32[1, 8, 1, 1]
          %k = mul(%p, %c) : f32[2, 8, 2, 2]
          %e = reduce_mean(%k) {axes=[2, 3]} : f32[2, 8]
          %f = weight {ref="f"} : f32[3, 8]
          %y = linear(%e, %f) : f32[2, 3]
        """,
    ),
    "concat": (
        "%x: f32[2, 3, 4, 4]",
        """
          %w = weight {ref="w"} : f32[6, 3, 1, 1]
          %a = conv(%x, %w) : f32[2, 6, 4, 4]
          %v = weight {ref="v"} : f32[7, 6, 1, 1]
          %t = tanh(%a) : f32[2, 6, 4, 4]
          %b = conv(%t, %v) : f32[2, 7, 4, 4]
          %c = concat(%x, %a, %b) {axis=1} : f32[2, 16, 4, 4]
          %u = weight {ref="u"} : f32[4, 16, 3, 3]
          %d = conv(%c, %u) : f32[2, 4, 2, 2]
          %s = slice(%c) {axis=1, start=1, stop=11} : f32[2, 10, 4, 4]
          %z = weight {ref="z"} : f32[4, 10, 3, 3]
          %e = conv(%s, %z) : f32[2, 4, 2, 2]
          %y = add(%d, %e) : f32[2, 4, 2, 2]
        """,
    ),
    "depthwise": (
        "%x: f32[2, 3, 5, 5]",
        """
          %w = weight {ref="w"} : f32[8, 3, 1, 1]
          %a = conv(%x, %w) : f32[2, 8, 5, 5]
          %d = weight {ref="d"} : f32[8, 1, 3, 3]
          %b = weight {ref="b"} : f32[8]
          %h = conv(%a, %d, %b) {groups=8} : f32[2, 8, 3, 3]
          %m = weight {ref="m"} : f32[16, 1, 3, 3]
          %k = weight {ref="k"} : f32[16]
          %i = conv(%h, %m, %k) {groups=8} : f32[2, 16, 1, 1]
          %v = weight {ref="v"} : f32[3, 16, 1, 1]
          %y = conv(%i, %v) : f32[2, 3, 1, 1]
        """,
    ),
    "grouped": (
        "%x: f32[2, 3, 4, 4]",
        """
          %w = weight {ref="w"} : f32[8, 3, 1, 1]
          %a = conv(%x, %w) : f32[2, 8, 4, 4]
          %d = weight {ref="d"} : f32[8, 4, 1, 1]
          %b = weight {ref="b"} : f32[8]
          %h = conv(%a, %d, %b) {groups=2} : f32[2, 8, 4, 4]
          %v = weight {ref="v"} : f32[3, 8, 1, 1]
          %y = conv(%h, %v) : f32[2, 3, 4, 4]
        """,
    ),
    "shuffle": (
        "%x: f32[2, 3, 4, 4]",
        """
          %w = weight {ref="w"} : f32[8, 3, 1, 1]
          %a = conv(%x, %w) : f32[2, 8, 4, 4]
          %s = reshape(%a) {shape=[2, 2, 4, 4, 4]} : f32[2, 2, 4, 4, 4]
          %t = transpose(%s) {perm=[0, 2, 1, 3, 4]} : f32[2, 4, 2, 4, 4]
          %u = reshape(%t) {shape=[2, 8, 4, 4]} : f32[2, 8, 4, 4]
          %v = weight {ref="v"} : f32[3, 8, 1, 1]
          %y = conv(%u, %v) : f32[2, 3, 4, 4]
        """,
    ),
    "norms": (
        "%x: f32[2, 3, 4, 4]",
        """
          %w = weight {ref="w"} : f32[8, 3, 1, 1]
          %a = conv(%x, %w) : f32[2, 8, 4, 4]
          %s = weight {ref="s"} : f32[8]
          %b = weight {ref="b"} : f32[8]
          %g = group_norm(%a, %s, %b) {groups=2} : f32[2, 8, 4, 4]
          %d = conv_transpose(%g, %e) {stride=[2, 2]} : f32[2, 6, 8, 8]
          %t = transpose(%d) {perm=[0, 2, 3, 1]} : f32[2, 8, 8, 6]
          %q = weight {ref="q"} : f32[6]
          %l = layer_norm(%t, %q, %q) : f32[2, 8, 8, 6]
          %f = weight {ref="f"} : f32[8, 6]
          %h = linear(%l, %f) : f32[2, 8, 8, 8]
          %p = softmax(%h) : f32[2, 8, 8, 8]
          %r = rms_norm(%p) : f32[2, 8, 8, 8]
          %v = weight {ref="v"} : f32[3, 8]
          %y = linear(%r, %v) : f32[2, 8, 8, 3]
        """,
    ),
    "glu": (
        "%x: f32[2, 3]",
        """
          %w = weight {ref="w"} : f32[16, 3]
          %b = weight {ref="b"} : f32[16]
          %a = linear(%x, %w, %b) : f32[2, 16]
          %g = slice(%a) {axis=1, stop=8} : f32[2, 8]
          %u = slice(%a) {axis=1, start=8, stop=16} : f32[2, 8]
          %s = silu(%g) : f32[2, 8]
          %m = mul(%s, %u) : f32[2, 8]
          %v = weight {ref="v"} : f32[3, 8]
          %y = linear(%m, %v) : f32[2, 3]
        """,
    ),
    "mirror": (
        "%x: f32[2, 3]",
        """
          %w = weight {ref="w"} : f32[8, 3]
          %a = linear(%x, %w) : f32[2, 8]
          %f = flip(%a) {axes=[1]} : f32[2, 8]
          %s = add(%a, %f) : f32[2, 8]
          %i = slice(%s) {axis=1, start=2, stop=8} : f32[2, 6]
          %v = weight {ref="v"} : f32[3, 6]
          %y = linear(%i, %v) : f32[2, 3]
        """,
    ),
    "tied": (
        "%x: f32[2, 8], %t: s64[2]",
        """
          %w = weight {ref="w"} : f32[8, 8]
          %a = linear(%x, %w) : f32[2, 8]
          %r = relu(%a) : f32[2, 8]
          %b = linear(%r, %w) : f32[2, 8]
          %e = weight {ref="e"} : f32[5, 8]
          %g = gather(%e, %t) : f32[2, 8]
          %u = weight {ref="u"} : f32[8, 8]
          %h = linear(%g, %u) : f32[2, 8]
          %i = relu(%h) : f32[2, 8]
          %j = linear(%i, %u) : f32[2, 8]
          %m = add(%j, %g) : f32[2, 8]
          %k = linear(%m, %e) : f32[2, 5]
          %v = weight {ref="v"} : f32[5, 8]
          %n = linear(%b, %v) : f32[2, 5]
          %y = add(%k, %n) : f32[2, 5]
        """,
    ),
    "spelled": (
        "%x: f32[2, 5, 3]",
        """
          %wq = weight {ref="wq"} : f32[8, 3]
          %wv = weight {ref="wv"} : f32[8, 3]
          %q = linear(%x, %wq) : f32[2, 5, 8]
          %v = linear(%x, %wv) : f32[2, 5, 8]
          %qs = reshape(%q) {shape=[2, 5, 2, 4]} : f32[2, 5, 2, 4]
          %vs = reshape(%v) {shape=[2, 5, 2, 4]} : f32[2, 5, 2, 4]
          %qt = transpose(%qs) {perm=[0, 2, 1, 3]} : f32[2, 2, 5, 4]
          %vt = transpose(%vs) {perm=[0, 2, 1, 3]} : f32[2, 2, 5, 4]
          %mask = weight {ref="mask"} : f32[2, 5, 5]
          %s = matmul(%qt, %qt) {transpose_b=true} : f32[2, 2, 5, 5]
          %m = add(%s, %mask) : f32[2, 2, 5, 5]
          %p = softmax(%m) {axis=3} : f32[2, 2, 5, 5]
          %a = matmul(%p, %vt) : f32[2, 2, 5, 4]
          %at = transpose(%a) {perm=[0, 2, 1, 3]} : f32[2, 5, 2, 4]
          %as = reshape(%at) {shape=[2, 5, 8]} : f32[2, 5, 8]
          %wo = weight {ref="wo"} : f32[3, 8]
          %y = linear(%as, %wo) : f32[2, 5, 3]
        """,
    ),
    "heads": (
        "%x: f32[2, 5, 3]",
        """
          %wq = weight {ref="wq"} : f32[16, 3]
          %wk = weight {ref="wk"} : f32[8, 3]
          %wv = weight {ref="wv"} : f32[8, 3]
          %bv = weight {ref="bv"} : f32[8]
          %q = linear(%x, %wq) : f32[2, 5, 16]
          %k = linear(%x, %wk) : f32[2, 5, 8]
          %v = linear(%x, %wv, %bv) : f32[2, 5, 8]
          %qs = reshape(%q) {shape=[2, 5, 4, 4]} : f32[2, 5, 4, 4]
          %ks = reshape(%k) {shape=[2, 5, 2, 4]} : f32[2, 5, 2, 4]
          %vs = reshape(%v) {shape=[2, 5, 2, 4]} : f32[2, 5, 2, 4]
          %qt = transpose(%qs) {perm=[0, 2, 1, 3]} : f32[2, 4, 5, 4]
          %kt = transpose(%ks) {perm=[0, 2, 1, 3]} : f32[2, 2, 5, 4]
          %vt = transpose(%vs) {perm=[0, 2, 1, 3]} : f32[2, 2, 5, 4]
          %cos = weight {ref="cos"} : f32[1, 1, 5, 4]
          %qr = mul(%qt, %cos) : f32[2, 4, 5, 4]
          %mask = weight {ref="mask"} : f32[1, 4, 5, 5]
          %a = attention(%qr, %kt, %vt, %mask) {scale=0.5, kv_groups=2} : f32[2, 4, 5, 4]
          %at = transpose(%a) {perm=[0, 2, 1, 3]} : f32[2, 5, 4, 4]
          %as = reshape(%at) {shape=[2, 5, 16]} : f32[2, 5, 16]
          %wo = weight {ref="wo"} : f32[3, 16]
          %y = linear(%as, %wo) : f32[2, 5, 3]
        """,
    ),
}  # fmt: skip


def case(name: str) -> Graph:
    """One of the graphs above, with random weights."""
    inputs, body = BODIES[name]
    if name == "norms":
        body = '\n          %e = weight {ref="e"} : f32[8, 6, 2, 2]' + body
    body = textwrap.dedent(body).strip()
    return read_graph(f"graph @g ({inputs}) -> (y = %y) level=graph {{\n{textwrap.indent(body, '  ')}\n}}")


@lru_cache(maxsize=16)
def model(name: str) -> Graph:
    """A tiny model of the zoo, canonical, its weights redrawn so that no bias is zero and no scale one."""
    module, inputs = ZOO[name]()
    graph, _ = run_pipeline(bw.capture(module, inputs), parse_passes(CANONICAL))
    rng = np.random.default_rng(0)
    new = {
        k: (h.array + 0.05 * rng.standard_normal(h.array.shape)).astype(h.array.dtype)
        for k, h in sorted(graph.weights.items())
        if h.array.dtype.kind == "f"
    }
    return Graph(
        graph.name, graph.inputs, graph.nodes, graph.outputs, graph.output_names,
        Weights({**graph.weights, **new}), graph.level,
    )  # fmt: skip


def moves(coupling: Coupling, seed: int = 0) -> Array:
    """A random exchange within every group of at least two."""
    rng, to = np.random.default_rng(seed), np.arange(len(coupling.root))
    for g in coupling.groups:
        drawn = rng.permutation(g.channels)
        to[g.channels] = np.roll(drawn, 1) if np.array_equal(drawn, g.channels) else drawn
    return to


def removal(coupling: Coupling, seed: int = 0) -> Array:
    """Flags that drop about half of every group, never all of it."""
    rng, keep = np.random.default_rng(seed), np.ones(len(coupling.root), np.bool_)
    for g in coupling.groups:
        keep[rng.permutation(g.channels)[: len(g.channels) // 2]] = False
    return keep


def silenced(coupling: Coupling, keep: Array) -> dict[str, Array]:
    """Weights that read channels, zero where they would read one that goes: the original that pruning must equal."""
    out: dict[str, Array] = {}
    for u in coupling.uses:
        if u.role == "in":
            w = out.setdefault(u.const, np.array(coupling.graph.constant(u.const)))
            np.moveaxis(w, u.axes[0], 0)[~keep[coupling.channels(u.label)]] = 0
    return out


def apart(a: Graph, b: Graph, weights: dict[str, Array] | None = None) -> float:
    """Largest difference of an output, over its largest entry, with some weights of ``a`` replaced."""
    x = random_inputs(a)
    worst = 0.0
    for y, z in zip(evaluate(a, x, overrides=weights), evaluate(b, x), strict=True):
        largest = float(y.abs().max())
        worst = max(worst, float((y - z).abs().max()) / (largest or 1.0))
    return worst
