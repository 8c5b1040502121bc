"""Looking at this machine: processor flags, cache sizes, and a one-second measurement of its peaks."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bitwright.codegen.cache import default_directory
from bitwright.codegen.link import find_compiler
from bitwright.ir.errors import BitwrightError
from bitwright.ir.files import beside
from bitwright.ir.target import Rate, Target
from bitwright.ir.types import BF16, F32, S8, S32, U8

_VERSION = 2


def _normal(flag: str) -> str:
    """/proc/cpuinfo spells some features with an underscore that LLVM leaves out."""
    return flag.replace("avx512_", "avx512")


def cpu_flags() -> set[str]:
    """Processor feature names (empty where /proc/cpuinfo has none: then the portable level is used)."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return {_normal(f) for f in line.split(":", 1)[1].split()}
    except OSError:
        pass
    return set()


def cpu_name() -> str:
    """The processor's model name, or the empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def caches() -> dict[int, int]:
    """Bytes of data cache by level, as the kernel reports them for core 0."""
    out: dict[int, int] = {}
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind, level, size = ((entry / f).read_text().strip() for f in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            out[int(level)] = int(size[:-1]) * 1024
    return out


_LOOP = """
long bw_{name}(long n) {{
  for (long i = 0; i < n; i++)
    __asm__ volatile({body} : : : {clobbers});
  return n * {ops};
}}
"""


def _loop(name: str, instruction: str, register: str, ops: int, count: int = 12) -> str:
    """A C function that issues ``count`` independent accumulations and counts their operations."""
    body = " ".join('"' + instruction.format(i=i) + '\\n"' for i in range(count))
    clobbers = ", ".join(f'"{register}{i}"' for i in range(16))
    return _LOOP.format(name=name, body=body, clobbers=clobbers, ops=ops * count)


def _source(isa: str) -> str:
    if isa == "avx512-vnni":
        loops = _loop("int8", "vpdpbusd %%zmm14, %%zmm15, %%zmm{i}", "xmm", 128)
        loops += _loop("f32", "vfmadd231ps %%zmm14, %%zmm15, %%zmm{i}", "xmm", 32)
    elif isa == "avx-vnni":
        loops = _loop("int8", "%{{vex%}} vpdpbusd %%ymm14, %%ymm15, %%ymm{i}", "xmm", 64)
        loops += _loop("f32", "vfmadd231ps %%ymm14, %%ymm15, %%ymm{i}", "xmm", 16)
    elif isa == "avx2":
        madd = "vpmaddwd %%ymm14, %%ymm15, %%ymm13\\n vpaddd %%ymm13, %%ymm{i}, %%ymm{i}"
        loops = _loop("int8", madd, "xmm", 32) + _loop("f32", "vfmadd231ps %%ymm14, %%ymm15, %%ymm{i}", "xmm", 16)
    else:
        madd = "movdqa %%xmm15, %%xmm13\\n pmaddwd %%xmm14, %%xmm13\\n paddd %%xmm13, %%xmm{i}"
        loops = _loop("int8", madd, "xmm", 16)
        loops += _loop("f32", "movaps %%xmm15, %%xmm13\\n mulps %%xmm14, %%xmm13\\n addps %%xmm13, %%xmm{i}", "xmm", 8)
    return loops + _READ


_READ = """
#include <stdint.h>
long bw_read(const uint64_t* p, long words, long times) {
  uint64_t s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
  for (long t = 0; t < times; t++)
    for (long i = 0; i + 8 <= words; i += 8) {
      s0 += p[i]; s1 += p[i + 1]; s2 += p[i + 2]; s3 += p[i + 3];
      s4 += p[i + 4]; s5 += p[i + 5]; s6 += p[i + 6]; s7 += p[i + 7];
    }
  return (long)(s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7);
}
"""


def _best(run: Callable[[], float], seconds: float = 0.15) -> float:
    """Largest of the rates that ``run`` returns within a time budget."""
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = max(best, run())
    return best


def _timed(call: Callable[[], int], work: float) -> float:
    begin = time.thread_time()
    call()
    return work / max(time.thread_time() - begin, 1e-9)


def peaks(isa: str) -> dict[str, float]:
    """Measured operations per second (int8, f32) and bytes per second (cache, memory) of one core."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.c", Path(folder) / "peak.so"
        source.write_text(_source(isa))
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        line = [*find_compiler(), *flags, str(source), "-o", str(library)]
        result = subprocess.run(line, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BitwrightError(f"the calibration program does not compile: {result.stderr[-500:]}")
        lib = ctypes.CDLL(str(library))
    out = {}
    for name in ("int8", "f32"):
        fn = getattr(lib, f"bw_{name}")
        fn.restype = ctypes.c_long
        ops = fn(ctypes.c_long(1))
        out[name] = _best(lambda fn=fn, ops=ops: _timed(lambda: fn(ctypes.c_long(200_000)), 200_000.0 * ops))  # type: ignore[misc]
    for name, nbytes, times in (("cache", 4 << 20, 8), ("memory", 192 << 20, 1)):
        data = (ctypes.c_uint64 * (nbytes // 8))()
        work = float(nbytes * times)
        out[name] = _best(
            lambda d=data, n=nbytes, t=times, w=work: _timed(  # type: ignore[misc]
                lambda: lib.bw_read(d, ctypes.c_long(n // 8), ctypes.c_long(t)), w
            ),
            0.25,
        )
    return out


def measured(target: Target) -> Target:
    """The target with this machine's peaks; measured once, kept in the cache directory by processor and level."""
    path = default_directory() / "machine.json"
    key = f"{_VERSION}/{cpu_name()}/{target.isa}"
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    found = known.get(key) if isinstance(known, dict) else None
    if not isinstance(found, dict):
        try:
            found = peaks(target.isa)
        except BitwrightError:
            return target
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside(path) as temporary:
                temporary.write_text(json.dumps({**(known if isinstance(known, dict) else {}), key: found}, indent=1))
        except OSError:
            pass
    faster = found["int8"] / (target.rate(U8, S8) or found["int8"])  # narrow sums keep their gain
    narrow = [replace(r, ops_per_second=r.ops_per_second * faster) for r in target.rates if r.terms > 1]
    floats = found["f32"] / (target.rate(F32, F32) or found["f32"])  # those of bf16 keep their ratio
    halves = [replace(r, ops_per_second=r.ops_per_second * floats) for r in target.rates if r.x == BF16]
    rates = (Rate(U8, S8, S32, found["int8"]), Rate(F32, F32, F32, found["f32"]), *halves, *narrow)
    return replace(
        target, rates=rates, cache_bandwidth=found["cache"], memory_bandwidth=found["memory"],
        source=f"peaks measured on {cpu_name() or 'this machine'}",
    )  # fmt: skip
