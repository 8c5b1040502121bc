"""Kernel template: softmax(q k^T) v with views, masks, grouped keys and pointwise operators behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitwright.codegen.tvm.attention_views import Attend, Unfit, attend_of
from bitwright.codegen.tvm.cuda.attention import vector
from bitwright.codegen.tvm.cuda.attention.flash import QUERIES, WARPS, Flash, plan_of
from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.config import CudaConfig
from bitwright.codegen.tvm.generic_eval import memory
from bitwright.codegen.tvm.template import Config, Refused, Template, plain_args
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.types import BF16, F16, F32, S32
from bitwright.ir.weights import Array

WIDEST = 256
"""Depth and width of a head whose sums fit registers."""


FEW = 9


@dataclass(frozen=True)
class AttentionConfig(CudaConfig):
    """``flash``: tiles of queries on tensor cores."""

    flash: bool = True


class CudaAttention(Template):
    """Attention with everything around it as strides or pointwise work."""

    name: ClassVar[str] = "cuda_attention"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes heads of up to 256, any mask, causal, grouped keys."""
        try:
            a = attend_of(body)
        except Unfit as unfit:
            return Refused(str(unfit))
        if max(a.depth, a.width) > WIDEST:
            return Refused(f"heads of {max(a.depth, a.width)}: kernels take up to {WIDEST}")
        if why := why_not_flash(body, a):
            return _few(body, a, target, why)
        plan = plan_of(a.depth, a.width)
        blocks = math.prod(a.batch) * -(-a.rows // QUERIES)
        return AttentionConfig(
            args=plain_args(body), mcpu=target.mcpu, threads=32 * WARPS, grid=(blocks, 1, 1),
            reason=f"tiles of {QUERIES} queries and {plan.keys} keys on tensor cores",
        )  # fmt: skip

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        assert isinstance(config, AttentionConfig)
        a = attend_of(body)
        b = CudaBuilder(symbol, grid=config.grid, threads=config.threads)
        pointers = {v.name: b.param(f"x{i}", memory(v.type.dtype), v.type.size) for i, v in enumerate(body.inputs)}
        result = body.types[body.outputs[0]]
        pointers[""] = b.param("y", memory(result.dtype), result.size)
        if config.flash:
            Flash(b, body, a, pointers, plan=plan_of(a.depth, a.width)).run()
            return b.finish()
        cut = vector.plan_of(body, a)
        counters = b.param("scratch", S32, cut.tasks) if cut.splits > 1 else None
        work = b.param("work", F32, cut.work_bytes // 4) if cut.splits > 1 else None
        vector.Vector(b, body, a, pointers, plan=cut, counters=counters, work=work).run()
        return b.finish()


def _few(body: Graph, a: Attend, target: Target, why: str) -> AttentionConfig:
    """The kernel without tensor cores."""
    cut = vector.plan_of(body, a)
    split = f", keys split between {cut.splits} blocks" if cut.splits > 1 else ""
    return AttentionConfig(
        args=plain_args(body), mcpu=target.mcpu, threads=32 * vector.WARPS, grid=(cut.tasks, cut.splits, 1),
        flash=False,
        scratch_bytes=4 * cut.tasks if cut.splits > 1 else 0, work_bytes=cut.work_bytes,
        reason=f"{cut.queries} queries against all keys in f32{split}: {why}",
    )  # fmt: skip


def why_not_flash(body: Graph, a: Attend) -> str:
    """Why tensor cores do not take an attention; the empty string if they do."""
    kinds = {body.types[o.name].dtype for o in (a.q, a.k, a.v)}
    if a.rows < FEW:
        return f"tensor cores take {FEW} queries and more"
    if len(kinds) != 1 or not kinds <= {F16, BF16}:
        return f"products of {', '.join(sorted(map(str, kinds)))}"
    return ""


__all__ = ["AttentionConfig", "CudaAttention"]
