"""Hopper's asynchronous copies and barriers: mbarriers, bulk copies, proxy fences, registers moved between warpgroups.

Sources: PTX ISA, "Parallel synchronization: mbarrier", "cp.async.bulk", "membar/fence", "setmaxnreg"; CUTLASS
``include/cutlass/arch/barrier.h``. In the emulator a bulk copy arrives at a random moment, at the latest when nothing
else can run, and what threads write to shared memory reaches wgmma only after their own ``bw_fence_proxy``.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitwright.codegen.cuda.instructions import Instruction

_DEVICE = "static __device__ __forceinline__ void"
_HOST = "static inline void"
_SHARED = '"r"((unsigned)__cvta_generic_to_shared({}))'


def instructions() -> Iterator[Instruction]:
    """``bw_mbarrier_init(barrier, count)``, ``_ready()`` (after all init, before a block barrier), ``_arrive(barrier)``,
    ``_expect(barrier, bytes)`` (arrives, too), ``_wait(barrier, parity)`` until the phase of this parity is complete;

    ``bw_bulk_load(shared, global, bytes, barrier)``: 16-byte aligned, multiples of 16; completes ``bytes`` at it;
    ``bw_bulk_multicast(.., mask)``: the same to the same places of the cluster's blocks in the mask, and their barriers;
    ``bw_mbarrier_arrive_at(barrier, rank)``: at the same place of a block of the cluster; ``bw_cluster_sync()``;
    ``bw_fence_proxy()``: what this thread wrote by ``cp.async`` (and waited for) or ``bw_stage16`` is seen by wgmma;
    ``bw_stage16(shared, from)``: 16 bytes to shared memory for wgmma; ``bw_setmaxnreg_{inc,dec}_N()``.
    """
    yield _plain(
        "bw_mbarrier_init", "void* b, int count", '"mbarrier.init.shared::cta.b64 [%0], %1;"',
        f'{_SHARED.format("b")}, "r"(count)', "bw::mbarrier_init(b, count);", r"SYNCS\.EXCH",
    )  # fmt: skip
    yield _plain("bw_mbarrier_ready", "", '"fence.mbarrier_init.release.cluster;"', "", "")
    yield _plain(
        "bw_mbarrier_arrive", "void* b", '"mbarrier.arrive.shared::cta.b64 _, [%0];"',
        _SHARED.format("b"), "bw::mbarrier_arrive(b, 0);", r"SYNCS\.ARRIVE",
    )  # fmt: skip
    yield _plain(
        "bw_mbarrier_expect", "void* b, int bytes", '"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"',
        f'{_SHARED.format("b")}, "r"(bytes)', "bw::mbarrier_arrive(b, bytes);", r"SYNCS\.ARRIVE\.TRANS64",
    )  # fmt: skip
    wait = (
        r'"{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra READY;\nbra AGAIN;\n'
        r'READY:\n}"'
    )
    yield _plain(
        "bw_mbarrier_wait", "void* b, int parity", wait, f'{_SHARED.format("b")}, "r"(parity)',
        "bw::mbarrier_wait(b, parity);", r"SYNCS\.PHASECHK",
    )  # fmt: skip
    yield _plain(
        "bw_bulk_load", "void* to, const void* from, int bytes, void* b",
        '"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"',
        f'{_SHARED.format("to")}, "l"(__cvta_generic_to_global(from)), "r"(bytes), {_SHARED.format("b")}',
        "bw::bulk_load(to, from, bytes, b, 1u << bw::here->rank);", r"UBLKCP",
    )  # fmt: skip
    yield _plain(
        "bw_bulk_multicast", "void* to, const void* from, int bytes, void* b, int mask",
        '"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"',
        f'{_SHARED.format("to")}, "l"(__cvta_generic_to_global(from)), "r"(bytes), {_SHARED.format("b")}, '
        '"h"((unsigned short)mask)',
        "bw::bulk_load(to, from, bytes, b, mask);", r"UBLKCP",
    )  # fmt: skip
    yield _plain(
        "bw_mbarrier_arrive_at", "void* b, int rank",
        r'"{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [at];\n}"',
        f'{_SHARED.format("b")}, "r"(rank)', "bw::mbarrier_arrive(bw::mapped(b, rank), 0);", r"SYNCS\.ARRIVE",
    )  # fmt: skip
    yield _plain(
        "bw_cluster_sync", "",
        r'"barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"', "", "bw::cluster_sync();",
        "UCGABAR",
    )  # fmt: skip
    yield _plain(
        "bw_fence_proxy", "", '"fence.proxy.async.shared::cta;"', "", "bw::fence_proxy();", r"FENCE\.VIEW\.ASYNC"
    )
    yield Instruction(
        "bw_stage16",
        f"{_DEVICE} bw_stage16(void* to, const void* from) {{ *(uint4*)to = *(const uint4*)from; }}",
        f"""{_HOST} bw_stage16(void* to, const void* from) {{
  if (((uintptr_t)to | (uintptr_t)from) % 16) bw::fail("bw_stage16 of an unaligned address");
  memcpy(to, from, 16);
  bw::staged(to, 16);
}}""",
        arch=90,
        sass=r"STS\.128",
    )
    for way in ("inc", "dec"):
        for count in range(24, 257, 8):
            yield Instruction(
                f"bw_setmaxnreg_{way}_{count}",
                f'{_DEVICE} bw_setmaxnreg_{way}_{count}() {{ asm volatile("setmaxnreg.{way}.sync.aligned.u32 {count};"); }}',
                f"{_HOST} bw_setmaxnreg_{way}_{count}() {{}}",
                arch=900,
                sass="USETMAXREG",
            )


def _plain(name: str, takes: str, text: str, operands: str, meaning: str, sass: str = "") -> Instruction:
    """One PTX instruction without results."""
    return Instruction(
        name,
        f'{_DEVICE} {name}({takes}) {{ asm volatile({text} :: {operands} : "memory"); }}',
        f"{_HOST} {name}({takes}) {{ {meaning} }}",
        arch=90,
        sass=sass,
    )
