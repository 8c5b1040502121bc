"""AVX-512 with products of bf16 (``vdpbf16ps``): the level of ``x86-avx512-vnni`` and one instruction more.

Source: kernel study on a Zen 5 core (references of the project, CPU kernels, sections 0 and 2).
"""

from __future__ import annotations

from dataclasses import replace

from bitwright.codegen.targets.x86 import AVX512_VNNI
from bitwright.ir.target import Rate
from bitwright.ir.types import BF16, F32

AVX512_BF16 = replace(
    AVX512_VNNI,
    name="x86-avx512-bf16",
    features=(*AVX512_VNNI.features, "avx512bf16"),
    rates=(*AVX512_VNNI.rates, Rate(BF16, BF16, F32, 500e9)),
)
