"""What measurements of kernels are filed under: the body without names and without values that cost no time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from bitwright.codegen.cache import key_of
from bitwright.ir.graph import Graph, Node
from bitwright.ir.target import Target
from bitwright.ir.text import show
from bitwright.ir.weights import Array

FORMAT = 1
"""Part of every key: raise it when the meaning of a workload or of a measurement changes."""
_DENSE = 0.75
_ZEROS = {"x_zero": 0, "zero": 0}


def describe(body: Graph, constants: Mapping[str, Array]) -> str:
    """The workload as text: the canonical ``body`` with zero points left out, which inputs are weights, and how many
    of these are zero (in steps of 5 %, from 25 % on), since sparse kernels depend on it."""
    plain = replace(body, nodes=tuple(map(_without_zero_points, body.nodes)))
    kept = [f"{v.name}:{_density(constants[v.name])}" for v in body.inputs if v.name in constants]
    return f"{show(plain)}\nconstants: {' '.join(kept)}"


def workload_key(body: Graph, constants: Mapping[str, Array]) -> str:
    """The key of :func:`describe`."""
    return key_of("workload", FORMAT, describe(body, constants))


def target_key(target: Target, machine: str) -> str:
    """What measurements hold for: the target's fingerprint, for ``host`` and GPUs with the processor's or device's
    name."""
    return f"{target.fingerprint}/{machine}" if target.name == "host" or target.kind == "gpu" else target.fingerprint


def _without_zero_points(node: Node) -> Node:
    changed = {k: v for k, v in _ZEROS.items() if getattr(node.op, k, v) != v}
    return replace(node, op=replace(node.op, **changed)) if changed else node


def _density(array: Array) -> str:
    if array.ndim < 2 or not array.size:
        return "vector"
    share = np.count_nonzero(array) / array.size
    return "dense" if share > _DENSE else f"{round(share * 20) * 5}%"
