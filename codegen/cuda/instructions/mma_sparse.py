"""Tensor-core products of a warp whose left operand is 2:4 sparse, ``mma.sp::ordered_metadata`` (PTX ISA 9.0, 9.7.14.6).

``bw_mma_sp_{type}(d, a, b, meta)``: d (16x8) += a (16xk, rows first, 2 of 4 consecutive elements kept) * b (kx8, columns
first), 64 bytes of k an instruction. Of lane l with g = l / 4 and t = l % 4:

* ``a``: what is kept, laid out as the operand of the dense product over k / 2 elements (:mod:`.mma`);
* ``b[i]``: the bytes 4 t .. 4 t + 3 of quarter i of k, column g; ``d`` as in the dense product;
* ``meta``: the places of kept elements, 2 bits each, 4 bits a group of four elements, ascending along k from the lowest
  bit; the first place is below the second (a pair of equal places is undefined, and the emulator refuses it).

Who holds which metadata. 16-bit types: names end in ``_0`` or ``_1``, the selector: of each four lanes only the lanes
t = 2 selector + h contribute; bits 16 u .. 16 u + 15 of theirs belong to row g + 8 u and elements 16 h .. 16 h + 15 of k.
8-bit types: every lane contributes; its 32 bits belong to row g + 8 (t % 2), elements 32 (t / 2) .. 32 (t / 2) + 31.

Sources, which agree: PTX ISA 9.0, sections 9.7.14.6.1 and 9.7.14.6.2 (selectors, figures of metadata); CUTLASS 4,
``cute/atom/mma_traits_sm120_sparse.hpp`` (``ELayout`` of 16x8x64) and ``mma_traits_sm90_gmma_sparse.hpp``
(``ELayout_64x32``, ``ELayout_64x64``, 16 rows a warp); ``cutlass/util/host_reorder.h`` ``reorder_meta`` with
``ColumnMajorInterleaved<2>``, which is how sm_80 kernels store it (``torch/sparse/_semi_structured_conversions.py``, the
tests compare with it). 8-bit floats need sm_89 (PTX ISA 8.4; ``cutlass/arch/mma_sparse_sm89.h``).
"""

from __future__ import annotations

from collections.abc import Iterator

from bitwright.codegen.cuda.instructions import Instruction
from bitwright.codegen.cuda.instructions.mma import OPERANDS, Operands


def instructions() -> Iterator[Instruction]:
    """``bw_mma_sp_f16_0``, ``_f16_1``, ``_bf16_0``, ``_bf16_1``, ``_s8``, ``_s8u8`` (b is unsigned), ``_u8s8``, ``_u8``,
    ``_e4m3``."""
    for o in OPERANDS:
        for selector in (0, 1) if o.size == 2 else (0,):
            yield _mma_sp(o, selector)


def _mma_sp(o: Operands, selector: int) -> Instruction:
    name = f"bw_mma_sp_{o.name}" + (f"_{selector}" if o.size == 2 else "")
    code = "+f" if o.sum == "float" else "+r"
    ds = ", ".join(f'"{code}"(d[{i}])' for i in range(4))
    rs = ", ".join([f'"r"({x}[{i}])' for x in "ab" for i in range(4)] + ['"r"(meta)'])
    wide = "double" if o.sum == "float" else "unsigned"
    k, each = 2 * o.k, 4 // o.size
    if o.size == 2:
        word, shift = f"4 * (r % 8) + 2 * {selector} + k / 16", "16 * (r / 8) + k % 16"
    else:
        word, shift = "4 * (r % 8) + r / 8 + 2 * (k / 32)", "k % 32"
    return Instruction(
        name,
        f"""static __device__ __forceinline__ void {name}({o.sum}* d, const unsigned* a, const unsigned* b, unsigned meta) {{
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k{k}.row.col.{o.ptx} "
    "{{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9,%10,%11}}, {{%0,%1,%2,%3}}, %12, {selector};"
    : {ds} : {rs});
}}""",
        f"""static inline void {name}({o.sum}* d, const unsigned* a, const unsigned* b, unsigned meta) {{
  struct In {{ {o.sum} d[4]; unsigned a[4], b[4], meta; }};
  struct Out {{ {o.sum} d[4]; }};
  In in = {{{{d[0], d[1], d[2], d[3]}}, {{a[0], a[1], a[2], a[3]}}, {{b[0], b[1], b[2], b[3]}}, meta}};
  Out out = bw::together<In, Out>("{name}", 32, in, [](const In* in, Out* out) {{
    {wide} A[16][{k // 2}], B[8][{k}];
    int at[16][{k // 2}];
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++)
        for (int e = 0; e < {each}; e++) {{
          const unsigned char* p = (const unsigned char*)&in[l].a[i] + e * {o.size};
          A[l / 4 + 8 * (i % 2)][i / 2 * {o.k // 2} + l % 4 * {each} + e] = ({wide}){o.left};
          p = (const unsigned char*)&in[l].b[i] + e * {o.size};
          B[l / 4][i * {o.k // 2} + l % 4 * {each} + e] = ({wide}){o.right};
        }}
    for (int r = 0; r < 16; r++)
      for (int k = 0; k < {k}; k += 4) {{
        unsigned places = in[{word}].meta >> ({shift});
        if ((places & 3) >= (places >> 2 & 3)) bw::fail("{name}: places of a group that do not ascend");
        at[r][k / 2] = k + (places & 3);
        at[r][k / 2 + 1] = k + (places >> 2 & 3);
      }}
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {{
        int m = l / 4 + 8 * (i / 2), n = l % 4 * 2 + i % 2;
        {wide} s = ({wide})in[l].d[i];
        for (int k = 0; k < {k // 2}; k++) s += A[m][k] * B[n][at[m][k]];
        out[l].d[i] = ({o.sum})s;
      }}
  }});
  for (int i = 0; i < 4; i++) d[i] = out.d[i];
}}""",
        arch=o.arch,
        sass=r"HMMA\.SP" if o.size == 2 else r"IMMA\.SP" if o.sum == "int" else r"[HQ]MMA\.SP",
    )
