"""The targets bitwright knows, by name, and the one of this machine."""

from __future__ import annotations

from dataclasses import replace

from bitwright.codegen.devices import library
from bitwright.codegen.targets import arm, c99, nvidia, riscv, x86
from bitwright.codegen.targets.x86_bf16 import AVX512_BF16
from bitwright.ir.errors import InvalidInput, did_you_mean
from bitwright.ir.target import Target

BUILTIN: dict[str, Target] = {t.name: t for t in (AVX512_BF16, x86.AVX512_VNNI, x86.AVX_VNNI, x86.AVX2, x86.PORTABLE)}
"""Machines that programs are loaded on."""
CROSS: dict[str, Target] = {t.name: t for t in (arm.AARCH64, arm.DOTPROD, arm.NEON, riscv.RISCV64_V, riscv.RISCV64)}
"""Machines that programs are compiled for here and loaded on elsewhere, or emulated."""
SOURCES: dict[str, Target] = {c99.C.name: c99.C}
"""What sources are written for."""


GPUS: dict[str, Target] = {t.name: t for t in (nvidia.SM90, nvidia.SM80)}
"""Devices that kernels are compiled for anywhere and launched on by a host's driver, or emulated."""


def names() -> list[str]:
    """What ``--target`` takes."""
    return ["host", *BUILTIN, *CROSS, *GPUS, *SOURCES, *library.names()]


def resolve(target: str | Target, *, calibrate: bool = True) -> Target:
    """A target by name (``host``: this machine; ``*.toml``: a file); raises :class:`InvalidInput`."""
    if isinstance(target, Target):
        return target
    if target == "host":
        return host(calibrate=calibrate)
    if library.is_processor(target):
        from bitwright.codegen.targets.files import load_processor

        return load_processor(target, BUILTIN | CROSS)
    if library.is_device(target):
        return library.find_device(target).target()
    known = BUILTIN | CROSS | GPUS | SOURCES
    if target not in known:
        raise InvalidInput(
            f"unknown target {target!r}{did_you_mean(target, names())}; `bitwright targets` lists them all"
        )
    return known[target]


def host(*, calibrate: bool = True) -> Target:
    """The target that describes this machine: its best instruction-set level, caches, cores and measured speeds.

    ``calibrate``: measure peak speed and bandwidth once (about a second) and keep them in the cache directory.
    """
    from bitwright.codegen.targets.machine import caches, cores, cpu_flags, measured

    flags = cpu_flags()
    base = next(t for t in BUILTIN.values() if {f.replace("avxvnni", "avx_vnni") for f in t.features} <= flags)
    sizes = caches()
    known = {f"l{level}_bytes": size for level, size in sizes.items() if level in (1, 2, 3)}
    target = replace(base, name="host", cores=cores(), **known)  # type: ignore[arg-type]
    return measured(target) if calibrate else target
