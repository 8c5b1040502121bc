"""Pointwise chains before and behind a pooling loop, evaluated on vectors of channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitwright.codegen.tvm.pointwise_program import Leaf, NotPointwise, Program
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, width
from bitwright.codegen.tvm.vecmath import keep
from bitwright.ir.graph import Graph
from bitwright.ir.types import BF16, F16, DType


class Chain:
    """The pointwise nodes that make ``name`` (of shape ``shape``) out of ``given`` values and body inputs.

    ``groups``: sizes of runs of axes that the kernel walks with one counter each; operands that cannot be walked
    so raise NotPointwise. The last group is the vectors' and walked with step 0 or 1.
    """

    def __init__(self, body: Graph, shape: tuple[int, ...], name: str, given: Sequence[str], groups: Sequence[int]):
        self.body, self.name = body, name
        self.program = Program(body, shape, (name,), given=given)
        self.steps: dict[Leaf, tuple[int, ...]] = {}
        for (x, places), leaf in self.program.leaves.items():
            if x in body.producers:
                raise NotPointwise("a literal tensor")
            row = self.program.strides(body.types[x].static_shape, places)
            if len(row) != len(shape):
                raise NotPointwise("groups along an axis")
            self.steps[leaf] = _grouped(row, shape, groups)

    @property
    def dtypes(self) -> set[DType]:
        """Formats of everything computed or read."""
        names = [self.name, *(leaf.name for leaf in self.steps)]
        names += [x for n in self.program.nodes.values() for x in (*n.inputs, *n.outputs)]
        return {self.body.types[x].dtype for x in names}

    def value(
        self,
        b: Builder,
        isa: str,
        pointers: Mapping[str, Pointer],
        at: Sequence[Index],
        lanes: int,
        given: Mapping[str, Vec],
    ) -> Vec:
        """The value at the counters ``at``, ``lanes`` elements along the last one."""  # fmt: skip

        def read(leaf: Leaf) -> Vec:
            steps = self.steps[leaf]
            place: Index = 0
            for i, n in zip(at, steps, strict=True):
                place = place + i * n if n else place
            if steps[-1] == 0 or lanes == 1:
                return keep(b, b.load(pointers[leaf.name], place)).spread(lanes)
            return b.load(pointers[leaf.name], place, lanes)

        return self.program.evaluate(b, isa, lanes, read, given)[self.name]


def _grouped(row: Sequence[int], shape: Sequence[int], groups: Sequence[int]) -> tuple[int, ...]:
    """One step per group of axes."""
    steps, k = [], 0
    for count in groups:
        axes = [(n, s) for n, s in zip(shape[k : k + count], row[k : k + count], strict=True) if n != 1]
        if any(s != axes[i + 1][1] * axes[i + 1][0] for i, (_, s) in enumerate(axes[:-1])):
            raise NotPointwise("an operand that is broadcast inside a run of axes")
        steps.append(axes[-1][1] if axes else 0)
        k += count
    if steps[-1] not in (0, 1):
        raise NotPointwise("an operand that is not contiguous")
    return tuple(steps)


def lanes_of(kinds: set[DType], vector_bits: int) -> int:
    """Lanes of a vector in which everything fits one register."""
    if BF16 in kinds:
        raise NotPointwise("arithmetic on bf16")
    widest = max(4 if k == F16 else width(k) for k in kinds)
    return vector_bits // 8 // widest
