"""Loads of memory into registers that may find nothing: what is not there reads as zero."""

from __future__ import annotations

from collections.abc import Iterator

from bitwright.codegen.cuda.instructions import Instruction

_DEVICE = "static __device__ __forceinline__ void"


def instructions() -> Iterator[Instruction]:
    """``bw_pull{4,8,16}(registers, from, there)``: so many bytes, aligned to their number, where ``there`` is true.

    ``bw_gather{4,8,16}(registers, from, valid)``: the first ``valid`` bytes (any number) of any address, byte by byte.
    """
    for size in (4, 8, 16):
        words = size // 4
        kind = {4: "unsigned", 8: "uint2", 16: "uint4"}[size]
        fields = [""] if words == 1 else [f".{f}" for f in "xyzw"[:words]]
        zeros = " ".join(f"r[{i}] = 0;" for i in range(words))
        plain = " ".join(f"r[{i}] = v{f};" for i, f in enumerate(fields))
        meaning = f"""{{
  if (there && (uintptr_t)from % {size}) bw::fail("a load of {size} bytes of an unaligned address");
  memset(r, 0, {size});
  if (there) memcpy(r, from, {size});
}}"""
        name = f"bw_pull{size}(unsigned* r, const void* from, bool there)"
        yield Instruction(
            f"bw_pull{size}",
            f"{_DEVICE} {name} {{ {zeros} if (there) {{ {kind} v = *(const {kind}*)from; {plain} }} }}",
            f"static inline void {name} {meaning}",
            sass=r"LDG\.E" + {4: r"\b", 8: r"\.64", 16: r"\.128"}[size],
        )
        name = f"bw_gather{size}(unsigned* r, const void* from, int valid)"
        body = f"""{{
  {zeros}
  for (int i = 0; i < {size}; i++)
    if (i < valid) r[i / 4] |= (unsigned)((const unsigned char*)from)[i] << 8 * (i % 4);
}}"""
        unrolled = body.replace("for (", '_Pragma("unroll") for (')
        yield Instruction(
            f"bw_gather{size}",
            f"{_DEVICE} {name} {unrolled}",
            f"static inline void {name} {body}",
        )
