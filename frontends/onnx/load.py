"""``load_onnx``: an ONNX model as a graph-level program."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from bitwright.frontends.onnx import (
    ops_contract,
    ops_control,
    ops_index,
    ops_math,
    ops_norm,
    ops_quant,
    ops_recurrent,
    ops_resize,
    ops_sample,
    ops_shape,
    ops_signal,
)
from bitwright.frontends.onnx.importer import MALFORMED, Importer, Limits, Scope, clean
from bitwright.frontends.onnx.reader import LARGEST_ELEMENTS, LARGEST_RANK, array_handle, dtype_of_element, read_model
from bitwright.frontends.onnx.values import NeedsConstants, Nothing, Poison, Seq, Val, Value
from bitwright.ir.errors import BitwrightError, InvalidInput, Problem, Unsupported, did_you_mean
from bitwright.ir.graph import Graph
from bitwright.ir.types import Dim, TensorType, parse_dim

HANDLERS = {
    **ops_math.TABLE, **ops_shape.TABLE, **ops_contract.TABLE, **ops_norm.TABLE, **ops_quant.TABLE,
    **ops_index.TABLE, **ops_control.TABLE, **ops_resize.TABLE, **ops_sample.TABLE, **ops_recurrent.TABLE,
    **ops_signal.TABLE,
}  # fmt: skip
"""Every operator with a translation of its own; the rest goes through the standard's function bodies."""


def load_onnx(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    *,
    sizes: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[Dim]] | None = None,
    constants: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
) -> Graph:
    """Import an ONNX model.

    ``sizes`` gives symbolic sizes a number (``{"batch": 8}``), ``shapes`` an input another shape
    (``{"x": ("b", 3, 224, 224)}``), ``constants`` a fixed value to inputs that must be known while importing (a
    shape, axes, k). Raises :class:`InvalidInput` for a malformed file and :class:`Unsupported` with every problem
    of the model; :class:`NeedsConstants` when ``constants`` would help.
    """
    model, folder = read_model(source)
    options = (dict(sizes or {}), {k: tuple(v) for k, v in (shapes or {}).items()}, dict(constants or {}))
    try:
        return _load(model, folder, options, limits or Limits())
    except BitwrightError:
        raise
    except (RecursionError, *MALFORMED) as e:
        raise InvalidInput(f"the model is malformed: {type(e).__name__}: {e}") from e


Options = tuple[dict[str, int], dict[str, tuple[Dim, ...]], dict[str, Any]]


def _load(model: onnx.ModelProto, folder: Path | None, options: Options, limits: Limits) -> Graph:
    g = model.graph
    opsets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import}
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opsets.get("", 1) <= newest:
        raise Unsupported(Problem("model", "", f"operator set {opsets['']} is newer than {newest}"))
    importer = Importer(g.name, folder, limits, HANDLERS)
    for f in model.functions:
        key = ("" if f.domain == "ai.onnx" else f.domain, f.name, f.overload)
        if key in importer.functions:
            raise InvalidInput(f"function {f.name!r} of domain {f.domain!r} is defined twice")
        importer.functions[key] = f
    scope = Scope(opsets)
    _define_constants(importer, g, scope)
    Inputs(importer, scope, options).define(g)
    names = [o.name for o in g.output]
    if not names or len(set(names)) != len(names):
        raise InvalidInput(f"output names {names} must be there and differ")
    importer.run_nodes(g.node, names, scope)
    outs = _outputs(importer, names, scope)
    _raise_problems(importer)
    importer.origin = "outputs"
    emitted = [importer.name_of(v) for v in outs]
    return importer.builder.finish(emitted, distinct(clean(n) for n in names))


def distinct(names: Iterable[str]) -> list[str]:
    """The names, numbered where cleaning made two of them equal."""
    out: list[str] = []
    for name in names:
        fresh, n = name, 1
        while fresh in out:
            fresh, n = f"{name}.{n}", n + 1
        out.append(fresh)
    return out


def _define_constants(importer: Importer, g: onnx.GraphProto, scope: Scope) -> None:
    for t in g.initializer:
        try:
            scope.define(t.name, importer.initializer(t))
        except Unsupported as e:
            for p in e.problems:
                importer.report(p)
            scope.define(t.name, Poison())
    for s in g.sparse_initializer:
        importer.report(Problem("initializer", s.values.name, "sparse initializers are not supported"))
        scope.define(s.values.name, Poison())


def _outputs(importer: Importer, names: list[str], scope: Scope) -> list[Val]:
    outs = []
    for name in names:
        value: Value | None = scope.find(name)
        if value is None:
            raise InvalidInput(f"output {name!r} is not defined by any node")
        if isinstance(value, (Seq, Nothing)):
            importer.report(Problem("output", name, "sequences and optionals cannot leave the program"))
        elif isinstance(value, Val):
            outs.append(value)
    return outs


def _raise_problems(importer: Importer) -> None:
    problems = tuple(importer.problems)
    if not problems:
        return
    if all(p in importer.malformed for p in problems):
        raise InvalidInput("the model is malformed:\n" + "\n".join(f"  - {p}" for p in problems))
    if importer.needs:
        raise NeedsConstants(problems, importer.needs)
    raise Unsupported(problems)


class Inputs:
    """Declares the graph inputs: types, symbols, values bound to constants."""

    def __init__(self, importer: Importer, scope: Scope, options: Options) -> None:
        self.importer, self.scope = importer, scope
        self.sizes, self.shapes, self.constants = options
        self.symbols: dict[str, str] = {}
        self.used: set[str] = set()

    def define(self, g: onnx.GraphProto) -> None:
        """Put every input into the scope; an initializer of the same name is its default and wins."""
        names = [v.name for v in g.input]
        if len(set(names)) != len(names) or "" in names:
            raise InvalidInput(f"input names {names} must be there and differ")
        for given, what in ((self.shapes, "shapes"), (self.constants, "constants")):
            for key in given:
                if key not in names:
                    raise InvalidInput(
                        f"{what} names {key!r}, which is no input of the model{did_you_mean(key, names)}"
                    )
        for v in g.input:
            if v.name not in self.scope.names or v.name in self.constants:
                self.scope.names[v.name] = self._value(v)
        for key in self.sizes:
            if key not in self.used:
                raise InvalidInput(f"sizes names {key!r}, which is no symbolic size{did_you_mean(key, self.symbols)}")

    def _value(self, v: onnx.ValueInfoProto) -> Value:
        try:
            if v.name in self.constants:
                return self._constant(v)
            if not v.type.HasField("tensor_type"):
                kind = v.type.WhichOneof("value") or "unknown"
                raise Unsupported(Problem("input", v.name, f"a {kind.replace('_', ' ')} input is not supported"))
            t = TensorType(dtype_of_element(v.type.tensor_type.elem_type, v.name, "input"), self._shape(v))
            name = self.importer.builder.fresh(clean(v.name))
            return Val(t, ir=self.importer.builder.input(name, t), sources=frozenset([v.name]))
        except Unsupported as e:
            for p in e.problems:
                self.importer.report(p)
            return Poison()

    def _constant(self, v: onnx.ValueInfoProto) -> Val:
        handle, kind = array_handle(self.constants[v.name], v.name)
        want = dtype_of_element(v.type.tensor_type.elem_type, v.name, "input")
        if kind.dtype != want:
            raise InvalidInput(f"constants gives {v.name!r} as {kind.dtype}, the model wants {want}")
        return Val(kind, handle, label=v.name)

    def _shape(self, v: onnx.ValueInfoProto) -> tuple[Dim, ...]:
        if v.name in self.shapes:
            return self._within(v, tuple(self._given(d) for d in self.shapes[v.name]))
        t = v.type.tensor_type
        if not t.HasField("shape"):
            raise Unsupported(Problem("input", v.name, "its rank is not declared", f"give shapes={{{v.name!r}: ...}}"))
        return self._within(v, tuple(self._dim(d, f"{v.name}_{i}") for i, d in enumerate(t.shape.dim)))

    def _within(self, v: onnx.ValueInfoProto, dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
        if len(dims) > LARGEST_RANK or math.prod(d for d in dims if isinstance(d, int)) > LARGEST_ELEMENTS:
            raise Unsupported(Problem("input", v.name, f"a tensor of shape {list(dims)} is too large"))
        return dims

    def _given(self, d: Dim) -> Dim:
        if isinstance(d, int):
            if d < 0:
                raise InvalidInput(f"a size of {d}")
            return d
        return self._bound(parse_dim(d), str(d))

    def _dim(self, d: onnx.TensorShapeProto.Dimension, fallback: str) -> Dim:
        if d.HasField("dim_value"):
            if d.dim_value < 0:
                raise InvalidInput(f"a size of {d.dim_value} at {fallback}")
            return int(d.dim_value)
        name = d.dim_param or fallback
        return self._bound(self._symbol(name), name)

    def _symbol(self, name: str) -> str:
        """A symbol the IR can spell, one for each name in the file."""
        if name not in self.symbols:
            stem = re.sub(r"\W", "_", name, flags=re.ASCII)
            stem = stem if re.match(r"[A-Za-z_]", stem) else f"n_{stem}"
            taken, fresh, n = set(self.symbols.values()), stem, 1
            while fresh in taken:
                fresh, n = f"{stem}_{n}", n + 1
            self.symbols[name] = fresh
        return self.symbols[name]

    def _bound(self, symbol: Dim, name: str) -> Dim:
        for key in (name, symbol):
            if key in self.sizes:
                self.used.add(str(key))
                size = self.sizes[str(key)]
                if not isinstance(size, int) or size < 1:
                    raise InvalidInput(f"sizes gives {key!r} the size {size!r}")
                return size
        return symbol
