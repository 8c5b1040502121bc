"""The operators, as frozen dataclasses: fields are the attributes. Their meaning is in ``semantics.py``.

Shapes in the comments: N batch, C channels, H/W space, K reduction, O outputs. Operand dtypes must agree;
front ends insert :class:`Cast` where the source language promotes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from bitwright.ir.types import S8, S32, Dim, DType, small_float

if TYPE_CHECKING:
    from bitwright.ir.graph import Graph

UNARY = frozenset(
    "relu neg abs exp log sqrt rsqrt reciprocal erf tanh sigmoid silu softplus mish sin cos tan asin acos atan "
    "sinh cosh asinh acosh atanh floor ceil round trunc sign not bitnot isnan isinf softsign hardswish "
    "hardsigmoid gelu gelu_tanh log1p expm1 square".split()
)
COMPARE = frozenset("eq ne lt le gt ge".split())
BINARY = COMPARE | frozenset(
    "add sub mul div floordiv pow min max mod fmod and or xor bitand bitor bitxor shl shr atan2".split()
)
PREDICATES = frozenset(["isnan", "isinf", "not"])
REDUCE = frozenset("sum mean max min prod any all l1 l2 logsumexp logsum sumsq".split())


@dataclass(frozen=True)
class Op:
    """Base of all operators."""

    name: ClassVar[str] = ""
    arity: ClassVar[tuple[int, int]] = (1, 1)
    """Smallest and largest number of operands."""
    results: ClassVar[int] = 1

    @property
    def spelling(self) -> str:
        """The word that stands for this operator in the text."""
        return self.name

    def attributes(self) -> dict[str, Any]:
        """Fields that differ from their default, in declaration order (what the text prints)."""
        out = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "fn" and (value != f.default or type(value) is not type(f.default)):
                out[f.name] = value
        return out


@dataclass(frozen=True)
class _Named(Op):
    """An operator family whose member is named by ``fn``."""

    fn: str = ""

    @property
    def spelling(self) -> str:
        return f"{self.name}_{self.fn}" if self.name else self.fn


# --- sources -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight(Op):
    """A tensor of the graph's weight store, by key."""

    name = "weight"
    arity = (0, 0)
    ref: str = ""


@dataclass(frozen=True)
class Constant(Op):
    """A small literal tensor: ``values`` in row-major order; the node's type gives dtype and shape."""

    name = "constant"
    arity = (0, 0)
    values: tuple[float | int | bool, ...] = ()


# --- pointwise (NumPy broadcasting) ------------------------------------------------------------------------


@dataclass(frozen=True)
class Unary(_Named):
    """One of UNARY, element by element. ``gelu`` is the erf form; ``round`` is half to even."""


@dataclass(frozen=True)
class Binary(_Named):
    """One of BINARY with broadcasting. Integer ``div`` truncates toward zero; ``mod`` has the divisor's sign."""

    arity = (2, 2)


@dataclass(frozen=True)
class Where(Op):
    """condition (bool), then, otherwise."""

    name = "where"
    arity = (3, 3)


@dataclass(frozen=True)
class Clamp(Op):
    """min(max(x, lo), hi)."""

    name = "clamp"
    lo: float = float("-inf")
    hi: float = float("inf")


@dataclass(frozen=True)
class LeakyRelu(Op):
    """x where x >= 0, slope * x elsewhere."""

    name = "leaky_relu"
    slope: float = 0.01


@dataclass(frozen=True)
class Elu(Op):
    """gamma * x where x > 0, gamma * alpha * (exp(x / beta) - 1) elsewhere (selu and celu included)."""

    name = "elu"
    alpha: float = 1.0
    gamma: float = 1.0
    beta: float = 1.0


@dataclass(frozen=True)
class Cast(Op):
    """Convert to ``dtype``; float to integer truncates toward zero (out of range: wraps as C does). Small floats are
    rounded half to even, NaN to 0."""

    name = "cast"
    dtype: DType = S32


@dataclass(frozen=True)
class Quantize(Op):
    """saturate(round_half_even(x / scale) + zero); operands x, scale, [zero]; per tensor, per ``axis``, or
    per ``group`` consecutive elements of ``axis`` (scale then has size/group entries there). To a small float:
    x / scale (in f32) in that format, half to even; there is no zero point then."""

    name = "quantize"
    arity = (2, 3)
    dtype: DType = S32
    axis: int | None = None
    group: int = 0


@dataclass(frozen=True)
class Dequantize(Op):
    """(q - zero) * scale in the scale's dtype; operands q, scale, [zero]; axis and group as in Quantize."""

    name = "dequantize"
    arity = (2, 3)
    axis: int | None = None
    group: int = 0


@dataclass(frozen=True)
class Requantize(Op):
    """saturate(zero + round_half_up(acc * multiplier / 2^shift)), exact in 64-bit integers.

    Operands acc (s32), multiplier (s32, 0 <= m < 2^31), shift (s32, 1..62); the latter two are scalars
    (shape []) or one entry per index of ``axis``.
    """

    name = "requantize"
    arity = (3, 3)
    dtype: DType = S32
    zero: int = 0
    axis: int | None = None


@dataclass(frozen=True)
class DynamicQuantize(Op):
    """x[..., K] to 8-bit codes [..., K] and one scale per row [..., 1] (f32), found at run time: scale is max|x| / 127,
    the code round_half_even(x * (127 / max|x|)); ``dtype`` u8 holds the code + 128. A row whose maximum is below 2^-120
    has codes of zero; one with a NaN or an infinity too, and its scale is NaN."""

    name = "dynamic_quantize"
    results = 2
    dtype: DType = S8


@dataclass(frozen=True)
class Saturate(Op):
    """Clamp to [max(lo, dtype.lo), min(hi, dtype.hi)] and convert an integer tensor to ``dtype``."""

    name = "saturate"
    dtype: DType = S32
    lo: int | None = None
    hi: int | None = None


# --- contractions ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear(Op):
    """x[..., K], w[O, K], [bias[O]] -> [..., O]."""

    name = "linear"
    arity = (2, 3)


@dataclass(frozen=True)
class MatMul(Op):
    """a[..., M, K], b[..., K, O] (or [..., O, K] when transposed) -> [..., M, O]; batch axes broadcast."""

    name = "matmul"
    arity = (2, 2)
    transpose_b: bool = False


@dataclass(frozen=True)
class Conv(Op):
    """x[N, C, *S], w[O, C/groups, *K], [bias[O]]; 1 to 3 space axes.

    padding is (begin..., end...). With ``channels_last`` x and the result are [N, *S, C]; w stays as it is.
    """

    name = "conv"
    arity = (2, 3)
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    channels_last: bool = False


@dataclass(frozen=True)
class ConvTranspose(Op):
    """x[N, C, *S], w[C, O/groups, *K], [bias]; padding (begin..., end...) trims the full result."""

    name = "conv_transpose"
    arity = (2, 3)
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class Attention(Op):
    """softmax(q k^T * scale + mask) v over q[..., L, D], k[..., S, D], v[..., S, E]; mask float (added) or bool
    (true = attend), broadcast to [..., L, S]; ``causal`` aligns the diagonal top left as torch does; key and value
    batch axes broadcast against the query's except for ``kv_groups``: consecutive query heads (axis -3) per
    key head."""

    name = "attention"
    arity = (3, 4)
    scale: float = 1.0
    causal: bool = False
    kv_groups: int = 1


@dataclass(frozen=True)
class IntLinear(Op):
    """Exact integer Linear without bias: sum over K of (x - x_zero) * w; the result's dtype is ``acc``.

    ``partial``: a kernel may sum products x * w in this narrower format, for any ``every`` products of one output are
    proved to fit it; the result is the same."""

    name = "int_linear"
    arity = (2, 2)
    x_zero: int = 0
    acc: DType = S32
    partial: DType | None = None
    every: int = 0


@dataclass(frozen=True)
class IntMatMul(Op):
    """Exact integer MatMul of (a - a_zero) and (b - b_zero)."""

    name = "int_matmul"
    arity = (2, 2)
    transpose_b: bool = False
    a_zero: int = 0
    b_zero: int = 0
    acc: DType = S32


@dataclass(frozen=True)
class IntConv(Op):
    """Exact integer Conv of (x - x_zero) and w, no bias; padding contributes nothing (x = x_zero); ``partial`` and
    ``every`` as for int_linear."""

    name = "int_conv"
    arity = (2, 2)
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    channels_last: bool = False
    x_zero: int = 0
    acc: DType = S32
    partial: DType | None = None
    every: int = 0


@dataclass(frozen=True)
class GroupLinear(Op):
    """Linear of codes with a weight scale for every ``group`` consecutive inputs (0: all of them) of each output.

    x[..., K] (s8), x_scale[..., 1] (f32), w[O, K] (integers up to 8 bits), w_scale[O, K/group] (f32 or bf16), [w_zero,
    integers as w_scale]. Sums of x * (w - w_zero) are exact (s32) within a group; times the scale they are added in f32
    in order of the groups; the total is multiplied by x_scale: f32[..., O]."""

    name = "group_linear"
    arity = (4, 5)
    group: int = 0


M7E4_PRODUCT, M7E4_SUM = small_float(4, 7, 12), small_float(4, 7, 10)


@dataclass(frozen=True)
class _SmallFloat(Op):
    """Contractions whose every product and every sum is a small float (``small_float.py``), in chunks of terms; the
    final sum, and then the bias, in the operands' format. Terms in order of k; operands are f32, f16 or bf16, or small
    floats, each in a format of its own, with the result in f32."""

    product: DType = M7E4_PRODUCT
    acc: DType = M7E4_SUM
    chunk: int = 16
    rounding: str = "floor"


@dataclass(frozen=True)
class SmallLinear(_SmallFloat):
    """Linear with small-float sums."""

    name = "small_linear"
    arity = (2, 3)


@dataclass(frozen=True)
class SmallMatMul(_SmallFloat):
    """MatMul with small-float sums; both operands have a row and a column."""

    name = "small_matmul"
    arity = (2, 2)
    transpose_b: bool = False


@dataclass(frozen=True)
class SmallConv(_SmallFloat):
    """Conv of one group with small-float sums; k counts the taps in row-major order, and at each tap the channels.
    Terms that read padding are zeros, and count."""

    name = "small_conv"
    arity = (2, 3)
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    channels_last: bool = False


# --- normalisation, softmax, pooling, reductions ------------------------------------------------------------


@dataclass(frozen=True)
class BatchNorm(Op):
    """x[N, C, ...], scale, bias, mean, variance (all [C]): (x - mean) / sqrt(variance + eps) * scale + bias."""

    name = "batch_norm"
    arity = (5, 5)
    eps: float = 1e-5


@dataclass(frozen=True)
class LayerNorm(Op):
    """Normalise over the last ``axes`` axes (population variance); operands x, [scale, [bias]]."""

    name = "layer_norm"
    arity = (1, 3)
    axes: int = 1
    eps: float = 1e-5


@dataclass(frozen=True)
class RmsNorm(Op):
    """x / sqrt(mean(x^2 over the last ``axes`` axes) + eps) * scale; operands x, [scale]."""

    name = "rms_norm"
    arity = (1, 2)
    axes: int = 1
    eps: float = 1e-6


@dataclass(frozen=True)
class GroupNorm(Op):
    """Normalise x[N, C, ...] over each group of channels and all space; operands x, [scale[C], bias[C]]."""

    name = "group_norm"
    arity = (1, 3)
    groups: int = 1
    eps: float = 1e-5


@dataclass(frozen=True)
class Softmax(Op):
    """Softmax (or its logarithm) over one axis."""

    name = "softmax"
    axis: int = -1
    log: bool = False


@dataclass(frozen=True)
class MaxPool(Op):
    """Window maximum over x[N, C, *S] ([N, *S, C] when channels_last); padding (begin..., end...) never wins."""

    name = "max_pool"
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    channels_last: bool = False


@dataclass(frozen=True)
class AvgPool(Op):
    """Window mean; ``count_padding`` divides by the window clipped to the padded input; ``extra`` is further
    padding at the end (ceil mode) that is never counted."""

    name = "avg_pool"
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    count_padding: bool = True
    channels_last: bool = False


@dataclass(frozen=True)
class Reduce(_Named):
    """One of REDUCE over ``axes``."""

    name = "reduce"
    axes: tuple[int, ...] = ()
    keepdim: bool = False


@dataclass(frozen=True)
class ArgReduce(_Named):
    """``argmax`` or ``argmin`` along one axis: s64 indices; first occurrence, or the last with ``last``."""

    axis: int = -1
    keepdim: bool = False
    last: bool = False


@dataclass(frozen=True)
class CumSum(Op):
    """Running sum along one axis."""

    name = "cumsum"
    axis: int = 0
    exclusive: bool = False
    reverse: bool = False


@dataclass(frozen=True)
class TopK(Op):
    """The k largest (or smallest) along an axis, in order; results values and s64 indices; ties: lower index."""

    name = "topk"
    results = 2
    k: int = 1
    axis: int = -1
    largest: bool = True


@dataclass(frozen=True)
class UnbiasedMask(Op):
    """x with at most ``keep`` of every ``group`` along ``axis`` left (a shorter last group: its share, rounded up), at
    random, so that the expectation over draws is x; operands x, draw (s64[]). Certain entries stay, others become
    x/probability. The random numbers of a group are Philox-4x32-10 of its number, the draw and the ``seed``; method
    optimal (least variance) or, for keep 2, two-draw. A group with a NaN becomes NaN. Exact: ``mvue.py``."""

    name = "unbiased_mask"
    arity = (2, 2)
    keep: int = 2
    group: int = 4
    axis: int = -1
    seed: int = 0
    method: str = "optimal"


# --- shape and indexing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reshape(Op):
    """Same elements in row-major order, new shape (no -1; symbols allowed)."""

    name = "reshape"
    shape: tuple[Dim, ...] = ()


@dataclass(frozen=True)
class Transpose(Op):
    """Result axis i is operand axis perm[i]."""

    name = "transpose"
    perm: tuple[int, ...] = ()


@dataclass(frozen=True)
class Expand(Op):
    """Broadcast to ``shape``."""

    name = "expand"
    shape: tuple[Dim, ...] = ()


@dataclass(frozen=True)
class Concat(Op):
    """Join along ``axis``."""

    name = "concat"
    arity = (1, 10_000)
    axis: int = 0


@dataclass(frozen=True)
class Slice(Op):
    """x[start:stop:step] along ``axis``; 0 <= start <= stop <= size, step >= 1 (use Flip for negative steps)."""

    name = "slice"
    axis: int = 0
    start: int = 0
    stop: int = 0
    step: int = 1


@dataclass(frozen=True)
class Pad(Op):
    """padding (begin of every axis..., end of every axis...), non-negative; mode constant, reflect, edge or wrap."""

    name = "pad"
    padding: tuple[int, ...] = ()
    value: float = 0.0
    mode: str = "constant"


@dataclass(frozen=True)
class Tile(Op):
    """Repeat the whole tensor ``repeats[i]`` times along axis i."""

    name = "tile"
    repeats: tuple[int, ...] = ()


@dataclass(frozen=True)
class Flip(Op):
    """Reverse along ``axes``."""

    name = "flip"
    axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Gather(Op):
    """x, indices (s32/s64, any shape, negative counts from the end): take along ``axis``; embedding is axis 0."""

    name = "gather"
    arity = (2, 2)
    axis: int = 0


@dataclass(frozen=True)
class GatherElements(Op):
    """x, indices of x's rank: out[i][j] = x[index[i][j]][j] for axis 0."""

    name = "gather_elements"
    arity = (2, 2)
    axis: int = 0


@dataclass(frozen=True)
class GatherNd(Op):
    """ONNX GatherND: x, indices[..., r]; ``batch`` leading axes are shared."""

    name = "gather_nd"
    arity = (2, 2)
    batch: int = 0


@dataclass(frozen=True)
class ScatterElements(Op):
    """ONNX ScatterElements: x, indices, updates; reduction none, add, mul, min or max; in index order."""

    name = "scatter_elements"
    arity = (3, 3)
    axis: int = 0
    reduction: str = "none"


@dataclass(frozen=True)
class ScatterNd(Op):
    """ONNX ScatterND: x, indices[..., r], updates."""

    name = "scatter_nd"
    arity = (3, 3)
    reduction: str = "none"


@dataclass(frozen=True)
class Resize(Op):
    """Interpolate the space axes of x[N, C, *S] to ``size``; mode nearest, linear or cubic.

    ``scales`` (per space axis) enter the coordinate transform: half_pixel, asymmetric, align_corners or
    pytorch_half_pixel; ``rounding`` for nearest: floor, ceil, round_prefer_floor, round_prefer_ceil.
    """

    name = "resize"
    size: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    mode: str = "nearest"
    coordinates: str = "half_pixel"
    rounding: str = "floor"
    cubic: float = -0.75


# --- kernel level --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region(Op):
    """A fused kernel: its meaning is its body's. Operands map to the body's inputs by position.

    ``role`` tells what the body is built around: contraction, pointwise, rowwise, pool, move, generic.
    """

    name = "region"
    arity = (0, 10_000)
    body: Graph = None  # type: ignore[assignment]
    role: str = "pointwise"


POINTWISE: tuple[type[Op], ...] = (
    Unary, Binary, Where, Clamp, LeakyRelu, Elu, Cast, Quantize, Dequantize, Requantize, Saturate,
)  # fmt: skip
SMALL_FLOAT: tuple[type[Op], ...] = (SmallLinear, SmallMatMul, SmallConv)
CONTRACTION: tuple[type[Op], ...] = (
    Linear, MatMul, Conv, ConvTranspose, IntLinear, IntMatMul, IntConv, GroupLinear, *SMALL_FLOAT,
)  # fmt: skip
INTEGER: tuple[type[Op], ...] = (IntLinear, IntMatMul, IntConv, GroupLinear, Requantize, Saturate)


def _subclasses(base: type[Op]) -> list[type[Op]]:
    return [c for s in base.__subclasses__() for c in [s, *_subclasses(s)]]


def spellings() -> dict[str, tuple[type[Op], dict[str, str]]]:
    """Every operator word of the text form, with the class and the fields that the word fixes."""
    table: dict[str, tuple[type[Op], dict[str, str]]] = {
        c.name: (c, {}) for c in _subclasses(Op) if c.name and not issubclass(c, _Named)
    }
    families: tuple[tuple[type[Op], frozenset[str], str], ...] = (
        (Unary, UNARY, ""), (Binary, BINARY, ""), (Reduce, REDUCE, "reduce_"),
        (ArgReduce, frozenset(["argmax", "argmin"]), ""),
    )  # fmt: skip
    for cls, members, prefix in families:
        table.update({prefix + fn: (cls, {"fn": fn}) for fn in members})
    return table
