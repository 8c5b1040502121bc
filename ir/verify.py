"""The verifier: every rule a graph of each level obeys. The pass manager runs it after every change."""

from __future__ import annotations

import numpy as np

from bitwright.ir import ops
from bitwright.ir.errors import VerifyError
from bitwright.ir.graph import Graph, Level, Node
from bitwright.ir.infer import InferenceError, infer
from bitwright.ir.patterns import violation
from bitwright.ir.text import show_node
from bitwright.ir.types import TensorType

_FORBIDDEN: dict[Level, tuple[tuple[type[ops.Op], ...], str]] = {
    "graph": ((*ops.INTEGER, ops.Region), "it belongs to a lower level"),
    "integer": ((ops.Region,), "regions belong to the kernel level"),
    "kernel": ((), ""),
}
_KERNEL_LEVEL = (ops.Region, ops.Reshape, ops.Weight, ops.Constant)


def verify(graph: Graph, level: Level | None = None) -> None:
    """Check names, order, operand and result types, the level's rules and weight values.

    Raises :class:`VerifyError` that quotes the first offending node with its neighbours.
    """
    if level is not None and graph.level != level:
        raise VerifyError(f"graph {graph.name!r} is of level {graph.level}, expected {level}")
    known = {v.name: v.type for v in graph.inputs}
    if len(known) != len(graph.inputs):
        raise VerifyError(f"graph {graph.name!r} has two inputs of one name")
    for i, node in enumerate(graph.nodes):
        if why := _check(graph, node, known):
            raise VerifyError(f"{why}\n{_context(graph, i)}")
        known.update(zip(node.outputs, node.types, strict=True))
    for out in graph.outputs:
        if out not in known:
            raise VerifyError(f"output %{out} is not defined")
    if len(set(graph.output_names)) != len(graph.output_names) or len(graph.outputs) != len(graph.output_names):
        raise VerifyError(f"output names {graph.output_names} do not match the outputs one to one")


def _context(graph: Graph, at: int, reach: int = 3) -> str:
    low = max(0, at - reach)
    lines = [show_node(n).splitlines()[0] for n in graph.nodes[low : at + reach + 1]]
    return "\n".join(("> " if low + k == at else "  ") + line.strip() for k, line in enumerate(lines))


def _check(graph: Graph, node: Node, known: dict[str, TensorType]) -> str:
    """Why the node is wrong, or the empty string."""
    if why := _check_names(node, known) or _check_level(graph.level, node.op):
        return why
    if isinstance(node.op, ops.Weight):
        return _check_weight(graph, node)
    if isinstance(node.op, ops.Constant):
        have, want = len(node.op.values), node.type.size
        return "" if have == want else f"a literal of {node.type} with {have} values"
    if isinstance(node.op, ops.Region) and (why := _check_region(node)):
        return why
    return _check_types(node, known)


def _check_names(node: Node, known: dict[str, TensorType]) -> str:
    for x in node.inputs:
        if x not in known:
            return f"%{x} is used before it is defined"
    for o in node.outputs:
        if o in known:
            return f"%{o} is defined twice"
    return ""


def _check_level(level: Level, op: ops.Op) -> str:
    banned, why = _FORBIDDEN[level]
    if isinstance(op, banned):
        return f"{op.spelling} may not stand in a graph of level {level}: {why}"
    if level == "kernel" and not isinstance(op, _KERNEL_LEVEL):
        return f"{op.spelling} may not stand in a graph of level kernel outside a region"
    return ""


def _check_types(node: Node, known: dict[str, TensorType]) -> str:
    try:
        types = infer(node.op, [known[x] for x in node.inputs])
    except InferenceError as e:
        return str(e)
    if len(types) != len(node.types) or len(node.types) != len(node.outputs):
        return f"{node.op.spelling} gives {len(types)} results, {len(node.types)} are declared"
    for have, want in zip(node.types, types, strict=True):
        if have.with_encoding(None) != want:
            return f"declared {have}, but {node.op.spelling} gives {want}"
        if have.encoding is not None:
            return f"%{node.output}: only weights carry an encoding"
    return ""


def _check_region(node: Node) -> str:
    assert isinstance(node.op, ops.Region)
    try:
        verify(node.op.body)
    except VerifyError as e:
        return f"inside the region: {e}"
    return ""


def _check_weight(graph: Graph, node: Node) -> str:
    assert isinstance(node.op, ops.Weight)
    handle = graph.weights.get(node.op.ref)
    if handle is None:
        return f"the weight store has no {node.op.ref!r}"
    if node.type in handle.checked:
        return ""
    a = handle.array
    if a.dtype != node.type.dtype.numpy or a.shape != node.type.shape:
        return f"weight {node.op.ref!r} is {a.dtype}{list(a.shape)}, declared {node.type}"
    if a.dtype.kind not in "iub" and bool(np.isnan(a.astype(np.float32, copy=False)).any()):
        return f"weight {node.op.ref!r} contains NaN"
    dtype = node.type.dtype
    if dtype.is_integer and dtype.bits not in (8, 16, 32, 64) and a.size and (a.min() < dtype.lo or a.max() > dtype.hi):
        return f"weight {node.op.ref!r} has values outside {dtype}"
    if node.type.encoding is not None and (why := violation(a, node.type.encoding)):
        return f"weight {node.op.ref!r} breaks its encoding: {why}"
    handle.checked.add(node.type)
    return ""
