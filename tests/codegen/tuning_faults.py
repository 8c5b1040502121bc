"""Kernels and worker functions that go wrong in every way a candidate can; imported by the workers of the tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.codegen.tuning.bench import LocalBench, link_alone
from bitwright.codegen.tuning.measure import REPEAT_C, Case, Code, Outcome, Request
from bitwright.codegen.tuning.records import Database, Record

SIZE = 64
KERNELS_C = """
#include <unistd.h>
typedef int I;
#define K(NAME, BODY) void NAME(I b, I e, float* x, float* w, float* y) { BODY }
#define DO(EXPR) for (I i = b; i < e; i++) y[i] = EXPR;
K(good, DO(x[i] * w[i]))
K(slow, for (volatile I n = 0; n < 3000; n++) {} DO(x[i] * w[i]))
K(wrong, DO(x[i] * w[i] + (i == 7)))
K(hang, for (volatile I n = 0;; n++) {})
K(crash, *(volatile I*)8 = 1; DO(x[i]))
K(leave, _exit(3);)
K(outside, DO(x[i] * w[i]) y[e] = 1;)
K(spoil, DO(x[i] * w[i]) x[b] = 5;)
K(rewrite, DO(x[i] * w[i]) w[b] = 5;)
K(nan, DO(i == 3 ? 0.0f / 0.0f : x[i] * w[i]))
"""


def library() -> bytes:
    """All the kernels above."""
    return link_alone({"kernels.c": KERNELS_C.encode()})


def request(kernels: bytes, name: str, repeat: bytes = b"", **more: Any) -> Request:
    """Measure kernel ``name`` beside the good one."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(SIZE).astype(np.float32) for _ in range(2))
    args = (("input", 0), ("packed", 0), ("output", 0))
    codes = [Code(kernels, n, SIZE, 0, args, (w,)) for n in (name, "good")]
    cases = tuple(Case((v,), (v * w,)) for v in (x, -x))
    quick: dict[str, Any] = {"rounds": 3, "sample_seconds": 1e-3, "seconds": 5.0} | more
    return Request(codes[0], codes[1], repeat or link_alone({"r.c": REPEAT_C.encode()}), cases, **quick)


def do(what: str) -> str:
    """A worker's function: what it is told."""
    if what == "raise":
        raise ValueError("as asked")
    if what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang":
        time.sleep(1000)
    if what == "memory":
        return str(len(bytearray(1 << 42)))
    return str(os.getpid())


def compile_by_symbol(order: Any) -> bytes:
    """A compile function that fails as the order says."""
    return do(order).encode()


def pretend(_: Request) -> Outcome:
    """A measurement that is instant and always finds the same."""
    return Outcome("ok", "", 0.5, 1.0, 0.5, 3)


def tune_forever(path: Path) -> None:
    """Measure a kernel again and again, print the name of every record once it is stored."""
    kernels, n = library(), 0
    with LocalBench(1) as bench, Database(path) as database:
        one = request(kernels, "good", bench.repeat)
        while True:
            o = bench.measure(one)
            stored = database.add(
                Record("w", "t", "c", "good", {"n": n}, o.status, o.reason, o.seconds, o.default_seconds, o.ratio)
            )
            print(stored.uid, flush=True)
            n += 1


if __name__ == "__main__":
    tune_forever(Path(sys.argv[1]))
