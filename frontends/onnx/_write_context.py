"""What every part of the ONNX writer shares: names, initializers, nodes, and the types that stand for IR formats."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bitwright.frontends.onnx.reader import ELEMENTS
from bitwright.ir import ops
from bitwright.ir.errors import Problem, Unsupported
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import BF16, BOOL, F16, F32, Dim, DType, TensorType, integer, symbols_of
from bitwright.ir.weights import Array

Handler = Callable[["Writing", Node, Any], "str | tuple[str, ...]"]
"""Emits the nodes of one IR node; gives the names of its results."""

S4, U4 = integer(4), integer(4, False)


def container(dtype: DType, nibble: bool = False) -> DType:
    """The format ONNX holds ``dtype`` in: itself, else the next wider integer, f32 for small floats.

    ``nibble``: integers of up to four bits as INT4 and UINT4 and not in a byte.
    """
    if dtype.is_float:
        return dtype if dtype in ELEMENTS else F32
    if dtype == BOOL:
        return dtype
    signed = dtype.kind != "uint"
    if nibble and dtype.bits <= 4:
        return S4 if signed else U4
    return integer(next(w for w in (8, 16, 32, 64) if dtype.bits <= w), signed)


def element(dtype: DType) -> int:
    """The ONNX element type of a format that :func:`container` gave."""
    return int(ELEMENTS[dtype])


class Writing:
    """The model under construction. Value names are ONNX names; IR values have theirs from :meth:`name`."""

    def __init__(self, graph: Graph, codes: Callable[[Writing, Node, bool], str]) -> None:
        self.graph = graph
        self._codes = codes  # writes a weight in codes; True: transposed
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.bound: dict[str, str] = {v.name: v.name for v in graph.inputs}
        self.nibbles: set[str] = set()
        """IR values that are held in INT4 or UINT4."""
        self._refs = {n.op.ref for n in graph.nodes if isinstance(n.op, ops.Weight)}
        self._taken = {*self.bound, *graph.output_names}
        self._node_names: set[str] = set()
        self._cache: dict[Any, str] = {}
        self._place = ("", "")
        self._final: dict[str, str] = {}
        for value, name in zip(graph.outputs, graph.output_names, strict=True):
            if value not in self.bound and name not in self.bound and not graph.is_constant(value):
                self._final.setdefault(value, name)

    # --- reading the IR ----------------------------------------------------------------------------------------

    def type(self, value: str) -> TensorType:
        return self.graph.types[value]

    def refuse(self, why: str, cure: str = "") -> NoReturn:
        """Stop this operator: raises :class:`Unsupported` with operator and place."""
        raise Unsupported(Problem(*self._place, why, cure))

    def at(self, n: Node) -> None:
        """Nodes and refusals from here on belong to ``n``."""
        self._place = (n.op.spelling, n.origin or n.output)

    def finish(self, n: Node, results: str | tuple[str, ...], first: int) -> None:
        """Name the results of ``n``, whose nodes are those from ``first`` on, as the IR does."""
        names = (results,) if isinstance(results, str) else results
        made = {o for node in self.nodes[first:] for o in node.output}
        for value, name in zip(n.outputs, names, strict=True):
            if name in made:
                made.remove(name)
                self.bound[value] = self._rename(name, self._final.get(value) or self.fresh(value), first)
            else:
                self.bound[value] = name
        layer = re.match(r"[^,:(]+?(?=, | \(|$)", n.origin)
        for node in self.nodes[first:]:
            node.name = node.name or self._unique(layer[0] if layer else n.output)

    def label(self, name: str) -> None:
        """Name the last node."""
        self.nodes[-1].name = self._unique(name)

    def _rename(self, old: str, new: str, first: int) -> str:
        for node in self.nodes[first:]:
            for names in (node.input, node.output):
                for i, x in enumerate(names):
                    if x == old:
                        names[i] = new
        return new

    def _unique(self, stem: str) -> str:
        name, i = stem, 0
        while name in self._node_names:
            i += 1
            name = f"{stem}.{i}"
        self._node_names.add(name)
        return name

    def fresh(self, stem: str) -> str:
        """A value name nobody has, that starts with ``stem``."""
        name, i = stem, 0
        while name in self._taken:
            i += 1
            name = f"{stem}.{i}"
        self._taken.add(name)
        return name

    # --- values ------------------------------------------------------------------------------------------------

    def name(self, value: str) -> str:
        """The ONNX name of an IR value; constants, and weights in codes, are written when they are first asked for."""
        if value not in self.bound:
            n = self.graph.producers[value]
            if isinstance(n.op, ops.Dequantize):
                before, place = len(self.nodes), self._place
                self.at(n)
                self.finish(n, self._codes(self, n, False), before)
                self._place = place
            else:
                self.bound[value] = self.constant(value)
        return self.bound[value]

    def names(self, values: Iterable[str]) -> list[str]:
        return [self.name(v) for v in values]

    def array(self, value: str) -> Array:
        """The values of a weight or literal."""
        found = self.graph.constant(value)
        assert isinstance(found, np.ndarray)
        return found

    def constant(self, value: str, *, held: DType | None = None, turned: bool = False) -> str:
        """An initializer for a weight or literal, as ``held``; ``turned``: transposed (two axes)."""
        key = ("constant", value, held, turned)
        if key not in self._cache:
            n = self.graph.producers[value]
            dtype = held or container(n.type.dtype)
            array = self.array(value)
            self._cache[key] = self.initializer(self.constant_stem(value), array.T if turned else array, dtype)
        return self._cache[key]

    def constant_stem(self, value: str) -> str:
        """What a user calls this constant: the key of the weight, without the number a pass gave a new version."""
        n = self.graph.producers[value]
        if not isinstance(n.op, ops.Weight):
            return n.output
        stem = re.sub(r"[.~]\d+$", "", n.op.ref)
        versions = re.compile(re.escape(stem) + r"([.~]\d+)?")  # of one weight, or a list of weights
        return n.op.ref if any(r != n.op.ref and versions.fullmatch(r) for r in self._refs) else stem

    def initializer(self, stem: str, array: Array, dtype: DType) -> str:
        """A new initializer; ``dtype`` is a format ONNX has."""
        numpy = {S4: np.dtype(ml_dtypes.int4), U4: np.dtype(ml_dtypes.uint4), BF16: np.dtype(ml_dtypes.bfloat16)}
        data = np.ascontiguousarray(array).reshape(array.shape).astype(numpy.get(dtype, dtype.numpy), copy=False)
        name = self.fresh(stem)
        self.initializers[name] = numpy_helper.from_array(data, name)
        return name

    def literal(self, values: Any, dtype: DType, stem: str = "") -> str:
        """A small constant that the writer itself needs; equal ones are one."""
        array = np.asarray(values, dtype.numpy)
        key = ("literal", str(dtype), array.shape, array.tobytes())
        if key not in self._cache:
            shown = stem or "c." + (str(array.item()) if array.size == 1 else "x".join(map(str, array.shape)))
            self._cache[key] = self.initializer(shown, array, dtype)
        return self._cache[key]

    def ints(self, values: Iterable[int]) -> str:
        """A vector of s64."""
        from bitwright.ir.types import S64

        return self.literal(np.array(list(values), np.int64).reshape(-1), S64, "axes")

    def cached(self, key: Any, make: Callable[[], str]) -> str:
        """The value under ``key``, made once."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    # --- nodes -------------------------------------------------------------------------------------------------

    def emit(self, op: str, *inputs: str, **attributes: Any) -> str:
        """One node with one result; attributes that are None are left out."""
        return self.emit_many(op, 1, *inputs, **attributes)[0]

    def emit_many(self, op: str, results: int, *inputs: str, **attributes: Any) -> tuple[str, ...]:
        """One node with several results."""
        outs = tuple(self.fresh(f"{op.lower()}.{len(self.nodes)}") for _ in range(results))
        given = {k: v for k, v in sorted(attributes.items()) if v is not None}
        self.nodes.append(helper.make_node(op, list(inputs), list(outs), **given))
        return outs

    def cast(self, x: str, dtype: DType) -> str:
        return self.emit("Cast", x, to=element(dtype))

    def widened(self, x: str, dtype: DType) -> str:
        """f16 and bf16 as f32, which the IR computes sums in."""
        return self.cast(x, F32) if dtype in (F16, BF16) else x

    def narrowed(self, x: str, dtype: DType) -> str:
        """Back from :meth:`widened`."""
        return self.cast(x, dtype) if dtype in (F16, BF16) else x

    def transposed(self, x: str, rank: int) -> str:
        """The last two axes exchanged."""
        return self.emit("Transpose", x, perm=[*range(rank - 2), rank - 1, rank - 2])

    # --- symbolic sizes ----------------------------------------------------------------------------------------

    def size(self, symbol: str) -> str:
        """A symbol as s64[1], from an input that has it as a factor-free or scaled size."""
        for v in self.graph.inputs:
            for axis, d in enumerate(v.type.shape):
                if symbols_of(d) == (symbol,):
                    factor = math.prod(int(p) for p in str(d).split("*") if p.isdigit())
                    return self.cached(("size", symbol), lambda: self._measure(v.name, axis, factor))  # noqa: B023
        self.refuse(f"the size {symbol!r} is no size of an input by itself", f"give the model a fixed {symbol}")

    def _measure(self, value: str, axis: int, factor: int) -> str:
        found = self.emit("Shape", value, start=axis, end=axis + 1)
        return found if factor == 1 else self.emit("Div", found, self.ints([factor]))

    def shape(self, dims: Iterable[Dim]) -> str:
        """A shape as an s64 vector: a constant, or computed from the sizes of the inputs."""
        dims = tuple(dims)
        if all(isinstance(d, int) for d in dims):
            return self.ints(int(d) for d in dims)
        parts = [self.ints([d]) if isinstance(d, int) else self._product(d) for d in dims]
        return parts[0] if len(parts) == 1 else self.emit("Concat", *parts, axis=0)

    def _product(self, dim: str) -> str:
        factors = dim.split("*")
        parts = [self.ints([int(f)]) if f.isdigit() else self.size(f) for f in factors]
        out = parts[0]
        for p in parts[1:]:
            out = self.emit("Mul", out, p)
        return out

    def reshape(self, x: str, have: tuple[Dim, ...], want: tuple[Dim, ...]) -> str:
        """Reshape with the batch left open: 0 copies a size, a single -1 stands for what is left."""
        if all(isinstance(d, int) for d in want):
            return self.emit("Reshape", x, self.ints(map(int, want)), allowzero=1 if 0 in want else None)
        plan = [d if isinstance(d, int) else 0 if i < len(have) and have[i] == d else -1 for i, d in enumerate(want)]
        if plan.count(-1) <= 1 and not any(d == 0 for d in (*have, *want)):
            return self.emit("Reshape", x, self.ints(plan))
        return self.emit("Reshape", x, self.shape(want), allowzero=1)
