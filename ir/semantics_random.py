"""Meaning of the operator that draws random numbers: counted ones, so that a draw is an operand and not a state.

The numbers of a block are Philox-4x32-10 (Salmon et al., SC 2011) of the counter (block, 0, draw low, draw high) under
the key (seed low, seed high): the same on every machine, in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bitwright.ir import mvue, ops
from bitwright.ir.types import NM

Tensor = torch.Tensor
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
WORD = 0xFFFFFFFF


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Four 32-bit words, in s64 tensors (or integers), from a counter of four and a key of two.

    >>> [hex(int(w)) for w in philox((0, 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    a, b, c, d = counter
    k, m = key
    for _ in range(ROUNDS):
        (high, low), (up, down) = _wide(MULTIPLIERS[0], a), _wide(MULTIPLIERS[1], c)
        a, b, c, d = up ^ b ^ k, down, high ^ d ^ m, low
        k, m = (k + WEYL[0]) & WORD, (m + WEYL[1]) & WORD
    return a, b, c, d


def _wide(factor: int, x: Any) -> tuple[Any, Any]:
    """High and low word of a 32 x 32 bit product, by halves: 64 bits with a sign do not hold it."""
    low, high = factor * (x & 0xFFFF), factor * (x >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & WORD


def uniform(blocks: int, draw: Tensor, seed: int) -> Tensor:
    """Two numbers of [0, 1) for each block, [blocks, 2] in float64, multiples of 2^-32; ``draw`` is s64[]."""
    number = torch.arange(blocks, dtype=torch.int64, device=draw.device)
    zero = torch.zeros_like(number)
    counter = number & WORD, number >> 32, zero + (draw & WORD), zero + ((draw >> 32) & WORD)
    first, second, _, _ = philox(counter, (seed & WORD, seed >> 32 & WORD))
    return torch.stack([first, second], -1).double() * 2.0**-32


def _unbiased_mask(op: ops.UnbiasedMask, x: Tensor, draw: Tensor) -> Tensor:
    NM(op.keep, op.group, op.axis)
    if draw.dtype != torch.int64 or draw.dim() or not x.is_floating_point():
        raise ValueError("x holds floats and the draw is s64[]")
    if op.method not in ("optimal", "two-draw") or (op.method == "two-draw" and op.keep != 2):
        raise ValueError(f"method {op.method!r} is optimal or, for keep 2, two-draw")
    if not 0 <= op.seed < 1 << 64:
        raise ValueError(f"seed {op.seed} is no unsigned 64-bit number")
    lead = x.movedim(op.axis, -1)
    size = lead.shape[-1]
    full, rows = size - size % op.group, lead.numel() // max(size, 1)
    blocks = -(-size // op.group)
    u = uniform(rows * blocks, draw, op.seed).reshape(rows, blocks, 2)
    parts = []
    for part, at, n in ((lead[..., :full], slice(0, full // op.group), op.group),
                        (lead[..., full:], slice(full // op.group, blocks), size % op.group)):  # fmt: skip
        if part.numel():
            groups, kept = part.reshape(-1, n).double(), -(-op.keep * n // op.group)
            limit = torch.finfo(x.dtype).max
            out = mvue.sparse_groups(groups.abs(), kept, op.method, u[:, at].reshape(-1, 2), limit)  # type: ignore[arg-type]
            out = torch.where(out > 0, torch.copysign(out, groups), 0.0)
            out = torch.where(groups.isnan().any(-1, keepdim=True), float("nan"), out)
            parts.append(out.reshape(part.shape))
    out = torch.cat(parts, -1) if parts else lead.double()
    return out.to(x.dtype).movedim(-1, op.axis)


RANDOM_MEANING: dict[type[ops.Op], Callable[..., Tensor]] = {ops.UnbiasedMask: _unbiased_mask}
