"""Runs linalg text: torch-mlir's wheel has MLIR's execution engine, and this is the pipeline down to LLVM."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitwright.frontends.mlir.context import context, parse
from bitwright.ir.weights import Array

_PASSES = """
    canonicalize cse func.func(refback-generalize-tensor-pad) func.func(refback-generalize-tensor-concat)
    func.func(linalg-generalize-named-ops) func.func(linalg-fuse-elementwise-ops) convert-shape-to-std
    func.func(tm-tensor-bufferize)
    one-shot-bufferize{copy-before-write|bufferize-function-boundaries|function-boundary-type-conversion=identity-layout-map}
    refback-mlprogram-bufferize buffer-results-to-out-params{hoist-static-allocs|modify-public-functions}
    func.func(tm-tensor-to-loops) func.func(refback-munge-memref-copy) func.func(convert-linalg-to-loops)
    expand-strided-metadata func.func(lower-affine) convert-scf-to-cf func.func(refback-expand-ops-for-llvm)
    func.func(arith-expand) func.func(convert-math-to-llvm) convert-math-to-libm finalize-memref-to-llvm lower-affine
    convert-bufferization-to-memref finalize-memref-to-llvm func.func(convert-arith-to-llvm) convert-vector-to-llvm
    convert-func-to-llvm convert-cf-to-llvm convert-arith-to-llvm reconcile-unrealized-casts
"""
TO_LLVM = ",".join(_PASSES.split()).replace("|", " ")
"""After torch-mlir's reference backend; results become the last arguments."""


def run_linalg(text: str, inputs: Sequence[Array], outputs: Sequence[tuple[tuple[int, ...], Any]]) -> list[Array]:
    """Call ``main`` of a module of linalg on tensors; ``outputs``: shape and dtype of each result."""
    with context():
        from torch_mlir import ir
        from torch_mlir.execution_engine import ExecutionEngine
        from torch_mlir.passmanager import PassManager
        from torch_mlir.runtime import get_ranked_memref_descriptor

        module = parse(text, "the linalg module")
        for op in module.body.operations:
            if op.operation.name == "func.func":
                op.attributes["llvm.emit_c_interface"] = ir.UnitAttr.get()
        PassManager.parse(f"builtin.module({TO_LLVM})").run(module.operation)
        engine = ExecutionEngine(module, 2)
        results = [np.zeros(shape, dtype) for shape, dtype in outputs]
        held = [get_ranked_memref_descriptor(np.ascontiguousarray(a)) for a in (*inputs, *results)]
        engine.invoke("main", *(ctypes.pointer(ctypes.pointer(d)) for d in held))
        return results
