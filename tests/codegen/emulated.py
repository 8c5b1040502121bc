"""Kernels for other architectures in one static program, which an emulator runs: many calls, one start."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.codegen.c.toolchain import TOOLCHAINS
from bitwright.codegen.tvm.adapter import build_object, machine
from bitwright.emulation import CPU
from bitwright.ir.target import Target

Array = np.ndarray[Any, Any]
POINTERS = 6
"""Pointers that a kernel takes at most: all of them in registers."""
GUARD = 64


@dataclass(frozen=True)
class Call:
    """Kernel number ``kernel``, its tasks in two ranges, on these arrays; the last one is the output."""

    kernel: int
    tasks: int
    arrays: tuple[Array, ...]
    scratch: int = 0


def need(on: Target) -> None:
    """Skip where the compiler or the emulator is missing."""
    if why := TOOLCHAINS[on.arch].missing():
        pytest.skip(why)


def run(funcs: Sequence[Any], names: Sequence[str], calls: Sequence[Call], on: Target, folder: Path) -> list[Array]:
    """The outputs of all calls; fails if a kernel wrote behind one."""
    chain = TOOLCHAINS[on.arch]
    (folder / "kernels.o").write_bytes(build_object(list(funcs), machine(on.mcpu)))
    table = "\n".join(f"extern void {n}();" for n in names)
    table += f"\nstatic kernel* const kernels[] = {{{', '.join(f'(kernel*){n}' for n in names)}}};\n"
    (folder / "main.c").write_text(_HEAD + table + _MAIN)
    line = [chain.compiler, *chain.options, "-w", "main.c", "kernels.o", "-lm", "-o", "program"]
    subprocess.run(line, cwd=folder, check=True)
    with (folder / "in").open("wb") as file:
        for c in calls:
            assert len(c.arrays) + bool(c.scratch) <= POINTERS
            file.write(struct.pack("<4i", c.kernel, c.tasks, len(c.arrays), c.scratch))
            file.write(struct.pack(f"<{len(c.arrays)}i", *(a.nbytes for a in c.arrays)))
            for a in c.arrays[:-1]:
                file.write(np.ascontiguousarray(a).tobytes())
    command = [str(chain.emulator), *CPU[on.arch], "./program"]
    with (folder / "in").open("rb") as stdin, (folder / "out").open("wb") as stdout:
        subprocess.run(command, cwd=folder, stdin=stdin, stdout=stdout, check=True)
    data = np.frombuffer((folder / "out").read_bytes(), np.uint8)
    results, at = [], 0
    for c in calls:
        out = c.arrays[-1]
        results.append(data[at : at + out.nbytes].view(out.dtype).reshape(out.shape))
        guard = data[at + out.nbytes : at + out.nbytes + GUARD]
        assert np.all(guard == 0xA5), f"kernel {c.kernel} wrote behind its output"
        at += out.nbytes + GUARD
    assert at == data.size
    return results


_HEAD = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef void kernel(int32_t, int32_t, void*, void*, void*, void*, void*, void*);
"""

_MAIN = r"""
static uint8_t* memory(int32_t size) {
  uint8_t* p = aligned_alloc(64, (size + 256) / 64 * 64);
  memset(p, 0xA5, (size + 256) / 64 * 64);
  return p;
}

int main(void) {
  int32_t head[4], sizes[6];
  while (fread(head, sizeof head, 1, stdin) == 1) {
    void* p[6] = {0};
    const int32_t count = head[2], cut = head[1] / 3;
    if (fread(sizes, 4, count, stdin) != count) return 1;
    for (int i = 0; i < count; i++) {
      p[i] = memory(sizes[i]);
      if (i < count - 1 && sizes[i] && fread(p[i], sizes[i], 1, stdin) != 1) return 2;
    }
    void *out = p[count - 1], *scratch = head[3] ? memory(head[3]) : 0;
    if (scratch) p[count] = scratch;
    kernels[head[0]](0, cut, p[0], p[1], p[2], p[3], p[4], p[5]);
    kernels[head[0]](cut, head[1], p[0], p[1], p[2], p[3], p[4], p[5]);
    fwrite(out, sizes[count - 1] + 64, 1, stdout);
    for (int i = 0; i < count; i++) free(p[i]);
    free(scratch);
  }
  return 0;
}
"""
