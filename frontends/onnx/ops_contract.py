"""Contractions: MatMul, Gemm, Conv, ConvTranspose, Einsum, attention. A constant right operand becomes a weight."""

from __future__ import annotations

import math

import numpy as np

from bitwright.frontends.onnx.call import Call
from bitwright.frontends.onnx.importer import has_nan
from bitwright.frontends.onnx.ops_shape import transposed
from bitwright.frontends.onnx.symbolic import Entry, exact_div, product
from bitwright.frontends.onnx.values import Val
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import BOOL, S64


def checked(c: Call, *xs: Val | None) -> None:
    """Refuse an infinite or NaN constant of a contraction."""
    for x in xs:
        if x is None or x.handle is None or not x.type.dtype.is_float or "finite" in x.handle.checked:
            continue
        a = x.handle.array
        name = x.label or c.importer.origin
        if has_nan(a):
            raise InvalidInput(f"tensor {name!r} contains NaN")
        with np.errstate(all="ignore"):
            wide = a if a.dtype.itemsize >= 4 else a.astype(np.float32)
            if not np.isfinite(wide.sum()) and bool(np.isinf(wide).any()):
                raise InvalidInput(f"weight {name!r} of a contraction contains an infinity")
        x.handle.checked.add("finite")


def weight_of(c: Call, w: Val) -> Val | None:
    """A constant (or dequantized constant) matrix [K, O] as the weight [O, K] of a Linear; None when computed."""
    stored = w.packed.q if w.packed is not None else w
    if w.rank != 2 or stored.handle is None:
        return None
    key = id(stored.handle)
    kept = c.importer.flipped.get(key)
    if kept is not None and w.packed is None:
        return kept[1]
    out = transposed(c, w, (1, 0))
    if w.packed is None:
        out.label = w.label
        c.importer.flipped[key] = (stored.handle, out)
    return out


def matmul(c: Call, a: Val, b: Val) -> Val:
    """NumPy's matmul: Linear when the right operand is a constant matrix."""
    checked(c, a, b)
    if a.rank == 0 or b.rank == 0:
        raise InvalidInput("matmul of a scalar")
    if b.rank == 2 and a.rank >= 2 and (w := weight_of(c, b)) is not None:
        return c.emit(ops.Linear(), a, w)
    left = c.unsqueeze(a, 0) if a.rank == 1 else a
    right = c.unsqueeze(b, 1) if b.rank == 1 else b
    y = c.emit(ops.MatMul(), left, right)
    if b.rank == 1:
        y = c.squeeze(y, -1)
    return c.squeeze(y, -1 if b.rank == 1 else -2) if a.rank == 1 else y


def _matmul(c: Call) -> Val:
    return matmul(c, c.x(0), c.x(1))


def _fused_matmul(c: Call) -> Val:
    a, b = c.x(0), c.x(1)
    if c.int_("transBatchA") or c.int_("transBatchB"):
        raise c.refuse("transposed batch axes are not supported")
    if c.int_("transA"):
        a = transposed(c, a, (*range(a.rank - 2), a.rank - 1, a.rank - 2))
    if c.int_("transB"):
        b = transposed(c, b, (*range(b.rank - 2), b.rank - 1, b.rank - 2))
    y, alpha = matmul(c, a, b), c.float_("alpha", 1.0)
    return y if alpha == 1.0 else c.mul(y, alpha)


def _gemm(c: Call) -> Val:
    a, b, bias = c.x(0), c.x(1), c.opt(2)
    checked(c, a, b, bias)
    c.ignore("broadcast")
    if a.rank != 2 or b.rank != 2:
        raise InvalidInput(f"a Gemm of {a.type} and {b.type}")
    a = transposed(c, a, (1, 0)) if c.int_("transA") else a
    alpha, beta = c.float_("alpha", 1.0), c.float_("beta", 1.0)
    w = b if c.int_("transB") else (weight_of(c, b) or transposed(c, b, (1, 0)))
    if bias is not None and beta != 1.0:
        bias = c.mul(bias, c.scalar(beta, bias.type.dtype))
    plain = bias is not None and alpha == 1.0 and bias.rank == 1 and bias.shape == w.shape[:1]
    if plain and bias is not None:
        return c.emit(ops.Linear(), a, w, bias)
    y = c.emit(ops.Linear(), a, w)
    y = y if alpha == 1.0 else c.mul(y, c.scalar(alpha, y.type.dtype))
    return y if bias is None else c.add(y, bias)


def windows(c: Call, x: Val, kernel: tuple[int, ...], transposing: bool = False) -> tuple[tuple[int, ...], ...]:
    """stride, dilation and padding (begin..., end...) of a window operator on x[N, C, *S]."""
    n = len(kernel)
    stride, dilation = c.ints("strides") or (1,) * n, c.ints("dilations") or (1,) * n
    if x.rank != n + 2:
        raise InvalidInput(f"{n} window sizes for {x.type}")
    if len(stride) != n or len(dilation) != n or min((*stride, *dilation, *kernel), default=1) < 1:
        raise InvalidInput(f"strides {stride}, dilations {dilation} do not fit windows {kernel}")
    auto = c.text("auto_pad", "NOTSET") or "NOTSET"
    if auto == "NOTSET":
        pads = c.ints("pads") or (0,) * (2 * n)
        if len(pads) != 2 * n:
            raise InvalidInput(f"{len(pads)} pads for {n} axes")
        return stride, dilation, pads
    if auto == "VALID":
        return stride, dilation, (0,) * (2 * n)
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise InvalidInput(f"auto_pad is {auto!r}")
    if transposing:
        return stride, dilation, ()
    total = []
    for i in range(n):
        reach = dilation[i] * (kernel[i] - 1) + 1
        if stride[i] == 1:
            total.append(reach - 1)
            continue
        size = c.size(x, 2 + i)
        total.append(max(0, (-(-size // stride[i]) - 1) * stride[i] + reach - size))
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return stride, dilation, tuple((*small, *large) if auto == "SAME_UPPER" else (*large, *small))


def kernel_of(c: Call, w: Val) -> tuple[int, ...]:
    """The window sizes, from the weight; the attribute must agree."""
    if w.rank < 3 or w.rank > 5:
        raise c.refuse(f"a convolution with weight {w.type}; 1 to 3 space axes are supported")
    kernel = c.static(w)[2:]
    said = c.ints("kernel_shape")
    if said is not None and said != kernel:
        raise InvalidInput(f"kernel_shape {list(said)} differs from the weight {w.type}")
    return kernel


def conv(c: Call, x: Val, w: Val, bias: Val | None) -> Val:
    """Conv with this node's attributes on given operands."""
    checked(c, x, w, bias)
    stride, dilation, pads = windows(c, x, kernel_of(c, w))
    n = w.rank - 2
    if min(pads) < 0:
        from bitwright.frontends.onnx.ops_shape import padded

        x = padded(c, x, [0, 0, *pads[:n]], [0, 0, *pads[n:]], "constant", 0.0)
        pads = (0,) * (2 * n)
    op = ops.Conv(stride, pads if any(pads) else (0,) * (2 * n), dilation, c.int_("group", 1))
    return c.emit(op, x, w, *([] if bias is None else [bias]))


def _conv(c: Call) -> Val:
    return conv(c, c.x(0), c.x(1), c.opt(2))


def _conv_transpose(c: Call) -> Val:
    x, w, bias = c.x(0), c.x(1), c.opt(2)
    checked(c, x, w, bias)
    kernel = kernel_of(c, w)
    n = len(kernel)
    stride, dilation, pads = windows(c, x, kernel, transposing=True)
    extra = c.ints("output_padding") or (0,) * n
    want = c.ints("output_shape")
    if want is None and not pads:
        want = tuple(c.size(x, 2 + i) * stride[i] for i in range(n))
    if want is not None:
        want = want[-n:]
        full = [(c.size(x, 2 + i) - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 + extra[i] for i in range(n)]
        total = [f - w for f, w in zip(full, want, strict=True)]
        if min(total) < 0:
            raise c.refuse("output_shape is larger than the transposed convolution reaches")
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = tuple((*small, *large) if c.text("auto_pad") == "SAME_UPPER" else (*large, *small))
    op = ops.ConvTranspose(stride, pads, extra, dilation, c.int_("group", 1))
    return c.emit(op, x, w, *([] if bias is None else [bias]))


# --- einsum -----------------------------------------------------------------------------------------------------


def _einsum(c: Call) -> Val:
    xs = c.all()
    equation = c.text("equation").replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(xs):
        raise InvalidInput(f"equation {equation!r} for {len(xs)} operands")
    terms, dots = _name_ellipsis(terms, xs)
    if "->" not in equation:
        letters = "".join(terms)
        right = "..." + "".join(sorted(t for t in set(letters) if letters.count(t) == 1 and t not in dots))
    right = right.replace("...", dots)
    value, term = _diagonal(c, xs[0], terms[0])
    for i in range(1, len(xs)):
        other, t = _diagonal(c, xs[i], terms[i])
        later = set(right).union(*terms[i + 1 :])
        value, term = _contract_pair(c, value, term, other, t, later)
    value, term = _sum_out(c, value, term, set(right))
    if sorted(term) != sorted(right) or len(set(right)) != len(right):
        raise InvalidInput(f"equation {equation!r} has an output label that no operand has")
    return c.transpose(value, [term.index(t) for t in right])


def _name_ellipsis(terms: list[str], xs: list[Val]) -> tuple[list[str], str]:
    """Give the axes behind ``...`` letters of their own (right-aligned)."""
    free = [ch for ch in map(chr, range(0x100, 0x180))]
    ranks = [x.rank - len(t.replace("...", "")) if "..." in t else 0 for t, x in zip(terms, xs, strict=True)]
    if min(ranks) < 0 or max(ranks) > 64:
        raise InvalidInput("an equation's term has more letters than its operand has axes")
    dots = "".join(free[: max(ranks)])
    out = [t.replace("...", dots[len(dots) - r :]) for t, r in zip(terms, ranks, strict=True)]
    if any(len(t) != x.rank for t, x in zip(out, xs, strict=True)):
        raise InvalidInput("an equation's term does not have one letter per axis of its operand")
    return out, dots


def _diagonal(c: Call, x: Val, term: str) -> tuple[Val, str]:
    """Take the diagonal of letters that repeat within one operand."""
    for letter in dict.fromkeys(term):
        while term.count(letter) > 1:
            i, j = [k for k, t in enumerate(term) if t == letter][:2]
            n = c.size(x, i)
            perm = [i, j] + [k for k in range(x.rank) if k not in (i, j)]
            y = c.transpose(x, perm)
            y = c.reshape(y, (n * n, *y.dims[2:]))
            x = c.emit(ops.Slice(0, 0, n * n, n + 1), y)
            term = letter + "".join(term[k] for k in perm[2:])
    return x, term


def _sum_out(c: Call, x: Val, term: str, keep: set[str]) -> tuple[Val, str]:
    axes = tuple(i for i, t in enumerate(term) if t not in keep)
    if not axes:
        return x, term
    return c.reduce("sum", x, axes), "".join(t for t in term if t in keep)


def _contract_pair(c: Call, a: Val, ta: str, b: Val, tb: str, later: set[str]) -> tuple[Val, str]:
    """One product of two operands as a batched MatMul."""
    a, ta = _sum_out(c, a, ta, later | set(tb))
    b, tb = _sum_out(c, b, tb, later | set(ta))
    batch = [t for t in ta if t in tb and t in later]
    inner = [t for t in ta if t in tb and t not in later]
    left, right = [t for t in ta if t not in tb], [t for t in tb if t not in ta]
    a = c.transpose(a, [ta.index(t) for t in batch + left + inner])
    b = c.transpose(b, [tb.index(t) for t in batch + inner + right])
    nb, nl, ni = len(batch), len(left), len(inner)
    shape_a, shape_b = a.dims, b.dims
    lead = tuple(y if x == 1 else x for x, y in zip(shape_a[:nb], shape_b[:nb], strict=True))
    if any(x != y and 1 in (x, y) for x, y in zip(shape_a[nb + nl :], shape_b[nb : nb + ni], strict=True)):
        raise c.refuse("a summed letter is broadcast")
    k = product(shape_a[nb + nl :])
    flat_a = c.reshape(a, (*shape_a[:nb], product(shape_a[nb : nb + nl]), k))
    flat_b = c.reshape(b, (*shape_b[:nb], k, product(shape_b[nb + ni :])))
    y = matmul(c, flat_a, flat_b)
    return c.reshape(y, (*lead, *shape_a[nb : nb + nl], *shape_b[nb + ni :])), "".join(batch + left + right)


# --- attention --------------------------------------------------------------------------------------------------


def _attention(c: Call) -> object:
    """The usual forms become one Attention; the rest goes through the standard's function body."""
    q, k, v, mask = c.x(0), c.x(1), c.x(2), c.opt(3)
    unusual = c.opt(6) is not None or c.wants(3) or c.float_("softcap") or c.has("softmax_precision")
    if unusual or q.type.dtype != v.type.dtype or not c.float_("scale", 1.0) > 0:
        return c.by_function_body()
    c.has("qk_matmul_output_mode")
    heads = (c.int_("q_num_heads"), c.int_("kv_num_heads"))
    flat = q.rank == 3
    if flat:
        q, k, v = (_split_heads(c, t, n) for t, n in ((q, heads[0]), (k, heads[1]), (v, heads[1])))
    if q.rank != 4 or k.rank != 4 or v.rank != 4:
        raise InvalidInput(f"attention over {q.type}, {k.type}, {v.type}")
    past: Entry = 0
    if c.opt(4) is not None:
        past = c.x(4).dims[2]
        k, v = c.concat([c.x(4), k], 2), c.concat([c.x(5), v], 2)
    if mask is not None and (mask.rank < 2 or mask.shape[-1] != k.shape[-2]):
        return c.by_function_body()
    left, right = c.int_("left_window_size", -1), c.int_("right_window_size", -1)
    causal = bool(c.int_("is_causal"))
    plain = causal and past == 0 and mask is None and left < 0 and right < 0
    if not plain:
        mask = _windowed(c, mask, (q.dims[2], k.dims[2], past), left, 0 if causal else right)
    groups = c.size(q, 1) // max(1, c.size(k, 1))
    scale = c.float_("scale", 0.0) or 1.0 / math.sqrt(c.size(q, 3))
    y = c.emit(ops.Attention(scale, plain, groups), q, k, v, *([] if mask is None else [mask]))
    y = _zero_unattended(c, y, mask)
    if flat:
        y = c.transpose(y, (0, 2, 1, 3))
        y = c.reshape(y, (y.dims[0], y.dims[1], product(y.dims[2:])))
    return (y, k, v)[: max(1, c.outputs)]


def _windowed(c: Call, mask: Val | None, lengths: tuple[Entry, Entry, Entry], left: int, right: int) -> Val | None:
    """The mask with keys outside [position - left, position + right] taken out (negative: unbounded)."""
    if left < 0 and right < 0:
        return mask
    queries, keys, past = lengths
    position = c.reshape(c.iota(queries), (queries, 1))
    if past != 0:
        offset = np.empty((), dtype=object)
        offset[()] = past
        position = c.add(position, c.importer.sizes(offset, S64))
    key = c.reshape(c.iota(keys), (1, keys))
    allowed: Val | None = None
    if right >= 0:
        allowed = c.binary("le", key, c.add(position, right))
    if left >= 0:
        above = c.binary("ge", key, c.sub(position, left))
        allowed = above if allowed is None else c.binary("and", allowed, above)
    assert allowed is not None
    if mask is None:
        return allowed
    if mask.type.dtype == BOOL:
        return c.binary("and", mask, allowed)
    return c.where(allowed, mask, c.scalar(float("-inf"), mask.type.dtype))


def _zero_unattended(c: Call, y: Val, mask: Val | None) -> Val:
    """A query that a bool mask lets attend nothing gives zero, not NaN."""
    if mask is None or mask.type.dtype != BOOL:
        return y
    some = c.reduce("any", mask, (mask.rank - 1,), keep=True)
    if some.handle is not None and bool(some.handle.array.all()):
        return y
    return c.where(some, y, c.scalar(0, y.type.dtype))


def _split_heads(c: Call, t: Val, heads: int) -> Val:
    if heads < 1:
        raise InvalidInput("q_num_heads and kv_num_heads are needed for operands of rank 3")
    b, s, width = t.dims
    each: Entry = exact_div(width, heads)
    return c.transpose(c.reshape(t, (b, s, heads, each)), (0, 2, 1, 3))


TABLE = {
    ("", "MatMul"): _matmul, ("", "Gemm"): _gemm, ("", "Conv"): _conv, ("", "ConvTranspose"): _conv_transpose,
    ("", "Einsum"): _einsum, ("", "Attention"): _attention, ("com.microsoft", "FusedMatMul"): _fused_matmul,
}  # fmt: skip
