"""What reaches a layer on calibration data, in the lowered view: rows x (taps * inputs), taps first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_numpy, to_torch
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of
from bitwright.passes._pass import Context
from bitwright.passes.sparsity._frontier import walk

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20
"""Elements of lowered input held at a time."""


def reduction_axis(op: ops.Op) -> int:
    """The axis of a contraction's weight that is summed over (input channels of a convolution)."""
    return 0 if isinstance(op, ops.MatMul) and not op.transpose_b else 1


def lowered(op: ops.Op, weight: Array) -> torch.Tensor:
    """The weight of Linear, MatMul or Conv as float64 [outputs, taps * inputs]."""
    import torch

    w = to_torch(weight).to(torch.float64)
    if reduction_axis(op) == 0:
        return w.T.contiguous()
    return w.reshape(*w.shape[:2], -1).transpose(1, 2).reshape(w.shape[0], -1).contiguous()


def raised(op: ops.Op, matrix: torch.Tensor, like: Array) -> Array:
    """A lowered matrix in the shape and dtype of the weight it came from."""
    if reduction_axis(op) == 0:
        back = matrix.T
    else:
        back = matrix.reshape(matrix.shape[0], -1, like.shape[1]).transpose(1, 2).reshape(like.shape)
    out: Array = np.ascontiguousarray(to_numpy(back)).astype(like.dtype)
    return out


def rows(op: ops.Op, x: torch.Tensor, kernel: tuple[int, ...] = ()) -> Iterator[torch.Tensor]:
    """The inputs of Linear, MatMul or Conv as float64 matrices of rows x (taps * inputs), in pieces.

    ``kernel``: the window of a convolution, whose patches (padding included) become rows.
    """
    import torch

    if not isinstance(op, ops.Conv):
        flat = x.reshape(-1, x.shape[-1])
        for part in torch.split(flat, max(1, CHUNK // max(1, flat.shape[1]))):
            yield part.to(torch.float64)
        return
    x = x if op.channels_last else x.movedim(1, -1)
    begin, end, stride, dilation = _window(op, len(kernel))
    out = _places(op, x.shape[1:-1], kernel)
    pads = [p for pair in zip(reversed(begin), reversed(end), strict=True) for p in pair]
    wide = max(1, int(np.prod(out)) * int(np.prod(kernel)) * x.shape[-1])
    for image in torch.split(x, max(1, CHUNK // wide)):
        part = torch.nn.functional.pad(image, (0, 0, *pads))
        taps = [
            part[(slice(None), *(slice(t * d, t * d + (o - 1) * s + 1, s)
                                 for t, d, o, s in zip(tap, dilation, out, stride, strict=True)))]
            for tap in product(*map(range, kernel))
        ]  # fmt: skip
        yield torch.stack(taps, -2).reshape(-1, len(taps) * x.shape[-1]).to(torch.float64)


def count_rows(op: ops.Op, x: torch.Tensor, kernel: tuple[int, ...] = ()) -> int:
    """How many rows :func:`rows` gives in all."""
    if not isinstance(op, ops.Conv):
        return x.numel() // max(1, x.shape[-1])
    spatial = x.shape[1:-1] if op.channels_last else x.shape[2:]
    return int(x.shape[0] * np.prod(_places(op, spatial, kernel)))


def _window(op: ops.Conv, n: int) -> tuple[tuple[int, ...], ...]:
    """Padding at either end, stride and dilation of a convolution over ``n`` axes."""
    one, none = (1,) * n, (0,) * n
    return op.padding[:n] or none, op.padding[n:] or none, op.stride or one, op.dilation or one


def _places(op: ops.Conv, sizes: Sequence[int], kernel: tuple[int, ...]) -> list[int]:
    """Places of the window along each axis."""
    found = zip(sizes, kernel, *_window(op, len(kernel)), strict=True)
    return [(size + b + e - d * (k - 1) - 1) // s + 1 for size, k, b, e, s, d in found]


@dataclass
class Moments:
    """Sums over the rows that reach a layer."""

    gram: torch.Tensor
    """float64 [K, K]: the sum of x xᵀ."""
    total: torch.Tensor
    """float64 [K]: the sum of x."""
    rows: int = 0
    other: Moments | None = None
    """Of what the layer gets in the dense model, where its target is made from that."""
    cross: torch.Tensor | None = None
    """float64 [K, K]: the sum of (x in the dense model) xᵀ, with ``other``."""

    @staticmethod
    def empty(size: int) -> Moments:
        """Nothing seen yet of a layer with ``size`` lowered inputs."""
        import torch

        return Moments(torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64))

    def add(self, part: torch.Tensor) -> None:
        """Count a float64 matrix of rows."""
        self.gram.addmm_(part.T, part)
        self.total += part.sum(0)
        self.rows += len(part)

    def add_pair(self, part: torch.Tensor, dense: torch.Tensor) -> None:
        """Count rows and the same rows in the dense model."""
        import torch

        if self.other is None or self.cross is None:
            self.other, self.cross = Moments.empty(len(self.total)), torch.zeros_like(self.gram)
        self.add(part)
        self.other.add(dense)
        self.cross.addmm_(dense.T, part)

    def centred(self) -> torch.Tensor:
        """The sum of (x - mean)(x - mean)ᵀ."""
        import torch

        return self.gram - torch.outer(self.total, self.total / max(1, self.rows))

    def towards(self, centred: bool) -> torch.Tensor:
        """The sum of (target's x) xᵀ, each less its mean when centred."""
        import torch

        if self.other is None or self.cross is None:
            return self.centred() if centred else self.gram
        return self.cross - torch.outer(self.other.total, self.total / max(1, self.rows)) if centred else self.cross


def kernel_of(graph: Graph, node: Node) -> tuple[int, ...]:
    """The window of a convolution, empty for other contractions."""
    return graph.types[node.inputs[1]].static_shape[2:] if isinstance(node.op, ops.Conv) else ()


def finite(graph: Graph, node: Node, part: torch.Tensor, batch: int) -> torch.Tensor:
    """The rows; raises :class:`InvalidInput` that names value, layer and batch when one is NaN or infinite."""
    if not all_finite(part):
        what = "NaN" if bool(part.isnan().any()) else "an infinity"
        raise InvalidInput(
            f"%{node.inputs[0]}, the input of {layer_of(graph, node)}, has {what} in calibration batch {batch}: "
            "check the calibration data"
        )
    return part


def all_finite(values: torch.Tensor) -> bool:
    """True when no value is NaN or infinite; holds nothing of the size of the values, as ``isfinite`` does."""
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


def need_calibration(context: Context, who: str) -> None:
    """Raises :class:`InvalidInput` when there is no calibration data."""
    if not context.calibration:
        raise InvalidInput(
            f"{who} needs calibration data, a few batches of typical inputs: "
            "pass calibration=... in Python or --calibrate FILE on the command line"
        )


def input_norms(graph: Graph, nodes: list[Node], context: Context) -> dict[str, Array]:
    """Euclidean norm of each input feature over the calibration data, by value name of the weight it meets.

    The arrays are float64 and broadcast against the weight: per input of Linear and MatMul, per input channel and
    tap of a convolution. Layers with the same weight are summed. Batches run one after the other.
    Wanda: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, eq. 1.
    """

    squares: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(context.calibration):
        if context.progress is not None:
            context.progress("measuring inputs", number / len(context.calibration))

        def visit(node: Node, xs: list[torch.Tensor], _: list[torch.Tensor], number: int = number) -> None:
            for part in rows(node.op, xs[0], kernel_of(graph, node)):
                sums = finite(graph, node, part, number).square().sum(0)
                key = node.inputs[1]
                squares[key] = squares[key] + sums if key in squares else sums

        walk(graph, [batch], {n.output for n in nodes}, visit)
    out = {}
    for n in nodes:
        shape = graph.types[n.inputs[1]].static_shape
        if n.inputs[1] not in squares:
            raise InvalidInput(f"no calibration data reaches {layer_of(graph, n)}: the batches are empty")
        norms = squares[n.inputs[1]].sqrt().numpy()
        if isinstance(n.op, ops.Conv):
            norms = np.ascontiguousarray(norms.reshape(-1, shape[1]).T).reshape(1, *shape[1:])
        out[n.inputs[1]] = norms[:, None] if reduction_axis(n.op) == 0 else norms
    return out
