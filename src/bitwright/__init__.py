"""bitwright: compile neural networks to sparse, low-bit kernels, and see what each pass did.

>>> import bitwright as bw
>>> issubclass(bw.errors.Unsupported, bw.errors.BitwrightError)
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitwright import errors
from bitwright._version import __version__

if TYPE_CHECKING:
    from bitwright.a2q_training import constrained_training
    from bitwright.driver import (
        advise,
        capture,
        compile,
        compile_c,
        load,
        load_graph,
        load_onnx,
        optimize,
        simulate,
        to_onnx,
        verify,
    )
    from bitwright.drop_connect import fault_training
    from bitwright.float_training import small_float_training
    from bitwright.frontends.mlir import load_mlir, to_mlir
    from bitwright.ir.graph import Graph
    from bitwright.ir.target import Target
    from bitwright.runtime.program import Program
    from bitwright.sparse_linear import sparse_linear
    from bitwright.training import sparse_training
    from bitwright.tuning import tune

_LAZY = {
    **{
        n: "bitwright.driver"
        for n in (
            "advise",
            "capture",
            "compile",
            "compile_c",
            "load",
            "load_graph",
            "load_onnx",
            "optimize",
            "simulate",
            "to_onnx",
            "verify",
        )
    },
    "emulate": "bitwright.emulation",
    **dict.fromkeys(("load_mlir", "to_mlir"), "bitwright.frontends.mlir"),
    "Graph": "bitwright.ir.graph",
    "Target": "bitwright.ir.target",
    "Program": "bitwright.runtime.program",
    "constrained_training": "bitwright.a2q_training",
    "fault_training": "bitwright.drop_connect",
    "small_float_training": "bitwright.float_training",
    "sparse_linear": "bitwright.sparse_linear",
    "sparse_training": "bitwright.training",
    "tune": "bitwright.tuning",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: ``import bitwright`` itself loads no torch, onnx or TVM."""
    if name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'bitwright' has no attribute {name!r}")


__all__ = [
    "Graph",
    "Program",
    "Target",
    "__version__",
    "advise",
    "capture",
    "compile",
    "compile_c",
    "constrained_training",
    "emulate",
    "errors",
    "fault_training",
    "load",
    "load_graph",
    "load_mlir",
    "load_onnx",
    "optimize",
    "simulate",
    "small_float_training",
    "sparse_linear",
    "sparse_training",
    "to_mlir",
    "to_onnx",
    "tune",
    "verify",
]
