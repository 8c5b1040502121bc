"""A picture of a mask: which weights of a layer are kept, on the lowered view of outputs by reduction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput, did_you_mean
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import NM

CLOSE = 48
"""Rows and columns of the part that is shown weight by weight."""
WHOLE = 1024
"""Cells a side of the picture of the whole layer; a larger layer is shown as the kept share of each cell."""
Array = np.ndarray[Any, Any]


def draw_mask(graph: Graph, layer: str, path: str | Path) -> str:
    """Write a PNG of the constant weight of ``layer``: the whole matrix, and its upper left corner with the groups.

    ``layer`` is the name that reports and refusals use, such as ``encoder.fc1``. Returns a line that says what is
    kept. Raises :class:`InvalidInput` for an unknown layer or one whose weight is not constant.
    """
    from matplotlib.figure import Figure

    node, weight = _find(graph, layer)
    flat = lowered(node, weight)
    kept = flat != 0
    pattern = graph.types[node.inputs[1]].encoding
    text = f"{layer}: {pattern or 'dense'}, {np.count_nonzero(kept):,} of {kept.size:,} weights ({kept.mean():.1%})"
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    whole, close = figure.subplots(1, 2)
    cells = _cells(kept)
    whole.imshow(cells, cmap="Blues", vmin=0, vmax=1, aspect="auto", extent=(0, flat.shape[1], flat.shape[0], 0))
    whole.set(title=f"kept share, {flat.shape[0]} outputs x {flat.shape[1]}", xlabel="reduction (tap, input)")
    whole.set_ylabel("output")
    part = np.abs(flat[:CLOSE, :CLOSE].astype(np.float64))
    shown = np.ma.masked_where(part == 0, part)
    image = close.imshow(shown, cmap="viridis", aspect="equal", extent=(0, part.shape[1], part.shape[0], 0))
    close.set(title=f"the first {part.shape[0]} x {part.shape[1]}: magnitude, white is pruned", xlabel="reduction")
    if isinstance(pattern, NM):
        _grid(close, pattern, node, part.shape)
    figure.colorbar(image, ax=close, shrink=0.8)
    figure.suptitle(text, fontsize=11)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as e:
        raise InvalidInput(f"cannot write {path}: {e.strerror or e}") from e
    return text


def lowered(node: Node, weight: Array) -> Array:
    """The matrix of outputs by (tap, input): of a convolution's OIHW weight, input channels innermost."""
    if weight.ndim == 2:
        stored_by_rows = isinstance(node.op, ops.MatMul) and not node.op.transpose_b
        return weight.T if stored_by_rows else weight
    moved: Array = np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)
    return moved


def _find(graph: Graph, layer: str) -> tuple[Node, Array]:
    from bitwright.passes._layers import layer_of

    found = [n for n in graph.nodes if isinstance(n.op, ops.CONTRACTION)]
    names = [layer_of(graph, n) for n in found]
    if layer not in names:
        raise InvalidInput(f"no layer is called {layer!r}{did_you_mean(layer, names)}; the model has {_some(names)}")
    node = found[names.index(layer)]
    if not graph.is_constant(node.inputs[1]) or graph.types[node.inputs[1]].rank < 2:
        raise InvalidInput(f"{layer} has no constant weight matrix to draw")
    return node, np.asarray(graph.constant(node.inputs[1]))


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _cells(kept: Array) -> Array:
    """Kept share of at most WHOLE x WHOLE cells."""
    cells = kept.astype(np.float64)
    for axis in (0, 1):
        step = -(-cells.shape[axis] // WHOLE)
        starts = np.arange(0, cells.shape[axis], step)
        sizes = np.diff(np.append(starts, cells.shape[axis]))
        cells = np.add.reduceat(cells, starts, axis=axis) / (sizes[:, None] if axis == 0 else sizes)
    return cells


def _grid(axes: Any, nm: NM, node: Node, shape: tuple[int, ...]) -> None:
    """Lines between the groups of the pattern."""
    across = range(0, shape[1] + 1, nm.group * nm.block)
    step = nm.group if nm.transposable else nm.shared
    down = range(0, shape[0] + 1, step) if step > 1 else ()
    for x in across:
        axes.axvline(x, color="0.75", linewidth=0.6)
    for y in down:
        axes.axhline(y, color="0.75", linewidth=0.6)
