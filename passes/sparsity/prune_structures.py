"""Structured pruning: channels and attention heads go, with everything that depends on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.passes._layers import layer_of, matches, selected
from bitwright.passes._pass import Context, Pass
from bitwright.passes.sparsity._channel_prune import Floats, Score, pruned, rounded, size, width, worth
from bitwright.passes.sparsity._channels import Coupling, Group, couple


@dataclass(frozen=True)
class PruneStructures(Pass):
    """Remove the weakest channels and attention heads, each with all weights and constants that depend on it.

    Channels that residual additions, depthwise convolutions or attention tie together go together; what remains
    computes as if the weights that read the removed channels were zero. ``ratio``: share that goes, of every group
    of coupled channels or (``global``) of all. ``multiple``: outputs are kept in multiples of this; ``auto`` takes
    the target's vector lanes. ``score``: norm of the weights that would go. ``only`` and ``except`` name the layers
    that make the channels.

    before:
        graph @g (%x: f32[2, 1]) -> (y = %y) level=graph {
          %w = constant {values=[3.0, 1.0, -2.0, 4.0]} : f32[4, 1]
          %b = constant {values=[0.5, 0.25, 0.75, 1.0]} : f32[4]
          %v = constant {values=[1.0, 1.0, 1.0, 1.0]} : f32[1, 4]
          %h = linear(%x, %w, %b) : f32[2, 4]
          %r = relu(%h) : f32[2, 4]
          %y = linear(%r, %v) : f32[2, 1]
        }
    after:
        graph @g (%x: f32[2, 1]) -> (y = %y) level=graph {
          %w.1 = constant {values=[3.0, -2.0, 4.0]} : f32[3, 1]
          %b.1 = constant {values=[0.5, 0.75, 1.0]} : f32[3]
          %h = linear(%x, %w.1, %b.1) : f32[2, 3]
          %r = relu(%h) : f32[2, 3]
          %v.1 = constant {values=[1.0, 1.0, 1.0]} : f32[1, 3]
          %y = linear(%r, %v.1) : f32[2, 1]
        }
    """

    name: ClassVar[str] = "prune-structures"
    lossy: ClassVar[bool] = True
    ratio: float = 0.25
    only: str = "*"
    except_: str = ""
    multiple: str = "auto"
    score: Score = "l2"
    global_: bool = False
    heads: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise InvalidInput(f"{self.name}: ratio is a share from 0 to below 1, not {self.ratio}")
        if self.multiple != "auto" and not (self.multiple.isdecimal() and int(self.multiple) >= 1):
            raise InvalidInput(f"{self.name}: multiple is auto or a positive number, not {self.multiple!r}")

    def run(self, graph: Graph, context: Context) -> Graph:
        coupling = couple(graph, "prune", self.heads)
        self._refuse_pinned(graph, coupling, context)
        groups = [g for g in coupling.groups if self._chosen(graph, g)]
        scores = [worth(coupling, g, self.score) for g in groups]
        keep = np.ones(len(coupling.root), np.bool_)
        for group, score, k in zip(groups, scores, self._kept(scores), strict=True):
            n = len(group.channels)
            kept = rounded(k, n, width(coupling, group), self.multiple, context.target)
            place = ", ".join(dict.fromkeys(layer_of(graph, u.node) for u in group.uses if u.role == "out"))
            if kept == n:
                why = "none" if k == n else f"{n - k}, and {self.multiple} is the multiple to keep"
                context.refuse(self.name, place, f"a share of {self.ratio} of its {n} channels is {why}")
                continue
            keep[group.channels[np.argsort(score, kind="stable")[: n - kept]]] = False
            context.remark(self.name, place, channels=n, kept=kept)
        if keep.all():
            return graph
        after = pruned(coupling, keep)
        (p0, m0), (p1, m1) = size(graph), size(after)
        context.remark(self.name, "model", parameters_before=p0, parameters=p1, macs_before=m0, macs=m1)
        return after

    def _kept(self, scores: list[Floats]) -> list[int]:
        """How many channels of each group the ratio leaves, before rounding; at least one."""
        if not self.global_:
            return [max(1, len(s) - int(len(s) * self.ratio + 1e-9)) for s in scores]
        if not scores:
            return []
        scaled = [s / (s.mean() or 1.0) for s in scores]  # groups of large weights are not better ones
        every = np.sort(np.concatenate(scaled), kind="stable")
        gone = int(len(every) * self.ratio + 1e-9)
        least = every[gone - 1] if gone else -np.inf
        return [max(1, int((s > least).sum())) for s in scaled]

    def _chosen(self, graph: Graph, group: Group) -> bool:
        """True when ``only`` names a layer that makes the channels, and ``except`` none."""
        made = [u.node for u in group.uses if u.role == "out"]
        return any(selected(self.only, "", graph, n) for n in made) and not (
            self.except_ and any(matches(self.except_, graph, n) for n in made)
        )

    def _refuse_pinned(self, graph: Graph, coupling: Coupling, context: Context) -> None:
        """Say of every selected layer why its output channels stay."""
        made = {u.node.output: u.label for u in coupling.uses if u.role == "out"}
        for n in graph.nodes:
            if not isinstance(n.op, (ops.Linear, ops.Conv, ops.ConvTranspose)) or _depthwise(graph, n):
                continue
            if not selected(self.only, self.except_, graph, n):
                continue
            label = made.get(n.output)
            if label is None and n.type.shape[-1 if isinstance(n.op, ops.Linear) else 1] == 1:
                continue
            grouped = "are made by a grouped convolution" if isinstance(n.op, ops.Conv) else "have a computed weight"
            why = grouped if label is None else coupling.reason(label)
            if why:
                context.refuse(self.name, layer_of(graph, n), f"its output channels {why}")


def _depthwise(graph: Graph, node: Node) -> bool:
    return isinstance(node.op, ops.Conv) and node.op.groups > 1 and graph.types[node.inputs[1]].shape[1] == 1
