"""Products of f32 on ordinary lanes: outer products in registers, each product and sum rounded once (``fma``)."""

from __future__ import annotations

from collections.abc import Iterator

from bitwright.codegen.cuda.instructions import Instruction


def instructions() -> Iterator[Instruction]:
    """``bw_outer{2,8}(acc, a, x)``: acc[8 i + j] += a[j] * x[4 i]; ``bw_outer{2,8}_rows``: a[4 j] instead of a[j]."""
    for rows in (2, 8):
        for name, step in ((f"bw_outer{rows}", 1), (f"bw_outer{rows}_rows", 4)):
            body = f"""void {name}(float* acc, const float* a, const float* x) {{
#pragma unroll
  for (int i = 0; i < {rows}; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) acc[8 * i + j] = fmaf(a[{step} * j], x[4 * i], acc[8 * i + j]);
}}"""
            yield Instruction(name, f"static __device__ __forceinline__ {body}", f"static inline {body}", sass=r"FFMA")
