"""Dense tensor-core products of a warp, ``mma.sync`` (PTX ISA, "Warp-level matrix instructions: mma").

``bw_mma_{type}(d, a, b)``: d (16x8) += a (16xk, rows first) * b (kx8, columns first), 32 bytes of k an instruction.
Of lane l with g = l / 4 and t = l % 4, register i of ``a`` holds row g + 8 (i % 2) and the bytes 4 t .. 4 t + 3 of
k-half i / 2; register i of ``b`` the same bytes of half i of column g; ``d[i]`` is row g + 8 (i / 2), column 2 t + i % 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bitwright.codegen.cuda.instructions import Instruction


@dataclass(frozen=True, slots=True)
class Operands:
    """Number formats of a tensor-core product: PTX's names, size, how the emulator reads an element of a and of b."""

    name: str
    ptx: str
    size: int
    left: str
    right: str
    sum: str
    """C++ type of the accumulator."""
    arch: int = 80

    @property
    def k(self) -> int:
        """Elements in 32 bytes."""
        return 32 // self.size


_HALF, _BRAIN = "bw_half_to_float(*(const uint16_t*)p)", "bw_bits_float((uint32_t)*(const uint16_t*)p << 16)"
_SIGNED, _UNSIGNED, _E4M3 = "(int)*(const signed char*)p", "(int)*p", "bw_e4m3_to_float(*p)"
OPERANDS = (
    Operands("f16", "f32.f16.f16.f32", 2, _HALF, _HALF, "float"),
    Operands("bf16", "f32.bf16.bf16.f32", 2, _BRAIN, _BRAIN, "float"),
    Operands("s8", "s32.s8.s8.s32", 1, _SIGNED, _SIGNED, "int"),
    Operands("u8s8", "s32.u8.s8.s32", 1, _UNSIGNED, _SIGNED, "int"),
    Operands("s8u8", "s32.s8.u8.s32", 1, _SIGNED, _UNSIGNED, "int"),
    Operands("u8", "s32.u8.u8.s32", 1, _UNSIGNED, _UNSIGNED, "int"),
    Operands("e4m3", "f32.e4m3.e4m3.f32", 1, _E4M3, _E4M3, "float", arch=89),
)


def instructions() -> Iterator[Instruction]:
    """``bw_mma_f16``, ``_bf16``, ``_s8``, ``_u8s8`` (a is unsigned), ``_s8u8`` (b is), ``_u8``, ``_e4m3``."""
    for o in OPERANDS:
        yield _mma(o)


def _mma(o: Operands) -> Instruction:
    name, code = f"bw_mma_{o.name}", "+f" if o.sum == "float" else "+r"
    ds = ", ".join(f'"{code}"(d[{i}])' for i in range(4))
    rs = ", ".join([f'"r"(a[{i}])' for i in range(4)] + [f'"r"(b[{i}])' for i in range(2)])
    wide = "double" if o.sum == "float" else "unsigned"
    return Instruction(
        name,
        f"""static __device__ __forceinline__ void {name}({o.sum}* d, const unsigned* a, const unsigned* b) {{
  asm volatile("mma.sync.aligned.m16n8k{o.k}.row.col.{o.ptx} {{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9}}, {{%0,%1,%2,%3}};"
    : {ds} : {rs});
}}""",
        f"""static inline void {name}({o.sum}* d, const unsigned* a, const unsigned* b) {{
  struct In {{ {o.sum} d[4]; unsigned a[4], b[2]; }};
  struct Out {{ {o.sum} d[4]; }};
  In in = {{{{d[0], d[1], d[2], d[3]}}, {{a[0], a[1], a[2], a[3]}}, {{b[0], b[1]}}}};
  Out out = bw::together<In, Out>("{name}", 32, in, [](const In* in, Out* out) {{
    {wide} A[16][{o.k}], B[8][{o.k}];
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++)
        for (int e = 0; e < {4 // o.size}; e++) {{
          int k = i / 2 * {o.k // 2} + l % 4 * {4 // o.size} + e;
          const unsigned char* p = (const unsigned char*)&in[l].a[i] + e * {o.size};
          A[l / 4 + 8 * (i % 2)][k] = ({wide}){o.left};
          if (i >= 2) continue;
          k = i * {o.k // 2} + l % 4 * {4 // o.size} + e;
          p = (const unsigned char*)&in[l].b[i] + e * {o.size};
          B[l / 4][k] = ({wide}){o.right};
        }}
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {{
        int m = l / 4 + 8 * (i / 2), n = l % 4 * 2 + i % 2;
        {wide} s = ({wide})in[l].d[i];
        for (int k = 0; k < {o.k}; k++) s += A[m][k] * B[n][k];
        out[l].d[i] = ({o.sum})s;
      }}
  }});
  for (int i = 0; i < 4; i++) d[i] = out.d[i];
}}""",
        arch=o.arch,
        sass=r"HMMA\.1" if o.size == 2 else r"IMMA\.1" if o.sum == "int" else r"QMMA|HMMA",
    )
