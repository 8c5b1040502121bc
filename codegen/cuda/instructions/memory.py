"""Moving bytes: asynchronous copies to shared memory (Ampere's ``cp.async``), 16-byte moves, ``ldmatrix``.

In the emulator an asynchronous copy happens in the wait that asks for it, not before.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitwright.codegen.cuda.instructions import Instruction

_SHARED = "(unsigned)__cvta_generic_to_shared"


def instructions() -> Iterator[Instruction]:
    """``bw_copy{4,8,16}(to, from)``: a plain move of so many bytes, aligned to their number.

    ``bw_cp_async{4,8,16}(shared, global, valid)``: of the bytes, the first ``valid`` are copied, the rest become zero;
    ``bw_cp_async{4,8,16}_or(shared, global, other, ok)``: from another place where not ``ok``;
    ``bw_cp_async_commit()``, ``bw_cp_async_wait<N>()`` as ``bw_cp_async_wait{0..6}``: until at most N groups are under way.
    ``bw_ldmatrix{1,2,4}[_trans](registers, row)``: 8x8 matrices of 16-bit elements (PTX ISA, "ldmatrix").
    """
    for size, kind in ((4, "unsigned"), (8, "uint2"), (16, "uint4")):
        text = f"void bw_copy{size}(void* to, const void* from) {{ *({kind}*)to = *(const {kind}*)from; }}"
        aligned = f'if (((uintptr_t)to | (uintptr_t)from) % {size}) bw::fail("bw_copy{size} of an unaligned address");'
        yield Instruction(
            f"bw_copy{size}",
            f"static __device__ __forceinline__ {text}",
            f"static inline void bw_copy{size}(void* to, const void* from) {{ {aligned} memcpy(to, from, {size}); }}",
        )
        mode = "cg" if size == 16 else "ca"
        yield Instruction(
            f"bw_cp_async{size}",
            f"""static __device__ __forceinline__ void bw_cp_async{size}(void* to, const void* from, int valid) {{
  asm volatile("cp.async.{mode}.shared.global [%0], [%1], {size}, %2;" :: "r"({_SHARED}(to)), "l"(from), "r"(valid) : "memory");
}}""",
            f"""static inline void bw_cp_async{size}(void* to, const void* from, int valid) {{
  if (((uintptr_t)to | (uintptr_t)(valid ? from : to)) % {size}) bw::fail("cp.async of an unaligned address");
  bw::shared_address(to);
  if (valid) (void)*(volatile const char*)from, (void)*((volatile const char*)from + valid - 1);
  bw::self->pending.push_back([=] {{ memset(to, 0, {size}); memcpy(to, from, valid); bw::staged(to, {size}); }});
}}""",
            sass=r"LDGSTS\.",
        )
        yield Instruction(
            f"bw_cp_async{size}_or",
            f"""static __device__ __forceinline__ void bw_cp_async{size}_or(void* to, const void* from, const void* other, bool ok) {{
  asm volatile("cp.async.{mode}.shared.global [%0], [%1], {size};" :: "r"({_SHARED}(to)), "l"(ok ? from : other) : "memory");
}}""",
            f"""static inline void bw_cp_async{size}_or(void* to, const void* from, const void* other, bool ok) {{
  if (!ok) from = other;
  if (((uintptr_t)to | (uintptr_t)from) % {size}) bw::fail("cp.async of an unaligned address");
  bw::shared_address(to);
  (void)*(volatile const char*)from, (void)*((volatile const char*)from + {size} - 1);
  bw::self->pending.push_back([=] {{ memcpy(to, from, {size}); bw::staged(to, {size}); }});
}}""",
            sass=r"LDGSTS\.",
        )
    yield Instruction(
        "bw_cp_async_commit",
        'static __device__ __forceinline__ void bw_cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }',
        """static inline void bw_cp_async_commit() {
  bw::self->copies.push_back(std::move(bw::self->pending));
  bw::self->pending.clear();
}""",
    )
    for left in range(7):
        yield Instruction(
            f"bw_cp_async_wait{left}",
            f'static __device__ __forceinline__ void bw_cp_async_wait{left}() {{ asm volatile("cp.async.wait_group {left};" ::: "memory"); }}',
            f"""static inline void bw_cp_async_wait{left}() {{
  auto& groups = bw::self->copies;
  while (groups.size() > {left}) {{ for (auto& copy : groups.front()) copy(); groups.erase(groups.begin()); }}
}}""",
        )
    for count in (1, 2, 4):
        for trans in ("", "_trans"):
            yield _ldmatrix(count, trans)


def _ldmatrix(count: int, trans: str) -> Instruction:
    name = f"bw_ldmatrix{count}{trans}"
    outs = ", ".join(f"%{i}" for i in range(count))
    regs = ", ".join(f'"=r"(r[{i}])' for i in range(count))
    word = ".trans" if trans else ""
    pick = "row[2 * (l % 4) + h][l / 4]" if trans else "row[l / 4][2 * (l % 4) + h]"
    return Instruction(
        name,
        f"""static __device__ __forceinline__ void {name}(unsigned* r, const void* row) {{
  asm volatile("ldmatrix.sync.aligned.m8n8.x{count}{word}.shared.b16 {{{outs}}}, [%{count}];" : {regs} : "r"({_SHARED}(row)) : "memory");
}}""",
        f"""static inline void {name}(unsigned* r, const void* address) {{
  struct Out {{ unsigned r[{count}]; }};
  if (bw::self->id.x % 32 < {8 * count} && bw::shared_address(address) % 16) bw::fail("ldmatrix of an unaligned row");
  Out out = bw::together<const void*, Out>("{name}", 32, address, [](const void* const* in, Out* out) {{
    for (int m = 0; m < {count}; m++) {{
      const unsigned short* row[8];
      for (int i = 0; i < 8; i++) row[i] = (const unsigned short*)in[8 * m + i];
      for (int l = 0; l < 32; l++) {{
        unsigned w = 0;
        for (int h = 0; h < 2; h++) w |= (unsigned){pick} << 16 * h;
        out[l].r[m] = w;
      }}
    }}
  }});
  for (int m = 0; m < {count}; m++) r[m] = out.r[m];
}}""",
        sass=r"LDSM\.",
    )
