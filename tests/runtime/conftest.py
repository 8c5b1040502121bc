"""Small programs made of hand-written C kernels, for the tests of loading and calling."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitwright.codegen.link import link
from bitwright.codegen.main_c import Variant, arena_bytes, main_c, scratch_bytes, step_labels
from bitwright.codegen.plan import Arg, Buffer, Plan, Step, plan
from bitwright.runtime.artifact import Contents
from bitwright.runtime.manifest import Manifest, StepRow, TensorSpec
from bitwright.runtime.report import Layer, Report

WIDTH = 8
KERNELS = r"""
#include <stdint.h>
#include <stdlib.h>
/* z[r, :] = x[r, :] @ w, 8 x 8; a task is a row */
void matmul(int32_t b, int32_t e, float* x, float* w, float* z) {
  for (int32_t r = b; r < e; r++)
    for (int j = 0; j < 8; j++) {
      float sum = 0;
      for (int k = 0; k < 8; k++) sum += x[r * 8 + k] * w[k * 8 + j];
      z[r * 8 + j] = sum;
    }
}
void add(int32_t b, int32_t e, float* x, float* y, float* z) {
  for (int32_t i = b * 8; i < e * 8; i++) z[i] = x[i] + y[i];
}
/* z = x + sum of the 64 bytes behind x, times 0: reads past the end as vector kernels do */
void overread(int32_t b, int32_t e, float* x, float* z) {
  volatile uint8_t junk = 0;
  if (e == 16) for (int i = 0; i < 64; i++) junk += ((uint8_t*)(x + 128))[i];
  for (int32_t i = b * 8; i < e * 8; i++) z[i] = x[i];
}
"""
Make = Callable[..., Contents]


def network(rows: int, depth: int = 3) -> Plan:
    """h = x; depth times h = h @ w; y = h + x; z = h."""
    steps, last, size = [], "x", 4 * WIDTH * rows
    for i in range(depth):
        steps.append(Step("matmul", rows, (Arg(last), Arg("w"), Arg(f"h{i}", access="w")), label=f"fc{i}"))
        last = f"h{i}"
    steps.append(Step("add", rows, (Arg(last), Arg("x"), Arg("y", access="w")), label="residual"))
    buffers = [Buffer("x", size, "input"), Buffer("w", 4 * WIDTH * WIDTH, "weight"), Buffer("y", size)]
    return plan(steps, [*buffers, *(Buffer(f"h{i}", size) for i in range(depth))], ["y", last])


def expected(x: Any, w: Any, depth: int = 3) -> tuple[Any, Any]:
    """What ``network`` computes, summed in the same order."""
    h = x
    for _ in range(depth):
        total = np.zeros_like(h)
        for k in range(WIDTH):
            total = total + h[:, k : k + 1] * w[k]
        h = total
    return h + x, h


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "k.c").write_text(KERNELS)
    subprocess.run(["gcc", "-O1", "-ffp-contract=off", "-fPIC", "-c", "k.c"], cwd=folder, check=True)
    return (folder / "k.o").read_bytes()


@pytest.fixture(scope="session")
def weight() -> Any:
    return np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)


@pytest.fixture(scope="session")
def make(kernels: bytes, weight: Any) -> Make:
    """Contents of a program for ``network``, static or chunked."""
    known: dict[Any, bytes] = {}

    def build(
        rows: int = 4, *, chunks: tuple[int, ...] = (), depth: int = 3, features: tuple[str, ...] = (),
        **manifest: Any,
    ) -> Contents:  # fmt: skip
        step = 4 * WIDTH
        strides = ((step,), (step, step)) if chunks else ((), ())
        variants = [Variant(network(c, depth), c if chunks else 1, *strides) for c in chunks or (rows,)]
        key = (rows, chunks, depth, features)
        if key not in known:
            known[key] = link({"k": kernels}, main_c(variants, features=features), openmp=True)
        blob = np.zeros(variants[0].plan.weights_bytes, np.uint8)
        blob[: weight.nbytes] = weight.view(np.uint8).ravel()
        shape = ("b" if chunks else rows, WIDTH)
        fields: dict[str, Any] = {
            "name": "net",
            "inputs": (TensorSpec(name="x", dtype="f32", shape=shape),),
            "outputs": tuple(TensorSpec(name=n, dtype="f32", shape=shape) for n in ("y", "h")),
            "batch": "b" if chunks else "",
            "chunks": chunks or (1,),
            "arena_bytes": arena_bytes(variants),
            "scratch_bytes": scratch_bytes(variants),
            "weights_bytes": len(blob),
            "steps": tuple(StepRow(label=n, kernel=k, rows=r) for n, k, r in step_labels(variants)),
            "versions": {"bitwright": "0.1.0"},
            "features": features,
        }
        report = Report(model="net", layers=[Layer(name=f"fc{i}", op="linear") for i in range(depth)])
        return Contents(Manifest(**fields | manifest), "graph @net", known[key], blob, report.to_json())

    return build


@pytest.fixture(scope="session")
def reference(weight: Any) -> Callable[..., tuple[Any, Any]]:
    return lambda x, depth=3: expected(x, weight, depth)
