"""Which instruction runs a contraction: by formats, mask and proof that its sums fit; with the reason."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.devices.schema import Device, Instruction
from bitwright.codegen.devices.tables import Codebooks, books
from bitwright.codegen.devices.words import Words, plan, told
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.numerics import bits_for, prefix_range, type_bound
from bitwright.ir.patterns import violation
from bitwright.ir.types import DType, TensorType

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Work:
    """One contraction as rows by outputs: ``taps`` runs of ``channels`` terms, for each of ``groups``."""

    rows: int
    outputs: int
    taps: int
    channels: int
    groups: int
    batch: int = 1

    @property
    def macs(self) -> int:
        return self.batch * self.groups * self.rows * self.outputs * self.taps * self.channels


@dataclass(frozen=True, slots=True)
class Selected:
    """An instruction for a contraction: its steps, and why it is the one. No instruction: the vector unit.

    ``words``: the outputs by width, where the device's words hold several; ``instruction`` is then the widest.
    ``books``: the weights' codebooks, where products are looked up."""

    work: Work
    instruction: Instruction | None
    steps: int
    reason: str
    words: Words | None = None
    books: Codebooks | None = None

    @property
    def names(self) -> str:
        """The instructions that run."""
        if self.words is not None:
            return " ".join(i.name for i, _ in self.words.runs())
        return self.instruction.name if self.instruction else ""

    @property
    def energy(self) -> float:
        """Joules of all steps."""
        if self.words is not None:
            return self.steps / max(1, self.words.count) * self.words.energy()
        return self.steps * self.instruction.energy if self.instruction else 0.0


def work_of(node: Node, body: Graph) -> Work:
    """The sizes of a contraction."""
    x, w = (body.types[v].static_shape for v in node.inputs[:2])
    if isinstance(node.op, ops.Conv | ops.IntConv | ops.SmallConv):
        groups = getattr(node.op, "groups", 1)
        out = node.type.static_shape
        return Work(prod(out) // w[0], w[0] // groups, prod(w[2:]), w[1], groups)
    if isinstance(node.op, ops.MatMul | ops.IntMatMul):
        out = node.type.static_shape
        return Work(out[-2], out[-1], 1, x[-1], 1, prod(out[:-2]))
    return Work(prod(x[:-1]), w[0], 1, x[-1], 1)


def fits(inner: DType, outer: DType) -> bool:
    """Whether every value of one format is one of the other."""
    if inner == outer:
        return True
    if not (inner.is_integer and outer.is_integer):
        return False
    return outer.lo <= inner.lo and inner.hi <= outer.hi and str(outer) not in ("bipolar",)


def select(node: Node, body: Graph, weight: Array | None, device: Device) -> Selected | str:
    """The instruction with the fewest cycles, or why none runs this contraction (one line an instruction)."""
    work = work_of(node, body)
    if device.cells is not None and (why := _not_in_cells(weight, device.cells.levels)):
        return why
    if device.words is not None:
        return _in_words(node, body, work, weight, device)
    made = None
    if device.tables is not None:
        covered = books(weight, device.tables) if weight is not None else "codebooks are of constant weights"
        if isinstance(covered, str):
            return covered
        made = covered
    found: list[tuple[float, int, Instruction, str]] = []
    refused = []
    for i in device.instruction:
        why = _refusal(node, body, weight, i)
        if why:
            refused.append(f"{i.name}: {why}")
            continue
        steps = steps_of(work, i)
        found.append((steps * i.cycles, steps, i, _told(i)))
    if not found:
        return "; ".join(refused)
    cycles, steps, best, told = min(found, key=lambda f: (f[0], f[2].name))
    others = [f"{i.name} takes {c / cycles:.2g}x" for c, _, i, _ in found if i is not best]
    if made is not None:
        others.insert(0, f"{len(made.values)} tables")
    return Selected(work, best, steps, "; ".join([told, *others]), books=made)


def _not_in_cells(weight: Array | None, levels: int) -> str:
    if weight is None:
        return "cells hold constant weights, these are computed"
    most = int(np.abs(weight.astype(np.int64)).max(initial=0)) if weight.dtype.kind in "iu" else 0
    return (
        f"codes of up to {most}, a pair of cells holds {levels} (quantize-weights{{bits=4}})" if most > levels else ""
    )


def _in_words(node: Node, body: Graph, work: Work, weight: Array | None, device: Device) -> Selected | str:
    assert device.words is not None
    if weight is None or not isinstance(node.op, ops.IntLinear | ops.IntConv):
        return "words hold constant weights of linear layers and convolutions of integers"
    found = plan(weight, work.groups, device)
    if isinstance(found, str):
        return found
    widest = found.instructions[0]
    if why := _refusal(node, body, weight, widest):
        return f"{widest.name}: {why}"
    steps = work.batch * work.rows * found.count * ceil(work.taps * work.channels / found.depth)
    return Selected(work, widest, steps, told(found, device), found)


def steps_of(work: Work, i: Instruction) -> int:
    """Steps of a contraction: every row, ``lanes`` outputs and ``depth`` terms at a time."""
    return work.batch * work.groups * work.rows * ceil(work.outputs / i.lanes) * ceil(padded_terms(work, i) / i.depth)


def padded_terms(work: Work, i: Instruction) -> int:
    """Terms of one output; runs are filled up where a mask's groups would cross them."""
    nm = i.parsed.pattern
    if nm is not None and work.taps > 1 and work.channels % (nm.group * nm.block):
        return work.taps * ceil(work.channels / i.depth) * i.depth
    return work.taps * work.channels


def cure_of(device: Device) -> str:
    """What makes layers fit the device: the pass that gives them its sums, where those are its own."""
    small = [i.parsed.product.op for i in device.instruction if isinstance(i.parsed.product.op, ops.SmallLinear)]
    if not small:
        return "quantize to the formats of the device, or mask for it (`bitwright targets show`)"
    op = small[0]
    rounding = "" if op.rounding == "floor" else f" rounding={op.rounding}"
    sums = f"small-float-sums{{product={op.product} acc={op.acc} chunk={op.chunk}{rounding}}}"
    x, w = next((i.parsed.x, i.parsed.w) for i in device.instruction if i.parsed.product.op is op)
    if not x.is_small_float:
        return f"the recipe {sums}"
    both = f"x={x}" if x == w else f"x={x} w={w}"
    return f"the recipe observe-ranges, quantize-floats{{{both} sums={op.acc}}}, {sums}"


def _told(i: Instruction) -> str:
    m = i.parsed
    mask = f" {m.pattern.keep}:{m.pattern.group}" if m.pattern else ""
    return f"{i.name}: {m.x} by {m.w}{mask}, {i.lanes} outputs and {i.depth} terms a step"


def _refusal(node: Node, body: Graph, weight: Array | None, i: Instruction) -> str:
    """Why the instruction cannot run the contraction; the empty string if it can."""
    m = i.parsed
    x, w = (body.types[v] for v in node.inputs[:2])
    small = isinstance(node.op, ops.SMALL_FLOAT)
    if (small or isinstance(m.product.op, ops.SmallLinear)) and (why := _other_sums(node, m.product.op)):
        return why
    for name, given, takes in (("x", x.dtype, m.x), ("w", w.dtype, m.w)):
        if not _values_fit(given, takes, weight if name == "w" else None):
            return f"takes {name} in {takes}, this is {given}"
    if m.pattern is not None:
        if weight is None:
            return "its weights are masked constants, these are computed"
        if why := violation(weight, m.pattern):
            return f"the weights do not obey {m.pattern}: {why}"
    return _sums_fit(work_of(node, body), x, w, weight, m.acc) if m.acc is not None and m.acc.is_integer else ""


def _values_fit(given: DType, takes: DType, weight: Array | None) -> bool:
    if fits(given, takes):
        return True
    if weight is None or not (given.is_integer and takes.is_integer) or not weight.size:
        return False
    if str(takes) == "bipolar":
        return bool((np.abs(weight) == 1).all())
    return takes.lo <= int(weight.min()) and int(weight.max()) <= takes.hi


def _other_sums(node: Node, op: ops.Op) -> str:
    """Small-float sums are part of the result: they must be the very same ones."""
    keys = ("product", "acc", "chunk", "rounding")
    if not isinstance(node.op, ops.SMALL_FLOAT):
        return "sums in small floats, which this layer does not"
    if not isinstance(op, ops.SmallLinear):
        return "sums exactly, this layer in small floats"
    differ = [k for k in keys if getattr(node.op, k) != getattr(op, k)]
    return f"another {' and '.join(differ)} of small-float sums" if differ else ""


def _sums_fit(work: Work, x: TensorType, w: TensorType, weight: Array | None, acc: DType) -> str:
    """Why partial sums, in any order, can leave the accumulator; the empty string if they provably cannot."""
    terms = work.taps * work.channels
    if weight is None:
        bounds = (x.dtype.lo, x.dtype.hi, w.dtype.lo, w.dtype.hi)
        needed = bits_for(*type_bound(*bounds, terms, register="saturate"))
    else:
        lo, hi = prefix_range(weight.reshape(weight.shape[0], -1), x.dtype.lo, x.dtype.hi)
        needed = bits_for(min(lo), max(hi))
    if needed <= acc.bits:
        return ""
    return (
        f"its {acc} sums can overflow: {needed} bits are needed (constrain-weights{{bits={acc.bits}}} makes them fit)"
    )


def taps(kernel: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The places of a kernel in row-major order."""
    return list(itertools.product(*(range(k) for k in kernel)))
