"""What follows a contraction in its region, one element at a time: bias, activation, residual, requantize, ...

The accumulator's element is known; everything else of the body is pulled by the generic evaluator, so whatever the
fuser put into a region works in every contraction kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitwright.codegen.tvm.generic_eval import Evaluator, convert
from bitwright.codegen.tvm.pointwise import needs_exact
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec
from bitwright.ir.graph import Graph, Node


@dataclass(eq=False)
class Epilogue:
    """Writes the outputs of ``body`` from elements of ``root``'s result.

    ``inputs``: pointers of the body's inputs by name; ``outputs``: of its outputs in order. All outputs have the
    shape of ``root``'s result (:func:`fits`).
    """

    b: Builder
    body: Graph
    root: Node
    inputs: Mapping[str, Pointer]
    outputs: Sequence[Pointer]

    def store(self, index: Sequence[Index], value: Vec) -> None:
        """The outputs at ``index``, of the root's ``value`` there (of the accumulator's format or the result's)."""
        ev = Evaluator(self.b, self.body, dict(self.inputs), isa="cuda", exact=needs_exact(self.body))
        at = tuple(index)
        with ev.layer():
            ev.fix(self.root.output, self.b.let(convert(value, ev.dtype(self.root.output))))
            for name, pointer in zip(self.body.outputs, self.outputs, strict=True):
                ev.store(pointer, ev.flat(name, at), ev.at(name, at), ev.dtype(name))
