"""Reordering of channels, so that N:M masks keep more of every weight that reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._pass import Context, Pass
from bitwright.passes.sparsity._channel_edit import moved
from bitwright.passes.sparsity._channel_layers import Layer, layer_views, why_not
from bitwright.passes.sparsity._channels import Coupling, Ints, couple
from bitwright.passes.sparsity._permutation import Search, best_seats
from bitwright.passes.sparsity.masks import Pattern

TWO_OF_FOUR = Pattern(2, 4)


@dataclass
class _Layers:
    """The selected layers by weight, with what is to say about those that cannot gain."""

    by_weight: dict[str, Layer] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PermuteChannels(Pass):
    """Reorder channels, where they are made and wherever they are read, so that N:M masks keep more magnitude.

    The function stays what it was and nothing is permuted at run time. Channels that residual additions, shared
    weights or norms tie together move together, in the order best for all their readers. ``search``: exchange two
    channels at a time (``swap``), or also regroup two or three runs of ``group`` channels (``pairs``, ``triples``).
    Place it before the pass that masks, with the same ``pattern``.

    before:
        graph @g (%x: f32[2, 1]) -> (y = %y) level=graph {
          %w = constant {values=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]} : f32[8, 1]
          %v = constant {values=[1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]} : f32[1, 8]
          %h = linear(%x, %w) : f32[2, 8]
          %r = relu(%h) : f32[2, 8]
          %y = linear(%r, %v) : f32[2, 1]
        }
    after:
        graph @g (%x: f32[2, 1]) -> (y = %y) level=graph {
          %w.1 = constant {values=[5.0, 2.0, 6.0, 4.0, 1.0, 3.0, 7.0, 8.0]} : f32[8, 1]
          %h = linear(%x, %w.1) : f32[2, 8]
          %r = relu(%h) : f32[2, 8]
          %v.1 = constant {values=[0.5, 1.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.5]} : f32[1, 8]
          %y = linear(%r, %v.1) : f32[2, 1]
        }
    """

    name: ClassVar[str] = "permute-channels"
    pattern: Pattern = TWO_OF_FOUR
    only: str = "*"
    except_: str = ""
    search: Search = "swap"
    seed: int = 0

    def run(self, graph: Graph, context: Context) -> Graph:
        coupling = couple(graph, "permute")
        layers = self._layers(graph, coupling, context)
        to = np.arange(len(coupling.root), dtype=np.int64)
        for i, group in enumerate(coupling.groups):
            if context.progress is not None:
                context.progress(f"{self.name} {i + 1}/{len(coupling.groups)}", i / len(coupling.groups))
            if len(group.channels) < 2:
                continue
            readers = dict.fromkeys(u.const for u in group.uses if u.role == "in" and u.const in layers.by_weight)
            views = []
            for w in readers:
                found = layer_views(coupling, layers.by_weight[w], group.channels, to, self.pattern)
                if isinstance(found, str):
                    layers.refused[w] = found
                else:
                    views += found
            if views:
                at = best_seats(views, self.pattern.keep, search=self.search, seed=self.seed)
                to[group.channels[at.numpy()]] = group.channels
        self._report(graph, coupling, layers, to, context)
        return moved(coupling, to)

    def _layers(self, graph: Graph, coupling: Coupling, context: Context) -> _Layers:
        """Selected contractions whose weight a mask of this pattern fits."""
        out, read = _Layers(), {u.const: u.label for u in coupling.uses if u.role == "in"}
        wanted = [n for n in graph.nodes if isinstance(n.op, (ops.Linear, ops.Conv, ops.MatMul, ops.ConvTranspose))]
        wanted = [n for n in wanted if selected(self.only, self.except_, graph, n)]
        if not wanted:
            context.refuse(self.name, "model", f"only={self.only} except={self.except_} selects no contraction")
        for n in wanted:
            w = n.inputs[1]
            why = why_not(graph, n, self.pattern)
            if not why and w not in read:
                why = f"its input channels are made by no weight: {_maker(graph, n.inputs[0])}"
            elif not why and (reason := coupling.reason(read[w])):
                why = f"its input channels {reason}"
            if why:
                context.refuse(self.name, layer_of(graph, n), why)
            elif w not in out.by_weight:
                out.by_weight[w] = Layer(n, read[w])
        return out

    def _report(self, graph: Graph, coupling: Coupling, layers: _Layers, to: Ints, context: Context) -> None:
        for w, layer in layers.by_weight.items():
            place = layer_of(graph, layer.node)
            before, after, most = layer.kept(graph, coupling, to, self.pattern)
            if w in layers.refused:
                context.refuse(self.name, place, layers.refused[w])
                if after == before:
                    continue
            efficacy = (after - before) / (most - before) if most > before else 0.0
            facts = {"before": round(before, 4), "after": round(after, 4), "efficacy": round(efficacy, 3)}
            context.remark(self.name, place, pattern=str(self.pattern), **facts)


def _maker(graph: Graph, value: str) -> str:
    node = graph.producers.get(value)
    return f"they come from {node.op.spelling} (%{value})" if node is not None else f"they are input %{value}"
