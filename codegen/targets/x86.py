"""x86-64 CPUs at four instruction-set levels. Speeds are of one core at 4 GHz unless ``host()`` measured others.

Sources: kernel study on a Zen 5 core (references of the project, CPU kernels, sections 0, 1, 2 and 4): N:M gains are
those of the kernels in ``codegen/tvm/contract`` over the dense kernel of the same level.
"""

from __future__ import annotations

from bitwright.ir.target import LanesRate, Rate, SparseRate, Target
from bitwright.ir.types import F32, S8, S16, S32, U8, DType

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def _sparse(x: DType, gains: dict[tuple[int, int], float], shared: int = 1) -> tuple[SparseRate, ...]:
    return tuple(SparseRate(x, keep, group, gain, shared) for (keep, group), gain in gains.items())


# Measured over the dense kernel of the same level, one thread (2026-11-21): AVX-512 means of 128x768x768, 128x3072x768
# and 128x768x3072, others 128x768x768 (AVX2 int8 between weights that fit pmaddubsw and those that do not). Below 1: it
# does not pay.
_PATTERNS = ((2, 4), (4, 8), (1, 4), (2, 8), (4, 16), (1, 8), (2, 16), (1, 16))


def _gains(*values: float) -> dict[tuple[int, int], float]:
    return dict(zip(_PATTERNS, values, strict=True))


# Groups above 16 on 128x768x1344: a selection of bytes reaches 64 activations, one of floats 32.
_AVX512_INT8 = _gains(1.34, 1.33, 2.64, 2.64, 2.63, 5.23, 5.23, 10.1) | {(4, 32): 5.28, (8, 64): 5.25}
_AVX512_F32 = _gains(1.35, 1.35, 2.53, 2.47, 2.53, 4.93, 5.05, 7.75) | {(4, 32): 2.93, (8, 64): 0.20}
_YMM_INT8 = _gains(1.37, 1.37, 2.65, 2.6, 2.65, 2.65, 2.65, 2.65)
_AVX2_INT8 = _gains(2.0, 2.0, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5)
_AVX2_F32 = _gains(1.35, 1.35, 2.6, 2.6, 1.2, 5.0, 2.4, 4.8)
_AVX_VNNI_F32 = _gains(1.3, 1.3, 2.55, 2.55, 1.15, 4.8, 2.3, 4.5)
_PORTABLE_INT8 = _gains(0.57, 0.61, 1.11, 1.08, 1.20, 2.19, 2.34, 4.39)
_PORTABLE_F32 = _gains(0.27, 0.28, 0.57, 0.54, 0.55, 1.13, 1.09, 2.27)


def _shared(x: DType, *blocks: tuple[int, dict[tuple[int, int], float]]) -> tuple[SparseRate, ...]:
    return tuple(rate for shared, gains in blocks for rate in _sparse(x, gains, shared))


# One pattern for so many outputs: activations are compacted, then the dense kernel runs (tvm/contract/shared.py).
_AVX512_SHARED = _shared(
    U8,
    (64, _gains(1.83, 1.82, 3.55, 3.57, 3.56, 6.6, 6.6, 11.3) | {(4, 32): 6.4, (8, 64): 6.4}),
    (32, _gains(1.68, 1.70, 3.18, 3.18, 3.15, 5.54, 5.51, 7.16) | {(4, 32): 5.5, (8, 64): 5.4}),
) + _shared(
    F32,
    (64, _gains(1.56, 1.57, 2.79, 2.78, 2.79, 5.2, 5.27, 9.1) | {(4, 32): 3.86, (8, 64): 3.94}),
    (32, _gains(1.41, 1.38, 2.37, 2.42, 2.43, 3.74, 3.70, 5.20) | {(4, 32): 2.9, (8, 64): 2.75}),
)
_AVX_VNNI_SHARED = _shared(
    U8,
    (64, _gains(1.79, 1.79, 3.23, 3.26, 3.27, 5.40, 5.37, 7.54)),
    (32, _gains(1.68, 1.68, 2.86, 2.85, 2.84, 4.28, 4.31, 5.13)),
) + _shared(
    F32,
    (64, _gains(1.67, 1.68, 3.11, 3.13, 2.60, 5.53, 5.07, 10.7)),
    (32, _gains(1.57, 1.60, 2.82, 2.90, 2.09, 4.69, 4.25, 8.91)),
    (16, _gains(1.49, 1.48, 2.66, 2.67, 1.60, 4.23, 3.35, 7.10)),
)
_AVX2_SHARED = _shared(
    U8,
    (64, _gains(1.87, 1.87, 3.6, 3.6, 3.6, 6.5, 6.5, 11.0)),
    (32, _gains(1.82, 1.82, 3.45, 3.45, 3.45, 5.9, 5.9, 9.0)),
    (16, _gains(1.75, 1.75, 3.2, 3.2, 3.2, 5.0, 5.0, 6.5)),
) + _shared(
    F32,
    (64, _gains(1.67, 1.66, 3.18, 3.20, 2.96, 5.73, 6.01, 11.1)),
    (32, _gains(1.59, 1.58, 2.95, 2.93, 2.55, 4.99, 5.34, 9.67)),
    (16, _gains(1.51, 1.51, 2.72, 2.75, 2.15, 4.46, 4.68, 8.85)),
)
_PORTABLE_SHARED = _shared(
    U8,
    (64, _gains(1.92, 1.93, 3.83, 3.84, 3.80, 7.69, 7.74, 15.2)),
    (32, _gains(1.87, 1.85, 3.71, 3.73, 3.74, 7.29, 7.53, 15.0)),
    (16, _gains(1.76, 1.81, 3.60, 3.57, 3.59, 7.24, 7.12, 14.6)),
) + _shared(
    F32,
    (64, _gains(1.77, 1.78, 3.47, 3.69, 3.63, 7.24, 7.32, 14.1)),
    (32, _gains(1.64, 1.67, 3.30, 3.31, 3.33, 6.75, 6.79, 12.4)),
    (16, _gains(1.48, 1.53, 2.98, 2.93, 3.02, 6.25, 6.16, 12.8)),
)


# Kernels with activations in lanes (tvm/lanes), transpositions and requantization to bytes included: row pointers for 1
# output, a fixed count for 2 and 4 that share, shares from 0.05 to 0.5, 128x3072x768 and 128x768x3072 (AVX-512) or
# 128x768x768, one thread (2026-11-21).
def _lanes(x: DType, *times: tuple[float, float]) -> tuple[LanesRate, ...]:
    return tuple(LanesRate(x, shared, *time) for shared, time in zip((1, 2, 4), times, strict=True))


_YMM_F32_LANES = _lanes(F32, (1.23, 0.04), (1.14, 0.012), (1.16, 0.011))
_AVX512_F32_LANES = _lanes(F32, (1.46, 0.09), (0.93, 0.06), (0.96, 0.038))
_AVX512_LANES = _lanes(U8, (1.41, 0.1), (0.915, 0.08), (0.98, 0.04)) + _AVX512_F32_LANES
_AVX_VNNI_LANES = _lanes(U8, (1.57, 0.062), (1.06, 0.06), (1.08, 0.06)) + _YMM_F32_LANES
_AVX2_LANES = _lanes(U8, (1.24, 0.023), (1.14, 0.013), (1.03, 0.024)) + _YMM_F32_LANES
_PORTABLE_LANES = _lanes(F32, (1.24, 0.02), (1.8, 0.005), (2.06, 0.005))

AVX512_VNNI = Target(
    name="x86-avx512-vnni", kind="cpu", isa="avx512-vnni", mcpu="znver4",
    features=("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512vnni"),
    vector_bits=512, vector_registers=32,
    l1_bytes=32 * KIB, l2_bytes=1 * MIB, l3_bytes=16 * MIB, cores=1,
    memory_bandwidth=30e9, cache_bandwidth=100e9, vector_ops_per_second=64e9, launch_seconds=3e-8,
    rates=(Rate(U8, S8, S32, 1000e9), Rate(F32, F32, F32, 250e9)),
    sparse=_sparse(U8, _AVX512_INT8) + _sparse(F32, _AVX512_F32) + _AVX512_SHARED,
    activation=U8, source="measured on one Zen 5 core, 4.1 GHz", lanes=_AVX512_LANES,
)  # fmt: skip

AVX_VNNI = Target(
    name="x86-avx-vnni", kind="cpu", isa="avx-vnni", mcpu="alderlake",
    features=("avx2", "fma", "avxvnni"), vector_bits=256, vector_registers=16,
    l1_bytes=32 * KIB, l2_bytes=1 * MIB, l3_bytes=16 * MIB, cores=1,
    memory_bandwidth=30e9, cache_bandwidth=80e9, vector_ops_per_second=32e9, launch_seconds=3e-8,
    rates=(Rate(U8, S8, S32, 420e9), Rate(F32, F32, F32, 125e9)),
    sparse=_sparse(U8, _YMM_INT8) + _sparse(F32, _AVX_VNNI_F32) + _AVX_VNNI_SHARED,
    activation=U8, source="measured on one Zen 5 core, 4.1 GHz, 256-bit code", lanes=_AVX_VNNI_LANES,
)  # fmt: skip

# pmaddubsw and paddw, widened with pmaddwd once in so many products; 128x3072x768, one thread (2026-11-21), where
# pmaddubsw and pmaddwd at every step reach 250. benchmarks/accumulators.py measures the same through the pipeline.
_AVX2_S16 = tuple(
    Rate(U8, S8, S16, speed, terms)
    for terms, speed in ((4, 325e9), (6, 355e9), (8, 370e9), (16, 390e9), (32, 400e9), (128, 420e9))
)

AVX2 = Target(
    name="x86-avx2", kind="cpu", isa="avx2", mcpu="haswell",
    features=("avx2", "fma"), vector_bits=256, vector_registers=16,
    l1_bytes=32 * KIB, l2_bytes=1 * MIB, l3_bytes=16 * MIB, cores=1,
    memory_bandwidth=30e9, cache_bandwidth=80e9, vector_ops_per_second=32e9, launch_seconds=3e-8,
    rates=(Rate(U8, S8, S32, 200e9), Rate(F32, F32, F32, 125e9), *_AVX2_S16),
    sparse=_sparse(U8, _AVX2_INT8) + _sparse(F32, _AVX2_F32) + _AVX2_SHARED,
    activation=U8, source="measured on one Zen 5 core, 4.1 GHz, AVX2 code", lanes=_AVX2_LANES,
)  # fmt: skip

PORTABLE = Target(
    name="x86-portable", kind="cpu", isa="portable", mcpu="x86-64",
    features=(), vector_bits=128, vector_registers=16,
    l1_bytes=32 * KIB, l2_bytes=256 * KIB, l3_bytes=8 * MIB, cores=1,
    memory_bandwidth=20e9, cache_bandwidth=40e9, vector_ops_per_second=12e9, launch_seconds=3e-8,
    rates=(Rate(U8, S8, S32, 25e9), Rate(F32, F32, F32, 25e9)),
    sparse=_sparse(U8, _PORTABLE_INT8) + _sparse(F32, _PORTABLE_F32) + _PORTABLE_SHARED, activation=U8,
    source="estimate for baseline x86-64 code", lanes=_PORTABLE_LANES,
)  # fmt: skip
