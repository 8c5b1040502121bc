"""64-bit Arm CPUs, compiled for on any machine. Nothing here is measured: speeds and gains follow from how many vector
operations a kernel takes and how many a core starts in a cycle, as Arm's optimisation guides publish them.

Neoverse N2: two vector pipes, each of which starts a dot product, a multiply-add or a table look-up every cycle.
Cortex-A72: two pipes, of which one multiplies integers, a full vector every other cycle.
"""

from __future__ import annotations

from bitwright.codegen.targets.x86 import KIB, MIB
from bitwright.ir.target import Rate, SparseRate, Target
from bitwright.ir.types import F32, S8, S32, U8, DType

_PATTERNS = ((2, 4), (4, 8), (1, 4), (2, 8), (4, 16), (1, 8), (2, 16), (1, 16))


def gains(x: DType, *values: float, shared: int = 1) -> tuple[SparseRate, ...]:
    """Rates of the usual patterns, from 2:4 to 1:16."""
    return tuple(SparseRate(x, *pattern, gain, shared) for pattern, gain in zip(_PATTERNS, values, strict=True))


# Vector operations for four products in every lane of a tile. usdot, 4 x 4: 1.25 dense, its broadcasts included, and 2
# with a table look-up for each; sdot, 4 x 3: 1.92 (activations less 128, and the sums of the weights) and 2.6. A step
# reaches 16 activations. Less 5 % for indices.
_USDOT_TABLES = gains(U8, 1.2, 1.2, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4)
_SDOT_TABLES = gains(U8, 1.4, 1.4, 2.8, 2.8, 2.8, 2.8, 2.8, 2.8)
# Activations are compacted once for all outputs that share a pattern, a tenth of the products' time at 64 outputs.
_COMPACTED = (
    *gains(U8, 1.7, 1.7, 3.1, 3.1, 3.1, 5.0, 5.0, 7.0, shared=64),
    *gains(U8, 1.5, 1.5, 2.5, 2.5, 2.5, 3.6, 3.6, 4.5, shared=32),
)
# A selection by scalar loads: about one operation for each lane.
GATHERED = (
    *gains(U8, 0.45, 0.45, 0.9, 0.9, 0.9, 1.8, 1.8, 3.5),
    *gains(F32, 0.3, 0.3, 0.6, 0.6, 0.6, 1.2, 1.2, 2.4),
)
_NEON_FLOATS = GATHERED[len(_PATTERNS) :]

AARCH64 = Target(
    name="aarch64", kind="cpu", isa="neon-i8mm",
    mcpu="-mtriple=aarch64-linux-gnu -mcpu=generic -mattr=+v8.2a,+dotprod,+i8mm", features=("dotprod", "i8mm"),
    vector_bits=128, vector_registers=32, l1_bytes=64 * KIB, l2_bytes=1 * MIB, l3_bytes=16 * MIB, cores=1,
    memory_bandwidth=20e9, cache_bandwidth=48e9, vector_ops_per_second=24e9, launch_seconds=3e-8,
    rates=(Rate(U8, S8, S32, 154e9), Rate(F32, F32, F32, 48e9)),
    sparse=_USDOT_TABLES + _NEON_FLOATS + _COMPACTED,
    activation=U8,
    source="predicted for one Neoverse N2 core at 3 GHz from published throughputs: two vector operations a cycle",
)  # fmt: skip

DOTPROD = Target(
    name="aarch64-dotprod", kind="cpu", isa="neon-dot",
    mcpu="-mtriple=aarch64-linux-gnu -mcpu=generic -mattr=+v8.2a,+dotprod", features=("dotprod",),
    vector_bits=128, vector_registers=32, l1_bytes=64 * KIB, l2_bytes=1 * MIB, l3_bytes=16 * MIB, cores=1,
    memory_bandwidth=20e9, cache_bandwidth=40e9, vector_ops_per_second=20e9, launch_seconds=3e-8,
    rates=(Rate(U8, S8, S32, 80e9), Rate(F32, F32, F32, 40e9)), sparse=_SDOT_TABLES + _NEON_FLOATS + _COMPACTED,
    activation=U8,
    source="predicted for one Neoverse N1 core at 2.5 GHz from published throughputs: two vector operations a cycle",
)  # fmt: skip

NEON = Target(
    name="aarch64-neon", kind="cpu", isa="vector", mcpu="-mtriple=aarch64-linux-gnu -mcpu=generic", features=(),
    vector_bits=128, vector_registers=32, l1_bytes=32 * KIB, l2_bytes=512 * KIB, l3_bytes=1 * MIB, cores=1,
    memory_bandwidth=4e9, cache_bandwidth=12e9, vector_ops_per_second=12e9, launch_seconds=6e-8,
    rates=(Rate(U8, S8, S32, 8e9), Rate(F32, F32, F32, 24e9)), sparse=GATHERED,
    activation=U8, source="predicted for one Cortex-A72 core at 1.5 GHz from published throughputs",
)  # fmt: skip
