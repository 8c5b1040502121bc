"""Activations of layers with low-bit weights as 8-bit codes whose scale is found at run time, one a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import ml_dtypes
import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import F32
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._pass import Context, Pass


@dataclass(frozen=True)
class DynamicQuantize(Pass):
    """Linear layers with weights of integer codes get activations of 8 bits, symmetric, one scale a row (a token).

    No calibration data: each row's largest magnitude is found when the program runs. Layers that share an input share
    its codes. ``scales=bf16`` rounds the scales of groups to 16 bits (a relative change of up to 0.2 %, and fewer
    bytes); ``f32`` leaves them. With ``activations=f32`` nothing is done (``weight-only{activations=f32}``): weights
    are then dequantized when the model is compiled, and the layer computes in floats.

    before:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %w = constant {values=[1, 2, -3, 4]} : s4[2, 2]
          %s = constant {values=[0.25, 0.5]} : f32[2]
          %wd = dequantize(%w, %s) {axis=0} : f32[2, 2]
          %y = linear(%x, %wd) : f32[1, 2]
        }
    after:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %w = constant {values=[1, 2, -3, 4]} : s4[2, 2]
          %s = constant {values=[0.25, 0.5]} : f32[2]
          %wd = dequantize(%w, %s) {axis=0} : f32[2, 2]
          %x.codes, %x.scale = dynamic_quantize(%x) : s8[1, 2]; f32[1, 1]
          %x.wide = cast(%x.codes) {dtype=f32} : f32[1, 2]
          %x.real = mul(%x.wide, %x.scale) : f32[1, 2]
          %y = linear(%x.real, %wd) : f32[1, 2]
        }
    """

    name: ClassVar[str] = "dynamic-quantize"
    lossy: ClassVar[bool] = True
    activations: Literal["dynamic-s8", "f32"] = "dynamic-s8"
    scales: Literal["bf16", "f32"] = "bf16"
    only: str = "*"
    except_: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        chosen: dict[str, float] = {}
        if self.activations == "f32":
            return graph
        for n in graph.nodes:
            if not isinstance(n.op, ops.Linear) or not selected(self.only, self.except_, graph, n):
                continue
            if context.target is not None and context.target.kind not in ("cpu", "gpu"):
                reason = f"target {context.target.name} has no kernels for codes found at run time"
                context.refuse(self.name, layer_of(graph, n), reason, "quantize-int8 with calibration data")
            elif why := _why_not(graph, n):
                context.refuse(self.name, layer_of(graph, n), *why)
            else:
                chosen[n.output] = _scale_change(graph, n) if self.scales == "bf16" else 0.0
                context.remark(self.name, layer_of(graph, n), activations="s8 per row", scale_change=chosen[n.output])
        return _write(graph, chosen) if chosen else graph


def _why_not(graph: Graph, n: Node) -> tuple[str, ...]:
    """Why a layer's activation stays as it is, and the cure; empty when it gets codes."""
    weight, x = graph.producers.get(n.inputs[1]), graph.producers.get(n.inputs[0])
    if weight is None or not isinstance(weight.op, ops.Dequantize) or not graph.is_constant(weight.inputs[0]):
        return ("its weights are no integer codes", "run quantize-weights before it")
    if x is not None and isinstance(x.op, ops.Dequantize):
        return ("its activation has codes already",)
    t = graph.types[n.inputs[0]]
    if t.dtype != F32:
        return (f"its activation is {t.dtype}", "cast the model to f32 first")
    if is_dynamic(graph, n.inputs[0]):
        return ("its activation has codes already",)
    return () if isinstance(t.shape[-1], int) else ("its number of inputs is open", "fix the sizes")


def is_dynamic(graph: Graph, value: str) -> bool:
    """True for what :func:`_write` makes of an activation: its codes times their scale."""
    real = graph.producers.get(value)
    if real is None or not isinstance(real.op, ops.Binary) or real.op.fn != "mul":
        return False
    scale = graph.producers.get(real.inputs[1])
    return scale is not None and isinstance(scale.op, ops.DynamicQuantize)


def _scales(graph: Graph, n: Node) -> str:
    """The scales of a layer's weight where they are those of groups and f32; else the empty string."""
    weight = graph.producers[n.inputs[1]]
    assert isinstance(weight.op, ops.Dequantize)
    plain = graph.types[weight.inputs[1]].dtype == F32 and graph.is_constant(weight.inputs[1])
    return weight.inputs[1] if weight.op.group and plain else ""


def _scale_change(graph: Graph, n: Node) -> float:
    """The largest relative change of a group's scale by rounding it to bf16."""
    name = _scales(graph, n)
    if not name:
        return 0.0
    scale = np.asarray(graph.constant(name), np.float32)
    change = np.abs(scale.astype(ml_dtypes.bfloat16).astype(np.float32) - scale) / np.maximum(np.abs(scale), 1e-30)
    return float(f"{change.max(initial=0.0):.3g}")


def _write(graph: Graph, chosen: Mapping[str, float]) -> Graph:
    real: dict[str, str] = {}
    rounded = {_scales(graph, graph.producers[o]) for o, change in chosen.items() if change}

    def step(rw: Rewriter, node: Node) -> bool:
        if node.output in rounded and isinstance(node.op, ops.Weight | ops.Constant):
            array = np.asarray(graph.constant(node.output)).astype(ml_dtypes.bfloat16).astype(np.float32)
            rw.free(node)
            rw.replace(node, rw.constant(array, node.type, name=node.output, origin=node.origin))
            return True
        if node.output not in chosen:
            return False
        old = node.inputs[0]
        if old not in real:
            real[old] = _codes(rw, old, node.origin)
        rw.keep_as(node, node.op, (real[old], *rw.of(*node.inputs[1:])), node.types)
        return True

    return rewrite(graph, step)[0]


def _codes(rw: Rewriter, old: str, origin: str) -> str:
    (x,) = rw.of(old)
    codes, scale = rw.emit_all(ops.DynamicQuantize(), x, names=(f"{old}.codes", f"{old}.scale"), origin=origin)
    wide = rw.emit(ops.Cast(F32), codes, name=f"{old}.wide", origin=origin)
    return rw.emit(ops.Binary("mul"), wide, scale, name=f"{old}.real", origin=origin)


__all__ = ["DynamicQuantize", "is_dynamic"]
