"""Blocks of one launch with each other: a fence, counters in memory, reads of what other blocks wrote."""

from __future__ import annotations

from collections.abc import Iterator

from bitwright.codegen.cuda.instructions import Instruction


def instructions() -> Iterator[Instruction]:
    """``bw_fence()``: what this thread wrote is seen by whoever sees what it writes later. ``bw_count(p)``: adds 1 to
    an int of memory and returns what it was. ``bw_fresh16(to, from)``: 16 bytes of memory past the first-level cache.
    ``bw_opaque(n)``: n, which the compiler does not know (a loop up to it is not unrolled)."""
    yield Instruction(
        "bw_fence",
        "static __device__ __forceinline__ void bw_fence() { __threadfence(); }",
        "static inline void bw_fence() {}",
        sass=r"MEMBAR",
    )
    yield Instruction(
        "bw_count",
        "static __device__ __forceinline__ int bw_count(int* p) { return atomicAdd(p, 1); }",
        "static inline int bw_count(int* p) { return (*p)++; }",
        sass=r"ATOM",
    )
    yield Instruction(
        "bw_fresh16",
        """static __device__ __forceinline__ void bw_fresh16(void* to, const void* from) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
  *(uint4*)to = v;
}""",
        """static inline void bw_fresh16(void* to, const void* from) {
  if (((uintptr_t)to | (uintptr_t)from) % 16) bw::fail("bw_fresh16 of an unaligned address");
  memcpy(to, from, 16);
}""",
        sass=r"LDG\.E\.128\.STRONG",
    )
    yield Instruction(
        "bw_opaque",
        """static __device__ __forceinline__ int bw_opaque(int n) {
  int blocks;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
  return blocks == 0 ? 0 : n;
}""",
        "static inline int bw_opaque(int n) { return n; }",
    )
