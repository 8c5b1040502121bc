"""Weights to the byte order the kernels stream, and back."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.tvm.contract.lowbit import narrowed, widened
from bitwright.codegen.tvm.contract.plan import Plan
from bitwright.codegen.tvm.contract.spec import ContractSpec, Matrix, runs_of
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import S32, DType

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """``[group][panel][run][step][vector][lane][quad]``, the last panel with the vectors that are left.

    Index vectors: ``[group][panel][run][index vector][vector][lane][index_quad]`` of ``index_dtype``.

    Weights of ``bits`` below 8: one vector holds several consecutive steps of a block (:attr:`Plan.fields`), the first
    one lowest in each byte, in two's complement or, if ``biased``, counted from the smallest.
    """

    lanes: int
    vectors: int
    index_dtype: DType
    index_quad: int
    bits: int = 8
    biased: bool = False

    def panels(self, cols: int) -> list[tuple[int, int]]:
        """(first column, vectors) of every panel."""
        total = ceil(cols / self.lanes)
        starts = range(0, total, self.vectors)
        return [(s * self.lanes, min(self.vectors, total - s)) for s in starts]


def to_runs(spec: ContractSpec, weight: Array) -> Array:
    """[groups, outputs per group, runs, length] in the order the kernel reads activations."""
    if weight.shape != spec.weight_shape:
        raise InvalidInput(f"weights of shape {weight.shape}, expected {spec.weight_shape}")
    runs = runs_of(spec)
    if not isinstance(spec.geometry, Matrix):
        weight = weight.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(weight).reshape(spec.groups, spec.cols // spec.groups, runs.count, runs.length)


def from_runs(spec: ContractSpec, runs: Array) -> Array:
    """Inverse of :func:`to_runs`."""
    if isinstance(spec.geometry, Matrix):
        return runs.reshape(spec.weight_shape)
    o, c, kh, kw = spec.weight_shape
    return np.ascontiguousarray(runs.reshape(o, kh, kw, c).transpose(0, 3, 1, 2))


def _compact(plan: Plan, dense: Array, kept: Array) -> tuple[Array, Array]:
    """[..., length] to values and positions [..., groups, keep]; short groups are filled with zeros."""
    pad = [(0, 0)] * (dense.ndim - 1) + [(0, plan.groups * plan.group - plan.length)]
    shape = (*dense.shape[:-1], plan.groups, plan.group)
    values, kept = np.pad(dense, pad).reshape(shape), np.pad(kept, pad).reshape(shape)
    if int(kept.sum(-1).max(initial=0)) > plan.keep:
        raise InvalidInput(f"a group of {plan.group} has more than {plan.keep} non-zeros: not {plan.keep}:{plan.group}")
    order = np.argsort(~kept, axis=-1, kind="stable")[..., : plan.keep]
    there = np.take_along_axis(kept, order, -1)
    picked = np.take_along_axis(values, order, -1)
    return np.where(there, picked, np.zeros_like(picked)), np.where(there, order, 0)


def _slots(plan: Plan) -> tuple[Array, Array, Array]:
    """Per step and slot: group, which non-zero, and whether it exists."""
    walk = plan.walk()
    group = np.array([[first + s.group if s else 0 for s in step.slots] for step, first, _ in walk])
    nth = np.array([[s.nth if s else 0 for s in step.slots] for step, _, _ in walk])
    real = np.array([[s is not None and first + s.group < plan.groups for s in step.slots] for step, first, _ in walk])
    return np.where(real, group, 0), np.where(real, nth, 0), real


def _interleave(layout: Layout, cols: int, packed: Array) -> Array:
    """[groups, cols, runs, steps, quad] to the flat panel order."""
    out = []
    for g in packed:
        for first, vectors in layout.panels(cols):
            part = g[first : first + vectors * layout.lanes]
            part = np.pad(part, [(0, vectors * layout.lanes - len(part)), (0, 0), (0, 0), (0, 0)])
            part = part.reshape(vectors, layout.lanes, *part.shape[1:]).transpose(2, 3, 0, 1, 4)
            out.append(part.reshape(-1))
    return np.concatenate(out) if out else np.zeros(0, packed.dtype)


def _separate(layout: Layout, cols: int, flat: Array, shape: tuple[int, int, int, int]) -> Array:
    """Inverse of :func:`_interleave`; shape is (groups, runs, steps, quad)."""
    groups, runs, steps, quad = shape
    needed = groups * runs * steps * ceil(cols / layout.lanes) * layout.lanes * quad
    if flat.size != needed:
        raise InvalidInput(f"packed weights have {flat.size} elements, expected {needed}")
    out = np.empty((groups, cols, runs, steps, quad), flat.dtype)
    at = 0
    for g in range(groups):
        for first, vectors in layout.panels(cols):
            size = runs * steps * vectors * layout.lanes * quad
            part = flat[at : at + size].reshape(runs, steps, vectors, layout.lanes, quad).transpose(2, 3, 0, 1, 4)
            part = part.reshape(vectors * layout.lanes, runs, steps, quad)
            out[g, first : first + len(part)] = part[: cols - first]
            at += size
    return out


def packed_sizes(spec: ContractSpec, plan: Plan, layout: Layout) -> tuple[int, int]:
    """Elements of the packed weights and of the packed indices."""
    vectors = spec.groups * ceil(spec.cols // spec.groups / layout.lanes) * layout.lanes * runs_of(spec).count
    return vectors * plan.all_weight_vectors * plan.quad, vectors * plan.vectors * layout.index_quad


def pack_weights(spec: ContractSpec, plan: Plan, layout: Layout, weight: Array, mask: Array | None) -> list[Array]:
    """Packed weights and, if sparse, packed indices."""
    weights, indices = _in_steps(spec, plan, weight, mask)
    if layout.bits < 8:
        weights = narrowed(plan, layout.bits, layout.biased, weights)
    streams = [weights] if indices is None else [weights, _pack_indices(plan, layout, *indices)]
    return [_interleave(layout, spec.cols // spec.groups, stream) for stream in streams]


def in_steps(spec: ContractSpec, plan: Plan, weight: Array, mask: Array | None = None) -> Array:
    """The weights as the plan consumes them: [groups, outputs per group, runs, steps, quad], zeros where there is none.

    Raises :class:`InvalidInput` for weights that do not follow the pattern.
    """
    return _in_steps(spec, plan, weight, mask)[0]


def _in_steps(
    spec: ContractSpec, plan: Plan, weight: Array, mask: Array | None
) -> tuple[Array, tuple[Array, Array] | None]:
    """The weights by step, and if sparse the position of each in its group and which slots exist."""
    dense = to_runs(spec, np.asarray(weight, spec.weight_dtype.numpy))
    if not plan.sparse:  # consecutive activations: the slots in order, zeros behind the end
        pad = plan.steps * plan.quad - plan.length
        return np.pad(dense, [(0, 0)] * 3 + [(0, pad)]).reshape(*dense.shape[:3], plan.steps, plan.quad), None
    kept = dense != 0 if mask is None else to_runs(spec, np.asarray(mask, bool))
    if np.any(dense[~kept] != 0):
        raise InvalidInput("a weight outside the mask is not zero")
    values, positions = _compact(plan, dense, kept)
    group, nth, real = _slots(plan)
    weights = np.where(real, values[..., group, nth], np.zeros((), values.dtype))
    return weights, (positions[..., group, nth], real)


def _pack_indices(plan: Plan, layout: Layout, positions: Array, real: Array) -> Array:
    fields = np.zeros((*positions.shape[:-2], plan.vectors, plan.quad), np.uint32)
    for n, (step, _, first) in enumerate(plan.walk()):
        value = np.where(real[n], positions[..., n, :] + np.array(step.base), 0).astype(np.uint32)
        fields[..., first + step.vector, :] |= value << np.uint32(step.shift)
    return fields.view(np.int32) if layout.index_dtype == S32 else fields.astype(layout.index_dtype.numpy)


def unpack_weights(spec: ContractSpec, plan: Plan, layout: Layout, arrays: list[Array]) -> tuple[Array, Array]:
    """Logical weights, and which of them are stored (non-zero slots; everything if dense)."""
    runs, cols = runs_of(spec).count, spec.cols // spec.groups
    flat = _separate(layout, cols, arrays[0], (spec.groups, runs, plan.all_weight_vectors, plan.quad))
    if layout.bits < 8:
        flat = widened(plan, layout.bits, layout.biased, flat)
    if not plan.sparse:  # consecutive activations: the slots in order
        dense = flat.reshape(*flat.shape[:3], -1)[..., : plan.length]
        return from_runs(spec, dense), from_runs(spec, np.ones_like(dense, bool))
    group, _, real = _slots(plan)
    packed = _separate(layout, cols, arrays[1], (spec.groups, runs, plan.vectors, plan.quad))
    fields = packed.view(f"u{arrays[1].itemsize}")
    where = np.empty(flat.shape, np.int32)
    for n, (step, _, first) in enumerate(plan.walk()):
        field = (fields[..., first + step.vector, :].astype(np.int32) >> step.shift) & ((1 << plan.bits) - 1)
        where[..., n, :] = field - np.array(step.base, np.int32)
    where = np.where(real, where + (group * plan.group).astype(np.int32), plan.length)
    stored = flat != 0
    if np.any(stored & ((where < 0) | (where >= plan.length))):
        raise InvalidInput("a packed index points outside its reduction")
    spare = np.where(stored, where, plan.length).reshape(*flat.shape[:3], -1)  # zeros go to one column too many
    dense = np.zeros((*flat.shape[:3], plan.length + 1), flat.dtype)
    np.put_along_axis(dense, spare.astype(np.int64), flat.reshape(spare.shape), -1)
    dense[..., plan.length] = 0
    kept = dense != 0
    cut = slice(0, plan.length)
    return from_runs(spec, dense[..., cut]), from_runs(spec, kept[..., cut])
