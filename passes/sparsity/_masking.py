"""What the passes that mask contraction weights share: which layers, why not, and the masked weight."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.patterns import kept_magnitude
from bitwright.ir.types import F32, NM
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of, selected, stem
from bitwright.passes._pass import Context, Pass

PAYS = 1.05
"""An expected speed over dense below this is not worth a pattern."""
CONTRACTIONS = (ops.Linear, ops.Conv, ops.MatMul, ops.ConvTranspose)


class MaskingPass(Pass):
    """Masks the constant weights of chosen contractions along their reduction axis."""

    def mask_layers(self, graph: Graph, context: Context, only: str, except_: str, skip_first: bool = False) -> Graph:
        """Mask every selected layer, or refuse it with the reason."""
        layers = [n for n in graph.nodes if isinstance(n.op, CONTRACTIONS)]
        wanted = [n for n in layers if selected(only, except_, graph, n)]
        if not wanted:
            context.refuse(self.name, "model", f"only={only} except={except_} selects no contraction")
        chosen: set[str] = set()
        for n in wanted:
            first = skip_first and n is layers[0]
            why = "first layer stays dense (skip_first)" if first else self._why_not(graph, n)
            if why:
                context.refuse(self.name, layer_of(graph, n), why)
            else:
                chosen.add(n.output)
        made: dict[str, str] = {}

        def step(rw: Rewriter, node: Node) -> bool:
            if node.output not in chosen:
                return False
            old = node.inputs[1]
            if old not in made:
                made[old] = self._masked(rw, node, context)
            rw.keep_as(node, node.op, (rw.of(node.inputs[0])[0], made[old], *rw.of(*node.inputs[2:])))
            return True

        after, _ = rewrite(graph, step)
        if made:
            self._check_gain(context)
        return after

    @abstractmethod
    def encoding(self, axis: int) -> NM:
        """What the masked weight obeys."""

    @abstractmethod
    def mask(self, weight: Array, axis: int, name: str) -> Array:
        """True where a weight is kept."""

    def _axis(self, node: Node) -> int:
        return 0 if isinstance(node.op, ops.MatMul) and not node.op.transpose_b else 1

    def _why_not(self, graph: Graph, node: Node) -> str:
        """Why a contraction cannot be masked, or the empty string."""
        weight = graph.producers.get(node.inputs[1])
        if weight is None or not isinstance(weight.op, ops.Weight):
            quantized = weight is not None and isinstance(weight.op, ops.Dequantize)
            return (
                "weight is quantized already: mask before quantizing"
                if quantized
                else "weight is computed, not constant"
            )
        if isinstance(node.op, ops.ConvTranspose):
            return "transposed convolution: no sparse kernel"
        if isinstance(node.op, ops.Conv) and node.op.groups != 1:
            depthwise = weight.type.shape[1] == 1
            return "depthwise convolution has no reduction over channels" if depthwise else "grouped convolution"
        if weight.type.rank < 2 or (isinstance(node.op, ops.MatMul) and weight.type.rank != 2):
            return f"weight of rank {weight.type.rank}"
        nm = self.encoding(self._axis(node))
        if weight.type.encoding == nm:
            return ""
        size, span = weight.type.static_shape[nm.axis], nm.group * nm.block
        what = "input channels" if isinstance(node.op, ops.Conv) else "inputs"
        if size % span:
            return f"{size} {what} are not a multiple of {span}"
        if weight.type.static_shape[0] % nm.shared:
            return f"{weight.type.static_shape[0]} outputs are not a multiple of shared={nm.shared}"
        return ""

    def _masked(self, rw: Rewriter, node: Node, context: Context) -> str:
        weight, encoding = rw.graph.producers[node.inputs[1]], self.encoding(self._axis(node))
        assert isinstance(weight.op, ops.Weight)
        if weight.type.encoding == encoding:
            return rw.of(node.inputs[1])[0]
        array, key = rw.graph.weights[weight.op.ref].array, stem(weight.op.ref)
        masked = np.where(self.mask(array, encoding.axis, weight.op.ref), array, np.zeros((), array.dtype))
        kept, pattern = kept_magnitude(array, masked), f"{encoding.keep}:{encoding.group}"
        context.remark(
            self.name, layer_of(rw.graph, node), pattern=pattern, kept_magnitude=round(kept, 4), axis=encoding.axis
        )
        return rw.weight(key, masked, weight.type.with_encoding(encoding), name=key, origin=weight.origin)

    def _check_gain(self, context: Context) -> None:
        if context.target is None:
            return
        nm = self.encoding(1)
        gains = {str(d): context.target.sparse_gain(d, nm) for d in (F32, context.target.activation)}
        if max(gains.values()) < PAYS:
            expected = ", ".join(f"{g:.2f}x for {d}" if g else f"no kernel for {d}" for d, g in gains.items())
            why = f"{nm.keep}:{nm.group} does not pay on this target ({expected}); masks were applied as asked"
            context.refuse(self.name, f"target {context.target.name}", why, "choose a pattern the target lists")
