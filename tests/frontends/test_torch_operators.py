"""Every torch operator family, captured and interpreted, against eager torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from bitwright.frontends.torch_export import capture
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.text import parse, show
from bitwright.ir.verify import verify


class Calls(nn.Module):
    """A module around a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: torch.Tensor) -> Any:
        return self.function(*x)


class Together(nn.Module):
    """Several modules side by side, each with its own inputs: one capture for many cases."""

    def __init__(self, modules: list[nn.Module], counts: list[int]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(modules)
        self.counts = counts

    def forward(self, *x: torch.Tensor) -> Any:
        results, at = [], 0
        for module, count in zip(self.cases, self.counts, strict=True):
            results.append(module(*x[at : at + count]))
            at += count
        return results


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Reproducible data with both signs."""
    g = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=g).to(dtype)


def ints(high: int, *shape: int, low: int = 0) -> torch.Tensor:
    """Reproducible integers."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(high))


def check(module: nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any) -> Graph:
    """Captured, verified and interpreted, the module gives what eager torch gives; the text form round-trips."""
    graph = capture(module, inputs, **options)
    verify(graph, "graph")
    assert parse(show(graph), graph.weights) == graph
    module.eval()
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*inputs))
    results = evaluate(graph, inputs)
    assert len(results) == len(expected)
    for have, want in zip(results, expected, strict=True):
        assert have.dtype == want.dtype
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5, equal_nan=True)
    return graph


X = rand(2, 3, 4)
IMAGE = rand(2, 4, 9, 7)
POSITIVE = rand(2, 3, 4).abs() + 0.5
N = ints(50, 2, 3, 4, low=-50)

POINTWISE: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "arithmetic": (lambda x, y: (x + y, x - y, x * y, x / y, -x, 2 - x, 3 / y), (X, POSITIVE)),
    "alpha": (lambda x, y: (torch.add(x, y, alpha=3), torch.sub(x, y, alpha=0.5), torch.rsub(x, y, alpha=2)), (X, X)),
    "mixed dtypes": (lambda x, n: (x + n, n * 2.5, n / 3, n + True, x > n, n.float() * x), (X, N)),
    "half precision": (lambda x: (x + 1, (x * 2.0).float(), torch.exp(x), x.sum()), (X.to(torch.bfloat16),)),
    "double": (lambda x: (x * 1e-9, x.to(torch.float32) + x), (X.double(),)),
    "integer": (lambda n: (n // 3, n % 7, n - 1, n * n, -n, n.abs(), torch.div(n, 3, rounding_mode="trunc")), (N,)),
    "integer to float": (lambda n: (n.exp(), n.sigmoid(), torch.sqrt(n.abs()), n.float().mean()), (N.clamp(-4, 4),)),
    "bits": (lambda n: (n & 3, n | 8, n ^ 5, ~n, n << 2, n >> 1), (N,)),
    "bool": (
        lambda x, y: ((x > 0) & (y > 0), (x > 0) | (y > 0), ~(x > 0), (x > 0) ^ (y > 0), (x > 0) + (y > 0)),
        (X, -X),
    ),
    "logical": (lambda x, n: (torch.logical_and(x, n), torch.logical_or(x > 0, n), torch.logical_not(n)), (X, N)),
    "logical xor": (lambda x, n: torch.logical_xor(x > 0, n > 0), (X, N)),
    "compare": (lambda x, y: (x == y, x != y, x < y, x <= y, x > 0.5, x >= y), (X, X.flip(0))),
    "compare scalars": (lambda n: (n == 3, n > 2.5, n != 0, 3 < n), (N,)),
    "floor divide": (
        lambda x, y: (x // y, x % y, torch.fmod(x, y), torch.div(x, y, rounding_mode="trunc")),
        (X, POSITIVE),
    ),
    "powers": (lambda x: (x**2, x**0.5, x**-0.5, x**-1, x**3, x**1.7, 2**x, torch.pow(x, x)), (POSITIVE,)),
    "exponentials": (lambda x: (x.exp(), x.log(), x.log2(), x.log10(), x.log1p(), x.expm1(), x.exp2()), (POSITIVE,)),
    "roots": (lambda x: (x.sqrt(), x.rsqrt(), x.reciprocal(), x.square()), (POSITIVE,)),
    "trigonometry": (lambda x: (x.sin(), x.cos(), x.tan(), x.sinh(), x.cosh(), x.tanh(), x.atan()), (X,)),
    "inverse trigonometry": (lambda x: (x.asin(), x.acos(), x.atanh(), (x + 2).acosh(), x.asinh()), (X.tanh() * 0.9,)),
    "atan2": (torch.atan2, (X, POSITIVE)),
    "rounding": (lambda x, n: (x.floor(), x.ceil(), x.round(), x.trunc(), x.sign(), x.frac(), n.floor()), (3 * X, N)),
    "round decimals": (lambda x: torch.round(x, decimals=2), (X,)),
    "error functions": (lambda x: (x.erf(), x.erfc()), (X,)),
    "extremes": (lambda x, y: (torch.maximum(x, y), torch.minimum(x, y), torch.max(x, y), torch.fmax(x, y)), (X, -X)),
    "clamp": (lambda x: (x.clamp(-0.5, 0.5), x.clamp(min=0), x.clamp(max=0.1), F.hardtanh(x), F.relu6(x)), (X,)),
    "clamp tensors": (
        lambda x, y: (torch.clamp(x, y, y + 1), torch.clamp(x, min=y), torch.clamp_max(x, y)),
        (X, X.flip(0)),
    ),
    "clamp integers": (lambda n: (n.clamp(-3, 5), n.clamp(min=0), n.clamp(-1.5, 2.5)), (N,)),
    "where": (lambda x, y: (torch.where(x > 0, x, y), torch.where(x > 0, 1.0, y), torch.where(y > 0, x, 0)), (X, -X)),
    "where promotes": (lambda x, n: torch.where(x > 0, x, n), (X, N)),
    "masked fill": (
        lambda x, m: (x.masked_fill(m > 0, -1e9), x.masked_fill(m > 0, float("-inf")).softmax(-1)),
        (X, X[:, :, :1]),
    ),
    "masked fill tensor": (lambda x, v: x.masked_fill(x > 0, v), (X, torch.tensor(2.5))),
    "predicates": (
        lambda x: (torch.isnan(x), torch.isinf(x), torch.isfinite(x)),
        (torch.tensor([1.0, float("inf"), float("nan")]),),
    ),
    "nan to num": (
        lambda x: (torch.nan_to_num(x), torch.nan_to_num(x, 1.0, 2.0, -3.0)),
        (torch.tensor([1.0, float("inf"), -float("inf"), float("nan")]),),
    ),
    "fused": (
        lambda x, y: (
            torch.addcmul(x, x, y, value=0.5),
            torch.addcdiv(x, x, y),
            torch.lerp(x, y, 0.3),
            torch.lerp(x, y, y),
        ),
        (X, POSITIVE),
    ),
    "log add exp": (lambda x, y: (torch.logaddexp(x, y), torch.hypot(x, y), torch.xlogy(x, y)), (X, POSITIVE)),
    "heaviside": (lambda x: torch.heaviside(x, torch.tensor(0.5)), (X.round(),)),
    "casts": (
        lambda x, n: (x.to(torch.int32), x.int(), n.float(), n.bool(), x.double(), n.to(torch.uint8), x.half()),
        (3 * X, N.clamp(0, 9)),
    ),
    "type as": (lambda x, n: (n.type_as(x), x.type_as(n), n.to(x.dtype)), (3 * X, N)),
    "in place": (lambda x: (x.clone().add_(1).mul_(2).relu_(), x), (X,)),
    "identities": (lambda x: (x.contiguous() + 0, x.clone(), x.detach() * 1, F.dropout(x, 0.5, False)), (X,)),
    "copysign": (lambda x, y: (torch.copysign(x, y), torch.signbit(x)), (X, -X.flip(0))),
}

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 1.3),
    "hardtanh": lambda x: F.hardtanh(x, -0.4, 0.7),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "softplus": F.softplus,
    "softplus beta": lambda x: F.softplus(x, 2.0, 3.0),
    "softsign": F.softsign,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "glu": lambda x: F.glu(x, -1),
    "log sigmoid": F.logsigmoid,
    "threshold": lambda x: F.threshold(x, 0.1, -2.0),
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "tanhshrink": F.tanhshrink,
    "rrelu": lambda x: F.rrelu(x, training=False),
    "softmax": lambda x: F.softmax(x, 1),
    "softmax dtype": lambda x: F.softmax(x, -1, dtype=torch.float64),
    "log softmax": lambda x: F.log_softmax(x, -1),
    "softmin": lambda x: F.softmin(x, 0),
    "normalize": lambda x: F.normalize(x, dim=1),
    "logit": lambda x: torch.logit(x.sigmoid()),
}

SHAPE: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "views": (lambda x: (x.view(6, 4), x.reshape(-1), x.flatten(1), x.unsqueeze(1), x.unflatten(2, (2, 2))), (X,)),
    "squeeze": (lambda x: (x.squeeze(), x.squeeze(1), x.squeeze((0, 1)), x[0]), (rand(1, 1, 3),)),
    "permutations": (lambda x: (x.permute(2, 0, 1), x.transpose(0, 2), x.mT, x.movedim(0, 2), x[0].t(), x[0].T), (X,)),
    "slices": (lambda x: (x[:, 1:], x[..., ::2], x[:, -2:], x[1:2, :, 1:3], x[:, :-1]), (X,)),
    "selects": (lambda x: (x[0], x[:, -1], x[..., 2], x.select(1, 1), x.narrow(2, 1, 2)), (X,)),
    "splits": (lambda x: (*x.split(3, 1), *x.split([1, 4], 1), *x.chunk(2, 1), *x.tensor_split(2, 1)), (rand(2, 5),)),
    "unbind": (lambda x: (*x.unbind(1), *x), (X,)),
    "cat": (lambda x, n: (torch.cat([x, x], 1), torch.cat([x, n], -1), torch.cat([x, torch.zeros(0)], 0)), (X, N)),
    "stack": (
        lambda x: (torch.stack([x, x], 1), torch.stack([x, x], -1), torch.hstack([x, x]), torch.vstack([x, x])),
        (X,),
    ),
    "repeat": (lambda x: (x.repeat(2, 1, 3), x.repeat(2, 1, 1, 1), x.tile(2), x.repeat_interleave(2, 1)), (X,)),
    "expand": (
        lambda x: (x.expand(2, 3, 4), x.expand(-1, 3, -1), torch.broadcast_to(x, (5, 2, 3, 4))),
        (rand(2, 1, 4),),
    ),
    "flip and roll": (lambda x: (x.flip(1), x.flip((0, 2)), x.roll(1, 1), x.roll((1, -1), (0, 2)), x.roll(3)), (X,)),
    "pad": (lambda x: (F.pad(x, (1, 2)), F.pad(x, (0, 1, 2, 0), value=3.0), F.pad(x, (-1, 1))), (X,)),
    "pad modes": (
        lambda x: (
            F.pad(x, (2, 1, 1, 2), "reflect"),
            F.pad(x, (2, 1, 1, 2), "replicate"),
            F.pad(x, (2, 1, 1, 2), "circular"),
        ),
        (IMAGE,),
    ),
    "pad 1d": (
        lambda x: (F.pad(x, (2, 1), "reflect"), F.pad(x, (2, 1), "replicate"), F.pad(x, (2, 1), "circular")),
        (X,),
    ),
    "pad integers": (lambda n: F.pad(n, (1, 1), value=7), (N,)),
    "triangles": (lambda x: (x.tril(), x.triu(1), x.tril(-1), (x > 0).tril()), (rand(3, 4, 5),)),
    "diagonal": (lambda x: (x.diagonal(), x.diagonal(1, 1, 2), torch.diag_embed(x), x[0].diag()), (X,)),
    "windows": (lambda x: (x.unfold(1, 3, 2), x.unfold(2, 2, 2), x.unfold(0, 2, 1)), (rand(2, 7, 4),)),
    "unfold": (lambda x: F.unfold(x, 3, padding=1, stride=2), (IMAGE,)),
    "fold": (lambda x: F.fold(x, (4, 5), 2), (rand(1, 12, 12),)),
    "pixel shuffle": (lambda x: (F.pixel_shuffle(x, 2), F.pixel_unshuffle(x[..., :8, :6], 2)), (IMAGE,)),
    "channel shuffle": (lambda x: F.channel_shuffle(x, 2), (IMAGE,)),
    "meshgrid": (lambda x: torch.meshgrid(x, x, indexing="ij"), (rand(4),)),
    "factories": (
        lambda x: (x + torch.arange(4), torch.ones_like(x), x * torch.full((3, 1), 2.0), x + torch.eye(3, 4)),
        (X,),
    ),
    "linspace": (lambda x: (x + torch.linspace(0, 1, 4), torch.zeros(2, 3) + x[..., 0], x.new_ones(3, 1) * x), (X,)),
    "constants": (lambda x: (x + torch.tensor([1.0, 2.0, 3.0, 4.0]), x * torch.tensor(3)), (X,)),
    "slice assignment": (lambda x: _assign(x), (X,)),
    "outputs repeat": (lambda x: (x, x, (x + 1,) * 2), (X,)),
}


def _assign(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 1] = 0
    y[:, :, 1:3] = x[:, :, :2]
    y[..., ::2] += 1
    y[0, 0, 0] = 7
    return y


REDUCTIONS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "sum": (
        lambda x, n: (x.sum(), x.sum(1), x.sum((0, 2), keepdim=True), n.sum(), (x > 0).sum(1), n.int().sum()),
        (X, N),
    ),
    "mean": (lambda x: (x.mean(), x.mean(-1), x.mean((1, 2), keepdim=True), x.mean(1, dtype=torch.float64)), (X,)),
    "amax": (lambda x: (x.amax(1), x.amin((0, 2)), x.max(), x.min(), x.aminmax(dim=1)), (X,)),
    "max with indices": (lambda x: (*x.max(1), *x.min(2, keepdim=True)), (X,)),
    "prod": (lambda x, n: (x.prod(), x.prod(1), x.prod(2, keepdim=True), n[..., :2].prod(-1)), (X, N)),
    "any and all": (
        lambda x: ((x > 0).any(), (x > 1).any(1), (x > -9).all(), (x > 0).all(2, keepdim=True), x.any(1)),
        (X,),
    ),
    "arg": (lambda x, n: (x.argmax(), x.argmax(1), x.argmin(-1, keepdim=True), n.argmax(2)), (X, N)),
    "variance": (
        lambda x: (x.var(), x.var(1), x.std(-1, keepdim=True), x.var(1, correction=0), x.std((0, 2), unbiased=False)),
        (X,),
    ),
    "variance and mean": (lambda x: (*torch.var_mean(x, 1), *torch.std_mean(x, (0, 1), keepdim=True)), (X,)),
    "norms": (
        lambda x: (
            x.norm(),
            x.norm(dim=1),
            x.norm(1, dim=-1),
            x.norm(3, dim=1, keepdim=True),
            torch.linalg.vector_norm(x, float("inf"), 1),
        ),
        (X,),
    ),
    "logsumexp": (lambda x: (x.logsumexp(1), x.logsumexp((0, 2), keepdim=True)), (X,)),
    "cumsum": (lambda x, n: (x.cumsum(1), n.cumsum(-1), (x > 0).cumsum(0)), (X, N)),
    "topk": (lambda x: (*x.topk(2), *x.topk(1, 1, largest=False)), (X,)),
    "sort": (lambda x: (*x.sort(1), *x.sort(-1, descending=True), x.argsort(-1)), (X,)),
    "median": (lambda x: (*x.median(2), *x.kthvalue(2, 1, keepdim=True)), (X,)),
    "count": (lambda x: (torch.count_nonzero(x > 0, 1), torch.numel(x) * x), (X,)),
    "distances": (
        lambda x: (torch.cdist(x, x.flip(1) + 1), F.cosine_similarity(x, x.flip(0), -1), F.pairwise_distance(x, -x)),
        (X,),
    ),
    "losses": (
        lambda x: (F.mse_loss(x, -x), F.smooth_l1_loss(x, -x), F.cross_entropy(x[:, 0], torch.tensor([1, 2]))),
        (X,),
    ),
}

INDEX = ints(3, 2, 5)
PLACES = torch.tensor([[0, 2, 1, 1], [2, 0, 0, 1]])

INDEXING: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "gather": (lambda x, i: (x.gather(1, i), torch.take_along_dim(x, i, 1)), (rand(2, 3), INDEX)),
    "index select": (lambda x, i: (x.index_select(1, i), x.index_select(0, i.clamp(max=1))), (X, ints(3, 4))),
    "one index": (lambda x, i: (x[:, i], x[:, :, i], x[i.clamp(max=1)]), (X, INDEX)),
    "two indices": (lambda x, i: (x[i % 2, i], x[:, i, i % 2], x[i % 2, :, i]), (X, INDEX)),
    "broadcast indices": (
        lambda x, i: (x[i[:, :1] % 2, i], x[torch.arange(2)[:, None], i], x[torch.arange(2), i[:, 0]]),
        (X, INDEX),
    ),
    "ranges": (
        lambda x: (
            x[torch.arange(2)[:, None], torch.arange(3)],
            x[:, torch.arange(3)],
            x[torch.arange(2), :, torch.arange(4)[:, None]],
        ),
        (X,),
    ),
    "constant indices": (
        lambda x: (x[:, [0, 2]], x[[1, 0]], x[:, torch.tensor([True, False, True])], x[:, [0, -1], [1, -2]]),
        (X,),
    ),
    "negative indices": (lambda x, i: (x[:, i - 3], x[-1, i - 3]), (X, INDEX)),
    "none index": (lambda x: (x[:, None], x[..., None], x[None, 0]), (X,)),
    "scatter": (
        lambda x, i: (x.scatter(1, i, 2 * x), x.scatter(1, i, 5.0), x.scatter(1, i[:, :2], x)),
        (rand(2, 3), torch.tensor([[0, 2, 1], [2, 0, 1]])),
    ),
    "scatter reductions": (
        lambda x, i, s: (x.scatter_add(1, i, s), x.scatter_reduce(1, i, s, "amax"), x.scatter_reduce(1, i, s, "prod")),
        (rand(2, 3), PLACES, rand(2, 4)),
    ),
    "scatter rows": (
        lambda x, s: (
            x.index_add(1, torch.tensor([0, 0, 2]), s),
            x.index_copy(1, torch.tensor([2, 0, 1]), s),
            x.index_fill(1, torch.tensor([1]), 3.0),
        ),
        (X, -X),
    ),
    "index put": (
        lambda x, v: (
            x.index_put((torch.tensor([0, 1]), torch.tensor([2, 1])), v),
            x.index_put((torch.tensor([0, 0]),), v, accumulate=True),
        ),
        (X, rand(4)),
    ),
    "mask assignment": (lambda x: _mask_assign(x), (X,)),
    "embedding": (lambda i, w: (F.embedding(i, w), F.embedding(i, w, padding_idx=0)), (INDEX, rand(7, 4))),
    "one hot": (lambda i: (F.one_hot(i, 5), F.one_hot(i, 3).float()), (INDEX,)),
    "bucketize": (
        lambda x: (
            torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])),
            torch.bucketize(x, torch.tensor([0.0, 1.0]), right=True),
        ),
        (X,),
    ),
    "searchsorted": (lambda x: torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), x), (X,)),
    "isin": (lambda n: torch.isin(n, torch.tensor([1, 2, 3])), (N,)),
}


def _mask_assign(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[y > 0.5] = 0.0
    return y


def _qkv(heads: int = 2, shared: int = 2, length: int = 5) -> tuple[torch.Tensor, ...]:
    return rand(2, heads, length, 8), rand(2, shared, length, 8) * 0.7, rand(2, shared, length, 8) * 1.3


CONTRACTIONS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "matmul": (
        lambda a, b: (a @ b, a[0] @ b, a @ b[0], a[0, 0] @ b, a @ b[0, :, 0], a[0, 0] @ b[0, :, 0]),
        (X, rand(2, 4, 5)),
    ),
    "mm": (
        lambda a, b: (torch.mm(a, b), torch.mv(a, b[:, 0]), torch.dot(a[0], b[:, 0]), torch.outer(a[0], b[0])),
        (rand(3, 4), rand(4, 5)),
    ),
    "bmm": (lambda a, b: (torch.bmm(a, b), torch.baddbmm(a[:, :, :1], a, b, beta=0.5, alpha=2)), (X, rand(2, 4, 5))),
    "addmm": (
        lambda c, a, b: (torch.addmm(c, a, b), torch.addmm(c, a, b, beta=0, alpha=3)),
        (rand(5), rand(3, 4), rand(4, 5)),
    ),
    "einsum": (
        lambda a, b: (
            torch.einsum("bij,bjk->bik", a, b),
            torch.einsum("bij,bjk->ki", a, b),
            torch.einsum("bij->jb", a),
        ),
        (X, rand(2, 4, 5)),
    ),
    "einsum attention": (lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k), _qkv()[:2]),
    "linear": (lambda x, w, b: (F.linear(x, w, b), F.linear(x, w), F.linear(x[0, 0], w, b)), (X, rand(5, 4), rand(5))),
    "bilinear": (lambda x, y, w: F.bilinear(x, y, w), (rand(2, 3), rand(2, 4), rand(5, 3, 4))),
    "tensordot": (lambda a, b: (torch.tensordot(a, b, dims=([2], [1])), torch.kron(a[0], b[0])), (X, rand(2, 4, 5))),
    "attention": (F.scaled_dot_product_attention, _qkv()),
    "attention causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), _qkv()),
    "attention scale": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), _qkv()),
    "attention bool mask": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m > -1),
        (*_qkv(), rand(2, 1, 5, 5).clamp(min=-0.9)),
    ),
    "attention float mask": (F.scaled_dot_product_attention, (*_qkv(), rand(2, 1, 1, 5))),
    "attention grouped": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), _qkv(4, 2)),
    "attention 3d": (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), _qkv()),
}

RESIZES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "nearest": (
        lambda x: (F.interpolate(x, scale_factor=2), F.interpolate(x, (5, 11)), F.interpolate(x, scale_factor=1.5)),
        (IMAGE,),
    ),
    "nearest exact": (lambda x: F.interpolate(x, (5, 11), mode="nearest-exact"), (IMAGE,)),
    "bilinear": (
        lambda x: (F.interpolate(x, scale_factor=2, mode="bilinear"), F.interpolate(x, (5, 4), mode="bilinear")),
        (IMAGE,),
    ),
    "bilinear aligned": (lambda x: F.interpolate(x, (12, 5), mode="bilinear", align_corners=True), (IMAGE,)),
    "bilinear odd factor": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"), (IMAGE,)),
    "bicubic": (
        lambda x: (
            F.interpolate(x, scale_factor=2, mode="bicubic"),
            F.interpolate(x, (5, 11), mode="bicubic", align_corners=True),
        ),
        (IMAGE,),
    ),
    "antialiased": (lambda x: F.interpolate(x, (4, 5), mode="bilinear", antialias=True), (IMAGE,)),
    "antialiased bicubic": (lambda x: F.interpolate(x, (4, 5), mode="bicubic", antialias=True), (IMAGE,)),
    "linear 1d": (lambda x: (F.interpolate(x, 9, mode="linear"), F.interpolate(x, scale_factor=2)), (X,)),
    "3d": (
        lambda x: (F.interpolate(x, scale_factor=2, mode="trilinear"), F.interpolate(x, scale_factor=2)),
        (rand(1, 2, 3, 4, 3),),
    ),
    "grid sample": (lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), (IMAGE, rand(2, 3, 5, 2))),
    "affine grid": (
        lambda x, t: F.grid_sample(x, F.affine_grid(t, [2, 4, 5, 5], align_corners=False), align_corners=False),
        (IMAGE, rand(2, 2, 3)),
    ),
}

POOLS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "max 2d": (
        lambda x: (F.max_pool2d(x, 2), F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, (3, 2), stride=1, dilation=2)),
        (IMAGE,),
    ),
    "max ceil": (lambda x: (F.max_pool2d(x, 2, ceil_mode=True), F.max_pool2d(x, 3, 2, 1, ceil_mode=True)), (IMAGE,)),
    "max 1d and 3d": (lambda x, y: (F.max_pool1d(x, 2), F.max_pool3d(y, 2)), (X, rand(1, 2, 4, 4, 4))),
    "average 2d": (
        lambda x: (F.avg_pool2d(x, 2), F.avg_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
        (IMAGE,),
    ),
    "average ceil": (
        lambda x: (
            F.avg_pool2d(x, 2, ceil_mode=True),
            F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
            F.avg_pool2d(x, 3, 2, 1, True, False),
        ),
        (IMAGE,),
    ),
    "average divisor": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, divisor_override=5), (IMAGE,)),
    "average 1d and 3d": (lambda x, y: (F.avg_pool1d(x, 2), F.avg_pool3d(y, 2, padding=1)), (X, rand(1, 2, 4, 4, 4))),
    "adaptive average": (
        lambda x: (
            F.adaptive_avg_pool2d(x, 1),
            F.adaptive_avg_pool2d(x, (3, 7)),
            F.adaptive_avg_pool2d(x, (4, 5)),
            F.adaptive_avg_pool2d(x, (None, 2)),
        ),
        (IMAGE,),
    ),
    "adaptive average 1d": (lambda x: (F.adaptive_avg_pool1d(x, 1), F.adaptive_avg_pool1d(x, 3)), (X,)),
    "adaptive max": (lambda x: (F.adaptive_max_pool2d(x, 1), F.adaptive_max_pool2d(x, (4, 5))), (IMAGE,)),
    "adaptive max 1d": (lambda x: F.adaptive_max_pool1d(x, 3), (X,)),
    "lp": (lambda x: F.lp_pool2d(x.abs(), 2, 3), (IMAGE,)),
    "unbatched": (lambda x: (F.max_pool2d(x[0], 2), F.avg_pool2d(x[0], 2), F.adaptive_avg_pool2d(x[0], 1)), (IMAGE,)),
    "local response": (lambda x: F.local_response_norm(x, 3), (IMAGE,)),
}

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...]]] = {
    "conv 1d": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), (rand(2, 3, 9),)),
    "conv 2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (IMAGE,)),
    "conv 3d": (lambda: nn.Conv3d(2, 3, 2, padding=1, bias=False), (rand(1, 2, 4, 4, 4),)),
    "conv grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (IMAGE,)),
    "conv depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (IMAGE,)),
    "conv same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (IMAGE,)),
    "conv valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (IMAGE,)),
    "conv circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (IMAGE,)),
    "conv reflect": (lambda: nn.Conv1d(3, 6, 3, padding=2, padding_mode="reflect"), (X,)),
    "conv unbatched": (lambda: nn.Conv2d(4, 6, 3), (IMAGE[0],)),
    "conv transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (IMAGE,)),
    "conv transposed dilated": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, bias=False), (IMAGE,)),
    "conv transposed 1d": (lambda: nn.ConvTranspose1d(3, 6, 4, stride=2, padding=1), (X,)),
    "conv transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (rand(1, 2, 3, 3, 3),)),
    "batch norm": (lambda: _with_statistics(nn.BatchNorm2d(4)), (IMAGE,)),
    "batch norm 1d": (lambda: _with_statistics(nn.BatchNorm1d(3)), (rand(5, 3),)),
    "batch norm plain": (lambda: _with_statistics(nn.BatchNorm2d(4, affine=False)), (IMAGE,)),
    "batch norm without statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (IMAGE,)),
    "layer norm": (lambda: nn.LayerNorm(4), (X,)),
    "layer norm 2 axes": (lambda: nn.LayerNorm((3, 4), eps=1e-3), (X,)),
    "layer norm plain": (lambda: nn.LayerNorm(4, elementwise_affine=False), (X,)),
    "layer norm without bias": (lambda: nn.LayerNorm(4, bias=False), (X,)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (IMAGE,)),
    "group norm plain": (lambda: nn.GroupNorm(2, 4, affine=False), (IMAGE,)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (IMAGE,)),
    "instance norm plain": (lambda: nn.InstanceNorm1d(3), (X,)),
    "rms norm": (lambda: nn.RMSNorm(4), (X,)),
    "rms norm plain": (lambda: nn.RMSNorm((3, 4), eps=1e-3, elementwise_affine=False), (X,)),
    "prelu": (lambda: nn.PReLU(4), (IMAGE,)),
    "prelu shared": (nn.PReLU, (IMAGE,)),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=0), (INDEX,)),
    "upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), (IMAGE,)),
    "sequential": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten()),
        (IMAGE,),
    ),
    "multihead attention": (lambda: _SelfAttention(), (X,)),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (X,)),
    "transformer decoder": (lambda: nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), (X, X.flip(1))),
    "lstm": (lambda: _Recurrent(nn.LSTM(4, 5, 2, batch_first=True)), (X,)),
    "lstm bidirectional": (lambda: _Recurrent(nn.LSTM(4, 3, bidirectional=True)), (X,)),
    "gru": (lambda: _Recurrent(nn.GRU(4, 5, batch_first=True)), (X,)),
    "rnn": (lambda: _Recurrent(nn.RNN(4, 5, batch_first=True)), (X,)),
    "lstm cell": (lambda: _Cell(), (rand(3, 4),)),
}


def _with_statistics(norm: Any) -> nn.Module:
    norm.running_mean.copy_(rand(len(norm.running_mean)))
    norm.running_var.copy_(rand(len(norm.running_var)).abs() + 0.3)
    assert isinstance(norm, nn.Module)
    return norm


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.attention(x, x, x, need_weights=False)[0]


class _Recurrent(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> Any:
        return self.cell(x)


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.cell(x)


TABLES: dict[str, dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]] = {
    "pointwise": POINTWISE,
    "shape": SHAPE,
    "reduction": REDUCTIONS,
    "index": INDEXING,
    "contraction": CONTRACTIONS,
    "resize": RESIZES,
    "pool": POOLS,
    "activation": {k: (f, (X,)) for k, f in ACTIVATIONS.items()},
}

Case = tuple[nn.Module, tuple[torch.Tensor, ...]]


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {
        f"{group}: {name}": (Calls(f), inputs) for group, table in TABLES.items() for name, (f, inputs) in table.items()
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        found |= {f"layer: {name}": (build(), inputs) for name, (build, inputs) in LAYERS.items()}
    return found


CASES = _cases()
CHUNKS = {
    f"{group} {at // 12}": names[at : at + 12]
    for group in (*TABLES, "layer")
    for names in [[n for n in CASES if n.startswith(f"{group}:")]]
    for at in range(0, len(names), 12)
}


@pytest.mark.parametrize("chunk", CHUNKS)
def test_operators(chunk: str) -> None:
    """A chunk is captured at once (a capture costs a tenth of a second whatever its size); failures are singled out."""
    cases = [CASES[n] for n in CHUNKS[chunk]]
    together = Together([m for m, _ in cases], [len(x) for _, x in cases])
    try:
        check(together, tuple(t for _, x in cases for t in x))
    except Exception as error:
        failed = {name: why for name in CHUNKS[chunk] if (why := _failure(*CASES[name]))}
        raise AssertionError("\n".join(f"{n}: {w}" for n, w in failed.items()) or str(error)) from error


def _failure(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> str:
    try:
        check(module, inputs)
    except Exception as e:
        return str(e)
    return ""


SYMBOLIC = (
    "pointwise: where", "shape: permutations", "shape: repeat", "shape: splits", "reduction: arg", "reduction: topk",
    "index: two indices", "index: index select", "index: embedding", "contraction: matmul",
    "contraction: attention causal", "pool: average ceil", "resize: bilinear", "layer: conv same", "layer: lstm",
    "layer: multihead attention", "layer: batch norm",
)  # fmt: skip


@pytest.mark.parametrize("name", SYMBOLIC)
def test_operator_with_symbolic_batch(name: str) -> None:
    module, inputs = CASES[name]
    graph = check(module, inputs, dynamic_batch=True)
    assert graph.inputs[0].type.shape[0] == "b"


def test_the_table_is_wide() -> None:
    assert len(CASES) >= 200
