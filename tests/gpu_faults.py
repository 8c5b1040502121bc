"""An emulated device with a clock, and kernels that go wrong on it; imported by the workers of the tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bitwright.codegen.cuda.machine_code import Resources
from bitwright.codegen.cuda.package import Kernel, packed
from bitwright.codegen.tuning.measure import Case, Code, Request
from bitwright.gpu_emulation import EmulatedDriver

SIZE = 64
_TEXT = """
extern "C" __global__ void NAME(float* x, float* w, float* y, int* s) {
  int i = blockIdx.x * 32 + threadIdx.x;
  BODY
}
"""
BODIES = {
    "good": "y[i] = x[i] * w[i];",
    "slow": "for (volatile int n = 0; n < 20000; n++) {} y[i] = x[i] * w[i];",
    "wrong": "y[i] = x[i] * w[i] + (i == 7);",
    "outside": "y[i] = x[i] * w[i]; if (i == 63) y[64] = 1;",
    "spoil": "y[i] = x[i] * w[i]; x[i] = 5;",
    "rewrite": "y[i] = x[i] * w[i]; if (i == 0) w[0] = 5;",
    "leave": "y[i] = x[i] * w[i] + s[0]; if (i == 63) s[0] += 1;",
    "fault": "y[i] = x[i + 256];",
    "stuck": "if (i % 32 < 7) __syncthreads(); y[i] = x[i] * w[i];",
}


class Clocked(EmulatedDriver):
    """An emulated device whose launches take the time of the emulation."""

    def timed(self, run: Callable[[int], None], stream: int) -> float:
        began = time.perf_counter()
        run(stream)
        return time.perf_counter() - began


class Hanging(Clocked):
    """A device that never comes back from the kernel ``slow``."""

    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, shared: int, pointers: Sequence[int], stream: int
    ) -> None:
        if kernel == "slow":
            time.sleep(1000)
        super().launch(kernel, grid, threads, shared, pointers, stream)


def code(name: str) -> Code:
    text = _TEXT.replace("NAME", name).replace("BODY", BODIES[name])
    kernel = Kernel(name, text, b"", (2, 1, 1, 32, 0), Resources(8, 0, 0, 0))
    w = np.arange(SIZE, dtype=np.float32)
    return Code(packed(kernel), name, 1, 4, (("input", 0), ("packed", 0), ("output", 0)), (w,))


def request(name: str, **more: Any) -> Request:
    """Measure kernel ``name`` beside the good one."""
    rng = np.random.default_rng(0)
    w = np.arange(SIZE, dtype=np.float32)
    cases = tuple(Case((v,), (v * w,)) for v in (rng.standard_normal(SIZE).astype(np.float32) for _ in range(2)))
    quick: dict[str, Any] = {"rounds": 3, "sample_seconds": 1e-3, "seconds": 20.0, "cold_bytes": 0} | more
    return Request(code(name), code("good"), b"", cases, **quick)
