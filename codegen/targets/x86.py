"""x86-64 CPUs at four instruction-set levels. Speeds are of one core at 4 GHz unless ``host()`` measured others.

Sources: kernel study on a Zen 5 core (references of the project, CPU kernels, sections 0, 1, 2 and 4): N:M gains are
those of the kernels in ``codegen/tvm/contract`` over the dense kernel of the same level.
"""

from __future__ import annotations

from bitwright.ir.target import Rate, SparseRate, Target
from bitwright.ir.types import F32, S8, S32, U8, DType

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def _sparse(x: DType, gains: dict[tuple[int, int], float]) -> tuple[SparseRate, ...]:
    return tuple(SparseRate(x, keep, group, gain) for (keep, group), gain in gains.items())


_AVX512_INT8 = {
    (2, 4): 1.4, (4, 8): 1.3, (1, 4): 2.7, (2, 8): 2.7, (4, 16): 2.7, (1, 8): 5.4, (2, 16): 5.4, (1, 16): 9.0,
}  # fmt: skip
_AVX512_F32 = {(2, 4): 1.4, (4, 8): 1.4, (1, 4): 2.6, (2, 8): 2.6, (4, 16): 2.6, (1, 8): 5.0, (2, 16): 5.0}
_AVX2_INT8 = {(2, 4): 1.7, (4, 8): 1.6, (1, 4): 3.3, (2, 8): 3.3}

AVX512_VNNI = Target(
    name="x86-avx512-vnni", kind="cpu", isa="avx512-vnni", mcpu="znver4",
    features=("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512vnni"),
    vector_bits=512, vector_registers=32,
    l1_bytes=32 * KIB, l2_bytes=1 * MIB, l3_bytes=16 * MIB, cores=1,
    memory_bandwidth=30e9, cache_bandwidth=100e9, vector_ops_per_second=64e9, launch_seconds=3e-8,
    rates=(Rate(U8, S8, S32, 1000e9), Rate(F32, F32, F32, 250e9)),
    sparse=_sparse(U8, _AVX512_INT8) + _sparse(F32, _AVX512_F32),
    activation=U8, source="measured on one Zen 5 core, 4.1 GHz",
)  # fmt: skip

AVX_VNNI = Target(
    name="x86-avx-vnni", kind="cpu", isa="avx-vnni", mcpu="alderlake",
    features=("avx2", "fma", "avxvnni"), vector_bits=256, vector_registers=16,
    l1_bytes=32 * KIB, l2_bytes=1 * MIB, l3_bytes=16 * MIB, cores=1,
    memory_bandwidth=30e9, cache_bandwidth=80e9, vector_ops_per_second=32e9, launch_seconds=3e-8,
    rates=(Rate(U8, S8, S32, 420e9), Rate(F32, F32, F32, 125e9)),
    sparse=_sparse(U8, {(2, 4): 1.5, (4, 8): 1.4, (1, 4): 3.0, (2, 8): 3.0}),
    activation=U8, source="measured on one Zen 5 core, 4.1 GHz, 256-bit code",
)  # fmt: skip

AVX2 = Target(
    name="x86-avx2", kind="cpu", isa="avx2", mcpu="haswell",
    features=("avx2", "fma"), vector_bits=256, vector_registers=16,
    l1_bytes=32 * KIB, l2_bytes=1 * MIB, l3_bytes=16 * MIB, cores=1,
    memory_bandwidth=30e9, cache_bandwidth=80e9, vector_ops_per_second=32e9, launch_seconds=3e-8,
    rates=(Rate(U8, S8, S32, 200e9), Rate(F32, F32, F32, 125e9)),
    sparse=_sparse(U8, _AVX2_INT8),
    activation=U8, source="measured on one Zen 5 core, 4.1 GHz, AVX2 code",
)  # fmt: skip

PORTABLE = Target(
    name="x86-portable", kind="cpu", isa="portable", mcpu="x86-64",
    features=(), vector_bits=128, vector_registers=16,
    l1_bytes=32 * KIB, l2_bytes=256 * KIB, l3_bytes=8 * MIB, cores=1,
    memory_bandwidth=20e9, cache_bandwidth=40e9, vector_ops_per_second=12e9, launch_seconds=3e-8,
    rates=(Rate(U8, S8, S32, 25e9), Rate(F32, F32, F32, 25e9)),
    sparse=(), activation=U8, source="estimate for baseline x86-64 code",
)  # fmt: skip
