"""Walks an ONNX graph and emits IR: scopes, constant folding, functions, limits, all problems collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto

from bitwright.frontends.onnx.fold import Folder
from bitwright.frontends.onnx.reader import LARGEST_ELEMENTS, LARGEST_RANK, array_handle, tensor_handle
from bitwright.frontends.onnx.symbolic import Poly, Unknown, to_dim
from bitwright.frontends.onnx.values import Nothing, NotStatic, Poison, Val, Value
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.errors import InvalidInput, Problem, Unsupported
from bitwright.ir.infer import InferenceError, infer
from bitwright.ir.types import DType, TensorType, symbols_of
from bitwright.ir.weights import Array, Handle

if TYPE_CHECKING:
    from bitwright.frontends.onnx.call import Call

Result = object
"""A value, or a list of values for the node's results in order."""
Handler = Callable[["Call"], Result]
MALFORMED = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What NumPy, torch and protobuf raise on operands that make no sense."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What keeps a small hostile file from becoming a large computation."""

    nodes: int = 100_000
    depth: int = 64
    trips: int = 256
    folded_bytes: int = 16 << 20
    problems: int = 200


class TooLarge(Unsupported):
    """A limit was hit; the import stops at once."""


def clean(text: str) -> str:
    """A name without line breaks and other control characters, as the text form needs it."""
    return "".join(c if c.isprintable() else "_" for c in text)


@dataclass(slots=True)
class Scope:
    """Names of one graph, function body or branch; the outer graph's names are visible in a branch."""

    opsets: Mapping[str, int]
    outer: Scope | None = None
    prefix: str = ""
    depth: int = 0
    names: dict[str, Value] = field(default_factory=dict)

    def find(self, name: str) -> Value | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        return None

    def define(self, name: str, value: Value) -> None:
        if name in self.names:
            raise InvalidInput(f"{name!r} is defined twice")
        self.names[name] = value


class Importer:
    """State of one import."""

    def __init__(
        self, name: str, folder: Path | None, limits: Limits, handlers: Mapping[tuple[str, str], Handler]
    ) -> None:
        self.builder = Builder(clean(name) or "main")
        self.folder, self.limits, self.handlers = folder, limits, handlers
        self.functions: dict[tuple[str, str, str], FunctionProto] = {}
        self.problems: dict[Problem, None] = {}
        self.malformed: set[Problem] = set()
        self.needs: dict[str, None] = {}
        self.steps = 0
        self.folder_of_constants = Folder(limits.folded_bytes)
        self.flipped: dict[int, tuple[Handle, Val]] = {}
        self.origin = ""

    # --- problems -----------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Count one node; raises :class:`TooLarge` at the limit."""
        self.steps += 1
        if self.steps > self.limits.nodes or len(self.builder.nodes) > 4 * self.limits.nodes:
            why = f"functions and loops expand to more than {self.limits.nodes} nodes"
            raise TooLarge(Problem("model", "", why, "simplify the model before importing it"))

    def report(self, problem: Problem, malformed: bool = False) -> None:
        if len(self.problems) < self.limits.problems:
            self.problems[problem] = None
            if malformed:
                self.malformed.add(problem)

    # --- values -------------------------------------------------------------------------------------------------

    def constant(self, array: Array, type: TensorType | None = None, label: str = "") -> Val:
        """A constant from an array."""
        handle, kind = array_handle(array, label or self.origin)
        return Val(type or kind, handle, label=label)

    def initializer(self, t: onnx.TensorProto) -> Val:
        handle, kind = tensor_handle(t, self.folder, f"tensor {t.name!r}")
        return Val(kind, handle, label=t.name)

    def sizes(self, entries: Array, dtype: DType, label: str = "") -> Val:
        """A tensor of sizes: a constant when no symbol is left in it."""
        entries = np.asarray(entries, dtype=object)
        if any(isinstance(e, Poly) for e in entries.flat):
            return Val(TensorType(dtype, entries.shape), entries=entries, label=label)
        return Val(TensorType(dtype, entries.shape), Handle(entries.astype(dtype.numpy)), label=label)

    def emit(self, op: ops.Op, *xs: Val, fold: bool = True, label: str = "") -> Val:
        """Apply an operator: folded when its operands are known, otherwise a node."""
        return self.emit_all(op, *xs, fold=fold, label=label)[0]

    def emit_all(self, op: ops.Op, *xs: Val, fold: bool = True, label: str = "") -> tuple[Val, ...]:
        types = infer(op, [x.type for x in xs])
        self._bounded(op, types)
        if fold and (known := self.folder_of_constants.fold(op, xs, types, self.origin)) is not None:
            return known
        names = [self.name_of(x) for x in xs]
        outs = self.builder.append(op, names, (clean(label),) * len(types), types, self.origin)
        sources = xs[0].sources if len(xs) == 1 else frozenset().union(*(x.sources for x in xs))
        return tuple(Val(t, ir=o, sources=sources) for t, o in zip(types, outs, strict=True))

    def _bounded(self, op: ops.Op, types: Iterable[TensorType]) -> None:
        for t in types:
            if t.rank > LARGEST_RANK:
                raise Unsupported(Problem(op.spelling, self.origin, f"a result of rank {t.rank} has too many axes"))
            count = 1
            for d in t.shape:
                count *= d if isinstance(d, int) else 1
            if count > LARGEST_ELEMENTS:
                raise Unsupported(Problem(op.spelling, self.origin, f"a result of type {t} is too large"))

    def name_of(self, x: Val) -> str:
        """The IR value; constants are emitted on first use, under the name the file gives them."""
        if x.ir is None:
            if x.entries is not None:
                x.ir = self._computed_sizes(x)
            else:
                assert x.handle is not None
                self._check_numbers(x)
                x.ir = self._emit_constant(x)
        return x.ir

    def _emit_constant(self, x: Val) -> str:
        assert x.handle is not None
        small = x.type.size <= 64 and (x.rank == 0 or not x.label or (x.rank == 1 and x.type.dtype.is_integer))
        if small and x.type.dtype.kind in ("float", "int", "uint", "bool"):
            return self.builder.constant(x.handle.array, x.type, name=clean(x.label), origin=self.origin)
        key = clean(x.label) or "folded"
        return self.builder.weight(key, x.handle, x.type, name=key, origin=self.origin)

    def _check_numbers(self, x: Val) -> None:
        assert x.handle is not None
        if x.type.dtype.is_float and has_nan(x.handle.array):
            raise InvalidInput(f"tensor {x.label or self.origin!r} contains NaN")
        x.handle.checked.add(x.type)

    def _computed_sizes(self, x: Val) -> str:
        """Sizes as data: a size s is the sum of s ones."""
        assert x.entries is not None
        parts = [self._computed_size(e, x.type.dtype) for e in x.entries.reshape(-1)]
        flat = [self.emit(ops.Reshape((1,)), p, fold=False) for p in parts]
        joined = self.emit(ops.Concat(0), *flat, fold=False) if len(flat) > 1 else flat[0]
        return self.name_of(self.emit(ops.Reshape(x.type.static_shape), joined, fold=False))

    def _computed_size(self, entry: object, dtype: DType) -> Val:
        if not isinstance(entry, Poly):
            return self.constant(np.asarray(entry, dtype.numpy), TensorType(dtype, ()))
        total: Val | None = None
        for names, factor in entry.terms:
            ones = self.constant(np.ones((), dtype.numpy), TensorType(dtype, ()))
            term = ones
            if names:
                dim = to_dim(Poly(((names, factor / factor),)))
                wide = self.emit(ops.Expand((dim,)), ones, fold=False)
                term = self.emit(ops.Reduce("sum", (0,)), wide)
            scale = self.constant(np.asarray(float(factor) if dtype.is_float else int(factor), dtype.numpy))
            term = self.emit(ops.Binary("mul"), term, scale) if factor != 1 else term
            total = term if total is None else self.emit(ops.Binary("add"), total, term)
        assert total is not None
        return total

    # --- graphs -------------------------------------------------------------------------------------------------

    def run_nodes(self, nodes: Sequence[NodeProto], wanted: Iterable[str], scope: Scope) -> None:
        """Translate the nodes that ``wanted`` needs."""
        for node in live(nodes, wanted):
            self.step()
            self.run_node(node, scope)

    def run_node(self, node: NodeProto, scope: Scope) -> None:
        """Translate one node; what fails is noted and its results are poisoned."""
        from bitwright.frontends.onnx.call import Call

        before, self.origin = self.origin, origin_of(node, scope)
        outputs: Sequence[Any] | None = None
        ins: list[Value | None] = []
        try:
            ins = [self._operand(name, scope) for name in node.input]
            if any(isinstance(x, Poison) for x in ins):
                outputs = (Poison(),) * len(node.output)
                self._check_known(Call(self, node, scope, ins))
            else:
                result = self._apply(Call(self, node, scope, ins))
                outputs = result if isinstance(result, (tuple, list)) else (result,)
        except TooLarge:
            raise
        except NotStatic as e:
            self._not_static(node, e)
        except InferenceError as e:
            self._does_not_fit(node, e, ins)
        except InvalidInput as e:
            self.report(Problem(node.op_type, self.origin, str(e)), malformed=True)
        except Unknown:
            self.report(Problem(node.op_type, self.origin, "a size is no whole number or no product of symbolic sizes"))
        except Unsupported as e:
            for p in e.problems:
                self.report(p)
        except RecursionError:
            raise TooLarge(Problem(node.op_type, self.origin, "functions or graphs nest too deeply")) from None
        except MALFORMED as e:
            self.report(Problem(node.op_type, self.origin, f"malformed: {type(e).__name__}: {e}"), malformed=True)
        self._define(node, outputs, scope)
        self.origin = before

    def _define(self, node: NodeProto, outputs: Sequence[Value | None] | None, scope: Scope) -> None:
        """Bind the node's results; None stands for a node that failed (and was reported)."""
        for i, name in enumerate(node.output):
            if not name:
                continue
            value = outputs[i] if outputs is not None and i < len(outputs) else None
            if name in scope.names:
                self.report(Problem(node.op_type, origin_of(node, scope), f"{name!r} is defined twice"), malformed=True)
                continue
            if value is None and outputs is not None:
                self.report(Problem(node.op_type, self.origin, f"its output {i} ({name!r}) is not supported"))
            scope.define(name, value if value is not None else Poison())

    def _operand(self, name: str, scope: Scope) -> Value | None:
        if not name:
            return None
        value = scope.find(name)
        if value is None:
            raise InvalidInput(f"reads {name!r}, which no input, initializer or earlier node defines")
        return value

    def _does_not_fit(self, node: NodeProto, e: InferenceError, ins: Sequence[Value | None]) -> None:
        """Operands that do not fit: the file's fault, unless symbolic sizes are involved."""
        symbols = {s: None for x in ins if isinstance(x, Val) for d in x.shape for s in symbols_of(d)}
        cure = f"give a number: sizes={{{', '.join(f'{s!r}: ...' for s in symbols)}}}" if symbols else ""
        self.report(Problem(node.op_type, self.origin, str(e), cure), malformed=not symbols)

    def _not_static(self, node: NodeProto, e: NotStatic) -> None:
        names = sorted(e.sources)
        cure = ""
        if e.bindable and names:
            self.needs.update(dict.fromkeys(names))
            cure = "give " + " and ".join(f"{n!r}" for n in names) + " a fixed value: constants={name: array}"
        self.report(Problem(node.op_type, self.origin, e.what, cure))

    def _check_known(self, call: Call) -> None:
        """Report an operator that nobody knows even where its operands could not be computed."""
        domain = "" if call.node.domain == "ai.onnx" else call.node.domain
        key = (domain, call.node.op_type)
        if call.schema is None and key not in self.handlers and (*key, call.node.overload) not in self.functions:
            raise call.refuse(call.why_unknown())

    def _apply(self, call: Call) -> Result:
        node = call.node
        domain = "" if node.domain == "ai.onnx" else node.domain
        function = self.functions.get((domain, node.op_type, node.overload))
        if function is not None:
            return self.run_function(function, call)
        call.check_operands()
        handler = self.handlers.get((domain, node.op_type))
        if handler is not None:
            result = handler(call)
            if unread := call.unread():
                raise call.refuse(f"its attribute {', '.join(unread)} is not supported in this combination")
            return result
        return call.by_function_body()

    def run_function(self, f: FunctionProto, call: Call) -> list[Value | None]:
        """Inline a function body."""
        if call.scope.depth >= self.limits.depth:
            raise TooLarge(Problem(f.name, self.origin, f"functions nest deeper than {self.limits.depth}"))
        own = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in f.opset_import}
        opsets = {**call.scope.opsets, **own}  # some of the standard's own bodies name no operator set for ""
        scope = Scope(opsets, None, f"{self.origin} > ", call.scope.depth + 1)
        if len(call.ins) > len(f.input):
            raise InvalidInput(f"function {f.name} takes {len(f.input)} inputs, got {len(call.ins)}")
        for i, name in enumerate(f.input):
            scope.define(name, (call.ins[i] if i < len(call.ins) else None) or Nothing())
        attributes = {a.name: a for a in f.attribute_proto} | call.attributes
        wanted = [name for i, name in enumerate(f.output) if call.wants(i)]
        self.run_nodes([resolve(n, attributes) for n in f.node], wanted, scope)
        return [self._result(n, scope, f.name) if call.wants(i) else None for i, n in enumerate(f.output)]

    def run_graph(self, g: GraphProto, values: Sequence[Value], outer: Scope) -> list[Value]:
        """Translate a branch or loop body; ``values`` for its inputs in order."""
        if outer.depth >= self.limits.depth:
            raise TooLarge(Problem("graph", self.origin, f"graphs nest deeper than {self.limits.depth}"))
        scope = Scope(outer.opsets, outer, outer.prefix, outer.depth + 1)
        if len(values) != len(g.input):
            raise InvalidInput(f"graph {g.name!r} takes {len(g.input)} inputs, got {len(values)}")
        for v, x in zip(g.input, values, strict=True):
            scope.define(v.name, x)
        for t in g.initializer:
            scope.define(t.name, self.initializer(t))
        self.run_nodes(g.node, [o.name for o in g.output], scope)
        return [self._result(o.name, scope, g.name) for o in g.output]

    def _result(self, name: str, scope: Scope, where: str) -> Value:
        value = scope.find(name)
        if value is None:
            raise InvalidInput(f"{where} returns {name!r}, which nothing defines")
        return value


def has_nan(a: Array) -> bool:
    """NaN anywhere, read once: a finite sum proves there is none."""
    with np.errstate(all="ignore"):
        wide = a if a.dtype.itemsize >= 4 else a.astype(np.float32)
        return not np.isfinite(wide.sum()) and bool(np.isnan(wide).any())


def origin_of(node: NodeProto, scope: Scope) -> str:
    """What errors and nodes call the user's place: the node's name (or its first result) and operator."""
    name = node.name or next((o for o in node.output if o), "")
    text = f"{scope.prefix}{name} ({node.op_type})" if name else f"{scope.prefix}{node.op_type}"
    text = " ".join(clean(text).split())
    return text if len(text) <= 320 else f"{text[:100]} ... {text[-200:]}"


def reads_of(node: NodeProto) -> set[str]:
    """Names a node reads, those inside its subgraphs included (a superset is fine)."""
    names = set(node.input)
    for a in node.attribute:
        for g in [a.g, *a.graphs] if a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) else []:
            names.update(o.name for o in g.output)
            for n in g.node:
                names |= reads_of(n)
    return names


def live(nodes: Sequence[NodeProto], wanted: Iterable[str]) -> list[NodeProto]:
    """The nodes that the wanted names need, in order."""
    need, kept = set(wanted), []
    for n in reversed(nodes):
        if need.intersection(o for o in n.output if o):
            need |= reads_of(n)
            kept.append(n)
    return kept[::-1]


def resolve(node: NodeProto, attributes: Mapping[str, AttributeProto]) -> NodeProto:
    """A copy of a function's node with its attribute references replaced by the call's values."""
    if not any(a.ref_attr_name or a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
        return node
    out = NodeProto()
    out.CopyFrom(node)
    del out.attribute[:]
    for a in node.attribute:
        if a.ref_attr_name:
            if a.ref_attr_name in attributes:
                out.attribute.add().CopyFrom(attributes[a.ref_attr_name])
                out.attribute[-1].name = a.name
            continue
        out.attribute.add().CopyFrom(a)
        graphs = [out.attribute[-1].g] if a.type == AttributeProto.GRAPH else out.attribute[-1].graphs
        for g in graphs:
            inner = [resolve(n, attributes) for n in g.node]
            del g.node[:]
            g.node.extend(inner)
    return out
