"""Freestanding C: the target of machines that bring nothing but a C compiler."""

from __future__ import annotations

from bitwright.ir.target import Rate, Target
from bitwright.ir.types import F32, S8, S32, U8

C = Target(
    name="c",
    kind="device",
    isa="portable",
    mcpu="cortex-m4",
    features=(),
    vector_bits=64,
    vector_registers=13,
    l1_bytes=16 << 10,
    l2_bytes=16 << 10,
    l3_bytes=16 << 10,
    cores=1,
    memory_bandwidth=80e6,
    cache_bandwidth=320e6,
    vector_ops_per_second=40e6,
    launch_seconds=1e-6,
    rates=(Rate(U8, S8, S32, 32e6), Rate(F32, F32, F32, 16e6)),
    sparse=(),
    activation=U8,
    source=(
        "no machine: the order of magnitude of a Cortex-M4 at 80 MHz, a multiply-accumulate in five cycles and its "
        "loads (timings of the Cortex-M4 technical reference manual); masks are kept for the bytes they save"
    ),
)
