"""N:M patterns that neighbouring outputs share: which activations they read, and the dense weights that are left.

The kept activations of such a block of outputs are gathered once and side by side; what follows is a dense product
over ``keep/group`` of the depth. The index stream holds one byte per kept activation of a block, counted from the
start of its *window*, the activations that one selection can reach (a gather by scalar loads reaches one group).
Source: references of the project, CPU kernels, section 1c.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.tvm.contract.packing import from_runs, to_runs
from bitwright.codegen.tvm.contract.spec import LANES, ContractSpec, Isa, Matrix, runs_of
from bitwright.ir.errors import InvalidInput

Array = NDArray[Any]

_REACH = {  # activations that a selection reaches in one register
    ("u8s8", "avx512-vnni"): 64,
    ("u8s8", "avx-vnni"): 16,
    ("u8s8", "avx2"): 16,
    ("u8s8", "neon-i8mm"): 16,
    ("u8s8", "neon-dot"): 16,
    ("f32", "avx512-vnni"): 16,
    ("f32", "avx-vnni"): 8,
    ("f32", "avx2"): 8,
}
_GATHER_REACH = 256
"""What a byte of index can count."""


@dataclass(frozen=True, slots=True)
class Compaction:
    """How a contraction with shared patterns becomes a dense one.

    ``outputs`` share a pattern; ``runs`` runs of ``length`` activations hold ``groups`` groups of ``group`` each, of
    which ``keep`` stay. A selection takes ``per_window`` groups; ``gathered``: by scalar loads, one group at a time.
    """

    outputs: int
    runs: int
    length: int
    keep: int
    group: int
    per_window: int
    gathered: bool

    @property
    def groups(self) -> int:
        return ceil(self.length / self.group)

    @property
    def picked(self) -> int:
        """Activations that a run leaves."""
        return self.groups * self.keep

    @property
    def depth(self) -> int:
        """Length of the dense reduction."""
        return self.runs * self.picked

    def units(self, cols: int) -> int:
        """Blocks of outputs among ``cols``."""
        return ceil(cols / self.outputs)


def is_shared(spec: ContractSpec) -> bool:
    """Whether the spec asks for the kernel that compacts activations for blocks of outputs."""
    return spec.pattern is not None and spec.pattern.shared > 1


def compaction_of(spec: ContractSpec, isa: Isa) -> Compaction | str:
    """The compaction, or the reason why there is none: blocks of outputs must be whole vectors of one group."""
    sparsity, pattern, cols = spec.sparsity, spec.pattern, spec.cols // spec.groups
    assert sparsity is not None
    assert pattern is not None
    (keep, group), outputs = sparsity, pattern.shared
    if spec.element not in ("u8s8", "f32"):
        return f"activations of {spec.element} are not compacted"
    if spec.groups > 1 and cols % outputs and outputs % cols:
        return f"blocks of {outputs} outputs lie across convolution groups of {cols}"
    outputs = min(outputs, cols) if spec.groups > 1 else outputs
    if outputs % LANES[isa]:
        return f"blocks of {outputs} outputs are no whole vectors of {LANES[isa]}"
    reach = _REACH.get((spec.element, isa), 0)
    if group > max(reach, _GATHER_REACH):
        return f"a group of {group} is more than a byte of index counts"
    runs, gathered = runs_of(spec), group > reach
    return Compaction(outputs, runs.count, runs.length, keep, group, 1 if gathered else reach // group, gathered)


def compaction(spec: ContractSpec, isa: Isa) -> Compaction:
    """The compaction; raises :class:`InvalidInput` where there is none."""
    found = compaction_of(spec, isa)
    if isinstance(found, str):
        raise InvalidInput(found)
    return found


def dense_spec(spec: ContractSpec, made: Compaction, cols: int) -> ContractSpec:
    """The dense contraction over compacted activations, for ``cols`` of the outputs."""
    return replace(spec, geometry=Matrix(spec.rows, cols, made.depth), pattern=None, init=False, pad_value=0)


def compacted(spec: ContractSpec, made: Compaction, weight: Array, mask: Array | None = None) -> tuple[Array, Array]:
    """Dense weights [cols, depth], and the index stream [groups, blocks, runs, picked] in bytes.

    Raises :class:`InvalidInput` if the outputs of a block together use more than ``keep`` of a group.
    """
    dense = to_runs(spec, np.asarray(weight, spec.weight_dtype.numpy))
    kept = dense != 0 if mask is None else to_runs(spec, np.asarray(mask, bool))
    if np.any(dense[~kept] != 0):
        raise InvalidInput("a weight outside the mask is not zero")
    cols, units = dense.shape[1], made.units(dense.shape[1])
    pad = [(0, 0), (0, units * made.outputs - cols), (0, 0), (0, made.groups * made.group - made.length)]
    shape = (spec.groups, units, made.outputs, made.runs, made.groups, made.group)
    dense, union = np.pad(dense, pad).reshape(shape), np.pad(kept, pad).reshape(shape).any(2)
    if int(union.sum(-1).max(initial=0)) > made.keep:
        raise InvalidInput(
            f"{made.outputs} outputs together have more than {made.keep} non-zeros in a group of {made.group}: "
            f"not {made.keep}:{made.group} shared by {made.outputs}"
        )
    order = np.argsort(~union, axis=-1, kind="stable")[..., : made.keep]
    there = np.take_along_axis(union, order, -1)
    order = np.where(there, order, 0)  # a slot too many reads an activation of its own group, times zero
    values = np.take_along_axis(dense, order[:, :, None], -1)
    values = np.where(there[:, :, None], values, np.zeros((), values.dtype))
    values = values.reshape(spec.groups, units * made.outputs, made.depth)[:, :cols]
    base = np.arange(made.groups) % made.per_window * made.group
    index = (order + base[:, None]).astype(np.uint8).reshape(spec.groups, units, made.runs, made.picked)
    return values.reshape(-1, made.depth), index


def spread_out(spec: ContractSpec, made: Compaction, values: Array, index: Array) -> tuple[Array, Array]:
    """Inverse of :func:`compacted`: logical weights, and which of them are stored (non-zero ones)."""
    cols = spec.cols // spec.groups
    units = made.units(cols)
    shape = (spec.groups, units, made.runs, made.groups, made.keep)
    if index.size != spec.groups * units * made.runs * made.picked:
        raise InvalidInput(f"packed indices have {index.size} elements, expected {np.prod(shape)}")
    base = (np.arange(made.groups) - np.arange(made.groups) % made.per_window) * made.group
    where = index.reshape(shape).astype(np.int64) + base[:, None]
    values = values.reshape(spec.groups, cols, made.runs, made.picked)
    where = np.repeat(where.reshape(spec.groups, units, made.runs, made.picked), made.outputs, 1)[:, :cols]
    stored = values != 0
    if np.any(stored & (where >= made.length)):
        raise InvalidInput("a packed index points outside its reduction")
    dense = np.zeros((*values.shape[:-1], made.length + 1), values.dtype)
    np.put_along_axis(dense, np.where(stored, where, made.length), values, -1)
    dense = dense[..., : made.length]  # zeros went to one column too many
    return from_runs(spec, dense), from_runs(spec, dense != 0)
