"""Pairs of 16-bit floats in a word, powers of two, shifts of any distance."""

from __future__ import annotations

from collections.abc import Iterator

from bitwright.codegen.cuda.instructions import Instruction

_DEVICE = "static __device__ __forceinline__"


def instructions() -> Iterator[Instruction]:
    """``bw_pack_{f16,bf16}(low, high)``: two f32 rounded to nearest even; ``bw_{low,high}_f16(word)``: back.

    ``bw_exp2(x)``: 2^x within 2 units in the last place of f32, 0 for -infinity (PTX ISA, ``ex2.approx``).
    ``bw_fma(a, b, c)``: a b + c, rounded once. ``bw_shift(v, n)``: v to the left by n bits, 0 for n < 0 and n > 31.
    """
    for name, to in (("f16", "bw_float_to_half"), ("bf16", "bw_float_to_bf16")):
        yield Instruction(
            f"bw_pack_{name}",
            f"""{_DEVICE} unsigned bw_pack_{name}(float low, float high) {{
  unsigned r;
  asm("cvt.rn.{name}x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}}""",
            f"static inline unsigned bw_pack_{name}(float low, float high) "
            f"{{ return (unsigned){to}(low) | (unsigned){to}(high) << 16; }}",
            sass=r"F2FP",
        )
    for name, shift in (("low", 0), ("high", 16)):
        yield Instruction(
            f"bw_{name}_f16",
            f"{_DEVICE} float bw_{name}_f16(unsigned w) {{ return __half2float(__ushort_as_half(w >> {shift})); }}",
            f"static inline float bw_{name}_f16(unsigned w) {{ return bw_half_to_float(w >> {shift}); }}",
            sass=r"HADD2\.F32",
        )
    yield Instruction(
        "bw_exp2",
        f"""{_DEVICE} float bw_exp2(float x) {{
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}}""",
        "static inline float bw_exp2(float x) { float r = exp2f(x); return r < 0x1p-126f ? 0.0f : r; }",
        sass=r"MUFU\.EX2",
    )
    yield Instruction(
        "bw_shift",
        f"""{_DEVICE} unsigned bw_shift(unsigned v, int n) {{
  unsigned r;
  asm("shl.b32 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(n));
  return r;
}}""",
        "static inline unsigned bw_shift(unsigned v, int n) { return n < 0 || n > 31 ? 0 : v << n; }",
        sass=r"SHF\.L",
    )
    yield Instruction(
        "bw_fma",
        f"{_DEVICE} float bw_fma(float a, float b, float c) {{ return fmaf(a, b, c); }}",
        "static inline float bw_fma(float a, float b, float c) { return fmaf(a, b, c); }",
        sass=r"FFMA",
    )
