"""Accumulator certificates: put into a program, and derived anew from the packed weights that it holds.

:func:`check` shares no code with what made the certificates: it reads the weights back from the artifact, multiplies
out, and compares. It also holds the packed start values of the accumulators to the weights.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from bitwright.codegen.build import Built, Kernel
from bitwright.ir import ops
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.text import parse
from bitwright.ir.types import NM
from bitwright.runtime.artifact import Contents
from bitwright.runtime.manifest import Certificate, Stored

Array = np.ndarray[Any, Any]
_CONTRACTIONS = (ops.IntLinear, ops.IntMatMul, ops.IntConv)
_SLAB = 1 << 22
"""Products held at once."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A certificate and what is wrong with it: the empty string when it holds."""

    certificate: Certificate
    fault: str

    @property
    def ok(self) -> bool:
        return not self.fault


# --- into the program ------------------------------------------------------------------------------------------


def recorded(built: Built, found: Mapping[str, Mapping[str, Any]]) -> tuple[Certificate, ...]:
    """The certificates of every integer contraction of a program, with the places of its weights.

    ``found``: what ``bound-accumulators`` noted, by value name.
    """
    out = []
    for kernel in built.kernels:
        assert isinstance(kernel.node.op, ops.Region)
        for node in kernel.node.op.body.nodes:
            if isinstance(node.op, _CONTRACTIONS) and node.output in found:
                facts = dict(found[node.output])
                stored = _stored(kernel, node, built) if "rows" in facts else None
                if "rows" not in facts and facts["terms"] is not None:
                    facts |= _pairs(facts)
                out.append(Certificate(value=node.output, step=kernel.node.output, stored=stored, **facts))
    return tuple(out)


def _pairs(facts: Mapping[str, Any]) -> dict[str, Any]:
    pairs = [(x, w) for x in facts["x"] for w in facts["w"]]
    value = {p: (p[0] - facts["x_zero"]) * (p[1] - facts["w_zero"]) for p in pairs}
    return {"low_pair": min(pairs, key=lambda p: value[p]), "high_pair": max(pairs, key=lambda p: value[p])}


def _stored(kernel: Kernel, node: Node, built: Built) -> Stored:
    """Where the kernel reads the weights of ``node``."""
    assert isinstance(kernel.node.op, ops.Region)
    config, body, made = kernel.config, kernel.node.op.body, built.plan
    at = next(i for i, s in enumerate(made.steps) if s.label == kernel.node.output)
    args = list(zip(config.args, made.steps[at].args, made.places[at], strict=False))  # a scratch pointer may follow
    packed = [(place.offset, made.sizes[arg.buffer]) for a, arg, place in args if a.kind == "packed"]
    places = tuple(
        (offset, nbytes // np.dtype(t).itemsize, t)
        for (offset, nbytes), t in zip(packed, kernel.packed_types, strict=True)
    )
    how = next((k for k in ("tile", "knobs") if hasattr(config, k)), "")
    if packed and hasattr(config, "spec") and how:
        tiled = ("spec", how)
        decisions = {k: _plain(getattr(config, k)) for k in tiled}
        return Stored(layout=kernel.template, places=places, config=decisions)
    index = [v.name for v in body.inputs].index(node.inputs[1])
    if packed and not any((a.kind, a.index) == ("input", index) for a, _, _ in args):
        return Stored(layout=kernel.template, places=places, config=dict(_layout(kernel)))
    offset = next(place.offset for a, _, place in args if (a.kind, a.index) == ("input", index))
    t = body.types[node.inputs[1]]
    return Stored(layout="plain", places=((offset, t.size, t.dtype.numpy.name),))


def _layout(kernel: Kernel) -> Mapping[str, Any]:
    from bitwright.codegen.tvm.select import template_of

    assert isinstance(kernel.node.op, ops.Region)
    return template_of(kernel.template).layout(kernel.node.op.body, kernel.config)


def _plain(value: Any) -> Any:
    """A dataclass as JSON-ready data with its class name."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"is": type(value).__name__} | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _rebuilt(data: Any) -> Any:
    """Inverse of :func:`_plain`; raises :class:`InvalidInput`."""
    from bitwright.codegen.tvm.contract import spec
    from bitwright.codegen.tvm.lanes.spec import LanesKnobs
    from bitwright.codegen.tvm.lut import LutSpec

    if isinstance(data, dict):
        name, given = data.get("is"), {k: _rebuilt(v) for k, v in data.items() if k != "is"}
        known = {"NM": NM, "LutSpec": LutSpec, "LanesKnobs": LanesKnobs}
        made = known.get(str(name)) or getattr(spec, str(name), None)
        if not is_dataclass(made) or not isinstance(made, type):
            raise InvalidInput(f"no decision of a kernel is called {name!r}")
        try:
            return made(**given)
        except TypeError as e:
            raise InvalidInput(f"{name}: {e}") from e
    return tuple(_rebuilt(v) for v in data) if isinstance(data, list) else data


# --- and out of it ---------------------------------------------------------------------------------------------


def check(contents: Contents) -> tuple[Checked, ...]:
    """Derive every certificate of a program from its packed weights, and compare.

    A certificate for each integer contraction of the program's graph must be there. Takes a second for 100 MB.
    """
    graph, out = parse(contents.graph), []
    given = {c.value: c for c in contents.manifest.certificates}
    for region, node, body in _contractions(graph):
        certificate = given.pop(node.output, None)
        if certificate is None:
            missing = Certificate(value=node.output, step=region.output, kind="type", acc_bits=0, x=(0, 0), w=(0, 0))
            out.append(Checked(missing, "this integer contraction has no certificate"))
            continue
        try:
            fault = _fault(certificate, contents, graph, region, node, body)
        except BitwrightError as e:
            fault = str(e)
        out.append(Checked(certificate, fault))
    return (*out, *(Checked(c, "the program has no such contraction") for c in given.values()))


def _contractions(graph: Graph) -> Iterator[tuple[Node, Node, Graph]]:
    for region in graph.nodes:
        if isinstance(region.op, ops.Region):
            for node in region.op.body.nodes:
                if isinstance(node.op, _CONTRACTIONS):
                    yield region, node, region.op.body


def _fault(c: Certificate, contents: Contents, graph: Graph, region: Node, node: Node, body: Graph) -> str:
    op = node.op
    zeros = (op.a_zero, op.b_zero) if isinstance(op, ops.IntMatMul) else (op.x_zero, 0)  # type: ignore[attr-defined]
    outer = dict(zip((v.name for v in body.inputs), region.inputs, strict=True))
    bounds = _code_bounds(graph, outer.get(node.inputs[0], ""), body.types[node.inputs[0]].dtype)
    if isinstance(op, ops.IntConv) and any(op.padding):
        bounds = min(bounds[0], zeros[0]), max(bounds[1], zeros[0])
    if zeros != (c.x_zero, c.w_zero) or c.step != region.output or op.acc.bits != c.acc_bits:  # type: ignore[attr-defined]
        return "it is made for another contraction"
    if c.kind != "calibrated" and not (c.x[0] <= bounds[0] and bounds[1] <= c.x[1]):
        return f"inputs lie in {bounds[0]}..{bounds[1]}, the certificate is for {c.x[0]}..{c.x[1]}"
    if c.on_overflow == "saturate" and c.acc_bits < c.partial_bits:
        return f"partial sums take {c.partial_bits} bits, the accumulator has {c.acc_bits}"
    if c.needs > c.acc_bits:
        return f"sums take {c.needs} bits, the accumulator has {c.acc_bits}"
    if c.stored is None:
        return _type_fault(c)
    return _weights_fault(c, op, contents, body.types[node.inputs[1]].static_shape)


def _code_bounds(graph: Graph, value: str, dtype: Any) -> tuple[int, int]:
    """What the operator behind a value of the program can give; the format's bounds unless it clamps."""
    lo, hi = int(dtype.lo), int(dtype.hi)
    node = graph.producers.get(value)
    while node is not None:
        if isinstance(node.op, ops.Region):
            body = node.op.body
            inner = dict(zip(node.outputs, body.outputs, strict=True))[value]
            graph, value = body, inner
        elif isinstance(node.op, ops.Reshape | ops.Transpose):
            value = node.inputs[0]
        elif isinstance(node.op, ops.Saturate):
            low, high = node.op.lo, node.op.hi
            return max(lo, lo if low is None else low), min(hi, hi if high is None else high)
        else:
            break
        node = graph.producers.get(value)
    return lo, hi


def _type_fault(c: Certificate) -> str:
    """A proof by formats: the pairs are corners, and no corner is further out."""
    if c.terms is None:
        return ""
    corners = [(x - c.x_zero) * (w - c.w_zero) for x in c.x for w in c.w]
    pairs = [(p[0] - c.x_zero) * (p[1] - c.w_zero) for p in (c.low_pair, c.high_pair) if p is not None]
    if pairs != [min(corners), max(corners)]:
        return "its pairs of factors are not the extreme ones"
    if c.range != (c.terms * min(corners), c.terms * max(corners)):
        return f"sums lie in {c.terms * min(corners)}..{c.terms * max(corners)}, not {c.range[0]}..{c.range[1]}"
    return "" if _width(*c.range) == c.bits else f"its range takes {_width(*c.range)} bits, not {c.bits}"


def _weights_fault(c: Certificate, op: ops.Op, contents: Contents, shape: tuple[int, ...]) -> str:
    weights, start = _unpacked(c, contents, shape)
    if c.digest != _digest(weights):
        return "the packed weights are not the ones that were certified"
    rows = _rows(op, weights)
    low, high, partial, register = _extremes(rows, c)
    if start is not None:
        sums = rows.sum(1, dtype=np.int64)
        if not np.array_equal(start.astype(np.int64), -c.x_zero * sums):
            return "the packed start values of the accumulators do not belong to the weights"
    if (low, high) != c.range or partial != c.partial_range or register != c.register_range:
        return f"sums lie in {low}..{high}, partial ones in {partial[0]}..{partial[1]}: the certificate says otherwise"
    assert c.rows is not None
    for name, row, bits, extreme in (("low", c.rows[0], c.low, low), ("high", c.rows[1], c.high, high)):
        got = witness_sum(rows[row], bits, c)
        if got != extreme:
            return f"the input given for the {name} end of the range makes {got}, not {extreme}"
    partial_bits = max(_width(*partial), _width(*register))
    if (_width(low, high), partial_bits, c.acc_bits - partial_bits) != (c.bits, c.partial_bits, c.headroom):
        return (
            f"final sums take {_width(low, high)} bits and partial ones {partial_bits}: the certificate says otherwise"
        )
    return ""


def _rows(op: ops.Op, weights: Array) -> Array:
    """[sums, terms]"""
    if not isinstance(op, ops.IntMatMul):
        return weights.reshape(weights.shape[0], -1)
    turned = weights if op.transpose_b or weights.ndim == 1 else weights.swapaxes(-1, -2)
    return turned.reshape(-1, turned.shape[-1])


def _extremes(rows: Array, c: Certificate) -> tuple[int, int, tuple[int, int], tuple[int, int]]:
    """Ranges of final sums, of sums of any terms, and of the kernel's register, by multiplying every term out."""
    lo, hi = (v - c.x_zero for v in c.x)
    reach = max(map(abs, (lo, hi, *c.x, c.x_zero)))
    top = 1 << (8 * rows.dtype.itemsize)
    dtype: Any = np.int64 if 2 * reach * (top + abs(c.w_zero)) * max(1, rows.shape[1]) < 1 << 62 else object
    step, found = max(1, _SLAB // max(1, rows.shape[1])), []
    for first in range(0, len(rows), step):
        w = rows[first : first + step].astype(dtype) - c.w_zero
        a, b = w * lo, w * hi
        least, most = np.minimum(a, b), np.maximum(a, b)
        p, q = (w * v for v in c.x)
        start = -c.x_zero * w.sum(1)
        ends = (
            least.sum(1), most.sum(1), np.minimum(least, 0).sum(1), np.maximum(most, 0).sum(1),
            start + np.minimum(np.minimum(p, q), 0).sum(1), start + np.maximum(np.maximum(p, q), 0).sum(1),
        )  # fmt: skip
        found.append([int(e.min()) if i % 2 == 0 else int(e.max()) for i, e in enumerate(ends)])
    low, high, p_low, p_high, r_low, r_high = (
        f(v) for f, v in zip((min, max) * 3, zip(*found, strict=True), strict=True)
    )
    return low, high, (p_low, p_high), (r_low, r_high)


def witness_sum(row: Array, bits: str, c: Certificate) -> int:
    """The final sum that a certificate's witness makes with a row of weights."""
    raw = np.frombuffer(base64.b64decode(bits), np.uint8)
    if raw.size != -(-row.size // 8):
        raise InvalidInput(f"the witness has {raw.size} bytes for {row.size} terms")
    up = np.unpackbits(raw)[: row.size].astype(bool)
    x = np.where(up, c.x[1], c.x[0]).tolist()
    return sum((v - c.x_zero) * (int(w) - c.w_zero) for v, w in zip(x, row.tolist(), strict=True))


def _unpacked(c: Certificate, contents: Contents, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
    """The weights in logical order and, where the kernel has them, the start values of its accumulators."""
    assert c.stored is not None
    arrays = []
    for offset, count, name in c.stored.places:
        nbytes = count * np.dtype(name).itemsize
        if offset + nbytes > contents.weights.size:
            raise InvalidInput("its weights lie outside the program's")
        arrays.append(contents.weights[offset : offset + nbytes].view(name))
    if c.stored.layout == "plain":
        if arrays[0].size != int(np.prod(shape)):
            raise InvalidInput(f"it stores {arrays[0].size} weights, the contraction has {shape}")
        return arrays[0].reshape(shape), None
    if c.stored.layout.startswith("cuda_"):
        from bitwright.codegen.tvm.select import template_of

        return template_of(c.stored.layout).unpack(c.stored.config, arrays, shape), None
    from bitwright.codegen.tvm import contract, lut
    from bitwright.codegen.tvm.lanes import packing
    from bitwright.codegen.tvm.lanes import spec as lanes

    spec, knobs, tile = (_rebuilt(c.stored.config.get(k)) for k in ("spec", "knobs", "tile"))
    if isinstance(spec, lut.LutSpec) and len(arrays) == 2:
        return lut.unpack(spec, arrays[0]).reshape(shape), arrays[1][: spec.cols]
    if isinstance(spec, contract.ContractSpec) and isinstance(tile, lanes.LanesKnobs):
        start = arrays.pop() if spec.init else None
        return packing.unpack(spec, tile, arrays).reshape(shape), start
    if not isinstance(spec, contract.ContractSpec) or not isinstance(knobs, contract.Knobs):
        raise InvalidInput(f"no layout of weights is called {c.stored.layout!r}")
    start = arrays.pop() if spec.init else None
    weights = contract.unpack(spec, knobs, arrays)[0]
    if knobs.spill and (why := contract.unsafe_sums(spec, knobs, weights)):
        raise InvalidInput(why)
    return weights.reshape(shape), start


def _digest(array: Array) -> str:
    flat = np.ascontiguousarray(array, np.int8 if array.dtype.itemsize == 1 else np.int64).reshape(-1)
    return hashlib.blake2b(flat.view(np.uint8).data, digest_size=16).hexdigest()


def _width(lo: int, hi: int) -> int:
    """The smallest two's complement width that holds both."""
    bits = 1
    while not -(1 << (bits - 1)) <= lo <= hi < 1 << (bits - 1):
        bits += 1
    return bits
