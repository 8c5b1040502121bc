"""Exchange between threads: shuffles, barriers of parts of a block."""

from __future__ import annotations

from collections.abc import Iterator

from bitwright.codegen.cuda.instructions import Instruction

_SHUFFLES = {"xor": "l ^ k", "down": "l + k < 32 ? l + k : l", "up": "l >= k ? l - k : l", "idx": "k & 31"}
_KINDS = {"float": "f32", "int": "s32", "unsigned": "u32"}


def instructions() -> Iterator[Instruction]:
    """``bw_shfl_{xor,down,up,idx}_{f32,s32,u32}(value, lane or offset)``; ``bw_syncwarp``; ``bw_barrier(id, threads)``."""
    for way, source in _SHUFFLES.items():
        for kind, short in _KINDS.items():
            name, call = f"bw_shfl_{way}_{short}", "__shfl_sync" if way == "idx" else f"__shfl_{way}_sync"
            yield Instruction(
                name,
                f"static __device__ __forceinline__ {kind} {name}({kind} v, int k) {{ return {call}(0xffffffffu, v, k); }}",
                f"""static inline {kind} {name}({kind} v, int k) {{
  struct In {{ {kind} v; int k; }};
  return bw::together<In, {kind}>("{name}", 32, In{{v, k}}, [](const In* in, {kind}* out) {{
    for (int l = 0; l < 32; l++) {{ int k = in[l].k; (void)k; out[l] = in[{source}].v; }}
  }});
}}""",
                sass=r"SHFL\.",
            )
    yield Instruction(
        "bw_syncwarp",
        "static __device__ __forceinline__ void bw_syncwarp() { __syncwarp(); }",
        """static inline void bw_syncwarp() {
  bw::together<int, int>("syncwarp", 32, 0, [](const int*, int* o) { for (int l = 0; l < 32; l++) o[l] = 0; });
}""",
    )
    yield Instruction(
        "bw_barrier",
        'static __device__ __forceinline__ void bw_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }',
        "static inline void bw_barrier(int id, int threads) { bw::barrier(id, threads); }",
    )
