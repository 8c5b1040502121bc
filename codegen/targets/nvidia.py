"""NVIDIA GPUs: the whole device counts as one core; kernels are compiled here and launched where a driver is.

Peaks: NVIDIA's data sheets of A100 80 GB SXM (2020) and H200 SXM (2024). ``mcpu`` is the architecture of the machine
code; ``vector_registers`` of a thread; ``l1_bytes`` is the shared memory one block may have. Gains of 2:4: what
counting shared memory and L2 leaves of the ideal 2 for large products (docs/gpu.md), until a device was measured.
"""

from __future__ import annotations

from dataclasses import replace

from bitwright.ir.target import Costs, Rate, SparseRate, Target
from bitwright.ir.types import BF16, F16, F32, S8, S32, U8

_COSTS = Costs(linear=0.7, conv=0.6, attention=0.5, tile=0.0, few_rows=1.0, near=1.0)

SM80 = Target(
    name="cuda-sm80",
    kind="gpu",
    isa="cuda",
    mcpu="sm_80",
    features=("sm_80",),
    vector_bits=128,
    vector_registers=255,
    l1_bytes=163 << 10,
    l2_bytes=40 << 20,
    l3_bytes=40 << 20,
    cores=1,
    memory_bandwidth=2.04e12,
    cache_bandwidth=5e12,
    vector_ops_per_second=19.5e12,
    launch_seconds=3e-6,
    rates=(
        Rate(U8, S8, S32, 624e12), Rate(S8, S8, S32, 624e12),
        Rate(F16, F16, F32, 312e12), Rate(BF16, BF16, F32, 312e12),
        Rate(F32, F32, F32, 19.5e12),
    ),
    sparse=tuple(SparseRate(x, 2, 4, 1.8) for x in (U8, S8, F16, BF16)),
    activation=S8,
    source="data sheet of A100 80 GB SXM, 2:4 by counting (docs/gpu.md); no device was measured",
    costs=_COSTS,
)  # fmt: skip

SM90 = replace(
    SM80,
    name="cuda-sm90",
    mcpu="sm_90a",
    features=("sm_80", "sm_89", "sm_90a"),
    l1_bytes=227 << 10,
    l2_bytes=50 << 20,
    l3_bytes=50 << 20,
    memory_bandwidth=4.8e12,
    cache_bandwidth=10e12,
    vector_ops_per_second=67e12,
    rates=(
        Rate(U8, S8, S32, 1979e12), Rate(S8, S8, S32, 1979e12),
        Rate(F16, F16, F32, 989e12), Rate(BF16, BF16, F32, 989e12),
        Rate(F32, F32, F32, 67e12),
    ),
    sparse=tuple(replace(s, gain=1.5) for s in SM80.sparse),
    source="data sheet of H200 SXM, 2:4 by counting (docs/gpu.md); no device was measured",
)  # fmt: skip
