"""Linear layers, matrix products and convolutions as instances of the contraction family."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from bitwright.codegen.cost import stored_bits, unpacking
from bitwright.codegen.tuning.space import Knob, Point, Rule, Setting, Space
from bitwright.codegen.tvm import contract
from bitwright.codegen.tvm.contract.halves import as_words, bf16_refusal
from bitwright.codegen.tvm.contract.space import knobs_of, moved, point_of, rules_of
from bitwright.codegen.tvm.contract.spec import LANES, ContractSpec, Conv, Element, Knobs, Matrix
from bitwright.codegen.tvm.dyadic import Form, forms
from bitwright.codegen.tvm.epilogue import PointwiseEpilogue
from bitwright.codegen.tvm.template import Arg, Config, Refused, Template
from bitwright.codegen.tvm.tir import STACK_LIMIT
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.patterns import tightest_keeps, violation
from bitwright.ir.target import Target, in_bytes
from bitwright.ir.types import BF16, F32, NM, S8, S16, U8, DType, TensorType
from bitwright.ir.weights import Array

_ELEMENTS: Mapping[DType, Element] = {U8: "u8s8", F32: "f32", BF16: "bf16"}
_PAYS = 1.05
"""A pattern whose expected gain is below this runs dense, and the report says so."""


@dataclass(frozen=True)
class ContractConfig(Config):
    """``spec`` and ``knobs`` of the generator, the positions of its operands among the body's inputs."""

    spec: ContractSpec = None  # type: ignore[assignment]
    knobs: Knobs = None  # type: ignore[assignment]
    weight: int = -1
    bias: int = -1
    zero: int = 0
    forms: tuple[tuple[str, Form], ...] = ()
    """How requantizations are computed."""

    def kernel_key(self) -> str:
        return repr(replace(self, reason="", zero=0))


def root_of(body: Graph) -> Node | None:
    """The body's only contraction, if the rest is pointwise."""
    computing = [n for n in body.nodes if not isinstance(n.op, (ops.Constant, *ops.POINTWISE))]
    return computing[0] if len(computing) == 1 and isinstance(computing[0].op, ops.CONTRACTION) else None


class Contract(Template):
    """The register-tiled contraction kernels of ``contract/`` with a fused pointwise epilogue."""

    name = "contract"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        return self.at(body, constants, target, {})

    def at(self, body: Graph, constants: Mapping[str, Array], target: Target, point: Point) -> Config | Refused:
        root = root_of(body)
        if root is None:
            return Refused("not a contraction with a pointwise epilogue")
        if isinstance(root.op, ops.SMALL_FLOAT):
            return Refused("its sums are small floats, rounded one by one in a fixed order")
        position = {v.name: i for i, v in enumerate(body.inputs)}
        if any(x not in position for x in root.inputs):
            return Refused("an operand of the contraction is a literal, or computed in the same kernel")
        plain = _spec_of(body, root, constants)
        if isinstance(plain, Refused):
            return plain
        weight = as_words(constants.get(root.inputs[1]))
        if plain.element == "bf16" and (lack := bf16_refusal(target)):
            return Refused(lack)
        spec, reason = _with_pattern(plain, body.types[root.inputs[1]], weight, target)
        if (asked := str(point.get("kernel", _label(spec.pattern)))) != _label(spec.pattern):
            made = _as_asked(plain, weight, asked, target)
            if isinstance(made, Refused):
                return made
            spec, reason = made
        isa = target.isa
        if why := contract.supports(spec, isa):
            return Refused(why)
        short = forms(body, root, constants)
        epilogue = PointwiseEpilogue(body, root, target.isa, short)
        if why := epilogue.refusal():
            return Refused(f"epilogue: {why}")
        narrow = getattr(root.op, "partial", None) == S16
        knobs, told = _knobs(body, root, spec, weight, target, point)
        reason += told + (_sums(spec, knobs, isa) if narrow else "")
        try:
            tasks, scratch, packed = _extent(spec, knobs)
        except InvalidInput as error:
            return Refused(str(error))
        x, w = position[root.inputs[0]], position[root.inputs[1]]
        operands = [Arg("input", x), *([Arg("input", w)] if spec.right != "constant" else [])]
        operands += [Arg("packed", i) for i in range(packed)]
        operands += [Arg("input", i) for i in epilogue.operands] + [Arg("output", 0)]
        return ContractConfig(
            tasks=tasks, scratch_bytes=scratch, args=tuple(operands), isa=target.isa, mcpu=target.mcpu,
            reason=reason, spec=spec, knobs=knobs, weight=w if weight is not None else -1,
            bias=position[root.inputs[2]] if len(root.inputs) > 2 else -1, zero=getattr(root.op, "x_zero", 0),
            forms=short,
        )  # fmt: skip

    def space(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Space:
        config, root = self.configure(body, constants, target), root_of(body)
        if not isinstance(config, ContractConfig) or root is None:
            return Space()
        spec, knobs = config.spec, config.knobs
        weight = as_words(constants.get(root.inputs[1]))
        here = _label(spec.pattern)
        default: dict[str, Setting] = {**point_of(spec, knobs), "kernel": here, "unpack": _form_of(knobs)}
        listed = [*knobs_of(spec, knobs.isa), Knob("unpack", _unpackings(body, root, spec))]
        held = [] if weight is None else [_label(nm) for nm in _held(spec, weight, target)]
        listed.append(Knob("kernel", tuple(dict.fromkeys(["dense", here, *held]))))
        rules = rules_of(spec, knobs)
        if PointwiseEpilogue(body, root, target.isa, config.forms).heavy:
            most = STACK_LIMIT // (4 * LANES[knobs.isa])
            rules += (Rule(f"a column of sums takes more than {most} rows of stack", lambda p: int(p["rows"]) <= most),)
        return Space(default, tuple(listed), rules)

    def pack(self, body: Graph, config: Config, constants: Mapping[str, Array]) -> list[Array]:
        assert isinstance(config, ContractConfig)
        if config.weight < 0:
            return []
        weight = as_words(constants[body.inputs[config.weight].name])
        init = initial(config, weight, body, constants) if config.spec.init else None
        return contract.pack(config.spec, config.knobs, weight, init=init)

    def emit(self, body: Graph, config: Config, symbol: str) -> object:
        assert isinstance(config, ContractConfig)
        root = root_of(body)
        assert root is not None
        epilogue = PointwiseEpilogue(body, root, config.isa, config.forms)
        return contract.emit(config.spec, config.knobs, epilogue, symbol).primfunc

    def kernel_body(self, body: Graph) -> Graph:
        """The body without what is in packed constants or in the knobs (the zero point, the length of partial sums):
        more layers share a kernel."""
        root = root_of(body)
        if root is None or not isinstance(root.op, ops.IntLinear | ops.IntConv):
            return body
        plain = replace(root, op=replace(root.op, x_zero=0, partial=None, every=0))
        return replace(body, nodes=tuple(plain if n is root else n for n in body.nodes))

    def verify(self, body: Graph, config: Config, constants: Mapping[str, Array], packed: list[Array]) -> str:
        assert isinstance(config, ContractConfig)
        if config.weight < 0:
            return ""
        weight = as_words(constants[body.inputs[config.weight].name])
        streams = packed[:-1] if config.spec.init else packed
        again, _ = contract.unpack(config.spec, config.knobs, streams)
        if config.knobs.spill and (why := contract.unsafe_sums(config.spec, config.knobs, again)):
            return why
        if not np.array_equal(again, weight.reshape(again.shape)):
            return "the packed weights do not unpack to the weights"
        pattern = body.inputs[config.weight].type.encoding
        return violation(again.reshape(weight.shape), pattern) if pattern else ""


def _knobs(
    body: Graph, root: Node, spec: ContractSpec, weight: Array | None, target: Target, point: Point
) -> tuple[Knobs, str]:
    """The knobs at a point, and what became of weights below 8 bits, for the report."""
    declared = body.types[root.inputs[1]].dtype
    form = point.get("unpack") or (unpacking(body, target) if spec.element == "u8s8" else "bytes")
    bits = 8 if form == "bytes" else stored_bits(declared)
    narrow = getattr(root.op, "partial", None) == S16
    default = contract.knobs(spec, target.isa, weight, narrow=narrow, bits=bits, panel=form == "panel")
    knobs = moved(default, point)
    again = ", once for all rows of a task" if knobs.panel else ""
    if knobs.bits < 8:
        return knobs, f"; {knobs.bits}-bit weights unpacked in the kernel{again}"
    return knobs, _as_bytes(declared, knobs, spec)


def _form_of(knobs: Knobs) -> str:
    return "panel" if knobs.panel else "registers" if knobs.bits < 8 else "bytes"


def _unpackings(body: Graph, root: Node, spec: ContractSpec) -> tuple[str, ...]:
    """Where weights of this format can be unpacked."""
    low = spec.element == "u8s8" and stored_bits(body.types[root.inputs[1]].dtype) < 8 and spec.right == "constant"
    return ("bytes", "registers", "panel") if low else ("bytes",)


def _label(pattern: NM | None) -> str:
    """What a point calls the kernel of a pattern.

    >>> _label(None), _label(NM(2, 4, 1)), _label(NM(2, 4, 1, block=4, shared=16))
    ('dense', '2:4', '2:4x4/16')
    """
    if pattern is None:
        return "dense"
    block = f"x{pattern.block}" if pattern.block > 1 else ""
    return f"{pattern.keep}:{pattern.group}{block}" + (f"/{pattern.shared}" if pattern.shared > 1 else "")


def _held(spec: ContractSpec, weight: Array, target: Target) -> list[NM]:
    """Patterns of the target that the weights obey and that have a kernel."""
    groups = {s.group for s in target.sparse if s.x == spec.operand}
    held = [NM(keep, group, 1) for group, keep in sorted(tightest_keeps(weight, groups, 1).items()) if keep < group]
    return [nm for nm in held if not contract.supports(replace(spec, pattern=nm), target.isa)]


def _as_asked(
    spec: ContractSpec, weight: Array | None, label: str, target: Target
) -> tuple[ContractSpec, str] | Refused:
    """The spec with the pattern of a point, if the weights obey it."""
    if label == "dense":
        return spec, "dense weights" if weight is not None else "both operands are computed"
    found = re.fullmatch(r"(\d+):(\d+)(?:x(\d+))?(?:/(\d+))?", label)
    if weight is None or found is None:
        return Refused(f"no kernel {label!r} here")
    keep, group, block, shared = (int(x or 1) for x in found.groups())
    if not 0 < keep < group:
        return Refused(f"no pattern {label}")
    pattern = NM(keep, group, 1, shared=shared, block=block)
    if why := violation(weight, pattern):
        return Refused(f"the weights do not obey {label}: {why}")
    gain = target.sparse_gain(spec.operand, pattern)
    return replace(spec, pattern=pattern), f"{label} kernel, expected {gain:.2g}x over dense"


def _as_bytes(declared: DType, knobs: Knobs, spec: ContractSpec) -> str:
    """Why weights below 8 bits take a byte each, for the report; the empty string for others."""
    if not declared.is_integer or stored_bits(declared) == 8:
        return ""
    why = contract.lowbit.refusal(spec, replace(knobs, bits=stored_bits(declared)))
    return f"; {declared} weights in bytes: {why or 'unpacking them would slow the layer'}"


def _sums(spec: ContractSpec, knobs: Knobs, isa: str) -> str:
    """What became of the wish for 16-bit sums, for the report."""
    if terms := contract.terms_between_spills(spec, knobs):
        return f"; s16 sums, spilled every {terms} terms (proved from the packed weights)"
    if isa != "avx2":
        return f"; s32 sums: {isa} has no faster products with 16-bit sums"
    return "; s32 sums: in the kernel's order too few terms fit 16 bits"


def epilogue_of(body: Graph, config: ContractConfig) -> PointwiseEpilogue:
    """What follows the sums of a configured body."""
    root = root_of(body)
    assert root is not None
    return PointwiseEpilogue(body, root, config.isa, config.forms)


def initial(config: ContractConfig, weight: Array, body: Graph, constants: Mapping[str, Array]) -> Array:
    """What accumulators start from: the bias (f32), or the zero point's share -zero * sum(w) (s32)."""
    if config.spec.element != "u8s8":
        return np.ascontiguousarray(constants[body.inputs[config.bias].name], np.float32)
    sums = weight.astype(np.int64).reshape(weight.shape[0], -1).sum(1)
    init: Array = (-config.zero * sums).astype(np.int32)
    return init


@cache
def _extent(spec: ContractSpec, knobs: Knobs) -> tuple[int, int, int]:
    """Tasks, scratch bytes and number of packed constants; none depends on the epilogue."""
    made = contract.emit(spec, knobs, contract.StoreAcc(spec.rows, spec.cols, spec.acc_dtype), "extent")
    packed = sum(n in ("weights", "indices", "init") for n in made.param_names)
    return made.tasks, made.scratch_bytes, packed


def _with_pattern(
    spec: ContractSpec, declared: TensorType, weight: Array | None, target: Target
) -> tuple[ContractSpec, str]:
    """The spec with the weight's N:M pattern if the target gains from it, and the reason for the choice."""
    nm = declared.encoding
    if weight is None or nm is None:
        return spec, "dense weights" if weight is not None else "both operands are computed"
    if not isinstance(nm, NM):
        return spec, f"runs dense: no kernel for {nm}"
    label = f"{nm.keep}:{nm.group}" + (f" of blocks of {nm.block}" if nm.block > 1 else "")
    if nm.axis % declared.rank != 1:
        return spec, f"runs dense: {label} lies along axis {nm.axis}, not along the reduction"
    free = NM(nm.keep, nm.group, 1, block=nm.block)
    sparse = replace(spec, pattern=free)
    why, gain = contract.supports(sparse, target.isa), target.sparse_gain(spec.operand, free)
    if nm.shared > 1:
        made = _shared(spec, replace(free, shared=nm.shared), 0.0 if why else gain, target)
        if isinstance(made, ContractSpec):
            better = target.sparse_gain(spec.operand, nm)
            return (
                made,
                f"{label} kernel with activations compacted for {nm.shared} outputs, expected {better:.2g}x over dense",
            )
        label += made
    if not why and gain >= _PAYS:
        return sparse, f"{label} kernel, expected {gain:.2g}x over dense"
    if (wider := _wider(spec, weight, target)) is not None:
        gain = target.sparse_gain(spec.operand, wider)
        text = (
            f"{wider.keep}:{wider.group} kernel for {label} weights, which obey both, expected {gain:.2g}x over dense"
        )
        return replace(spec, pattern=wider), text
    if why:
        return spec, f"runs dense: no {label} kernel here ({why})"
    return spec, f"runs dense: {label} would gain only {gain:.2f}x on {target.name}"


def _shared(spec: ContractSpec, nm: NM, free: float, target: Target) -> ContractSpec | str:
    """The spec of the kernel that compacts activations for the outputs that share a pattern, or why another one runs.

    ``free``: what the kernel gains that reads every output's own pattern.
    """
    made = replace(spec, pattern=nm)
    head = f" shared by {nm.shared} outputs"
    if why := contract.supports(made, target.isa):
        return f"{head} (not compacted: {why})"
    gain = target.sparse_gain(spec.operand, nm)
    if gain >= _PAYS and gain > free:
        return made
    return f"{head} (compacting activations is no faster here)"


def _wider(spec: ContractSpec, weight: Array, target: Target) -> NM | None:
    """The fastest pattern of the target that the weights obey as well, if it pays."""
    ready = _held(spec, weight, target)
    best = max(ready, key=lambda nm: target.sparse_gain(spec.operand, nm), default=None)
    return best if best is not None and target.sparse_gain(spec.operand, best) >= _PAYS else None


def _spec_of(body: Graph, root: Node, constants: Mapping[str, Array]) -> ContractSpec | Refused:
    x, w = (body.types[v] for v in root.inputs[:2])
    pair = (in_bytes(x.dtype), in_bytes(w.dtype))
    if pair not in ((U8, S8), (F32, F32), (BF16, BF16)):
        return Refused(f"no register-tiled kernel for {x.dtype} by {w.dtype}")
    constant = root.inputs[1] in constants
    if not constant and isinstance(root.op, (ops.Linear, ops.IntLinear, ops.Conv, ops.IntConv)):
        return Refused("the weights are computed at run time")
    if len(root.inputs) > 2 and root.inputs[2] not in constants:
        return Refused("the bias is computed at run time")
    element = _ELEMENTS[pair[0]]
    zero = getattr(root.op, "x_zero", 0)
    init = element == "u8s8" or len(root.inputs) > 2
    if isinstance(root.op, (ops.Linear, ops.IntLinear)):
        rows = math.prod(x.static_shape[:-1])
        return ContractSpec(element, Matrix(rows, int(w.shape[0]), int(x.shape[-1])), init=init, x_hi=_x_hi(x))
    if isinstance(root.op, (ops.Conv, ops.IntConv)):
        geometry = _geometry(root.op, x.static_shape, w.static_shape)
        if isinstance(geometry, Refused):
            return geometry
        pad = zero if any(geometry.padding) else 0
        return ContractSpec(element, geometry, init=init, pad_value=pad, x_hi=max(pad, _x_hi(x)))
    if isinstance(root.op, ops.MatMul) and element == "f32":
        return _matmul(root.op, x.static_shape, w.static_shape)
    return Refused(f"{root.op.spelling} has no register-tiled kernel")


def _x_hi(x: TensorType) -> int:
    return x.dtype.hi if x.dtype.is_integer else U8.hi


def _geometry(op: ops.Conv | ops.IntConv, x: tuple[int, ...], w: tuple[int, ...]) -> Conv | Refused:
    if not op.channels_last or len(x) != 4:
        return Refused("only two-dimensional convolutions laid out channels last are tiled")
    pad = op.padding or (0, 0, 0, 0)
    return Conv(
        x[0], x[1], x[2], x[3], w[0], (w[2], w[3]), (op.stride or (1, 1))[:2],  # type: ignore[arg-type]
        (op.dilation or (1, 1))[:2], (pad[0], pad[1], pad[2], pad[3]), op.groups,  # type: ignore[arg-type]
    )  # fmt: skip


def _matmul(op: ops.MatMul, a: tuple[int, ...], b: tuple[int, ...]) -> ContractSpec | Refused:
    if len(a) < 2 or len(b) < 2:
        return Refused("a vector operand")
    cols, depth = (b[-2], b[-1]) if op.transpose_b else (b[-1], b[-2])
    right = "nk" if op.transpose_b else "kn"
    if math.prod(b[:-2]) == 1:
        return ContractSpec("f32", Matrix(math.prod(a[:-1]), cols, depth), right=right)  # type: ignore[arg-type]
    lead = len(a) - len(b)
    if a[:-2] != (1,) * lead + b[:-2] and a[:-2] != b[:-2]:
        return Refused("batch axes that broadcast")
    return ContractSpec("f32", Matrix(a[-2], cols, depth, math.prod(a[:-2])), right=right)  # type: ignore[arg-type]
