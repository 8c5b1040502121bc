"""Contractions (linear, matmul, convolution; dense and N:M) as one family of kernels.

``supports`` → ``knobs`` → ``pack`` → ``emit``; ``unpack`` reads packed weights back to verify an artifact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.tvm.contract import lowbit
from bitwright.codegen.tvm.contract.choose import default_knobs as knobs
from bitwright.codegen.tvm.contract.choose import (
    is_depthwise,
    pairs_are_safe,
    supports,
    terms_between_spills,
    unsafe_sums,
)
from bitwright.codegen.tvm.contract.compact import is_shared
from bitwright.codegen.tvm.contract.depthwise import emit_depthwise, pack_depthwise, unpack_depthwise
from bitwright.codegen.tvm.contract.emit import contraction, emit_packed
from bitwright.codegen.tvm.contract.engines import engine_of
from bitwright.codegen.tvm.contract.epilogue import Epilogue, EpilogueParam, StoreAcc
from bitwright.codegen.tvm.contract.flipped import FlippedBytes, lacking, with_signs, without_signs
from bitwright.codegen.tvm.contract.packing import pack_weights, unpack_weights
from bitwright.codegen.tvm.contract.runtime_right import emit_runtime_right
from bitwright.codegen.tvm.contract.shared import emit_shared, pack_shared, unpack_shared
from bitwright.codegen.tvm.contract.spec import ContractSpec, Conv, KernelFunc, Knobs, Matrix
from bitwright.ir.errors import InvalidInput

Array = NDArray[Any]

__all__ = [
    "ContractSpec",
    "Conv",
    "Epilogue",
    "EpilogueParam",
    "KernelFunc",
    "Knobs",
    "Matrix",
    "StoreAcc",
    "emit",
    "knobs",
    "pack",
    "pairs_are_safe",
    "supports",
    "terms_between_spills",
    "unpack",
    "unsafe_sums",
]


def pack(
    spec: ContractSpec, knobs: Knobs, weight: Array, mask: Array | None = None, init: Array | None = None
) -> list[Array]:
    """The constants of the kernel in parameter order: weights, indices (if sparse), init (if the spec has it).

    ``weight`` has the logical layout (``spec.weight_shape``). Non-zeros are ``mask`` or, without it, ``weight != 0``;
    a group with fewer of them than ``keep`` is filled with zeros, one with more is an :class:`InvalidInput`.
    """
    _check(spec, knobs)
    if spec.right != "constant":
        raise InvalidInput("a run-time right operand has nothing to pack")
    if knobs.safe_pairs and not knobs.spill and not pairs_are_safe(spec, weight):
        raise InvalidInput("these weights can saturate pmaddubsw: use knobs without safe_pairs")
    if knobs.spill and (why := unsafe_sums(spec, knobs, weight)):
        raise InvalidInput(why)
    if is_depthwise(spec):
        arrays = pack_depthwise(spec, knobs, np.asarray(weight, spec.weight_dtype.numpy))
    elif is_shared(spec):
        arrays = pack_shared(spec, knobs, weight, mask)
    else:
        made = contraction(spec, knobs)
        arrays = pack_weights(spec, made.stored, made.layout, weight, mask)
        arrays = with_signs(made.plan, arrays) if _flips(spec, knobs) else arrays
    if spec.init != (init is not None):
        raise InvalidInput("initial accumulators and spec.init do not agree")
    if init is not None:
        init = init.reshape(spec.cols) + lacking(weight) if _flips(spec, knobs) else init
        arrays.append(np.ascontiguousarray(np.asarray(init, spec.acc_dtype.numpy).reshape(spec.cols)))
    return arrays


def unpack(spec: ContractSpec, knobs: Knobs, arrays: list[Array]) -> tuple[Array, Array]:
    """The logical weights that the packed constants hold, and the mask of the non-zero ones (dense: all)."""
    _check(spec, knobs)
    if is_depthwise(spec):
        return unpack_depthwise(spec, knobs, arrays)
    if is_shared(spec):
        return unpack_shared(spec, knobs, arrays)
    made = contraction(spec, knobs)
    arrays = without_signs(made.plan, arrays) if _flips(spec, knobs) else arrays
    return unpack_weights(spec, made.stored, made.layout, arrays)


def emit(spec: ContractSpec, knobs: Knobs, epilogue: Epilogue, name: str) -> KernelFunc:
    """The kernel ``void name(begin, end, x, [right], constants..., epilogue operands..., outputs..., [scratch])``."""
    _check(spec, knobs)
    if spec.right != "constant":
        return emit_runtime_right(spec, knobs, epilogue, name)
    if is_depthwise(spec):
        return emit_depthwise(spec, knobs, epilogue, name)
    if is_shared(spec):
        return emit_shared(spec, knobs, epilogue, name)
    return emit_packed(spec, knobs, epilogue, name)


def _flips(spec: ContractSpec, knobs: Knobs) -> bool:
    """Whether products take the weights' signs to the activations (not those of compacted activations)."""
    return not is_shared(spec) and spec.right == "constant" and isinstance(engine_of(spec, knobs), FlippedBytes)


def _check(spec: ContractSpec, knobs: Knobs) -> None:
    if reason := supports(spec, knobs.isa) or lowbit.refusal(spec, knobs):
        raise InvalidInput(reason)
