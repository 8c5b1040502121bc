"""The weight of a layer as integer codes: the lowered view, what its inputs are like, and the rounding of choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_numpy, to_torch
from bitwright.ir.weights import Array
from bitwright.passes.precision._integer_codes import Codes, Levels
from bitwright.passes.precision._rounding_common import Rounded
from bitwright.passes.sparsity._inputs import count_rows, finite, kernel_of, lowered, raised, rows

if TYPE_CHECKING:
    import torch

    from bitwright.passes.precision._adaquant import Rates

ROWS = 4096
"""Rows of inputs kept for AdaQuant; all others work on sums."""
BATCH = 256
FACTORS = 1024
"""Inputs of a layer up to which AdaQuant begins with GPTQ's codes: factors of Gram matrices take some 64 bytes times
their square, which shall stay below what learning holds."""
ITERATIONS = {"adaround": 2000, "adaquant": 300}
"""Unless the user asks for another number. AdaQuant: rates that fall to zero make 300 do more than 1,000 of the paper's
constant ones, whose error ends up swinging by a fifth."""


class Method(NamedTuple):
    """A rounding method and its options; ``iterations`` 0: the method's own number."""

    name: str
    iterations: int = 0
    damping: float = 0.01
    seed: int = 0
    fixed_scale: bool = False
    """True when scales may not be learnt, as powers of two."""


@dataclass
class Inputs:
    """What reaches a weight on calibration data, lowered, groups of a convolution first."""

    groups: int
    keep: int = 0
    """Rows to keep, spread over all there are; 0 keeps their sums of x xᵀ instead."""
    gram: torch.Tensor | None = None
    buffer: torch.Tensor | None = None
    filled: int = 0

    def add(self, graph: Graph, node: Node, x: torch.Tensor, batch: int, batches: int) -> None:
        """Take in one batch of so many; raises :class:`InvalidInput` for NaN and infinities."""
        finite(graph, node, x, batch)
        shape, kernel = graph.types[node.inputs[1]].static_shape, kernel_of(graph, node)
        share = -(-self.keep // batches)
        total, seen = count_rows(node.op, x, kernel), 0
        whole = self.keep and not isinstance(node.op, ops.Conv)  # nothing to lower: picked from where they are
        for flat in [x.reshape(-1, x.shape[-1])] if whole else rows(node.op, x, kernel):
            if self.keep:
                self._hold(flat, seen, total, min(share, total), shape)
            else:
                part = grouped_rows(flat, self.groups, shape)
                if self.gram is None:
                    self.gram = flat.new_zeros(self.groups, part.shape[2], part.shape[2])
                self.gram.baddbmm_(part.transpose(1, 2), part)
            seen += len(flat)

    def _hold(self, flat: torch.Tensor, seen: int, total: int, want: int, shape: tuple[int, ...]) -> None:
        """Copy those of ``want`` spread rows of a batch that fall into a piece of it into the buffer.

        One of each ``total / want`` rows, which one by chance: equal steps would take the same columns of every image.
        """
        import torch

        chance = torch.rand(want, generator=torch.Generator().manual_seed(total), dtype=torch.float64)
        chosen = ((torch.arange(want) + chance) * total / max(1, want)).long() - seen
        some = flat[chosen[(chosen >= 0) & (chosen < len(flat))]].float()
        part = grouped_rows(some, self.groups, shape)[:, : self.keep - self.filled]
        if self.buffer is None:
            self.buffer = part.new_empty(self.groups, self.keep, part.shape[2])
        self.buffer[:, self.filled : self.filled + part.shape[1]] = part
        self.filled += part.shape[1]

    def sample(self) -> torch.Tensor:
        """The rows kept, f32 [groups, rows, K]: a view of one buffer."""
        assert self.buffer is not None
        return self.buffer[:, : self.filled]


def grouped_rows(flat: torch.Tensor, groups: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Rows [n, taps * channels] as [groups, n, taps * channels of a group]."""
    if groups == 1:
        return flat[None]
    taps = int(np.prod(shape[2:]))
    parts = flat.reshape(len(flat), taps, groups, shape[1])
    return parts.permute(2, 0, 1, 3).reshape(groups, len(flat), taps * shape[1])


def groups_of(op: ops.Op) -> int:
    """Groups of a convolution, else 1."""
    return op.groups if isinstance(op, ops.Conv) else 1


def round_layer(op: ops.Op, weight: Array, start: Codes, inputs: Inputs, method: Method, relu: bool) -> Rounded:
    """Round by a method, starting from the scales of the nearest codes; matrices are [groups, outputs, K]."""
    from bitwright.passes.precision import rounding

    groups, form = inputs.groups, start.levels
    w = _matrix(op, weight, groups)
    kept = w != 0 if form.step == 1 and weight_is_masked(weight) else None
    spread = (
        _spread(op, start, start.scale, weight.shape, groups),
        _spread(op, start, start.zero, weight.shape, groups),
    )
    if method.name == "adaquant":
        scale, zero, columns = _compact(op, weight, start, groups)
        x = inputs.sample()
        begin = _begin(w, x, *spread, form, kept, method.damping) if w.shape[-1] <= FACTORS else None
        w = w.float()
        return rounding.adaquant(
            w, x, scale, zero, form, kept, columns=columns, relu=relu, batch=BATCH, seed=method.seed,
            iterations=method.iterations or ITERATIONS["adaquant"],
            rates=_rates(scale, form, method.fixed_scale, w.shape[-1]), begin=begin,
        )  # fmt: skip
    assert inputs.gram is not None
    args = (w, inputs.gram, *spread, form, kept)
    if method.name == "adaround":
        return rounding.adaround(*args, iterations=method.iterations or ITERATIONS["adaround"])
    if method.name == "gptq":
        return rounding.gptq(*args, damping=method.damping)
    return rounding.gpfq(*args) if method.name == "gpfq" else rounding.nearest(*args)


def _begin(
    w: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, form: Levels, kept: torch.Tensor | None,
    damping: float,
) -> torch.Tensor:  # fmt: skip
    """The weights of GPTQ's codes, f32, some outputs at a time."""
    import torch

    from bitwright.passes.precision import rounding
    from bitwright.passes.precision._adaquant import BLOCK

    gram = torch.stack([rows.T @ rows for rows in x])
    found, step = torch.empty(w.shape), max(1, BLOCK // (len(w) * w.shape[2]))
    for i in range(0, w.shape[1], step):
        some = slice(i, i + step)
        mask = None if kept is None else kept[:, some]
        made = rounding.gptq(w[:, some], gram, scale[:, some], zero[:, some], form, mask, damping=damping)
        found[:, some] = made.real()
    return found


def weight_is_masked(weight: Array) -> bool:
    """True when zeros stand out as a mask: they then stay zero under every method."""
    return bool(np.count_nonzero(weight) < weight.size)


def with_result(op: ops.Op, weight: Array, start: Codes, result: Rounded) -> Codes:
    """The codes, scales and zero points of a rounding in the layout of ``start``."""

    def back(t: torch.Tensor, dtype: type) -> Array:
        return raised(op, t.reshape(len(weight), -1), np.empty(weight.shape, dtype))

    codes = to_torch(back(result.codes, np.float32)).to(start.codes.dtype)
    parameters = []
    for t, old in ((result.scale, start.scale), (result.zero, start.zero)):
        whole = to_torch(back(t, np.float32))
        small = whole[:, :: start.group] if start.group else whole.reshape(len(weight), -1)[:, 0]
        parameters.append(small.to(old.dtype).reshape(old.shape).clone())  # a view would hold all of ``whole``
    return start._replace(codes=codes, scale=parameters[0], zero=parameters[1])


def _spread(op: ops.Op, start: Codes, values: torch.Tensor, shape: tuple[int, ...], groups: int) -> torch.Tensor:
    """A scale or zero point for each weight, as a matrix."""
    return _matrix(op, np.broadcast_to(to_numpy(start.spread(values)), shape), groups)


def _matrix(op: ops.Op, array: Array, groups: int) -> torch.Tensor:
    flat = lowered(op, np.ascontiguousarray(array))
    return flat.reshape(groups, -1, flat.shape[1])


def _compact(
    op: ops.Op, weight: Array, start: Codes, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Scale and zero point [groups, outputs, scales], and the scale of each lowered column."""
    import torch

    if not start.group:
        scale, zero = (t.reshape(groups, -1, 1) for t in (start.scale, start.zero))
        return scale, zero, None
    scale, zero = (_matrix(op, to_numpy(t), groups) for t in (start.scale, start.zero))
    channels, taps = weight.shape[1], int(np.prod(weight.shape[2:]))
    per_tap = start.scale.shape[1]
    columns = torch.arange(taps)[:, None] * per_tap + torch.arange(channels)[None] // start.group
    return scale, zero, columns.reshape(-1)


def _rates(scale: torch.Tensor, form: Levels, fixed: bool, inputs: int) -> Rates:
    """The paper's rates relative to this layer's magnitudes; the bias stays as it is."""
    from bitwright.passes.precision._adaquant import Rates, weight_rate

    step = float(scale.double().mean())
    return Rates(0.0, 0.0 if fixed else 2e-3 * step * form.top, weight_rate(inputs) * step, 0.0)


__all__ = ["ITERATIONS", "Inputs", "Method", "groups_of", "round_layer", "weight_is_masked", "with_result"]
