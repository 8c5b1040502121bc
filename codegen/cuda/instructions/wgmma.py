"""Products of a warpgroup (128 threads), dense and 2:4: ``wgmma.mma_async`` and ``wgmma.mma_async.sp`` (sm_90a).

``bw_wgmma[_sp][_rs]_{type}_n{N}(d, ..)``: d (64 x N) = [d +] A (64 x k) * B (N x k)^T, 32 bytes of stored A an
instruction. Of lane l of warp w, ``d[i]`` is row 16 w + l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2.
A and B lie in shared memory, K-major, and are named by the halves of a matrix descriptor: the low word is
:data:`LOW` of an address (+ bytes / 16 moves it), the high word :func:`high`. A may come from registers (``_rs``,
in the layout of ``mma.m16n8``). 2:4 (``_sp``): A holds two of four elements, ``e`` their places; see
``emulator/hopper.h`` for which lane holds which row.

Sources, crossed: PTX ISA, "wgmma.mma_async", "Matrix descriptor format", "Sparse matrix storage"; CUTLASS
``cute/arch/mma_sm90_desc.hpp``, ``mma_sm90_gmma{,_sparse}.hpp``, ``cute/atom/mma_traits_sm90_gmma{,_sparse}.hpp``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bitwright.codegen.cuda.instructions import Instruction

LOW = "bw_wgmma_low"
_MODES = {16: 0, 128: 1, 64: 2, 32: 3}


@dataclass(frozen=True, slots=True)
class Operands:
    """Number formats of A and B: PTX's names, bytes of an element, how the emulator reads one, the machine code."""

    name: str
    ptx: str
    size: int
    read_a: str
    read_b: str
    floating: bool
    sass: str
    trailing: int
    """Immediates after scale-d: signs of A and B, and for 16 bits their transposition."""


_HALF, _BF16 = "bw_half_to_float(*(const uint16_t*)p)", "bw_bits_float((uint32_t)*(const uint16_t*)p << 16)"
_S8, _U8, _E4M3 = "(int)*(const signed char*)p", "(int)*p", "bw_e4m3_to_float(*p)"
OPERANDS = (
    Operands("f16", "f32.f16.f16", 2, _HALF, _HALF, True, "HGMMA", 4),
    Operands("bf16", "f32.bf16.bf16", 2, _BF16, _BF16, True, "HGMMA", 4),
    Operands("s8s8", "s32.s8.s8", 1, _S8, _S8, False, "IGMMA", 0),
    Operands("s8u8", "s32.s8.u8", 1, _S8, _U8, False, "IGMMA", 0),
    Operands("u8s8", "s32.u8.s8", 1, _U8, _S8, False, "IGMMA", 0),
    Operands("u8u8", "s32.u8.u8", 1, _U8, _U8, False, "IGMMA", 0),
    Operands("e4m3", "f32.e4m3.e4m3", 1, _E4M3, _E4M3, True, "QGMMA", 2),
)


def widths(floating: bool) -> tuple[int, ...]:
    """Columns N that an instruction may have."""
    return tuple(range(8, 257, 8)) if floating else (8, 16, 24, *range(32, 257, 16))


def high(stride: int, swizzle: int) -> int:
    """The descriptor's high word: bytes between groups of 8 rows; bytes of a row's swizzle (16: none, 32, 64, 128).

    >>> hex(high(1024, 128))
    '0x40000040'
    """
    return stride >> 4 | _MODES[swizzle] << 30


def instructions() -> Iterator[Instruction]:
    """The products, ``bw_wgmma_low(shared)``, ``bw_wgmma_{fence,commit}()``, ``bw_wgmma_wait{0,1}()`` and
    ``bw_wgmma_keep_{f32,s32}_{count}(d)``: the compiler moves no use of so many accumulators across it."""
    yield Instruction(
        LOW,
        f"static __device__ __forceinline__ unsigned {LOW}(const void* p) "
        "{ return ((unsigned)__cvta_generic_to_shared(p) & 0x3ffff) >> 4 | 1u << 16; }",
        f"static inline unsigned {LOW}(const void* p) {{ return (bw::shared_address(p) & 0x3ffff) >> 4 | 1u << 16; }}",
        arch=900,
    )
    for name, ptx, meaning in (
        ("fence", "fence.sync.aligned", "bw::wgmma_fence();"),
        ("commit", "commit_group.sync.aligned", "bw::wgmma_commit();"),
        ("wait0", "wait_group.sync.aligned 0", "bw::wgmma_wait(0);"),
        ("wait1", "wait_group.sync.aligned 1", "bw::wgmma_wait(1);"),
    ):
        text = f'void bw_wgmma_{name}() {{ asm volatile("wgmma.{ptx};" ::: "memory"); }}'
        yield Instruction(
            f"bw_wgmma_{name}",
            f"static __device__ __forceinline__ {text}",
            f"static inline void bw_wgmma_{name}() {{ {meaning} }}",
            arch=900,
        )
    for kind, c, code in (("f32", "float", "f"), ("s32", "int", "r")):
        for count in range(4, 129, 4):
            text = " ".join(f'asm volatile("" : "+{code}"(d[{i}]) :: "memory");' for i in range(count))
            name = f"bw_wgmma_keep_{kind}_{count}"
            yield Instruction(
                name,
                f"static __device__ __forceinline__ void {name}({c}* d) {{ {text} }}",
                f"static inline void {name}({c}* d) {{}}",
                arch=900,
            )
    for o in OPERANDS:
        for n in widths(o.floating):
            yield _product(o, n)
            yield _product(o, n, registers=True)
            for selector in (0, 1) if o.size == 2 else (0,):
                yield _product(o, n, selector=selector)
                yield _product(o, n, selector=selector, registers=True)


def name_of(kind: str, n: int, selector: int | None = None, registers: bool = False) -> str:
    """The product's name.

    >>> name_of("f16", 64), name_of("bf16", 8, selector=1), name_of("s8u8", 256, selector=0, registers=True)
    ('bw_wgmma_f16_n64', 'bw_wgmma_sp1_bf16_n8', 'bw_wgmma_sp0_rs_s8u8_n256')
    """
    sparse = "" if selector is None else f"sp{selector}_"
    return f"bw_wgmma_{sparse}{'rs_' if registers else ''}{kind}_n{n}"


def _product(o: Operands, n: int, selector: int | None = None, registers: bool = False) -> Instruction:
    name, sparse, count = name_of(o.name, n, selector, registers), selector is not None, n // 2
    c, code = ("float", "f") if o.floating else ("int", "r")
    ds = ", ".join(f'"+{code}"(d[{i}])' for i in range(count))
    first = "const unsigned* a" if registers else "unsigned a, unsigned a_high"
    takes = f"{c}* d, {first}, unsigned b, unsigned b_high, {'unsigned e, ' if sparse else ''}int add"
    inputs = [f'"r"(a[{i}])' for i in range(4)] if registers else ['"l"((unsigned long long)a_high << 32 | a)']
    inputs += ['"l"((unsigned long long)b_high << 32 | b)', *(['"r"(e)'] if sparse else []), '"r"(add)']
    at = count
    left = f"{{{', '.join(f'%{at + i}' for i in range(4))}}}" if registers else f"%{at}"
    at += 4 if registers else 1
    right, at = f"%{at}", at + 1
    meta = ""
    if sparse:
        meta, at = f", %{at}, {selector}", at + 1
    fixed = (["1", "1"] if o.trailing else []) + (["0"] * (1 if registers else 2) if o.trailing == 4 else [])
    k = (64 if sparse else 32) // o.size
    word = f"wgmma.mma_async{'.sp' if sparse else ''}.sync.aligned.m64n{n}k{k}.{o.ptx}"
    lanes = ", ".join(f"%{i}" for i in range(count))
    text = (
        f"{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{at}, 0;\\n{word} {{{lanes}}}, {left}, {right}{meta}, p"
        f"{''.join(', ' + x for x in fixed)};\\n}}"
    )
    wide = "double" if o.floating else "int"
    where = "0, (uint64_t)b_high << 32 | b" if registers else "(uint64_t)a_high << 32 | a, (uint64_t)b_high << 32 | b"
    return Instruction(
        name,
        f'static __device__ __forceinline__ void {name}({takes}) {{\n  asm volatile("{text}" : {ds} : {", ".join(inputs)});\n}}',
        f"""static inline void {name}({takes}) {{
  bw::wgmma_issue("{name}", [](bw::Product& p) {{
    bw::multiply<{wide}, {c}, {o.size}>(p, {int(registers)}, {int(sparse)}, {selector or 0},
      [](const unsigned char* p) {{ return ({wide}){o.read_a}; }}, [](const unsigned char* p) {{ return ({wide}){o.read_b}; }});
  }}, {n}, d, {where}, add, {"a" if registers else "nullptr"}, {"&e" if sparse else "nullptr"});
}}""",
        arch=900,
        sass=rf"{o.sass}\.SP\.64x{n}x" if sparse else rf"{o.sass}\.64x{n}x",
    )
