"""What ``make gpu-report`` checks and times: small programs with their reference, large ones with their counts.

Weights of large cases repeat a random tile, so that their packed form compresses and still lies at distinct addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
KINDS = {
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "s8": np.dtype(np.int8),
    "f32": np.dtype(np.float32),
}
PERIOD = 64
"""Outputs and inputs after which large weights repeat."""


@dataclass(frozen=True)
class Case:
    """A program: ``text`` of a graph with weights, compiled with ``recipe``.

    ``operations`` and ``nbytes``: products and sums (dense), and bytes that a call must move at least. ``peer``: what
    it is timed against, with its sizes. ``timed`` False: only checked, against outputs stored with it.
    """

    name: str
    text: str
    weights: Callable[[], dict[str, Array]] = dict
    recipe: str = ""
    operations: float = 0.0
    nbytes: float = 0.0
    peer: str = ""
    sizes: tuple[int, ...] = ()
    timed: bool = True


def masked(w: Array) -> Array:
    """The two largest of every four along the inputs."""
    groups = w.astype(np.float32).reshape(w.shape[0], -1, 4)
    order = np.argsort(np.abs(groups), axis=2)
    out = groups.copy()
    np.put_along_axis(out, order[..., :2], 0, 2)
    return out.reshape(w.shape).astype(w.dtype)


def drawn(shape: tuple[int, ...], kind: str, seed: int = 0) -> Array:
    """Values of the size of a layer's: normal ones, codes of the whole range."""
    rng = np.random.default_rng(seed)
    if kind == "s8":
        return rng.integers(-127, 128, shape).astype(np.int8)
    return (rng.standard_normal(shape) * 0.25).astype(KINDS[kind])


def repeated(outs: int, inputs: int, kind: str, sparse: bool) -> Array:
    """[outs, inputs] that repeats a tile."""
    tile = drawn((PERIOD, PERIOD), kind)
    tile = masked(tile) if sparse else tile
    return np.tile(tile, (-(-outs // PERIOD), -(-inputs // PERIOD)))[:outs, :inputs].copy()


def linear(kind: str, m: int, n: int, k: int, sparse: bool, *, timed: bool = True) -> Case:
    """y[m, n] = x[m, k] w[n, k]^T; of integers with exact 32-bit sums as results."""
    level = "integer" if kind == "s8" else "graph"
    op, out = ("int_linear(%x, %w)", "s32") if kind == "s8" else ("linear(%x, %w)", kind)
    text = f"""
graph @linear (%x: {kind}[{m}, {k}]) -> (y = %y) level={level} {{
  %w = weight {{ref="w"}} : {kind}[{n}, {k}]
  %y = {op} : {out}[{m}, {n}]
}}
"""
    size = KINDS[kind].itemsize

    def weights() -> dict[str, Array]:
        if timed:
            return {"w": repeated(n, k, kind, sparse)}
        w = drawn((n, -(-k // 4) * 4), kind, 1)
        return {"w": (masked(w) if sparse else w)[:, :k].copy()}

    return Case(
        f"{kind} {'2:4 ' if sparse else ''}{m}x{n}x{k}", text, weights, operations=2.0 * m * n * k,
        nbytes=size * (m * k + n * k * (0.5 if sparse else 1)) + (4 if kind == "s8" else size) * m * n,
        peer=f"{kind}{' 2:4' if sparse else ''}", sizes=(m, n, k), timed=timed,
    )  # fmt: skip


def low(bits: int, rows: int, n: int, k: int, sparse: bool, *, timed: bool = True) -> Case:
    """A linear layer of f32 activations and weights of a few bits in groups of 64."""
    text = f"""
graph @low (%x: f32[{rows}, {k}]) -> (y = %y) level=graph {{
  %w = weight {{ref="w"}} : f32[{n}, {k}]
  %y = linear(%x, %w) : f32[{rows}, {n}]
}}
"""

    def weights() -> dict[str, Array]:
        if timed:
            return {"w": repeated(n, k, "f32", sparse)}
        w = drawn((n, k), "f32", 2)
        return {"w": masked(w) if sparse else w}

    kept = 0.5 if sparse else 1.0
    return Case(
        f"{bits} bit {'2:4 ' if sparse else ''}{rows}x{n}x{k}", text, weights,
        recipe=f"{'detect-sparsity, ' if sparse else ''}quantize-weights{{bits={bits} group=64}}, dynamic-quantize",
        operations=2.0 * rows * n * k, nbytes=n * k * bits / 8 * kept + 4 * rows * (n + k),
        peer="int4" if bits == 4 else "", sizes=(rows, n, k), timed=timed,
    )  # fmt: skip


def attention(kind: str, batch: int, heads: int, length: int, depth: int, causal: bool, *, timed: bool = True) -> Case:
    """Attention of every head."""
    shape = f"{kind}[{batch}, {heads}, {length}, {depth}]"
    text = f"""
graph @attention (%q: {shape}, %k: {shape}, %v: {shape}) -> (y = %y) level=graph {{
  %y = attention(%q, %k, %v) {{scale={depth**-0.5!r}{" causal=true" if causal else ""}}} : {shape}
}}
"""
    return Case(
        f"attention {kind} {'causal ' if causal else ''}{batch}x{heads}x{length}x{depth}", text,
        operations=4.0 * batch * heads * length * length * depth * (0.5 if causal else 1.0),
        nbytes=4.0 * batch * heads * length * depth * KINDS[kind].itemsize,
        peer="attention causal" if causal else "attention",
        sizes=(batch, heads, length, depth), timed=timed,
    )  # fmt: skip


def rows(op: str, kind: str, count: int, width: int, *, timed: bool = True) -> Case:
    """A norm or softmax along rows."""
    text = f"""
graph @rows (%x: {kind}[{count}, {width}]) -> (y = %y) level=graph {{
  %y = {op} : {kind}[{count}, {width}]
}}
"""
    name = op.partition("(")[0]
    return Case(
        f"{name} {kind} {count}x{width}", text, operations=5.0 * count * width,
        nbytes=2.0 * count * width * KINDS[kind].itemsize, peer=name, sizes=(count, width), timed=timed,
    )  # fmt: skip


def conv(kind: str, size: int, inside: int, outside: int, kernel: int, stride: int, *, timed: bool = True) -> Case:
    """A convolution of one image, bias and ReLU behind it."""
    pad, out = kernel // 2, (size + 2 * (kernel // 2) - kernel) // stride + 1
    result = f"{kind}[1, {outside}, {out}, {out}]"
    text = f"""
graph @conv (%x: {kind}[1, {inside}, {size}, {size}]) -> (y = %r) level=graph {{
  %w = weight {{ref="w"}} : {kind}[{outside}, {inside}, {kernel}, {kernel}]
  %y = conv(%x, %w) {{stride=[{stride}, {stride}] padding=[{pad}, {pad}, {pad}, {pad}]}} : {result}
  %r = relu(%y) : {result}
}}
"""
    inputs = inside * kernel * kernel

    def weights() -> dict[str, Array]:
        return {"w": drawn((outside, inside, kernel, kernel), kind, 3)}

    return Case(
        f"conv {kind} {size}x{size}x{inside} to {outside}, {kernel}x{kernel} / {stride}", text, weights,
        operations=2.0 * out * out * outside * inputs,
        nbytes=KINDS[kind].itemsize * (size * size * inside + out * out * outside + outside * inputs), peer="conv",
        sizes=(size, inside, outside, kernel, stride), timed=timed,
    )  # fmt: skip


LLAMA = ((4096, 4096), (14336, 4096), (4096, 14336))
"""Outputs and inputs of the projections and the two sides of the feed-forward of an 8-billion-parameter Llama."""


def timed() -> Iterator[Case]:
    """What is timed: squares, Llama's layers, layers of few rows, attention, rows, ResNet's convolutions."""
    for sparse in (False, True):
        for kind in ("f16", "s8"):
            yield from (linear(kind, n, n, n, sparse) for n in (4096, 8192))
            yield from (linear(kind, 2048, n, k, sparse) for n, k in LLAMA)
        yield linear("bf16", 4096, 4096, 4096, sparse)
        yield from (low(4, r, n, k, sparse) for r in (1, 16) for n, k in LLAMA[:2])
    yield low(4, 512, *LLAMA[0], False)
    yield from (low(bits, 1, *LLAMA[1], False) for bits in (3, 2))
    yield attention("bf16", 8, 12, 512, 64, False)
    yield attention("bf16", 1, 32, 2048, 128, True)
    yield rows("softmax(%x) {axis=1}", "f16", 8192, 4096)
    yield rows("rms_norm(%x)", "f16", 8192, 4096)
    yield conv("f16", 56, 64, 64, 3, 1)
    yield conv("f16", 14, 256, 256, 3, 1)


def checked() -> Iterator[Case]:
    """Sizes that are multiples of nothing, for every kernel."""
    for kind in ("f16", "bf16", "s8"):
        for sparse in (False, True):
            yield from (
                linear(kind, m, n, k, sparse, timed=False)
                for m, n, k in ((1, 67, 72), (37, 129, 136), (200, 300, 520), (129, 65, 1000))
            )
    yield linear("f32", 33, 65, 70, False, timed=False)
    for bits in (4, 3, 2):
        for sparse in (False, True) if bits == 4 else (False,):
            yield from (low(bits, r, 130, 192, sparse, timed=False) for r in (1, 5, 33))
    for kind in ("f16", "bf16", "f32"):
        yield attention(kind, 2, 3, 67, 64, False, timed=False)
        yield attention(kind, 1, 2, 130, 80, True, timed=False)
        yield rows("softmax(%x) {axis=1}", kind, 37, 1003, timed=False)
        yield rows("layer_norm(%x)", kind, 5, 70, timed=False)
        yield rows("rms_norm(%x)", kind, 300, 129, timed=False)
    for kind in ("f16", "f32"):
        yield conv(kind, 15, 16, 40, 3, 2, timed=False)
        yield conv(kind, 9, 24, 17, 1, 1, timed=False)
