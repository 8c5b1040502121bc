"""A training step of a transformer's MLP block on a GPU: dense, with packed transposable 2:4 weights, with torch's own.

    python benchmarks/gpu_training.py --prepare kernels [--arch sm_90a]   # where the compiler is
    python benchmarks/gpu_training.py --kernels kernels                   # where the device is: torch and cuda-bindings

Forward, gradients of inputs and of both weights, f16, tokens x width x 4 width, GELU between. Ours: both products of a
weight from one packed copy, packing timed apart; weight gradients are dense everywhere. torch's: ``torch.sparse``
semi-structured tensors pruned by its own tile kernel, where this build has them. Ours is compared with dense f32
products of the same masked weights before anything is timed. Without a device it says so.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright import sparse_products
from bitwright.codegen.cuda.transposable import Product
from bitwright.passes.sparsity._transposable import transposable_mask
from bitwright.runtime.cuda_driver import CudaDriver
from bitwright.sparse_linear import TransposableWeight

SIZES = ((2048, 1024), (8192, 1024), (8192, 4096))
"""(tokens, width)"""
ROUNDS = 20


def products() -> list[Product]:
    """All that a step of each size launches."""
    return [
        Product(o, i, tokens, by_columns)
        for tokens, width in SIZES
        for o, i in ((4 * width, width), (width, 4 * width))
        for by_columns in (False, True)
    ]


def seconds(run: Callable[[], Any]) -> float:
    """Median seconds of a call, by events, with 256 MB written in between."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(ROUNDS + 3):
        flush.zero_()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1e-3)
    return statistics.median(times[3:])


def masked(outputs: int, inputs: int) -> Tensor:
    w = torch.randn(outputs, inputs) / inputs**0.5
    return torch.where(transposable_mask(w, 2, 4, "greedy"), w, 0.0).half().cuda()


class Step:
    """Forward and backward of x -> GELU(x w1^T) w2^T with given products; returns all gradients."""

    def __init__(self, x: Tensor, loss: Tensor, forward: Callable[[Tensor, int], Tensor], back: Any) -> None:
        self.x, self.loss, self.forward, self.back = x, loss, forward, back

    def __call__(self) -> tuple[Tensor, ...]:
        h = self.forward(self.x, 0)
        a = torch.nn.functional.gelu(h)
        y = self.forward(a, 1)
        to_a = self.back(self.loss, 1)
        to_h = torch.ops.aten.gelu_backward(to_a, h)
        return y, self.back(to_h, 0), to_h.T @ self.x, self.loss.T @ a


def torch_sparse(weights: list[Tensor]) -> Step | str:
    """torch's semi-structured training tensors, or why there are none."""
    try:
        from torch.sparse import SparseSemiStructuredTensorCUTLASS as Sparse

        made = [Sparse.prune_dense_static_sort(w) for w in weights]
    except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return Step(  # type: ignore[return-value]
        None,
        None,
        lambda x, i: (made[i] @ x.T).T,
        lambda g, i: (made[i].t() @ g.T).T,  # type: ignore[arg-type]
    )


def measure(tokens: int, width: int, run: sparse_products.Products) -> list[tuple[str, float]]:
    weights = [masked(4 * width, width), masked(width, 4 * width)]
    x, loss = torch.randn(tokens, width).half().cuda(), torch.randn(tokens, width).half().cuda()
    packed = [TransposableWeight.pack(w) for w in weights]
    stream = int(torch.cuda.current_stream().cuda_stream)

    def sparse(by_columns: bool) -> Callable[[Tensor, int], Tensor]:
        return lambda z, i: run(z, packed[i], by_columns, stream=stream)

    dense = Step(x, loss, lambda z, i: z @ weights[i].T, lambda g, i: g @ weights[i])
    ours = Step(x, loss, sparse(False), sparse(True))
    exact = Step(x.float(), loss.float(), lambda z, i: z @ weights[i].float().T, lambda g, i: g @ weights[i].float())
    for got, want in zip(ours(), exact(), strict=True):
        error = float((got.float() - want).norm() / want.norm())
        if not error < 5e-3:
            raise SystemExit(f"{tokens} x {width}: ours is off by {error:.2g} of the dense result")
    rows = [("torch dense f16", seconds(dense)), ("bitwright 2:4", seconds(ours))]
    rows.append(("bitwright packing of both weights", seconds(lambda: [TransposableWeight.pack(w) for w in weights])))
    theirs = torch_sparse(weights)
    if isinstance(theirs, str):
        rows.append((f"torch semi-structured: {theirs}", float("nan")))
    else:
        theirs.x, theirs.loss = x, loss
        rows.append(("torch semi-structured", seconds(theirs)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prepare", type=Path)
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--arch", default="sm_90a", choices=("sm_80", "sm_90a"))
    given = parser.parse_args()
    if given.prepare:
        sparse_products.prepare(products(), given.arch, given.prepare)
        print(f"{len(products())} kernels in {given.prepare}")
        return
    if not torch.cuda.is_available():
        print("no CUDA device here (torch.cuda.is_available() is False): nothing was measured")
        return
    run = sparse_products.Products(CudaDriver(given.arch), given.arch, given.kernels)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, f16, seconds of a step by events")
    for tokens, width in SIZES:
        print(f"{tokens} tokens, width {width}:")
        rows = measure(tokens, width, run)
        for name, took in rows:
            print(f"  {name:<40} {took * 1e3:9.3f} ms  {rows[0][1] / took:5.2f}x of dense")


if __name__ == "__main__":
    main()
