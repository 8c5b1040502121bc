"""One quantized layer made to fit an accumulator: its rows in the kernels' order, the solution, its error."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import BIPOLAR, F32, TensorType
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of, stem
from bitwright.passes.accumulators._a2q import FACTORS, Inputs, Limit, coarsest, fit, inner_bits, limit_of, tiled
from bitwright.passes.lowering._dyadic import scalar_quantization
from bitwright.passes.sparsity._inputs import lowered, raised, rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Options:
    """The pass's options that concern one layer."""

    bits: int
    method: str
    tile: int
    search: bool
    centre: bool


@dataclass
class Moments:
    """Sums over what reaches a layer: x xᵀ as float64 [groups, K, K], and x as [groups, K]."""

    groups: int
    gram: torch.Tensor | None = None
    total: torch.Tensor | None = None
    rows: int = 0

    def add(self, part: torch.Tensor, taps: int) -> None:
        """Count a float64 matrix of rows x (taps * inputs)."""
        each = part.reshape(len(part), taps, self.groups, -1).permute(2, 0, 1, 3).reshape(self.groups, len(part), -1)
        gram, total = each.transpose(1, 2) @ each, each.sum(1)
        self.gram = gram if self.gram is None else self.gram + gram
        self.total = total if self.total is None else self.total + total
        self.rows += len(part)

    def spread(self) -> torch.Tensor | None:
        """The sum of (x - mean)(x - mean)ᵀ: what an error costs once its mean is taken off the bias."""
        if self.gram is None or self.total is None:
            return None
        return self.gram - self.total[:, :, None] * self.total[:, None, :] / max(1, self.rows)


@dataclass
class Layer:
    """A weight of integer codes with all its readers, and what becomes of it."""

    name: str
    nodes: list[Node]
    back: Node
    """Its dequantize."""
    codes: Array
    scale: Array
    inputs: list[Inputs]
    """Of every reader."""
    encoded: bool
    """The weight has a mask: its zeros stay."""
    ends: tuple[int, int]
    """Of the codes: those of the weight's format, the lowest only where the weight has it already."""
    seen: Moments = field(default_factory=lambda: Moments(1))
    done: Array | None = None
    new_scale: Array | None = None
    shift: Array | None = None
    """What the change adds to the mean of each output, float64 [O]; to be taken off the bias."""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> ops.Op:
        return self.nodes[0].op

    @property
    def groups(self) -> int:
        return self.op.groups if isinstance(self.op, ops.Conv) else 1

    def see(self, graph: Graph, node: Node, x: torch.Tensor) -> None:
        """Count what reaches the layer in one batch."""
        kernel = graph.types[node.inputs[1]].static_shape[2:] if isinstance(node.op, ops.Conv) else ()
        for part in rows(node.op, x, kernel):
            self.seen.add(part, int(np.prod(kernel)))

    @property
    def real(self) -> Array:
        """The new weight as the reference computes with it, float32."""
        assert self.done is not None
        assert self.new_scale is not None
        column = self.new_scale.reshape(-1, *[1] * (self.done.ndim - 1))
        return self.done.astype(np.float32) * column.astype(np.float32)


def layer_at(graph: Graph, node: Node) -> Layer | str:
    """A contraction of codes by constant codes, or why it is none."""
    x, back = (graph.producers.get(v) for v in node.inputs[:2])
    if not isinstance(node.op, (ops.Linear, ops.Conv)):
        return f"{node.op.spelling} has no weight of its own"
    if back is None or not isinstance(back.op, ops.Dequantize) or not graph.is_constant(back.inputs[0]):
        return "its weight is not integer"
    t, shape = graph.types[back.inputs[0]].dtype, graph.types[back.inputs[0]].static_shape
    scale = np.asarray(graph.constant(back.inputs[1]), np.float64).reshape(-1)
    zeros = graph.constant(back.inputs[2]) if len(back.inputs) > 2 else 0
    if (
        t.bits > 8
        or t.lo >= 0
        or t == BIPOLAR
        or np.any(np.asarray(zeros))
        or scale.size not in (1, shape[0])
        or back.op.group
    ):
        return f"its weight is {t} without a zero, or with scales or zero points that are not one for each output"
    if scale.size > 1 and back.op.axis not in (0, -len(shape)):
        return f"its weight has scales along axis {back.op.axis}, not along the outputs"
    found = scalar_quantization(graph, x) if x is not None and isinstance(x.op, ops.Dequantize) else None
    if found is None:
        return "its input is not integer"
    assert x is not None
    dtype = graph.types[x.inputs[0]].dtype
    codes: Array = np.asarray(graph.constant(back.inputs[0])).astype(np.int64)
    inputs, encoded = Inputs(dtype.lo, dtype.hi, found[1]), graph.types[back.inputs[0]].encoding is not None
    ends = min(-t.hi, int(codes.min(initial=0))), t.hi
    made = Layer(layer_of(graph, node), [node], back, codes, scale, [inputs], encoded, ends)
    made.seen = Moments(made.groups)
    return made


def solve(layer: Layer, options: Options) -> str:
    """Fill in ``done``, ``new_scale``, ``shift`` and the facts; returns why it cannot be, or the empty string."""
    limit = min((limit_of(options.bits, x, options.method, options.tile) for x in layer.inputs), key=lambda m: m.radius)
    limit = replace(limit, lo=layer.ends[0], hi=layer.ends[1])
    if limit.radius < 1:
        x = max(layer.inputs, key=lambda x: x.spread)
        least = next(b for b in range(2, 65) if limit_of(b, x, options.method).radius >= 1)
        return f"not even a weight of 1 fits {options.bits} bits with {x.bits}-bit inputs: it takes {least} bits"
    start = lowered(layer.op, layer.codes).numpy()
    kept = start != 0 if layer.encoded else np.ones(start.shape, bool)
    q, factor = start.astype(np.int64), np.ones(len(start))
    fits = _needed(layer, q, options) <= options.bits
    untouched, shared = fits, layer.scale.size == 1
    if not fits.all() and not shared:
        found = coarsest(start[~fits])
        q[~fits], factor[~fits] = found
        fits = _needed(layer, q, options) <= options.bits
    if not fits.all():
        more, times = _solution(layer, options, limit, start, kept)
        q, factor = (more, times) if shared else (np.where(fits[:, None], q, more), np.where(fits, factor, times))
    needed = int(_needed(layer, q, options).max(initial=1))
    assert needed <= options.bits, f"a constrained row of {layer.name} does not fit"
    scale = (layer.scale * (factor[:1] if shared else factor)).astype(np.float32)
    layer.done, layer.new_scale = raised(layer.op, _tensor(q), layer.codes.astype(np.int8)), scale
    layer.facts = {"method": options.method, "bits": needed, "cap": _cap(limit)}
    layer.facts |= {"changed_rows": int((q != start).any(1).sum()), "coarser": float(factor.mean())}
    layer.facts |= {"l1_before": int(np.abs(start).sum(1).max()), "l1_after": int(np.abs(q).sum(1).max())}
    old, new = start * layer.scale.reshape(-1, 1), q * scale.astype(np.float64).reshape(-1, 1)
    plain = _rescaled(start, limit, untouched) * layer.scale.reshape(-1, 1)
    _errors(layer, old, new, plain)
    return ""


def _needed(layer: Layer, rows_: Array, options: Options) -> Array:
    """The width of each row [O] behind the inputs of every reader."""
    return np.max([inner_bits(rows_, x, options.tile) for x in layer.inputs], axis=0)  # type: ignore[no-any-return]


def _cap(limit: Limit) -> float:
    return round(limit.radius * (2 if limit.halves else 1), 3)


def _solution(layer: Layer, options: Options, limit: Limit, start: Array, kept: Array) -> tuple[Array, Array]:
    """Codes [O, K] and the factor of each row's scale."""
    shared, factors = layer.scale.size == 1, FACTORS if options.search else FACTORS[:1]
    gram = layer.seen.spread()
    importance = None
    if gram is not None:
        diagonal = gram.diagonal(dim1=1, dim2=2).numpy()
        importance = np.repeat(diagonal, len(start) // layer.groups, 0)
        importance = importance / max(float(importance.mean()), 1e-30) + 1e-6
    centre = options.method == "a2q+" and options.centre
    found = fit(
        start, kept, limit, factors, centre=centre, shared=shared, refit=options.search, importance=importance
    )  # fmt: skip
    if not options.method.startswith("axe"):
        return found.rows, found.factor
    assert gram is not None
    from bitwright.passes.accumulators._axe import inverse_root

    root = inverse_root(gram) if options.method == "axe-gptq" else None
    best, errors = (found.rows, found.factor), np.full(len(start), np.inf)
    for times in (1.0, 2.0**0.5, 2.0**-0.5) if options.search and not shared else (1.0,):
        q, factor, missed = _greedy(
            layer, (gram, root), options, limit, start, kept, np.maximum(found.divisor * times, 1.0)
        )
        better = missed < errors
        errors = np.where(better, missed, errors)
        best = np.where(better[:, None], q, best[0]), np.where(better, factor, best[1])
    return best


def _greedy(
    layer: Layer,
    seen: tuple[torch.Tensor, torch.Tensor | None],
    options: Options,
    limit: Limit,
    start: Array,
    kept: Array,
    divisor: Array,
) -> tuple[Array, Array, Array]:
    """Codes [O, K] by error-compensating rounding, the factors [O] of their scales, and squared output errors [O]."""
    import torch

    from bitwright.passes.accumulators._axe import greedy

    shape, (gram, root) = (layer.groups, -1, start.shape[1]), seen
    order: Any = options.method.removeprefix("axe-")
    v = _tensor(start / divisor[:, None]).reshape(shape)
    q = greedy(v, torch.from_numpy(kept).reshape(v.shape), gram, limit, order, root)
    target = _tensor(start).reshape(shape)
    through = q @ gram
    both, own = ((through * x).sum(-1).reshape(-1).numpy() for x in (target, q))
    if layer.scale.size == 1:
        both, own = (np.full(len(start), x.sum()) for x in (both, own))
    factor = np.where((both > 0) & (own > 0), both / np.maximum(own, 1e-30), divisor) if options.search else divisor
    d = q * torch.from_numpy(np.ascontiguousarray(factor)).reshape(layer.groups, -1, 1) - target
    return q.reshape(start.shape).numpy().astype(np.int64), factor, (d @ gram * d).sum(-1).reshape(-1).numpy()


def _rescaled(start: Array, limit: Limit, fits: Array) -> Array:
    """What plain rescaling would give: every row divided until it fits, rounded toward zero; in the old unit."""
    parts = tiled(start, limit.tile)
    sums = [np.maximum(parts, 0).sum(-1), np.maximum(-parts, 0).sum(-1)] if limit.halves else [np.abs(parts).sum(-1)]
    factor = np.maximum(np.max([s.max(1) for s in sums], axis=0) / limit.radius, 1.0)
    factor = np.where(fits, 1.0, factor)[:, None]
    out: Array = np.trunc(start / factor) * factor
    return out


def _errors(layer: Layer, old: Array, new: Array, plain: Array) -> None:
    """Relative errors of weights and, with calibration, of outputs; and the shift of the outputs' mean."""
    norm = max(float(np.square(old).sum()), 1e-30)
    for name, w in (("weight_error", new), ("weight_error_rescaled", plain)):
        layer.facts[name] = float(np.sqrt(np.square(w - old).sum() / norm))
    gram, total, spread = layer.seen.gram, layer.seen.total, layer.seen.spread()
    if gram is None or total is None or spread is None:
        return
    shape = (layer.groups, -1, old.shape[1])
    mean = total / layer.seen.rows
    energy = max(_energy(_tensor(old).reshape(shape), gram), 1e-30)
    missed = _tensor(new - old).reshape(shape)
    layer.shift = (missed @ mean[..., None]).reshape(-1).numpy()
    for name, d, g in (
        ("output_error", missed, spread), ("output_error_rescaled", _tensor(plain - old).reshape(shape), gram)
    ):  # fmt: skip
        layer.facts[name] = float(np.sqrt(max(_energy(d, g), 0.0) / energy))


def _energy(w: torch.Tensor, gram: torch.Tensor) -> float:
    return float((w @ gram * w).sum())


def _tensor(a: Array) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(a, np.float64))


def new_bias(graph: Graph, node: Node, layer: Layer) -> Array | None:
    """The bias without the mean of the error: f32 [O]; None when there is nothing to take off."""
    given = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
    if layer.shift is None or given is None:
        return None
    return (np.asarray(given, np.float64) - layer.shift).astype(np.float32)


def written(graph: Graph, layers: dict[str, Layer]) -> Graph:
    """The graph with the new codes, scales and biases."""
    made: dict[str, str] = {}

    def step(rw: Rewriter, node: Node) -> bool:
        layer = layers.get(node.inputs[1]) if isinstance(node.op, ops.CONTRACTION) else None
        if layer is None or all(node is not n for n in layer.nodes):
            return False
        source = graph.producers[layer.back.inputs[0]]
        key = stem(source.op.ref) if isinstance(source.op, ops.Weight) else source.output
        if node.inputs[1] not in made:
            assert layer.done is not None
            assert layer.new_scale is not None
            w = rw.weight(key, layer.done, source.type, name=key, origin=source.origin)
            scale = rw.constant(
                layer.new_scale.reshape(graph.types[layer.back.inputs[1]].static_shape),
                name=f"{key}.scale",
                origin=source.origin,
            )
            made[node.inputs[1]] = rw.emit(layer.back.op, w, scale, name=f"{key}.dq", origin=source.origin)
        x, rest, bias = rw.of(node.inputs[0])[0], rw.of(*node.inputs[2:]), new_bias(graph, node, layer)
        if bias is not None:
            rest = (rw.weight(f"{layer.name}.bias", bias, TensorType(F32, bias.shape), name=f"{layer.name}.bias"),)
        rw.keep_as(node, node.op, (x, made[node.inputs[1]], *rest), node.types)
        return True

    return rewrite(graph, step)[0]
