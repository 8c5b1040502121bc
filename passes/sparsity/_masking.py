"""What the passes that mask contraction weights share: which layers, why not, and the masked weight."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.patterns import kept_magnitude
from bitwright.ir.target import Target
from bitwright.ir.types import F32, NM, DType, Unstructured
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of, selected, stem
from bitwright.passes._pass import Context, Pass
from bitwright.passes.sparsity._inputs import input_norms, need_calibration

PAYS = 1.05
"""An expected speed over dense below this is not worth a pattern."""
Mask = NM | Unstructured
"""What a mask makes a weight obey."""
CONTRACTIONS = (ops.Linear, ops.Conv, ops.MatMul, ops.ConvTranspose)


class MaskingPass(Pass):
    """Masks the constant weights of chosen contractions along their reduction axis.

    A subclass with a field ``score`` ranks weights by it: ``magnitude``, or ``wanda``, the magnitude times the norm of
    the input it meets on the calibration data (Sun et al., ICLR 2024).
    ``facts["dense"]`` maps the key of each masked weight to the :class:`Handle` of its values before any mask.
    """

    establishes: ClassVar[tuple[str, ...]] = ("dense",)

    def mask_layers(self, graph: Graph, context: Context, only: str, except_: str, skip_first: bool = False) -> Graph:
        """Mask every selected layer, or refuse it with the reason."""
        context.facts.setdefault("dense", {})
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
        norms = self._norms(graph, [n for n in wanted if n.output in chosen], context)
        made: dict[str, str] = {}

        def step(rw: Rewriter, node: Node) -> bool:
            if node.output not in chosen:
                return False
            old = node.inputs[1]
            if old not in made:
                made[old] = self._masked(rw, node, context, norms.get(old))
            rw.keep_as(node, node.op, (rw.of(node.inputs[0])[0], made[old], *rw.of(*node.inputs[2:])))
            return True

        after, _ = rewrite(graph, step)
        self._check_gain(context, [after.types[new].encoding for new in made.values() if new in after.types])
        return after

    def encoding(self, axis: int) -> Mask:
        """What a masked weight obeys when every layer gets the same pattern; otherwise override :meth:`choose`."""
        raise NotImplementedError

    def choose(self, weight: Array, axis: int, name: str) -> Mask | str:
        """The pattern of one layer, whose weight is called ``name``, or the reason to leave the layer alone."""
        return self.encoding(axis)

    @abstractmethod
    def mask(self, weight: Array, encoding: Mask, name: str) -> Array:
        """True where an element is kept, by the magnitudes of ``weight``; the result obeys ``encoding``."""

    def facts(self, before: Array, after: Array) -> dict[str, Any]:
        """What else the remark of a masked layer tells."""
        return {}

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
        nm = self._encoding(graph, node)
        if isinstance(nm, str) or weight.type.encoding == nm:
            return nm if isinstance(nm, str) else ""
        if isinstance(nm, Unstructured):
            return ""  # runs may be shorter at the end
        size, span = weight.type.static_shape[nm.axis], nm.group * nm.block
        what = "input channels" if isinstance(node.op, ops.Conv) else "inputs"
        if size % span:
            return f"{size} {what} are not a multiple of {span}"
        if weight.type.static_shape[0] % nm.shared:
            return f"{weight.type.static_shape[0]} outputs are not a multiple of shared={nm.shared}"
        return ""

    def _norms(self, graph: Graph, nodes: list[Node], context: Context) -> dict[str, Array]:
        """What magnitudes are multiplied with before they are compared, by value name of the weight."""
        if getattr(self, "score", "magnitude") == "magnitude":
            return {}
        need_calibration(context, f"{self.name}{{score=wanda}}")
        open_ = [n for n in nodes if graph.types[n.inputs[1]].encoding != self._encoding(graph, n)]
        return input_norms(graph, open_, context) if open_ else {}

    def _encoding(self, graph: Graph, node: Node) -> Mask | str:
        handle = graph.handle(node.inputs[1])
        assert handle is not None
        return self.choose(handle.array, self._axis(node), layer_of(graph, node))

    def _masked(self, rw: Rewriter, node: Node, context: Context, norms: Array | None) -> str:
        weight, encoding = rw.graph.producers[node.inputs[1]], self._encoding(rw.graph, node)
        assert isinstance(weight.op, ops.Weight)
        assert not isinstance(encoding, str)
        if weight.type.encoding == encoding:
            return rw.of(node.inputs[1])[0]
        handle, key = rw.graph.weights[weight.op.ref], stem(weight.op.ref)
        array = handle.array
        ranked = array if norms is None else np.abs(array.astype(np.float64)) * norms
        masked = np.where(self.mask(ranked, encoding, weight.op.ref), array, np.zeros((), array.dtype))
        context.remark(
            self.name, layer_of(rw.graph, node), pattern=label(encoding),
            kept_magnitude=round(kept_magnitude(array, masked), 4),
            kept_unstructured=round(kept_unstructured(array, int(np.count_nonzero(masked))), 4), axis=encoding.axis,
            **self.facts(array, masked), **({} if norms is None else {"score": "wanda"}),
        )  # fmt: skip
        new = rw.weight(key, masked, weight.type.with_encoding(encoding), name=key, origin=weight.origin)
        made, dense = rw.defined_by[new].op, context.facts["dense"]
        assert isinstance(made, ops.Weight)
        dense[made.ref] = dense.get(weight.op.ref, handle)
        return new

    def _check_gain(self, context: Context, used: list[Any]) -> None:
        """Refuse, once for the target, each pattern that does not pay there."""
        if (target := context.target) is None:
            return
        for e in dict.fromkeys(replace(e, axis=1) for e in used if isinstance(e, Mask)):
            gains = {str(d): gain(target, d, e) for d in (F32, target.activation)}
            if max(gains.values()) < PAYS:
                expected = ", ".join(f"{g:.2f}x for {d}" if g else f"no kernel for {d}" for d, g in gains.items())
                why = f"{label(e)} does not pay on this target ({expected}); masks were applied as asked"
                context.refuse(self.name, f"target {target.name}", why, "choose a pattern the target lists")


def label(encoding: Mask) -> str:
    """The pattern in short: ``2:4``, ``12 per 64``, ``90% zeros``."""
    if isinstance(encoding, NM):
        return f"{encoding.keep}:{encoding.group}"
    if not encoding.count:
        return f"{1.0 - encoding.kept:.0%} zeros" + (f" in blocks of {encoding.block}" if encoding.block > 1 else "")
    return f"{encoding.count} per {encoding.per}"


def gain(target: Target, x: DType, encoding: Mask) -> float:
    """Expected speed over dense; 0.0 without a kernel."""
    return target.gain(x, encoding)


def kept_unstructured(weight: Array, kept: int) -> float:
    """Sum of the ``kept`` largest magnitudes over the sum of all: what no pattern of that density can exceed."""
    a = np.abs(weight.astype(np.float64).reshape(-1))
    total = float(a.sum())
    cut = a.size - min(kept, a.size)
    return float(np.partition(a, cut)[cut:].sum()) / total if total and cut < a.size else float(not total)
