"""64-bit RISC-V CPUs, compiled for on any machine. Nothing here is measured: speeds are instruction counts of the inner
loops over what a small in-order core starts in a cycle (two scalar instructions, half a vector of 256 bits)."""

from __future__ import annotations

from bitwright.codegen.targets.arm import GATHERED, gains
from bitwright.codegen.targets.x86 import KIB, MIB
from bitwright.ir.target import Rate, Target
from bitwright.ir.types import F32, S8, S32, U8

_MACHINE = "-mtriple=riscv64-linux-gnu -mcpu=generic-rv64 -mabi=lp64d -mattr=+m,+a,+f,+d,+c"

RISCV64_V = Target(
    name="riscv64-v", kind="cpu", isa="vector", mcpu=f"{_MACHINE},+v", features=("v",),
    vector_bits=128, vector_registers=32, l1_bytes=32 * KIB, l2_bytes=512 * KIB, l3_bytes=1 * MIB, cores=1,
    memory_bandwidth=4e9, cache_bandwidth=10e9, vector_ops_per_second=6.4e9, launch_seconds=6e-8,
    rates=(Rate(U8, S8, S32, 8.5e9), Rate(F32, F32, F32, 12.8e9)), sparse=GATHERED,
    activation=U8, source="estimate: one core at 1.6 GHz with 128 bits of vector arithmetic a cycle",
)  # fmt: skip

# Without vectors a kept product costs one more load: of its index.
_SCALAR = (
    *gains(U8, 1.5, 1.5, 3.0, 3.0, 3.0, 6.0, 6.0, 12.0),
    *gains(F32, 1.4, 1.4, 2.8, 2.8, 2.8, 5.6, 5.6, 11.0),
)

RISCV64 = Target(
    name="riscv64", kind="cpu", isa="vector", mcpu=_MACHINE, features=(),
    vector_bits=128, vector_registers=32, l1_bytes=32 * KIB, l2_bytes=2 * MIB, l3_bytes=2 * MIB, cores=1,
    memory_bandwidth=2e9, cache_bandwidth=6e9, vector_ops_per_second=1.5e9, launch_seconds=6e-8,
    rates=(Rate(U8, S8, S32, 1.5e9), Rate(F32, F32, F32, 1.5e9)), sparse=_SCALAR,
    activation=U8, source="estimate: one core at 1.5 GHz, two scalar instructions a cycle, one of them a load",
)  # fmt: skip
