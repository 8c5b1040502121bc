"""Cross-layer weight equalization: ranges of neighbouring layers' channels meet in the middle, the function stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._match import array
from bitwright.passes._norms import Norm, channels_divided, known_norms
from bitwright.passes._pass import Context, Pass
from bitwright.passes.precision._equalize import Group, Layer, absorbed, solve, spread
from bitwright.passes.precision._follow import bound, follow
from bitwright.passes.precision._rescale import rescale, why_not_scaled


@dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Scale channels between layers until the weights on either side reach equally far (Nagel et al. 2019).

    Output channel i of a layer is divided by s_i = sqrt(r1_i / r2_i), r1 and r2 being the largest magnitudes of the
    weights that make and that read it, and its readers' weights are multiplied; over the whole model until nothing
    moves. Zeros stay zeros. A scale passes relu, pools, layout and attention's values; a clamp gets a bound by
    channel. ``absorb`` also moves what a batch norm says a channel never falls below (beta - 3 gamma) from the bias
    into the readers' bias: exact but for values below it.

    before:
        graph @g (%x: f32[1, 1]) -> (y = %y) level=graph {
          %w = constant {values=[8.0, 2.0]} : f32[2, 1]
          %v = constant {values=[2.0, 8.0]} : f32[1, 2]
          %h = linear(%x, %w) : f32[1, 2]
          %r = relu(%h) : f32[1, 2]
          %y = linear(%r, %v) : f32[1, 1]
        }
    after:
        graph @g (%x: f32[1, 1]) -> (y = %y) level=graph {
          %w = constant {values=[4.0, 4.0]} : f32[2, 1]
          %v = constant {values=[4.0, 4.0]} : f32[1, 2]
          %h = linear(%x, %w) : f32[1, 2]
          %r = relu(%h) : f32[1, 2]
          %y = linear(%r, %v) : f32[1, 1]
        }
    """

    name: ClassVar[str] = "equalize-layers"
    lossy: ClassVar[bool] = True
    only: str = "*"
    except_: str = ""
    clamps: bool = True
    absorb: bool = False
    sweeps: int = 200

    def run(self, graph: Graph, context: Context) -> Graph:
        if self.sweeps < 1:
            raise InvalidInput(f"equalize-layers: sweeps is at least 1, not {self.sweeps}")
        layers, groups = self._groups(graph, context)
        before = {g.producer: spread(layers[g.producer]) for g in groups}
        solve(layers, groups, self.sweeps)
        moved = [g for g in groups if float(np.abs(np.log(g.scale)).max(initial=0.0)) > 1e-3]
        bounds = {name: g.scale[ids] for g in moved for name, ids in g.reach.bounds.items()}
        divide = {g.producer: g.scale for g in moved}
        multiply = {}
        for g in moved:
            for reader, ids in g.reach.readers.items():
                multiply[reader] = g.scale[ids]
            node, s = graph.producers[g.producer], g.scale
            context.remark(
                self.name, layer_of(graph, node), smallest=float(s.min()), largest=float(s.max()),
                spread=before[g.producer], spread_after=spread(layers[g.producer]), readers=len(g.reach.readers),
            )  # fmt: skip
        after = rescale(graph, divide, multiply, bounds)
        if moved:
            channels_divided(context, divide)
        shift = self._absorb(after, groups, known_norms(context), context) if self.absorb else {}
        if shift:
            after = rescale(after, {}, {}, shift=shift)
            channels_divided(context, {})
        return after

    def _groups(self, graph: Graph, context: Context) -> tuple[dict[str, Layer], list[Group]]:
        """Layers by output, and every value whose channels can be scaled."""
        layers, groups, still = {}, [], bound(graph)
        why = {}
        for node in graph.nodes:
            if isinstance(node.op, ops.Linear | ops.Conv):
                why[node.output] = why_not_scaled(graph, node)
                if not why[node.output]:
                    weight, bias = (array(graph, x) for x in (node.inputs[1], node.inputs[-1]))
                    assert weight is not None
                    layers[node.output] = Layer.of(node.op, weight, bias if len(node.inputs) > 2 else None)
        for name in why:
            node = graph.producers[name]
            if not selected(self.only, self.except_, graph, node):
                continue
            reach = follow(still, name, 1 if isinstance(node.op, ops.Conv) else -1)
            blocked = [x for x in reach.readers if why[x]]
            reason = why[name] or reach.why or (blocked and f"a layer that reads it: {why[blocked[0]]}") or ""
            if (
                not reason
                and not self.clamps
                and any(isinstance(graph.producers[b].op, ops.Clamp) for b in reach.bounds)
            ):
                reason = "a clamp follows, whose bound would differ by channel (clamps=true allows it)"
            if reason:
                context.refuse(self.name, layer_of(graph, node), reason)
            else:
                groups.append(Group(name, reach, np.ones(len(layers[name].divide))))
        return layers, groups

    def _absorb(self, graph: Graph, groups: list[Group], norms: dict[str, Norm], context: Context) -> dict[str, Array]:
        """What to add to the bias of which layer, so that channels that are always positive start at zero."""
        shift: dict[str, Array] = {}
        for g in groups:
            if g.producer not in norms or not (g.reach.shiftable and g.reach.relu):
                continue
            norm = norms[g.producer]
            high = np.maximum(0.0, norm.beta - 3 * norm.std)
            if not high.any():
                continue
            norms[g.producer] = norm.moved(shift=-high)
            shift[g.producer] = shift.get(g.producer, 0.0) - high
            for reader, ids in g.reach.readers.items():
                node = graph.producers[reader]
                weight = array(graph, node.inputs[1])
                assert weight is not None
                shift[reader] = shift.get(reader, 0.0) + absorbed(node.op, weight, high[ids])
            context.remark(self.name, layer_of(graph, graph.producers[g.producer]), absorbed=float(high.max()))
        return shift
