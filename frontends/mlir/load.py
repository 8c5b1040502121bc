"""``load_mlir``: torch-dialect MLIR as a graph, read operator by operator into the torch front end."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from bitwright.frontends.mlir.context import MAGIC, context, from_onnx, parse, resources
from bitwright.frontends.mlir.program import Operators, Program
from bitwright.frontends.mlir.write import SIZES, imported
from bitwright.frontends.torch_export import capture
from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.errors import InvalidInput, Problem, Unsupported
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import S32, Dim, TensorType

Source = str | os.PathLike[str] | bytes | ExportedProgram


def load_mlir(
    source: Source, *, shapes: Mapping[str, Sequence[Dim]] | None = None, function: str | None = None
) -> Graph:
    """Read a program of the torch dialect as a graph of the graph level.

    ``source``: a file (text or bytecode), the text or bytes themselves, or an ``ExportedProgram``, which torch-mlir's
    importer turns into MLIR first. ``onnx`` operators, as torch-mlir's ONNX importer writes them, are converted
    by torch-mlir. ``shapes`` gives an input another shape (``{"arg0": ("b", 3, 32, 32)}``); without it a first size
    ``?`` is the symbol ``b``, and another one a problem. ``function`` is the one to read where there are several.

    Weights keep the names, formats and masks of the attributes ``bitwright.key``, ``bitwright.dtype`` and
    ``bitwright.encoding`` that :func:`to_mlir` writes. Raises :class:`InvalidInput` for what is no MLIR, or no program;
    :class:`Unsupported` with every operator that cannot be read and its place, and where torch-mlir is missing.
    """
    with context():
        module, name = _module(source)
        if 'torch.operator "onnx.' in module.operation.get_asm(large_elements_limit=4, large_resource_limit=4):
            from_onnx(module)
        program = Program(_function(module, function, name), name, resources(module), dict(shapes or {}))
        program.read()
    return _captured(program, name)


def _module(source: Source) -> tuple[Any, str]:
    if isinstance(source, ExportedProgram):
        return imported(source), "the exported program"
    if isinstance(source, bytes) or (isinstance(source, str) and "\n" in source):
        return parse(source, "the text"), "the text"
    path = Path(source)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InvalidInput(f"cannot read {path}: {e.strerror or e}") from e
    if data.startswith(MAGIC):
        return parse(data, path.name), path.name
    try:
        return parse(data.decode(), path.name), path.name
    except UnicodeDecodeError as e:
        raise InvalidInput(f"{path.name} is no valid MLIR: neither text nor MLIR bytecode") from e


def _function(module: Any, wanted: str | None, name: str) -> Any:
    """The function to read: the one asked for, else ``main``, else the only one with a body."""
    found = {
        str(op.attributes["sym_name"]).strip('"'): op
        for op in module.body.operations
        if op.operation.name == "func.func" and len(op.regions[0].blocks)
    }
    if wanted is not None and wanted not in found:
        raise InvalidInput(f"{name} has no function {wanted!r} (it has {', '.join(map(repr, found)) or 'none'})")
    key = wanted or ("main" if "main" in found else next(iter(found), None) if len(found) == 1 else None)
    if key is None:
        have = f"{len(found)} functions and none called main: name one" if found else "no function with a body"
        raise InvalidInput(f"{name} has {have}")
    if len(found[key].regions[0].blocks) != 1:
        raise Unsupported(Problem("control flow", key, "a function of several blocks", "export one branch"))
    return found[key]


class _Runs(torch.nn.Module):
    """The program as a module: ``forward`` takes the inputs by name; torch's notes lead back to the MLIR."""

    def __init__(self, program: Operators, names: Sequence[str]) -> None:
        import inspect

        super().__init__()
        self.mlir = program.finish()
        order = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])
        interpreter = _Interpreter(self.mlir)

        def forward(*inputs: torch.Tensor) -> Any:
            return interpreter.run(*inputs)

        forward.__signature__ = order  # type: ignore[attr-defined]
        self.forward = forward


class _Interpreter(torch.fx.Interpreter):
    """Runs a node; an operand that does not fit names its place in the MLIR."""

    def run_node(self, n: torch.fx.Node) -> Any:
        try:
            return super().run_node(n)
        except (RuntimeError, IndexError, TypeError, ValueError) as e:
            first = next((x.strip() for x in str(e).splitlines() if x.strip()), type(e).__name__)
            raise InvalidInput(f"{n.meta.get('place', n.name)}: {n.target}: {first}") from e


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs a traceback for operands that do not fit, which is an error of ours here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _captured(program: Program, name: str) -> Graph:
    """The graph behind the operators read so far; every problem of both steps is raised together."""
    symbols = {s: SIZES[i] for i, s in enumerate(program.symbols)}
    examples = [v.example(symbols) for v in program.inputs]
    names = [v.name for v in program.inputs]
    specs: Any = None
    if symbols:
        specs = {v.name: {i: d for i, d in enumerate(v.type.shape) if isinstance(d, str)} for v in program.inputs}
    try:
        with torch.fx.traceback.preserve_node_meta(), _quiet():
            graph = capture(_Runs(program.operators, names), examples, dynamic_shapes=specs, name=program.name)
    except Unsupported as e:
        found = [replace(p, place=program.placed(p.place)) for p in e.problems]
        raise Unsupported([*program.problems, *found]) from e
    except InvalidInput as e:
        why = str(e).partition("example inputs: ")[2] or str(e)
        raise InvalidInput(why if name in why else f"{name}: {why}") from e
    if program.problems:
        raise Unsupported(program.problems)
    return _finished(graph, program)


def _pool_of_codes(rw: Rewriter, n: Node) -> bool:
    """A maximum over windows of codes, which is written in s32 and cast back, of the codes themselves."""
    pool = rw.graph.producers.get(n.inputs[0]) if isinstance(n.op, ops.Cast) else None
    if pool is None or not isinstance(pool.op, ops.MaxPool):
        return False
    wide = rw.graph.producers.get(pool.inputs[0])
    if wide is None or not isinstance(wide.op, ops.Cast) or rw.graph.types[wide.inputs[0]].dtype != n.type.dtype:
        return False
    if pool.type.dtype != S32 or not n.type.dtype.is_integer or n.type.dtype.bits > 31:
        return False
    rw.keep_as(n, pool.op, rw.of(wide.inputs[0]))
    return True


def _finished(graph: Graph, program: Program) -> Graph:
    """Weights under their own keys with their formats and masks, other literals as constants, the user's places."""
    rw = Rewriter(graph)
    for n in graph.nodes:
        n = replace(n, origin=program.placed(n.origin))
        if _pool_of_codes(rw, n):
            continue
        if not isinstance(n.op, ops.Weight):
            rw.keep(n)
            continue
        literal = program.literals.get(n.op.ref.removeprefix("mlir."))
        rw.free(n)
        if literal is None:
            rw.replace(n, rw.constant(graph.weights[n.op.ref].array, n.type, name="constant", origin=n.origin))
            continue
        kind = TensorType(literal.dtype or n.type.dtype, n.type.shape, literal.encoding)
        made = rw.weight(literal.key, graph.weights[n.op.ref], kind, name=literal.key, origin=literal.key)
        rw.replace(n, made)
    done = rw.done()
    if len(done.outputs) != len(program.output_names):
        raise InvalidInput(f"the function returns {len(program.output_names)} values, {len(done.outputs)} are tensors")
    return replace(done, output_names=tuple(program.output_names))
