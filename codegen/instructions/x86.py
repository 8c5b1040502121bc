"""The x86 vector instructions the kernels use."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitwright.codegen.instructions.core import Array, Instruction, VecType
from bitwright.ir.types import BF16, F32, S8, S16, S32, U8


def _dot4(acc: Array, a: Array, w: Array) -> Array:
    products = a.astype(np.int64).reshape(-1, 4) * w.astype(np.int64).reshape(-1, 4)
    return np.asarray(acc.astype(np.int64) + products.sum(1), np.int32)


def _maddubs(a: Array, w: Array) -> Array:
    pairs = (a.astype(np.int32).reshape(-1, 2) * w.astype(np.int32).reshape(-1, 2)).sum(1)
    return np.asarray(np.clip(pairs, -32768, 32767), np.int16)


def _maddw(a: Array, b: Array) -> Array:
    products = a.astype(np.int64).reshape(-1, 2) * b.astype(np.int64).reshape(-1, 2)
    return np.asarray(products.sum(1), np.int32)


def _packed(lo: int, hi: int, dtype: type[np.generic]) -> Callable[[Array, Array], Array]:
    """Two vectors narrowed with saturation: by 128 bits, those of the first, then those of the second."""

    def meaning(a: Array, b: Array) -> Array:
        both = np.stack([v.reshape(-1, 16 // v.itemsize) for v in (a, b)], 1)
        return np.asarray(np.clip(both, lo, hi).reshape(-1), dtype)

    return meaning


def _rounded(x: Array) -> Array:
    """To the nearest integer, ties to even; the smallest for NaN and what 32 bits do not hold."""
    near = np.rint(x.astype(np.float64))
    inside = (near >= -(2.0**31)) & (near < 2.0**31)
    return np.asarray(np.where(inside, near, -(2.0**31)), np.int32)


def _permute(table: Array, index: Array) -> Array:
    return np.asarray(table[index.astype(np.int64) & (table.size - 1)])


def _pshufb(table: Array, index: Array) -> Array:
    i = index.view(np.uint8).astype(np.int64)
    lane = np.arange(table.size) // 16 * 16
    return np.asarray(np.where(i & 0x80, 0, table[lane + (i & 15)]), table.dtype)


def _fma(a: Array, b: Array, c: Array) -> Array:
    exact = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
    return np.asarray(exact, np.float32)


def _dot_bf16(acc: Array, a: Array, b: Array) -> Array:
    a, b = (x.astype(np.longdouble).reshape(-1, 2) for x in (a, b))
    odd = np.asarray(acc.astype(np.longdouble) + a[:, 1] * b[:, 1], np.float32)
    return np.asarray(odd.astype(np.longdouble) + a[:, 0] * b[:, 0], np.float32)


def _bytes(n: int) -> VecType:
    return VecType(S8, n)


def _dpbusd(bits: int, feature: str) -> Instruction:
    lanes = bits // 32
    return Instruction(
        f"vpdpbusd.{bits}",
        f"llvm.x86.avx512.vpdpbusd.{bits}",
        feature,
        VecType(S32, lanes),
        (VecType(S32, lanes), VecType(U8, 4 * lanes), _bytes(4 * lanes)),
        _dot4,
    )


VPDPBUSD_512 = _dpbusd(512, "avx512_vnni")
VPDPBUSD_256 = _dpbusd(256, "avx_vnni")
_DOT_BF16 = """
define internal <16 x float> @bitwright_vdpbf16ps_512(<16 x float> %acc, <16 x i32> %a, <16 x i32> %b) alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %acc, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
"""
VDPBF16PS_512 = Instruction(
    "vdpbf16ps.512",
    "bitwright_vdpbf16ps_512",
    "avx512_bf16",
    VecType(F32, 16),
    (VecType(F32, 16), VecType(BF16, 32), VecType(BF16, 32)),
    _dot_bf16,
    _DOT_BF16,
)
VPMADDUBSW_256 = Instruction(
    "vpmaddubsw.256",
    "llvm.x86.avx2.pmadd.ub.sw",
    "avx2",
    VecType(S16, 16),
    (VecType(U8, 32), _bytes(32)),
    _maddubs,
)
VPMADDWD_256 = Instruction(
    "vpmaddwd.256",
    "llvm.x86.avx2.pmadd.wd",
    "avx2",
    VecType(S32, 8),
    (VecType(S16, 16), VecType(S16, 16)),
    _maddw,
)
PMADDWD_128 = Instruction(
    "pmaddwd.128",
    "llvm.x86.sse2.pmadd.wd",
    "sse2",
    VecType(S32, 4),
    (VecType(S16, 8), VecType(S16, 8)),
    _maddw,
)
VPMADDUBSW_512 = Instruction(
    "vpmaddubsw.512",
    "llvm.x86.avx512.pmaddubs.w.512",
    "avx512bw",
    VecType(S16, 32),
    (VecType(U8, 64), _bytes(64)),
    _maddubs,
)
VPMADDWD_512 = Instruction(
    "vpmaddwd.512",
    "llvm.x86.avx512.pmaddw.d.512",
    "avx512bw",
    VecType(S32, 16),
    (VecType(S16, 32), VecType(S16, 32)),
    _maddw,
)
VPACKSSDW_512 = Instruction(
    "vpackssdw.512",
    "llvm.x86.avx512.packssdw.512",
    "avx512bw",
    VecType(S16, 32),
    (VecType(S32, 16), VecType(S32, 16)),
    _packed(-32768, 32767, np.int16),
)
VPACKUSWB_512 = Instruction(
    "vpackuswb.512",
    "llvm.x86.avx512.packuswb.512",
    "avx512bw",
    VecType(U8, 64),
    (VecType(S16, 32), VecType(S16, 32)),
    _packed(0, 255, np.uint8),
)
VPACKSSDW_256 = Instruction(
    "vpackssdw.256",
    "llvm.x86.avx2.packssdw",
    "avx2",
    VecType(S16, 16),
    (VecType(S32, 8), VecType(S32, 8)),
    _packed(-32768, 32767, np.int16),
)
VPACKUSWB_256 = Instruction(
    "vpackuswb.256",
    "llvm.x86.avx2.packuswb",
    "avx2",
    VecType(U8, 32),
    (VecType(S16, 16), VecType(S16, 16)),
    _packed(0, 255, np.uint8),
)
_ROUND_512 = """
define internal <16 x i32> @bitwright_vcvtps2dq_512(<16 x float> %x) alwaysinline {
  %r = call <16 x i32> @llvm.x86.avx512.mask.cvtps2dq.512(<16 x float> %x, <16 x i32> undef, i16 -1, i32 4)
  ret <16 x i32> %r
}
declare <16 x i32> @llvm.x86.avx512.mask.cvtps2dq.512(<16 x float>, <16 x i32>, i16, i32)
"""
VCVTPS2DQ_512 = Instruction(
    "vcvtps2dq.512",
    "bitwright_vcvtps2dq_512",
    "avx512f",
    VecType(S32, 16),
    (VecType(F32, 16),),
    _rounded,
    _ROUND_512,
)
VCVTPS2DQ_256 = Instruction(
    "vcvtps2dq.256", "llvm.x86.avx.cvt.ps2dq.256", "avx", VecType(S32, 8), (VecType(F32, 8),), _rounded
)
VPSHUFB_512 = Instruction(
    "vpshufb.512", "llvm.x86.avx512.pshuf.b.512", "avx512bw", _bytes(64), (_bytes(64), _bytes(64)), _pshufb
)
VPSHUFB_256 = Instruction("vpshufb.256", "llvm.x86.avx2.pshuf.b", "avx2", _bytes(32), (_bytes(32), _bytes(32)), _pshufb)
VPSHUFB_128 = Instruction(
    "vpshufb.128", "llvm.x86.ssse3.pshuf.b.128", "ssse3", _bytes(16), (_bytes(16), _bytes(16)), _pshufb
)
VPERMB_512 = Instruction(
    "vpermb.512",
    "llvm.x86.avx512.permvar.qi.512",
    "avx512vbmi",
    _bytes(64),
    (_bytes(64), _bytes(64)),
    _permute,
)
VPERMW_512 = Instruction(
    "vpermw.512",
    "llvm.x86.avx512.permvar.hi.512",
    "avx512bw",
    VecType(S16, 32),
    (VecType(S16, 32), VecType(S16, 32)),
    _permute,
)
VPERMPS_512 = Instruction(
    "vpermps.512",
    "llvm.x86.avx512.permvar.sf.512",
    "avx512f",
    VecType(F32, 16),
    (VecType(F32, 16), VecType(S32, 16)),
    _permute,
)
VPERMPS_256 = Instruction(
    "vpermps.256",
    "llvm.x86.avx2.permps",
    "avx2",
    VecType(F32, 8),
    (VecType(F32, 8), VecType(S32, 8)),
    _permute,
)
FMA_512 = Instruction("vfmadd.ps.512", "llvm.fma.v16f32", "avx512f", VecType(F32, 16), (VecType(F32, 16),) * 3, _fma)
FMA_256 = Instruction("vfmadd.ps.256", "llvm.fma.v8f32", "fma", VecType(F32, 8), (VecType(F32, 8),) * 3, _fma)

INSTRUCTIONS: tuple[Instruction, ...] = (
    VPDPBUSD_512,
    VPDPBUSD_256,
    VDPBF16PS_512,
    VPMADDUBSW_256,
    VPMADDWD_256,
    PMADDWD_128,
    VPMADDUBSW_512,
    VPMADDWD_512,
    VPACKSSDW_512,
    VPACKUSWB_512,
    VPACKSSDW_256,
    VPACKUSWB_256,
    VCVTPS2DQ_512,
    VCVTPS2DQ_256,
    VPSHUFB_512,
    VPSHUFB_256,
    VPSHUFB_128,
    VPERMB_512,
    VPERMW_512,
    VPERMPS_512,
    VPERMPS_256,
    FMA_512,
    FMA_256,
)
"""Every instruction with a spelling on x86."""
