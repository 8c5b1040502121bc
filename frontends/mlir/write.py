"""``to_mlir``: a graph as torch-dialect MLIR: quantized types for codes, attributes for formats and masks."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch.export import ExportedProgram

from bitwright.frontends.mlir.context import Module, bindings, context, show
from bitwright.frontends.mlir.emit import Stored, emitted
from bitwright.frontends.mlir.spell import PLACE, Spelled
from bitwright.frontends.torch_context import origin_of
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput, Problem, Unsupported
from bitwright.ir.files import save
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_numpy
from bitwright.ir.semantics import torch_dtype
from bitwright.ir.types import DType, dtype_of

BINARY = ".mlirbc"
"""The ending of a file that is written as bytecode."""

SIZES = (4, 6, 10, 14, 22, 26)
"""What symbolic sizes are while a program is traced; torch takes 0 and 1 for special."""


def to_mlir(graph: Graph, path: str | os.PathLike[str] | None = None) -> str:
    """Write a graph-level program in the torch dialect; into ``path`` too when it is given, whole or not at all.

    A path that ends in ``.mlirbc`` gets MLIR bytecode (half the size), any other text. The result, text, was verified
    by torch-mlir. Codes of up to 8 bits have quantized types (``torch.aten.quantize_per_tensor``,
    ``_make_per_channel_quantized_tensor``); ``bitwright.dtype`` names formats narrower than those. Weights are dense
    resources with ``bitwright.key``, and ``bitwright.encoding`` for a mask: ``"nm<2:4, axis=1>"``. Scales in groups of
    an axis become plain arithmetic. Locations are the origins of the nodes; no file of this machine is named.

    Raises :class:`InvalidInput` for a lower level, :class:`Unsupported` where an operator has no form in the dialect or
    torch-mlir is not installed; then nothing is written.
    """
    if graph.level != "graph":
        raise InvalidInput(
            f"@{graph.name} is at the {graph.level} level; MLIR is written from the graph level: run the passes before"
            " lower-to-integer only"
        )
    small = [n for n in graph.nodes if any(t.dtype.is_small_float for t in n.types)]
    if small:
        told = "the dialect has no such number format"
        cure = "write the graph before the pass that made this operator"
        raise Unsupported([Problem(f"a value of {n.type.dtype}", n.origin or n.output, told, cure) for n in small])
    with context():
        module = _written(graph)
        text = show(module)
        if path is not None:
            save(path, show(module, binary=True) if str(path).endswith(BINARY) else text)
    return text.decode()


def _written(graph: Graph) -> Module:
    spelled = Spelled(graph)
    program = _exported(graph, spelled)
    stored = {
        p: _stored(graph, spelled.keys[b], spelled.get_buffer(b))
        for p, b in program.graph_signature.inputs_to_buffers.items()
    }
    stored |= _constants(program)

    def node_of(node: torch.fx.Node) -> Node | None:
        number = (node.meta.get("custom") or {}).get(PLACE)
        return None if number is None else graph.nodes[number]

    def place(node: torch.fx.Node) -> str:
        found = node_of(node)
        return "" if found is None else found.origin or found.output

    def dtype(node: torch.fx.Node) -> DType | None:
        """The format of the codes that a quantize or dequantize is about."""
        found = node_of(node)
        if found is None or not isinstance(found.op, (ops.Quantize, ops.Dequantize)):
            return None
        return found.op.dtype if isinstance(found.op, ops.Quantize) else graph.types[found.inputs[0]].dtype

    ins = [v.name for v in graph.inputs]
    return _module(program, stored, place, dtype, (graph.name, ins, list(graph.output_names)))


def imported(program: ExportedProgram) -> Module:
    """An exported program in the torch dialect, by torch-mlir's importer, inside :func:`context`.

    Its weights become dense resources, byte by byte (the importer's own way goes through Python lists: minutes).
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = program.run_decompositions({})  # functional; the operators stay whole
    signature = program.graph_signature
    held = {**program.constants, **program.state_dict}  # buffers that are not persistent are only in constants
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    stored = {p: Stored(to_numpy(held[k]), k) for p, k in named.items()} | _constants(program)
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        first = next(iter([*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]))
        why = f"the model writes to {first!r}, and a compiled program keeps no state"
        raise Unsupported(Problem("mutation", str(first), why, "return the new value instead"))
    ins = [n for n in signature.user_inputs if isinstance(n, str)]
    outs = (
        ["output"] if len(signature.user_outputs) == 1 else [f"output_{i}" for i in range(len(signature.user_outputs))]
    )
    return _module(program, stored, origin_of, lambda node: None, ("main", ins, outs))


def _constants(program: ExportedProgram) -> dict[str, Stored]:
    found = program.graph_signature.inputs_to_lifted_tensor_constants
    return {p: Stored(to_numpy(program.constants[k]), "") for p, k in found.items()}


def _exported(graph: Graph, spelled: Spelled) -> ExportedProgram:
    names = dict.fromkeys(d for v in graph.inputs for d in v.type.shape if isinstance(d, str))
    if any("*" in d for d in names):
        why = f"sizes of its inputs are products ({', '.join(names)})"
        raise Unsupported(Problem("inputs", graph.name, why, "give the model fixed sizes (--size NAME=NUMBER)"))
    if len(names) > len(SIZES):
        raise Unsupported(Problem("inputs", graph.name, f"more than {len(SIZES)} symbolic sizes", "fix some of them"))
    sizes = dict(zip(names, SIZES, strict=False))
    shapes = [[sizes[d] if isinstance(d, str) else d for d in v.type.shape] for v in graph.inputs]
    examples = [torch.zeros(s, dtype=torch_dtype(v.type.dtype)) for s, v in zip(shapes, graph.inputs, strict=True)]
    specs = [{i: torch.export.Dim.DYNAMIC for i, d in enumerate(v.type.shape) if isinstance(d, str)}
             for v in graph.inputs]  # fmt: skip
    with torch.no_grad(), warnings.catch_warnings(), torch.fx.traceback.preserve_node_meta():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                spelled, tuple(examples), dynamic_shapes=(tuple(specs),) if names else None, strict=False
            )
            functional: ExportedProgram = program.run_decompositions({})
        except Exception as e:  # torch raises anything from AssertionError to UserError here
            first = next((x.strip() for x in str(e).splitlines() if x.strip()), type(e).__name__)
            cure = "fix the symbolic sizes" if names else "write the graph before the pass that made it"
            raise Unsupported(Problem("torch.export", graph.name, first, cure)) from e
    return functional


def _stored(graph: Graph, n: Node, held: torch.Tensor) -> Stored:
    array = to_numpy(held)
    key = n.op.ref if isinstance(n.op, ops.Weight) else ""
    dtype = n.type.dtype if key and n.type.dtype != dtype_of(array.dtype) else None
    return Stored(array, key, dtype, n.type.encoding)


def _module(program: ExportedProgram, stored: dict[str, Stored], place: Any, dtype: Any, names: Any) -> Module:
    """Import, and let MLIR verify what is written: the text parses again."""
    ir = bindings()
    try:
        module = emitted(program, stored, place, dtype, names)
        module.operation.verify()
    except (ir.MLIRError, NotImplementedError, TypeError, KeyError, AssertionError) as e:
        first = next((x.strip() for x in str(e).splitlines() if x.strip()), type(e).__name__)
        raise Unsupported(
            Problem("torch-mlir's importer", names[0], first, "fix symbolic sizes, if there are any")
        ) from e
    return module


__all__ = ["BINARY", "SIZES", "imported", "to_mlir"]
