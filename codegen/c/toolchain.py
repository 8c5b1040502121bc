"""C compilers for the sources: finding them, sizes of what they make, running a self-test under an emulator."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bitwright.ir.errors import BitwrightError, InvalidInput

TIMEOUT = 600


@dataclass(frozen=True, slots=True)
class Toolchain:
    """``prefix`` of the compiler's programs, its options, and the emulator that runs what it makes ("" if none is
    needed, None if it cannot run here)."""

    name: str
    prefix: str
    options: tuple[str, ...]
    emulator: str | None
    package: str

    @property
    def compiler(self) -> str:
        return f"{self.prefix}gcc"

    def missing(self) -> str:
        """What to install before this can be used; the empty string when nothing is missing."""
        if shutil.which(self.compiler) is None:
            return f"{self.compiler} is not installed: apt-get install {self.package}"
        if self.emulator and shutil.which(self.emulator) is None:
            return f"{self.emulator} is not installed: apt-get install qemu-user"
        return ""


def _arm(core: str) -> Toolchain:
    return Toolchain(core, "arm-none-eabi-", ("-Os", "-mthumb", f"-mcpu={core}"), None, "gcc-arm-none-eabi")


TOOLCHAINS: dict[str, Toolchain] = {
    t.name: t
    for t in (
        Toolchain("host", "", ("-O2",), "", "gcc"),
        Toolchain("aarch64", "aarch64-linux-gnu-", ("-O2", "-static"), "qemu-aarch64", "gcc-aarch64-linux-gnu"),
        Toolchain("riscv64", "riscv64-linux-gnu-", ("-O2", "-static"), "qemu-riscv64", "gcc-riscv64-linux-gnu"),
        *(_arm(c) for c in ("cortex-m0", "cortex-m4", "cortex-m7", "cortex-m55")),
    )
}
"""Compilers by the name of what they compile for."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of code, of constant tables and of static RAM."""

    code: int
    tables: int
    ram: int

    @property
    def flash(self) -> int:
        return self.code + self.tables


def toolchain(name: str) -> Toolchain:
    """By name; raises :class:`InvalidInput` for an unknown one."""
    if name not in TOOLCHAINS:
        raise InvalidInput(f"no C compiler is known for {name!r}; there are {', '.join(TOOLCHAINS)}")
    return TOOLCHAINS[name]


def make(folder: Path, chain: Toolchain, goal: str) -> None:
    """``make goal`` in a folder of sources, with this compiler and no leftovers of another; raises
    :class:`BitwrightError` with what it printed, or what to install."""
    if why := chain.missing():
        raise BitwrightError(why)
    for target in ("clean", goal):
        settings = [f"CC={chain.compiler}", f"AR={chain.prefix}ar", f"CFLAGS={' '.join(chain.options)}"]
        try:
            done = subprocess.run(
                ["make", "-s", target, *settings], cwd=folder, capture_output=True, text=True, timeout=TIMEOUT
            )
        except FileNotFoundError as e:
            raise BitwrightError("make is not installed: apt-get install make") from e
        if done.returncode:
            raise BitwrightError(f"{chain.compiler} cannot compile {folder}:\n{(done.stderr or done.stdout)[-2000:]}")


def sizes(folder: Path, chain: Toolchain) -> Sizes:
    """Compile the sources in ``folder`` and measure code, tables and static RAM."""
    make(folder, chain, "libmodel.a")
    done = subprocess.run(
        [f"{chain.prefix}size", "model.o", "weights.o"], cwd=folder, capture_output=True, text=True, check=True
    )
    (model, weights) = [[int(word) for word in line.split()[:3]] for line in done.stdout.splitlines()[1:]]
    return Sizes(model[0], weights[0] + weights[1] + model[1], model[2] + weights[2])


def run_self_test(folder: Path, chain: Toolchain) -> int:
    """Compile and run the self-test, emulated where needed: the number of wrong elements."""
    if chain.emulator is None:
        raise InvalidInput(f"code for {chain.name} cannot be run here")
    make(folder, chain, "selftest")
    command = [chain.emulator, "./selftest"] if chain.emulator else ["./selftest"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as e:
        raise BitwrightError(f"the self-test in {folder} did not end within {TIMEOUT} s") from e
    words = done.stdout.split()
    if len(words) != 2 or words[1] != "wrong":
        raise BitwrightError(f"the self-test in {folder} failed with exit code {done.returncode}: {done.stderr[-500:]}")
    return int(words[0])
