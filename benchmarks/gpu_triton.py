"""A matrix product in Triton, as its tutorial writes it: what a hand that is not ours reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(x, w, y, m, n, k, bm: tl.constexpr, bn: tl.constexpr, bk: tl.constexpr, group: tl.constexpr):  # type: ignore[no-untyped-def]
    """y[m, n] = x[m, k] w[n, k]^T; blocks in groups of rows, so that the second-level cache is used."""
    pid = tl.program_id(0)
    across = tl.cdiv(n, bn)
    width = group * across
    first = pid // width * group
    height = min(tl.cdiv(m, bm) - first, group)
    rows = (first + pid % width % height) * bm + tl.arange(0, bm)
    outs = pid % width // height * bn + tl.arange(0, bn)
    inner = tl.arange(0, bk)
    left = x + (rows % m)[:, None] * k + inner[None, :]
    right = w + (outs % n)[None, :] * k + inner[:, None]
    total = tl.zeros((bm, bn), dtype=tl.float32)
    for _ in range(0, tl.cdiv(k, bk)):
        total = tl.dot(tl.load(left), tl.load(right), total)
        left += bk
        right += bk
    place = y + rows[:, None] * n + outs[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=(rows[:, None] < m) & (outs[None, :] < n))


def linear(x: Any, w: Any) -> Callable[[], Any]:
    """A call of it for x [m, k] and w [n, k], k a multiple of 64."""
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, device=x.device, dtype=x.dtype)
    grid = (triton.cdiv(m, 128) * triton.cdiv(n, 256),)
    return lambda: _kernel[grid](x, w, y, m, n, k, 128, 256, 64, 8, num_warps=8, num_stages=3)
