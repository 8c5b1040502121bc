"""torch-mlir at arm's length: contexts, parsing, weights as resources, pass pipelines. Nothing else imports it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bitwright.ir.errors import InvalidInput, Problem, Unsupported
from bitwright.ir.weights import Array

Module = Any
"""A ``torch_mlir.ir.Module`` (its bindings carry no types that mypy reads)."""

PINNED = "20261001"
"""The torch-mlir that the project is tested with."""

MAGIC = b"ML\xefR"
"""How an MLIR bytecode file begins."""

_TORCH_ONNX = "builtin.module(func.func(convert-torch-onnx-to-torch),func.func(canonicalize))"
_BACKEND = "torchdynamo-export-to-torch-backend-pipeline{extra-library=}"
PIPELINES = {
    "linalg": f"builtin.module({_BACKEND},torch-backend-to-linalg-on-tensors-backend-pipeline)",
    "tosa": f"builtin.module({_BACKEND},torch-backend-to-tosa-backend-pipeline)",
}
"""torch-mlir's lowerings of the torch dialect, by the dialect they end in."""


def bindings() -> Any:
    """The module ``torch_mlir.ir``; raises :class:`Unsupported` where torch-mlir is not installed."""
    try:
        from torch_mlir import ir
    except ImportError as e:
        raise Unsupported(
            Problem("MLIR", "", f"torch-mlir cannot be imported ({e})", f"pip install torch-mlir=={PINNED}")
        ) from e
    return ir


@contextmanager
def context() -> Iterator[Any]:
    """A fresh MLIR context with the torch dialect, as the current one, with an unknown location."""
    ir = bindings()
    from torch_mlir.dialects import torch as dialect

    made = ir.Context()
    dialect.register_dialect(made)
    with made, ir.Location.unknown():
        yield made


def parse(text: str | bytes, name: str) -> Module:
    """A verified module from text or bytecode, inside :func:`context`.

    Raises :class:`InvalidInput` with MLIR's first reason and its line. ``name`` is the file as the user calls it.
    """
    ir = bindings()
    try:
        module = ir.Module.parse(text)
        module.operation.verify()
    except ir.MLIRError as e:
        raise InvalidInput(f"{name} is no valid MLIR: {_first_diagnostic(e)}") from e
    except (ValueError, UnicodeError) as e:
        raise InvalidInput(f"{name} is no valid MLIR: {str(e).splitlines()[0]}") from e
    return module


def _first_diagnostic(error: Any) -> str:
    for d in getattr(error, "error_diagnostics", []):
        m = re.match(r'loc\("-":(\d+):(\d+)\)', str(d.location))
        return f"line {m[1]}: {d.message}" if m else str(d.message)
    return next((x.strip() for x in str(error).splitlines() if x.strip()), "unknown reason")


def run_pipeline(module: Module, pipeline: str, what: str) -> None:
    """Run passes in place; raises :class:`Unsupported` with the first thing that could not be converted."""
    ir = bindings()
    from torch_mlir.passmanager import PassManager

    try:
        PassManager.parse(pipeline).run(module.operation)
    except ir.MLIRError as e:
        place, why = "", _first_diagnostic(e)
        for d in getattr(e, "error_diagnostics", []):
            place = str(d.location).removeprefix("loc(").removesuffix(")").strip('"')
            break
        raise Unsupported(Problem(what, place, why, "write the graph before the pass that made this operator")) from e


def lower(text: str | bytes, to: str = "linalg") -> str:
    """The torch dialect lowered to ``linalg`` (on tensors) or ``tosa`` by torch-mlir's pipeline, as text.

    Raises :class:`InvalidInput` for text that does not parse or an unknown dialect, :class:`Unsupported` where
    torch-mlir has no conversion of an operator.
    """
    if to not in PIPELINES:
        raise InvalidInput(f"torch-mlir lowers to {' or '.join(PIPELINES)}, not {to!r}")
    with context():
        module = parse(text, "the module")
        run_pipeline(module, PIPELINES[to], f"the lowering to {to}")
        module.operation.verify()
        return str(module.operation.get_asm())


def from_onnx(module: Module) -> None:
    """Turn ``torch.operator "onnx.*"`` into the torch dialect, in place; what is left over stays."""
    run_pipeline(module, _TORCH_ONNX, "convert-torch-onnx-to-torch")


def show(module: Module, *, binary: bool = False) -> bytes:
    """The module as bytecode or as text with locations."""
    if binary:
        out = io.BytesIO()
        module.operation.write_bytecode(out)
        return out.getvalue()
    return str(module.operation.get_asm(enable_debug_info=True)).encode()


_RESOURCE = re.compile(r'^\s+([\w$.-]+|"(?:[^"\\]|\\.)*"): "0x([0-9A-Fa-f]*)",?$', re.MULTILINE)


def resources(module: Module) -> dict[str, bytes]:
    """The bytes of every dense resource, by name.

    The bindings have no reader for them, so they come from the module's text: 2 characters for each byte.
    """
    text = module.operation.get_asm()
    start = text.rfind("\n{-#")
    if start < 0:
        return {}
    found = _RESOURCE.finditer(text, start)
    return {m[1].strip('"'): bytes.fromhex(m[2][8:]) for m in found}  # the first 4 bytes state the alignment


ELEMENTS: dict[str, str] = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i1": "bool",
    **{f"{s}i{b}": f"int{b}" for s in ("", "s") for b in (8, 16, 32, 64)},
    **{f"ui{b}": f"uint{b}" for b in (8, 16, 32, 64)},
}  # fmt: skip
"""NumPy's name of an MLIR element type."""


def elements(attr: Any, held: dict[str, bytes]) -> Array:
    """The array behind the value of a ``torch.vtensor.literal``; raises :class:`InvalidInput` when it has none."""
    ir = bindings()
    m = re.search(r"tensor<((?:\d+x)*)(\w+)>$", str(attr.type))
    if m is None or m[2] not in ELEMENTS:
        raise InvalidInput(f"a literal of type {attr.type} has no array form")
    import ml_dtypes

    shape = tuple(int(d) for d in m[1].split("x")[:-1])
    kind = np.dtype(ml_dtypes.bfloat16) if m[2] == "bf16" else np.dtype(ELEMENTS[m[2]])
    if str(attr).startswith("dense_resource<"):
        name = str(attr).removeprefix("dense_resource<").rpartition("> : ")[0].strip('"')
        data = held.get(name)
        if data is None or len(data) != kind.itemsize * int(np.prod(shape, dtype=np.int64)):
            have = "is not in the file" if data is None else f"holds {len(data)} bytes"
            raise InvalidInput(f"the resource {name!r} of a literal of type {attr.type} {have}")
        return np.frombuffer(data, kind).reshape(shape)
    return _dense(ir, attr, shape, kind)


def _dense(ir: Any, attr: Any, shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
    """The array of an inline ``dense<...>``."""
    if kind.name == "bfloat16":  # NumPy has no buffer format for it, nor have the bindings a reader
        inner = str(attr).partition("dense<")[2].rpartition("> : ")[0]
        if inner.startswith('"0x'):
            return np.frombuffer(bytes.fromhex(inner[3:-1]), kind).reshape(shape)
        try:
            return np.broadcast_to(np.array(json.loads(inner), np.float32).astype(kind), shape)
        except ValueError as e:
            raise InvalidInput(f"the literal {inner[:40]} has no array form: {e}") from e
    dense = ir.DenseElementsAttr(attr)
    if dense.is_splat:
        return np.full(shape, np.array(dense.get_splat_value().value), kind)
    return np.array(dense, kind).reshape(shape)
