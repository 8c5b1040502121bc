"""SmoothQuant: outlying channels of activations become small and the weights that read them large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._norms import channels_divided
from bitwright.passes._pass import Context, Pass
from bitwright.passes.precision._follow import Reach, bound, follow
from bitwright.passes.precision._rescale import rescale, why_not_scaled
from bitwright.passes.precision._smooth import Seen, best_scale, insert, moves, observe, smoothing_scale, weight_of

WORTH = 0.8
"""A multiplication is inserted where it brings the 8-bit error below this share of what it was."""


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divide outlying channels of a linear layer's input and multiply its weights by the same (Xiao et al. 2023).

    s = max|x|^alpha / max|w|^(1 - alpha) by channel goes into the scale and shift of the norm, or the weights of the
    linear layer, that makes the input, when nothing else reads it. ``search`` takes the alpha of least 8-bit error
    on calibration rows, or none. ``insert`` multiplies by 1/s where s cannot be absorbed (a norm that a residual
    reads too, an activation that is not homogeneous) and the 8-bit error falls by a fifth or more.

    before:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %g = weight {ref="norm.weight"} : f32[2]
          %w = weight {ref="fc.weight"} : f32[2, 2]
          %h = layer_norm(%x, %g) : f32[1, 2]
          %y = linear(%h, %w) : f32[1, 2]
        }
    after:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %g = weight {ref="norm.weight.1"} : f32[2]
          %w = weight {ref="fc.weight.1"} : f32[2, 2]
          %h = layer_norm(%x, %g) : f32[1, 2]
          %y = linear(%h, %w) : f32[1, 2]
        }
    """

    name: ClassVar[str] = "smooth-quant"
    lossy: ClassVar[bool] = True
    alpha: float = 0.5
    search: bool = False
    insert: bool = False
    only: str = "*"
    except_: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        if not 0 < self.alpha <= 1:
            raise InvalidInput(f"smooth-quant: alpha lies in (0, 1], not {self.alpha}")
        groups, others = self._groups(graph, context)
        inputs = {r: graph.producers[r].inputs[0] for r in [*_readers(groups), *others]}
        seen = observe(graph, context, self.name, set(inputs.values()), self.search or self.insert) if inputs else {}
        divide, multiply, bounds = dict[str, Array](), dict[str, Array](), dict[str, Array]()
        for name, reach in reversed(groups.items()):  # a layer's rows are settled before its columns are looked at
            weights = {r: weight_of(graph, r, divide.get(r)) for r in reach.readers}
            s = self._absorbed(graph, context, name, reach, weights, seen)
            divide[name] = s
            multiply.update({reader: s[ids] for reader, ids in reach.readers.items()})
            bounds.update({b: s[ids] for b, ids in reach.bounds.items()})
        shared = {
            inputs[r]: {q: weight_of(graph, q, divide.get(q)) for q in others if inputs[q] == inputs[r]} for r in others
        }
        inserted = self._inserted(graph, context, shared, seen)
        multiply.update({r: inserted[inputs[r]] for r in others if inputs[r] in inserted})
        divide, multiply, bounds = ({k: s for k, s in m.items() if moves(s)} for m in (divide, multiply, bounds))
        if multiply:
            channels_divided(context, divide)
        return insert(rescale(graph, divide, multiply, bounds), inserted, set(others))

    def _groups(self, graph: Graph, context: Context) -> tuple[dict[str, Reach], list[str]]:
        """Values whose scale can be absorbed, by the layer or norm that makes them; readers left for insertion."""
        still = bound(graph)
        groups: dict[str, Reach] = {}
        why: dict[str, str] = {}
        able = [n for n in graph.nodes if isinstance(n.op, ops.Linear) and not why_not_scaled(graph, n)]
        wanted = {n.output for n in able if selected(self.only, self.except_, graph, n)}
        for node in graph.nodes:
            if not isinstance(node.op, ops.LayerNorm | ops.RmsNorm | ops.Linear):
                continue
            reach = follow(still, node.output, -1)
            reason = reach.why or why_not_scaled(graph, node)
            if not isinstance(node.op, ops.Linear) and (len(node.inputs) < 2 or node.op.axes != 1):
                reason = reason or "it has no scale by channel"
            reason = reason or ("" if set(reach.readers) <= wanted else "others than the chosen layers read it")
            if reason:
                why.update(dict.fromkeys(reach.readers, f"%{node.output} cannot absorb a scale: {reason}"))
            else:
                groups[node.output] = reach
        left = [n.output for n in able if n.output in wanted - set(_readers(groups))]
        for r in left if not self.insert else []:
            reason = why.get(r, f"no norm or linear layer makes its input %{graph.producers[r].inputs[0]}")
            context.refuse(self.name, layer_of(graph, graph.producers[r]), reason, "insert=true multiplies there")
        return groups, left if self.insert else []

    def _absorbed(
        self, graph: Graph, context: Context, name: str, reach: Reach, readers: dict[str, Array], seen: dict[str, Seen]
    ) -> Array:
        """The scale of each channel of a value that can absorb it."""
        channels = int(graph.types[name].shape[-1])
        first = next(iter(readers))
        ids = reach.readers[first]
        alike = len({graph.producers[r].inputs[0] for r in readers}) == 1 and sorted(ids) == list(range(channels))
        facts: dict[str, float] = {"alpha": self.alpha}
        if self.search and alike:
            by_reader, alpha, error, plain = best_scale(seen[graph.producers[first].inputs[0]], list(readers.values()))
            s = np.ones(channels)
            s[ids] = by_reader
            facts = {"alpha": alpha, "error": error, "error_before": plain}
        else:
            values, weights = np.zeros(channels), np.zeros(channels)
            for r, w in readers.items():
                np.maximum.at(values, reach.readers[r], seen[graph.producers[r].inputs[0]].largest)
                np.maximum.at(weights, reach.readers[r], np.abs(w).max(0).astype(np.float64))
            s = smoothing_scale(values, weights, self.alpha)
        if moves(s):
            context.remark(self.name, name, readers=len(readers), **facts)
        return s

    def _inserted(
        self, graph: Graph, context: Context, inputs: dict[str, dict[str, Array]], seen: dict[str, Seen]
    ) -> dict[str, Array]:
        """Scales to multiply by, where that is worth it: by value."""
        found = {}
        for value, readers in inputs.items():
            s, alpha, error, plain = best_scale(seen[value], list(readers.values()))
            if error < WORTH * plain and moves(s):
                found[value] = s
                context.remark(
                    self.name, value, inserted=True, readers=len(readers), alpha=alpha, error=error, error_before=plain
                )
            else:
                for r in readers:
                    why = f"an inserted scale gains too little: 8-bit error {error:.2g} instead of {plain:.2g}"
                    context.refuse(self.name, layer_of(graph, graph.producers[r]), why)
        return found


def _readers(groups: dict[str, Reach]) -> list[str]:
    return [r for reach in groups.values() for r in reach.readers]
