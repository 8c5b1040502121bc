"""AVX-512 with products of bf16 (``vdpbf16ps``): the level of ``x86-avx512-vnni`` and one instruction more.

Source: kernel study on a Zen 5 core (references of the project, CPU kernels, sections 0 and 2); gains measured on
128x768x3072 over the dense kernel (2026-11-21).
"""

from __future__ import annotations

from dataclasses import replace

from bitwright.codegen.targets.x86 import AVX512_VNNI
from bitwright.ir.target import Rate, SparseRate
from bitwright.ir.types import BF16, F32

_GAINS = {
    (2, 4): 1.25, (4, 8): 1.3, (1, 4): 2.5, (2, 8): 2.5, (4, 16): 2.5, (1, 8): 4.9, (2, 16): 4.9, (1, 16): 8.0,
    (4, 32): 4.9,
}  # fmt: skip

AVX512_BF16 = replace(
    AVX512_VNNI,
    name="x86-avx512-bf16",
    features=(*AVX512_VNNI.features, "avx512bf16"),
    rates=(*AVX512_VNNI.rates, Rate(BF16, BF16, F32, 500e9)),
    sparse=(*AVX512_VNNI.sparse, *(SparseRate(BF16, keep, group, gain) for (keep, group), gain in _GAINS.items())),
)
