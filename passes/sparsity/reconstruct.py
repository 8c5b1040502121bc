"""Weights of masked layers chosen anew so that outputs on calibration data come close to the dense model's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import TensorType, dtype_of
from bitwright.ir.weights import Handle
from bitwright.passes._layers import stem
from bitwright.passes._pass import Context, Pass
from bitwright.passes.sparsity._inputs import need_calibration
from bitwright.passes.sparsity._reconstruction import Layer, plan
from bitwright.passes.sparsity._sweep import Options, sweep


@dataclass(frozen=True)
class Reconstruct(Pass):
    """Choose the kept weights of masked layers anew, so that each layer's output stays near the dense one.

    ``adaprune`` minimises ||W X - W' X|| exactly for the given mask (least squares by Cholesky factors or conjugate
    gradients, where the published code takes 1,000 steps of Adam); ``sparsegpt`` goes through the columns once and
    chooses the mask again on the way. ``mask=update`` with ``adaprune`` does both, ``mask=fixed`` keeps the mask.
    A constant bias takes up the mean difference. ``damping`` times the mean square of the inputs holds the weights
    near the dense ones. ``inputs=sequential``: a layer sees what the layers before it give after reconstruction, and
    aims at its output in the dense model, so that it makes up for their errors too; ``local`` (half the time and
    memory): it aims at what its dense weight makes of the same inputs; ``parallel``: both are those of the dense
    model. A weight read by several layers is solved once for all of them, on the dense model's inputs. ``resume``
    names a directory where solved layers are kept.
    Hubara et al., Accelerated Sparse Neural Training, NeurIPS 2021 (AdaPrune); Frantar and Alistarh, SparseGPT, ICML
    2023.

    before:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight.1"} : f32[4, 8] nm<2:4, axis=1>
          %y = linear(%x, %w) : f32[2, 4]
        }
    after:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[4, 8] nm<2:4, axis=1>
          %y = linear(%x, %w) : f32[2, 4]
        }
    """

    name: ClassVar[str] = "reconstruct"
    lossy: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("dense",)
    method: Literal["adaprune", "sparsegpt"] = "adaprune"
    mask: Literal["auto", "fixed", "update"] = "auto"
    inputs: Literal["sequential", "local", "parallel"] = "sequential"
    damping: float = 0.01
    only: str = "*"
    except_: str = ""
    resume: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        need_calibration(context, self.name)
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise InvalidInput(f"reconstruct: damping is a number from 0 up, not {self.damping}")
        done = context.facts.setdefault("reconstructed", {})
        layers = []
        for x in plan(graph, context, self.name, self.only, self.except_):
            handle, how = done.get(x.ref, (None, ""))
            if handle is not graph.weights[x.ref] or how != self._solution:
                layers.append(x)
        least_squares, update = self.method == "adaprune", self.mask == "update"
        if self.mask == "auto":
            update = not least_squares
        options = Options(least_squares, update, self.inputs, self.damping, self.resume, self._solution)
        sweep(graph, context, layers, options, self.name)
        solved = [x for x in layers if x.solved]
        return self._rewritten(graph, context, solved) if solved else graph

    @property
    def _solution(self) -> str:
        """The options that a solution depends on."""
        return str(replace(self, only="*", except_="", resume=""))

    def _rewritten(self, graph: Graph, context: Context, layers: list[Layer]) -> Graph:
        by_weight = {x.nodes[0].inputs[1]: x for x in layers}
        dense, done = context.facts["dense"], context.facts["reconstructed"]

        def put(
            rw: Rewriter, ref: str, handle: Handle, type: TensorType, before: Handle, name: str, origin: str
        ) -> str:
            new = rw.weight(stem(ref), handle, type, name=name, origin=origin)
            made = rw.defined_by[new].op
            assert isinstance(made, ops.Weight)
            dense[made.ref], done[made.ref] = before, (handle, self._solution)
            return new

        def step(rw: Rewriter, node: Node) -> bool:
            layer = by_weight.get(node.output)
            if layer is not None:
                rw.free(node)
                handle = Handle(layer.weight)
                rw.replace(node, put(rw, layer.ref, handle, node.type, layer.dense, node.output, node.origin))
                return True
            layer = by_weight.get(node.inputs[1]) if len(node.inputs) > 2 else None
            if layer is None or layer.bias is None or layer.dense_bias is None:
                return False
            type, name = TensorType(dtype_of(layer.bias.dtype), layer.bias.shape), node.inputs[2]
            old = graph.producers[name].op
            ref = old.ref if isinstance(old, ops.Weight) else f"{layer.name}.bias"
            bias = put(rw, ref, Handle(layer.bias), type, Handle(layer.dense_bias), stem(name), node.origin)
            rw.keep_as(node, node.op, (*rw.of(*node.inputs[:2]), bias))
            return True

        return rewrite(graph, step)[0]
