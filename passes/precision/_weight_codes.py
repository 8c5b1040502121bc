"""The weight of a layer as integer codes: the lowered view, what its inputs are like, and the rounding of choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_numpy, to_torch
from bitwright.ir.weights import Array
from bitwright.passes.precision._integer_codes import Codes, Levels
from bitwright.passes.precision._rounding_common import Rounded
from bitwright.passes.sparsity._inputs import finite, kernel_of, lowered, raised, rows

if TYPE_CHECKING:
    import torch

    from bitwright.passes.precision._adaquant import Rates

ROWS = 4096
"""Rows of inputs kept for AdaQuant; all others work on sums."""
BATCH = 256
ITERATIONS = {"adaround": 2000, "adaquant": 1000}
"""Unless the user asks for another number."""


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
    per_batch: int
    """Rows to keep of each batch; 0 keeps none."""
    gram: torch.Tensor | None = None
    kept: list[torch.Tensor] = field(default_factory=list)

    def add(self, graph: Graph, node: Node, x: torch.Tensor, batch: int) -> None:
        """Take in one batch; raises :class:`InvalidInput` for NaN and infinities."""
        taken = 0
        for flat in rows(node.op, x, kernel_of(graph, node)):
            part = grouped_rows(finite(graph, node, flat, batch), self.groups, graph.types[node.inputs[1]].static_shape)
            sums = part.transpose(1, 2) @ part
            self.gram = sums if self.gram is None else self.gram + sums
            want = self.per_batch - taken
            if want > 0:
                some = part[:, :: max(1, part.shape[1] // want)][:, :want].float()
                self.kept.append(some.clone())
                taken += some.shape[1]

    def sample(self) -> torch.Tensor:
        """The rows kept, f32 [groups, rows, K]."""
        import torch

        return torch.cat(self.kept, 1)


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

    assert inputs.gram is not None
    groups, form = inputs.groups, start.levels
    w = _matrix(op, weight, groups)
    kept = w != 0 if form.step == 1 and weight_is_masked(weight) else None
    if method.name == "adaquant":
        scale, zero, columns = _compact(op, weight, start, groups)
        return rounding.adaquant(
            w, inputs.sample(), scale, zero, form, kept, columns=columns, relu=relu, batch=BATCH, seed=method.seed,
            iterations=method.iterations or ITERATIONS["adaquant"],
            rates=_rates(scale, form, method.fixed_scale),
        )  # fmt: skip
    full = [
        _matrix(op, np.broadcast_to(to_numpy(start.spread(t)), weight.shape), groups) for t in (start.scale, start.zero)
    ]
    args = (w, inputs.gram, full[0], full[1], form, kept)
    if method.name == "adaround":
        return rounding.adaround(*args, iterations=method.iterations or ITERATIONS["adaround"])
    if method.name == "gptq":
        return rounding.gptq(*args, damping=method.damping)
    return rounding.gpfq(*args) if method.name == "gpfq" else rounding.nearest(*args)


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
        parameters.append(small.to(old.dtype).reshape(old.shape))
    return start._replace(codes=codes, scale=parameters[0], zero=parameters[1])


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


def _rates(scale: torch.Tensor, form: Levels, fixed: bool) -> Rates:
    """The paper's rates relative to this layer's magnitudes; the bias stays as it is."""
    from bitwright.passes.precision._adaquant import Rates

    step = float(scale.double().mean())
    return Rates(0.0, 0.0 if fixed else 2e-3 * step * form.top, 3e-3 * step, 0.0)


__all__ = ["ITERATIONS", "Inputs", "Method", "groups_of", "round_layer", "weight_is_masked", "with_result"]
