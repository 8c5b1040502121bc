"""Example inputs and symbolic sizes: what the user writes, what torch.export wants, and the names in between."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bitwright.ir.errors import InvalidInput

Batch = bool | str


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tensor, a sequence, or a mapping of keyword arguments."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    if example_inputs is None:
        raise InvalidInput("a torch module needs example_inputs: what it would be called with")
    raise InvalidInput(f"example inputs are a tensor, a sequence or a mapping, not {type(example_inputs).__name__}")


def arguments_by_name(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments under the names of forward's parameters, as torch.export's dynamic_shapes wants them."""
    try:
        return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    except TypeError as e:
        raise InvalidInput(f"example inputs do not fit {type(module).__name__}.forward: {e}") from e


def _map(tree: Any, leaf: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(tree, torch.Tensor):
        return leaf(tree)
    if isinstance(tree, (list, tuple)):
        made = [_map(t, leaf) for t in tree]
        return type(tree)(made) if type(tree) in (list, tuple) else type(tree)(*made)
    if isinstance(tree, dict):
        return {k: _map(v, leaf) for k, v in tree.items()}
    return tree


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a tree of lists, tuples and dicts, in order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for t in tree:
            yield from tensors_of(t)
    elif isinstance(tree, dict):
        for t in tree.values():
            yield from tensors_of(t)


def _specs_none(tree: Any, leaf: Callable[[torch.Tensor], Any]) -> Any:
    """Like the tree, with ``leaf(tensor)`` for tensors and None for everything else."""
    if isinstance(tree, torch.Tensor):
        return leaf(tree)
    if isinstance(tree, (list, tuple)):
        specs = [_specs_none(t, leaf) for t in tree]
        return specs if isinstance(tree, list) else tuple(specs)
    if isinstance(tree, dict):
        return {k: _specs_none(v, leaf) for k, v in tree.items()}
    return None


def batch_specs(arguments: dict[str, Any], symbol: str) -> dict[str, Any]:
    """dynamic_shapes that make axis 0 symbolic wherever it has the first tensor's size."""
    first = next((t.shape[0] for t in tensors_of(arguments) if t.dim()), None)
    if first is None:
        raise InvalidInput("dynamic_batch needs an input tensor with at least one axis")
    return {
        k: _specs_none(v, lambda t: {0: symbol} if t.dim() and t.shape[0] == first else {})
        for k, v in arguments.items()
    }


def widen_batch(args: Any, arguments: dict[str, Any]) -> Any:
    """The arguments with a batch of 1 doubled: torch.export would fix a symbolic size of 1."""
    first = next(t.shape[0] for t in tensors_of(arguments) if t.dim())
    if first != 1:
        return args
    return _map(args, lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t)


def torch_specs(spec: Any) -> Any:
    """The dynamic_shapes with plain names replaced by Dim.DYNAMIC, whose range torch finds out itself."""
    if isinstance(spec, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(spec, dict):
        return {k: torch_specs(v) for k, v in spec.items()}
    return type(spec)(torch_specs(v) for v in spec) if isinstance(spec, (list, tuple)) else spec


def _leaf_specs(tree: Any, spec: Any) -> Iterator[Any]:
    """The spec of every tensor, in order; None where there is none."""
    if isinstance(tree, torch.Tensor):
        yield spec
    elif isinstance(tree, dict):
        for i, (k, v) in enumerate(tree.items()):
            inner = spec.get(k) if isinstance(spec, dict) else spec[i] if isinstance(spec, (list, tuple)) else None
            yield from _leaf_specs(v, inner)
    elif isinstance(tree, (list, tuple)):
        for i, v in enumerate(tree):
            inner = spec[i] if isinstance(spec, (list, tuple)) and i < len(spec) else None
            yield from _leaf_specs(v, inner)


def _dim_name(dim: Any) -> str | None:
    name = dim if isinstance(dim, str) else getattr(dim, "__name__", None)
    return name if isinstance(name, str) and name.isidentifier() else None


def axis_names(arguments: dict[str, Any], spec: Any) -> list[dict[int, str]]:
    """For each input tensor in order: the user's names of its symbolic axes."""
    if isinstance(spec, (list, tuple)) and not isinstance(spec, dict):
        spec = dict(zip(arguments, spec, strict=False))
    out = []
    for leaf in _leaf_specs(arguments, spec):
        items = leaf.items() if isinstance(leaf, dict) else enumerate(leaf or ())
        out.append({axis: name for axis, d in items if (name := _dim_name(d))})
    return out


def symbol_names(fakes: Sequence[torch.Tensor], named: Sequence[dict[int, str]]) -> dict[str, str]:
    """torch's symbols (s77) to ours: the user's Dim names, else b for a first axis, s for a second, then d, e, ..."""
    found: dict[str, str] = {}
    loose: dict[str, int] = {}
    for i, fake in enumerate(fakes):
        for axis, size in enumerate(fake.shape):
            if isinstance(size, int):
                continue
            expr = size.node.expr
            name = named[i].get(axis) if i < len(named) else None
            if expr.is_Symbol and name and str(expr) not in found:
                found[str(expr)] = name
            for symbol in expr.free_symbols:
                loose.setdefault(str(symbol), axis)
    taken = set(found.values())
    for symbol, axis in loose.items():
        if symbol in found:
            continue
        candidates = ["b" if axis == 0 else "s" if axis == 1 else "d", *(f"d{k}" for k in range(100))]
        found[symbol] = next(c for c in candidates if c not in taken)
        taken.add(found[symbol])
    return found
