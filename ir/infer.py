"""Result types of an operator: its meaning run on meta tensors, symbols bound to large primes and read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations_with_replacement

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.types import BF16, BOOL, F32, S8, S64, U8, Dim, DType, TensorType, bind_dim, symbols_of

_PRIMES = ((1009, 1151, 1301, 1451, 1601, 1753), (2003, 2153, 2309, 2459, 2609, 2767))
"""Two sizes for each symbol: a result size that scales with both is a multiple of the symbol."""


class InferenceError(InvalidInput):
    """Operands do not fit the operator."""


def infer(op: ops.Op, types: Sequence[TensorType]) -> tuple[TensorType, ...]:
    """Types of the results; raises :class:`InferenceError` with the operand types when they do not fit."""
    low, high = op.arity
    if not low <= len(types) <= high:
        raise InferenceError(f"{op.spelling} takes {low} to {high} operands, got {len(types)}")
    try:
        return _infer(op, tuple(types))
    except InferenceError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError, AssertionError, KeyError, NotImplementedError) as e:
        given = ", ".join(str(t) for t in types)
        raise InferenceError(
            f"{op.spelling} does not fit ({given}): {str(e).splitlines()[0] if str(e) else e!r}"
        ) from e


@lru_cache(maxsize=8192)
def _infer(op: ops.Op, types: tuple[TensorType, ...]) -> tuple[TensorType, ...]:
    if isinstance(op, ops.Region):  # the verifier has checked the body
        want = tuple(v.type.with_encoding(None) for v in op.body.inputs)
        if tuple(t.with_encoding(None) for t in types) != want:
            raise InferenceError(f"region operands {list(map(str, types))} do not match its body's inputs")
        return tuple(op.body.types[o] for o in op.body.outputs)
    _check_dtypes(op, types)
    dims: list[Dim] = [d for t in types for d in t.shape] + [d for d in getattr(op, "shape", ())]
    symbols = tuple(dict.fromkeys(s for d in dims for s in symbols_of(d)))
    if len(symbols) > len(_PRIMES[0]):
        raise InferenceError(f"more than {len(_PRIMES[0])} symbolic sizes meet in {op.spelling}")
    dtypes = result_dtypes(op, types)
    first = _meta_shapes(op, types, dict(zip(symbols, _PRIMES[0], strict=False)))
    if not symbols:
        return tuple(TensorType(d, s) for d, s in zip(dtypes, first, strict=True))
    second = _meta_shapes(op, types, dict(zip(symbols, _PRIMES[1], strict=False)))
    shapes = [
        tuple(_read_back(a, b, symbols) for a, b in zip(x, y, strict=True)) for x, y in zip(first, second, strict=True)
    ]
    return tuple(TensorType(d, s) for d, s in zip(dtypes, shapes, strict=True))


def _meta_shapes(op: ops.Op, types: tuple[TensorType, ...], sizes: dict[str, int]) -> list[tuple[int, ...]]:
    import torch

    from bitwright.ir.semantics import apply, torch_dtype

    xs = [
        torch.empty([int(bind_dim(d, sizes)) for d in t.shape], dtype=torch_dtype(t.dtype), device="meta")
        for t in types
    ]
    with torch.no_grad():
        return [tuple(y.shape) for y in apply(bind_op(op, sizes), *xs)]


def _read_back(a: int, b: int, symbols: tuple[str, ...]) -> Dim:
    if a == b:
        return a
    for count in (1, 2, 3):
        for combo in combinations_with_replacement(range(len(symbols)), count):
            p, q = 1, 1
            for i in combo:
                p, q = p * _PRIMES[0][i], q * _PRIMES[1][i]
            if a % p == 0 and b % q == 0 and a // p == b // q:
                return "*".join(([str(a // p)] if a != p else []) + [symbols[i] for i in combo])
    raise InferenceError("a result size depends on a symbolic size in a way bitwright cannot name (only products can)")


def bind_op(op: ops.Op, sizes: dict[str, int]) -> ops.Op:
    """The operator with symbols in its shape attribute (and in a region's body) replaced."""
    if isinstance(op, ops.Region):
        return replace(op, body=bind_graph(op.body, sizes)) if sizes else op
    shape = getattr(op, "shape", None)
    if shape is None or all(isinstance(d, int) for d in shape):
        return op
    return replace(op, **{"shape": tuple(bind_dim(d, sizes) for d in shape)})


def bind_type(t: TensorType, sizes: dict[str, int]) -> TensorType:
    """The type with symbols replaced by sizes."""
    return t.with_shape(tuple(bind_dim(d, sizes) for d in t.shape))


def bind_graph(graph: Graph, sizes: dict[str, int]) -> Graph:
    """The graph with symbolic sizes replaced, e.g. ``{"b": 1}``."""
    nodes = tuple(
        replace(n, op=bind_op(n.op, sizes), types=tuple(bind_type(t, sizes) for t in n.types)) for n in graph.nodes
    )
    inputs = tuple(replace(v, type=bind_type(v.type, sizes)) for v in graph.inputs)
    return replace(graph, inputs=inputs, nodes=nodes)


_SAME = (ops.MatMul, ops.Linear, ops.Conv, ops.ConvTranspose, ops.Attention, ops.BatchNorm, *ops.SMALL_FLOAT)


def _check_dtypes(op: ops.Op, types: tuple[TensorType, ...]) -> None:
    """Operators whose operands must share a dtype say so here; torch would promote silently."""
    same: tuple[TensorType, ...] = ()
    if isinstance(op, ops.Binary) or isinstance(op, _SAME):
        same = types[:3] if isinstance(op, ops.Attention) else types
    elif isinstance(op, ops.Where):
        if types[0].dtype != BOOL:
            raise InferenceError(f"where needs a bool condition, got {types[0]}")
        same = types[1:]
    elif isinstance(op, ops.Concat):
        same = types
    if isinstance(op, ops.SMALL_FLOAT) and all(t.dtype.is_small_float for t in types[:2]):
        same = types[2:]
    elif isinstance(op, ops.DynamicQuantize | ops.GroupLinear):
        _check_dynamic(op, types)
    if len({t.dtype for t in same}) > 1:
        raise InferenceError(f"{op.spelling} needs operands of one dtype, got {', '.join(map(str, types))}")


def _check_dynamic(op: ops.Op, types: tuple[TensorType, ...]) -> None:
    """Formats of codes found at run time and of what is made of them."""
    first, kinds = types[0].dtype, [t.dtype for t in types]
    if isinstance(op, ops.DynamicQuantize):
        if first != F32 or op.dtype not in (S8, U8):
            raise InferenceError(f"{op.spelling} makes s8 or u8 of f32, not {op.dtype} of {first}")
        return
    weights = [k for k in (kinds[2], *kinds[4:]) if not k.is_integer or k.bits > 8]
    if first != S8 or kinds[1] != F32 or kinds[3] not in (F32, BF16) or weights:
        given = ", ".join(map(str, types))
        raise InferenceError(
            f"{op.spelling} takes s8 codes, an f32 scale, integer weights and their f32 or bf16 scales, got {given}"
        )


def result_dtypes(op: ops.Op, types: tuple[TensorType, ...]) -> tuple[DType, ...]:
    """Dtypes of the results."""
    if isinstance(op, (ops.Cast, ops.Quantize, ops.Requantize, ops.Saturate)):
        return (op.dtype,)
    if isinstance(op, (ops.IntLinear, ops.IntMatMul, ops.IntConv)):
        return (op.acc,)
    if isinstance(op, ops.Dequantize):
        return (types[1].dtype,)
    if isinstance(op, ops.DynamicQuantize):
        return (op.dtype, F32)
    if isinstance(op, ops.GroupLinear):
        return (F32,)
    if isinstance(op, ops.ArgReduce):
        return (S64,)
    if isinstance(op, ops.TopK):
        return (types[0].dtype, S64)
    if isinstance(op, ops.Where):
        return (types[1].dtype,)
    if isinstance(op, (ops.Unary, ops.Binary)) and (op.fn in ops.COMPARE or op.fn in ops.PREDICATES):
        return (BOOL,)
    if isinstance(op, ops.Binary) and op.fn in ("and", "or", "xor"):
        return (BOOL,)
    if isinstance(op, ops.SMALL_FLOAT) and types[0].dtype.is_small_float:
        return (F32,)
    return (types[0].dtype,)


__all__ = ["InferenceError", "bind_graph", "bind_op", "bind_type", "infer", "result_dtypes"]
