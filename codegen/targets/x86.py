"""x86-64 CPUs at four instruction-set levels. Speeds are of one core at 4 GHz unless ``host()`` measured others.

Sources: kernel study on a Zen 5 core (references of the project, CPU kernels, sections 0, 1, 2 and 4): N:M gains are
those of the kernels in ``codegen/tvm/contract`` over the dense kernel of the same level.
"""

from __future__ import annotations

from bitwright.ir.target import LanesRate, Rate, SparseRate, Target
from bitwright.ir.types import F32, S8, S16, S32, U8, DType

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def _sparse(x: DType, gains: dict[tuple[int, int], float]) -> tuple[SparseRate, ...]:
    return tuple(SparseRate(x, keep, group, gain) for (keep, group), gain in gains.items())


# Measured over the dense kernel of the same level, 128x768x768, one thread (2026-11-20). Below 1: it does not pay.
_PATTERNS = ((2, 4), (4, 8), (1, 4), (2, 8), (4, 16), (1, 8), (2, 16), (1, 16))


def _gains(*values: float) -> dict[tuple[int, int], float]:
    return dict(zip(_PATTERNS, values, strict=True))


# Groups above 16 on 128x768x1344 (2026-11-21): a selection of bytes reaches 64 activations, one of floats 16.
_AVX512_INT8 = _gains(1.37, 1.37, 2.69, 2.70, 2.69, 5.26, 5.31, 9.62) | {(4, 32): 5.62, (8, 64): 5.58}
_AVX512_F32 = _gains(1.37, 1.37, 2.62, 2.60, 2.61, 5.54, 5.53, 10.9) | {(4, 32): 0.27, (8, 64): 0.20}
_YMM_INT8 = _gains(1.39, 1.39, 2.77, 2.77, 2.77, 2.77, 2.77, 2.77)
_AVX2_F32 = _gains(1.36, 1.36, 2.55, 2.54, 0.23, 4.58, 0.47, 0.94)
_AVX_VNNI_F32 = _gains(1.21, 1.21, 2.38, 2.39, 0.24, 4.56, 0.46, 0.94)
_PORTABLE_INT8 = _gains(0.57, 0.61, 1.11, 1.08, 1.20, 2.19, 2.34, 4.39)
_PORTABLE_F32 = _gains(0.27, 0.28, 0.57, 0.54, 0.55, 1.13, 1.09, 2.27)


# Kernels with activations in lanes (tvm/lanes), transpositions included: units of 32 bits that 1, 2 and 4 outputs share
# at shares from 0.1 to 0.5, 128x3072x768 and 128x768x3072 (AVX-512) or 128x768x768, one thread (2026-11-21).
def _lanes(x: DType, *times: tuple[float, float]) -> tuple[LanesRate, ...]:
    return tuple(LanesRate(x, shared, *time) for shared, time in zip((1, 2, 4), times, strict=True))


_YMM_F32_LANES = _lanes(F32, (1.4, 0.03), (1.15, 0.02), (1.13, 0.02))
_AVX512_F32_LANES = _lanes(F32, (1.5, 0.08), (1.15, 0.03), (1.02, 0.02))
_AVX512_LANES = _lanes(U8, (1.55, 0.1), (1.05, 0.055), (1.0, 0.045)) + _AVX512_F32_LANES
_AVX_VNNI_LANES = _lanes(U8, (1.31, 0.044), (1.15, 0.025), (1.15, 0.025)) + _YMM_F32_LANES
_AVX2_LANES = _lanes(U8, (1.02, 0.018), (1.02, 0.015), (1.01, 0.012)) + _YMM_F32_LANES
_PORTABLE_LANES = _lanes(F32, (1.82, 0.01), (1.52, 0.01), (2.05, 0.02))

AVX512_VNNI = Target(
    name="x86-avx512-vnni", kind="cpu", isa="avx512-vnni", mcpu="znver4",
    features=("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512vnni"),
    vector_bits=512, vector_registers=32,
    l1_bytes=32 * KIB, l2_bytes=1 * MIB, l3_bytes=16 * MIB, cores=1,
    memory_bandwidth=30e9, cache_bandwidth=100e9, vector_ops_per_second=64e9, launch_seconds=3e-8,
    rates=(Rate(U8, S8, S32, 1000e9), Rate(F32, F32, F32, 250e9)),
    sparse=_sparse(U8, _AVX512_INT8) + _sparse(F32, _AVX512_F32),
    activation=U8, source="measured on one Zen 5 core, 4.1 GHz", lanes=_AVX512_LANES,
)  # fmt: skip

AVX_VNNI = Target(
    name="x86-avx-vnni", kind="cpu", isa="avx-vnni", mcpu="alderlake",
    features=("avx2", "fma", "avxvnni"), vector_bits=256, vector_registers=16,
    l1_bytes=32 * KIB, l2_bytes=1 * MIB, l3_bytes=16 * MIB, cores=1,
    memory_bandwidth=30e9, cache_bandwidth=80e9, vector_ops_per_second=32e9, launch_seconds=3e-8,
    rates=(Rate(U8, S8, S32, 420e9), Rate(F32, F32, F32, 125e9)),
    sparse=_sparse(U8, _YMM_INT8) + _sparse(F32, _AVX_VNNI_F32),
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
    sparse=_sparse(U8, _YMM_INT8) + _sparse(F32, _AVX2_F32),
    activation=U8, source="measured on one Zen 5 core, 4.1 GHz, AVX2 code", lanes=_AVX2_LANES,
)  # fmt: skip

PORTABLE = Target(
    name="x86-portable", kind="cpu", isa="portable", mcpu="x86-64",
    features=(), vector_bits=128, vector_registers=16,
    l1_bytes=32 * KIB, l2_bytes=256 * KIB, l3_bytes=8 * MIB, cores=1,
    memory_bandwidth=20e9, cache_bandwidth=40e9, vector_ops_per_second=12e9, launch_seconds=3e-8,
    rates=(Rate(U8, S8, S32, 25e9), Rate(F32, F32, F32, 25e9)),
    sparse=_sparse(U8, _PORTABLE_INT8) + _sparse(F32, _PORTABLE_F32), activation=U8,
    source="estimate for baseline x86-64 code", lanes=_PORTABLE_LANES,
)  # fmt: skip
