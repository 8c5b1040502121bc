"""The reference interpreter: runs a graph of any level on torch tensors with the operators' one meaning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.infer import bind_op
from bitwright.ir.types import BF16, TensorType, symbols_of
from bitwright.ir.weights import Array

if TYPE_CHECKING:
    import torch

Observer = Callable[[str, "torch.Tensor"], None]


def to_torch(array: Any, *, read: bool = False) -> torch.Tensor:
    """A torch tensor over the same values (bf16 included); a tensor comes back as it is.

    An array that must not be written is copied, unless the caller promises to ``read`` only.
    """
    import torch

    if isinstance(array, torch.Tensor):
        return array
    a = np.ascontiguousarray(array).reshape(np.shape(array))
    if a.dtype == BF16.numpy:
        return torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16)
    if a.flags.writeable or not read:
        return torch.from_numpy(a if a.flags.writeable else a.copy())
    with warnings.catch_warnings():  # torch warns of arrays that must not be written
        warnings.simplefilter("ignore")
        return torch.from_numpy(a)


def to_numpy(tensor: torch.Tensor) -> Array:
    """A NumPy array of the same values (bf16 as ml_dtypes.bfloat16)."""
    import torch

    t = tensor.detach().cpu().contiguous()
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(BF16.numpy)
    return t.numpy()


def bind_symbols(graph: Graph, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """Sizes of the graph's symbols from concrete input shapes; raises :class:`InvalidInput` on a mismatch."""
    sizes: dict[str, int] = {}
    for value, shape in zip(graph.inputs, shapes, strict=True):
        if len(shape) != value.type.rank:
            raise InvalidInput(f"input {value.name!r} has type {value.type}, given shape {list(shape)}")
        for want, got in zip(value.type.shape, shape, strict=True):
            names = symbols_of(want)
            if not names:
                ok = want == got
            else:
                factor = int(str(want).split("*")[0]) if str(want)[0].isdigit() else 1
                ok = (
                    len(names) == 1 and got % factor == 0 and sizes.setdefault(names[0], got // factor) == got // factor
                )
            if not ok:
                raise InvalidInput(f"input {value.name!r} has type {value.type}, given shape {list(shape)}")
    return sizes


def run_nodes(
    graph: Graph, values: dict[str, torch.Tensor], sizes: dict[str, int] | None = None, observe: Observer | None = None
) -> None:
    """Run every node, reading and filling ``values`` (inputs must be there); frees what nobody reads any more."""
    from bitwright.ir.semantics import apply

    last = {x: i for i, n in enumerate(graph.nodes) for x in n.inputs}
    keep = set(graph.outputs)
    for i, n in enumerate(graph.nodes):
        if isinstance(n.op, (ops.Weight, ops.Constant)):
            if n.output not in values:
                values[n.output] = to_torch(graph.constant(n.output), read=n.output not in keep)
            continue
        results = apply(bind_op(n.op, sizes or {}), *(values[x] for x in n.inputs))
        for name, r in zip(n.outputs, results, strict=True):
            values[name] = r
            if observe is not None:
                observe(name, r)
        for x in n.inputs:
            if last[x] == i and x not in keep:
                values.pop(x, None)


def evaluate(
    graph: Graph,
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    observe: Observer | None = None,
    overrides: Mapping[str, Any] | None = None,
    grad: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Run the graph; results in graph output order.

    ``inputs``: arrays or tensors by input name or in order. ``observe(name, tensor)`` sees every computed value.
    ``overrides`` replaces weights by value name. ``grad`` keeps the autograd graph. Raises
    :class:`InvalidInput` for missing, extra or misshapen inputs.
    """
    import torch

    names = [v.name for v in graph.inputs]
    if not isinstance(inputs, Mapping):
        if len(inputs) != len(names):
            raise InvalidInput(f"{graph.name} takes {len(names)} inputs ({', '.join(names)}), got {len(inputs)}")
        inputs = dict(zip(names, inputs, strict=True))
    if set(inputs) != set(names):
        raise InvalidInput(f"{graph.name} takes inputs {names}, got {list(inputs)}")
    values = {v.name: _checked(to_torch(inputs[v.name]), v.name, v.type) for v in graph.inputs}
    sizes = bind_symbols(graph, [tuple(values[n].shape) for n in names])
    values.update({k: to_torch(v) for k, v in (overrides or {}).items()})
    with torch.set_grad_enabled(grad):
        run_nodes(graph, values, sizes, observe)
    return tuple(values[o] for o in graph.outputs)


def _checked(t: torch.Tensor, name: str, want: TensorType) -> torch.Tensor:
    from bitwright.ir.semantics import torch_dtype

    if t.dtype != torch_dtype(want.dtype):
        raise InvalidInput(f"input {name!r} has type {want}, given dtype {t.dtype}")
    return t
