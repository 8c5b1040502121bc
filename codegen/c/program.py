"""A static kernel-level graph as a C program: functions, tables, one arena, and the calls in order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.build import nbytes_of, split_regions
from bitwright.codegen.c.nests import Function, function, heavy, unsupported, why_not
from bitwright.codegen.c.text import identifier
from bitwright.codegen.c.values import Table
from bitwright.codegen.packing import Span, lower_bound, pack
from bitwright.ir import ops
from bitwright.ir.errors import Problem, Unsupported
from bitwright.ir.graph import Graph, Node

ALIGN = 8
Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Call:
    """One step: a function by number, the values it reads, its tables by number, the values it writes."""

    function: int
    inputs: tuple[str, ...]
    tables: tuple[int, ...]
    outputs: tuple[str, ...]
    label: str
    forms: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A program ready to be written.

    ``offsets``: where a value lies in the arena; ``views``: value to the value it is a view of. ``live``: bytes that
    are in use during each call.
    """

    graph: Graph
    functions: tuple[Function, ...]
    tables: tuple[Table, ...]
    calls: tuple[Call, ...]
    offsets: dict[str, int]
    views: dict[str, str]
    arena_bytes: int
    bound_bytes: int
    live: tuple[int, ...]

    @property
    def table_bytes(self) -> int:
        """Bytes of constants in flash."""
        return sum(t.values.nbytes for t in self.tables)

    @property
    def libm(self) -> list[str]:
        return sorted(set().union(*(f.libm for f in self.functions)))

    @property
    def integer_only(self) -> bool:
        """True when neither a value nor an operation is floating point."""
        return not any("float" in line or "double" in line for f in self.functions for line in (*f.parameters, *f.body))

    @property
    def exact(self) -> bool:
        """True when all sums are of integers and no library function is called: the bits are the reference's."""
        sums = [n for r in self.graph.nodes if isinstance(r.op, ops.Region) for n in heavy(r.op.body)]
        return not self.libm and all(n.type.dtype.is_integer for n in sums)

    def root(self, value: str) -> str:
        while value in self.views:
            value = self.views[value]
        return value

    def call_bytes(self, call: Call) -> int:
        """Bytes of the tables that a call reads."""
        return sum(self.tables[t].values.nbytes for t in call.tables)


@dataclass
class _Making:
    functions: dict[tuple[object, ...], int] = field(default_factory=dict)
    made: list[Function] = field(default_factory=list)
    tables: dict[tuple[str, bytes], int] = field(default_factory=dict)
    kept: list[Table] = field(default_factory=list)

    def enter(self, f: Function) -> int:
        """Number of the function; equal text is one function."""
        key = (f.parameters, f.body)
        if key not in self.functions:
            self.functions[key] = len(self.made)
            self.made.append(f)
        return self.functions[key]

    def table(self, t: Table, hint: str, names: set[str]) -> int:
        key = (t.ctype, np.ascontiguousarray(t.values).tobytes())
        if key not in self.tables:
            self.tables[key] = len(self.kept)
            self.kept.append(Table(identifier(hint, names), t.values, t.ctype))
        return self.tables[key]


def source_of(graph: Graph) -> Source:
    """The C program of a static kernel-level graph; raises :class:`Unsupported` with every operator it lacks."""
    graph = _one_function_each(graph)
    making, names = _Making(), set[str]()
    calls: list[Call] = []
    views: dict[str, str] = {}
    for node in graph.nodes:
        if isinstance(node.op, ops.Reshape):
            views[node.output] = node.inputs[0]
        elif isinstance(node.op, ops.Region):
            calls.append(_call(graph, node, making, names))
    calls += _copies(graph, calls, making)
    offsets, arena, bound, live = _place(graph, calls, views)
    return Source(graph, tuple(making.made), tuple(making.kept), tuple(calls), offsets, views, arena, bound, live)


def _one_function_each(graph: Graph) -> Graph:
    """Regions that cannot be one function become single operators; what is still unsupported is an error."""
    wide = {n.output for n in graph.nodes if isinstance(n.op, ops.Region) and why_not(n.op.body)}
    graph = split_regions(graph, wide) if wide else graph
    problems = []
    for n in graph.nodes:
        if isinstance(n.op, ops.Region):
            problems += [
                Problem(what, n.origin or n.output, "the C back end has no code for it", "compile for a CPU target")
                for what in unsupported(n.op.body)
            ]
    if problems:
        raise Unsupported(problems)
    return graph


def _call(graph: Graph, node: Node, making: _Making, names: set[str]) -> Call:
    assert isinstance(node.op, ops.Region)
    body = node.op.body
    constants: dict[str, Array] = {}
    outer = {}
    for value, inner in zip(node.inputs, body.inputs, strict=True):
        outer[inner.name] = value
        array = graph.constant(value)
        if isinstance(array, np.ndarray):
            constants[inner.name] = array
    f = function(body, constants)
    tables = tuple(making.table(t, f"{node.output}_{t.name}", names) for t in f.tables)
    inputs = tuple(outer[x] for x in f.inputs)
    label = next((n.origin for n in heavy(body) if n.origin), "") or node.origin or node.output
    return Call(making.enter(f), inputs, tables, node.outputs, label, f.forms)


def _copies(graph: Graph, calls: list[Call], making: _Making) -> list[Call]:
    """Copies into outputs that no call writes there itself: inputs, constants, views, a value given out twice."""
    written = {o for c in calls for o in c.outputs}
    out, given = [], set[str]()
    for k, value in enumerate(graph.outputs):
        if value in written and value not in given:
            given.add(value)
            continue
        out.append(_copy(graph, value, f"out{k}", making))
    return out


def _copy(graph: Graph, value: str, target: str, making: _Making) -> Call:
    from bitwright.ir.build import Builder

    t = graph.types[value]
    b = Builder("copy")
    x = b.input("x", t)
    body = b.finish([b.emit(ops.Reshape(t.shape), x)], ["y"])
    array = graph.constant(value)
    f = function(body, {"x": array} if isinstance(array, np.ndarray) else {})
    tables = tuple(making.table(t, f"{value}_{t.name}", set()) for t in f.tables)
    return Call(making.enter(f), (value,) if f.inputs else (), tables, (target,), f"copy {value}", ())


def _place(graph: Graph, calls: list[Call], views: dict[str, str]) -> tuple[dict[str, int], int, int, tuple[int, ...]]:
    """Offsets of intermediate values by lifetime, the arena's size, its lower bound, bytes live at each call."""

    def root(v: str) -> str:
        while v in views:
            v = views[v]
        return v

    outside = {v.name for v in graph.inputs} | set(graph.outputs)
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, c in enumerate(calls):
        for o in c.outputs:
            first.setdefault(o, i)
            last[o] = i
        for x in c.inputs:
            last[root(x)] = i
    held = [v for v in first if v not in outside and v in graph.types]
    sizes = {v: -(-nbytes_of(graph.types[v]) // ALIGN) * ALIGN for v in held}
    spans = [Span(sizes[v], first[v], last[v]) for v in held]
    at, arena = pack(spans)
    live = tuple(sum(s.nbytes for s in spans if s.first <= i <= s.last) for i in range(len(calls)))
    return dict(zip(held, at, strict=True)), arena, lower_bound(spans), live
