"""Programs for other architectures, run by QEMU's user-mode emulation: the artifact's own library and weights.

Those for GPUs run in the emulator of ``codegen/cuda``.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path
from typing import Any

from bitwright.codegen.c.toolchain import TIMEOUT, TOOLCHAINS, Toolchain
from bitwright.gpu_emulation import EmulatedDriver
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.runtime.artifact import Contents, read
from bitwright.runtime.cuda import CudaProgram
from bitwright.runtime.manifest import TensorSpec
from bitwright.runtime.native import Elsewhere
from bitwright.runtime.program import Program

CPU = {"aarch64": ("-cpu", "max"), "riscv64": ("-cpu", "rv64,v=true,vlen=128,vext_spec=v1.0")}
"""The processor that QEMU emulates, by architecture: one that has every feature of the targets."""


def emulate(program: Program | str | Path) -> Program:
    """A program for another architecture that can be called and traced here; slowly, and its times mean nothing.

    ``program``: a compiled one, or the path of a ``.bw`` file. Raises :class:`InvalidInput` for one that needs no
    emulator or has none, and :class:`BitwrightError` that says what to install where a tool is missing.
    """
    contents = program.contents if isinstance(program, Program) else read(program)
    if contents.manifest.device:
        return CudaProgram(contents, EmulatedDriver())
    return Program(contents, threads=1, library=Emulated(contents))


def emulator_of(arch: str) -> Toolchain:
    """Compiler and emulator of an architecture; raises :class:`InvalidInput` for one that has none."""
    if arch not in CPU:
        raise InvalidInput(f"programs for {arch or 'this machine'} are not emulated, those for {', '.join(CPU)} are")
    return TOOLCHAINS[arch]


class Emulated(Elsewhere):
    """A program's library behind an emulator: every call starts it and passes inputs and outputs as files."""

    def __init__(self, contents: Contents) -> None:
        super().__init__(contents.weights, contents.manifest)
        chain = emulator_of(self.manifest.arch)
        if why := chain.missing():
            raise BitwrightError(f"emulating {chain.name}: {why}")
        self.folder = Path(tempfile.mkdtemp(prefix="bitwright-emulated-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        (self.folder / "program.so").write_bytes(contents.library)
        contents.weights.tofile(self.folder / "weights")
        (self.folder / "driver.c").write_text(_DRIVER)
        _checked([chain.compiler, "-O1", "driver.c", "-ldl", "-o", "driver"], self.folder)
        libc = _checked([chain.compiler, "-print-file-name=libc.so.6"], self.folder).strip()
        self.command = [str(chain.emulator), *CPU[chain.name], "-L", str(Path(libc).resolve().parents[1]), "./driver"]

    def run(self, *arguments: Any) -> int:
        """``bw_run`` of the program; the number of threads is ignored."""
        inputs, outputs, _, arena, _, _, rows = arguments
        return self._call(inputs, outputs, arena, int(rows), -1)

    def trace(self, *arguments: Any) -> int:
        """``bw_trace``: up to one step, the arena comes back as well."""
        inputs, outputs, _, arena, _, rows, stop = arguments
        return self._call(inputs, outputs, arena, int(rows), int(stop))

    def profile(self, *_: Any) -> int:
        """Raises :class:`InvalidInput`: the emulator's times are not those of any machine."""
        raise InvalidInput("an emulated program cannot be timed; its report holds predicted times")

    def _call(self, inputs: Any, outputs: Any, arena: int, rows: int, stop: int) -> int:
        m = self.manifest
        ins, outs = ([(n, _nbytes(t, rows)) for n, t in enumerate(ports)] for ports in (m.inputs, m.outputs))
        for n, size in ins:
            (self.folder / f"in{n}").write_bytes(ctypes.string_at(inputs[n], size))
        sizes = [m.weights_bytes, m.arena_bytes, m.scratch_bytes, rows, stop, len(ins), len(outs)]
        words = [*sizes, *(size for _, size in ins), *(size for _, size in outs)]
        code = int(_checked([*self.command, *map(str, words)], self.folder))
        for n, size in outs:
            ctypes.memmove(outputs[n], (self.folder / f"out{n}").read_bytes(), size)
        if stop >= 0:
            ctypes.memmove(arena, (self.folder / "arena").read_bytes(), m.arena_bytes)
        return code


def _nbytes(t: TensorSpec, rows: int) -> int:
    if t.factor:
        return t.row_bytes * rows
    size = t.itemsize
    for d in t.shape:
        size *= int(d)
    return size


def _checked(command: list[str], folder: Path) -> str:
    """What the command prints; raises :class:`BitwrightError` with its complaint."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise BitwrightError(f"{command[0]} did not end within {TIMEOUT} s") from error
    if done.returncode:
        raise BitwrightError(f"{command[0]} failed with exit code {done.returncode}: {done.stderr[-1000:]}")
    return done.stdout


_DRIVER = r"""
#include <dlfcn.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef int (*trace_fn)(void**, void**, const uint8_t*, uint8_t*, uint8_t*, int64_t, int);

static void fail(const char* what) {
  fprintf(stderr, "%s\n", what);
  exit(1);
}

/* Memory at a multiple of 64 bytes that kernels may read a little beyond. */
static uint8_t* memory(size_t size) {
  uint8_t* p = aligned_alloc(64, (size + 4096 + 63) / 64 * 64);
  if (!p) fail("out of memory");
  return p;
}

static void move(const char* stem, int number, void* data, size_t size, int out) {
  char name[64];
  snprintf(name, sizeof name, number < 0 ? "%s" : "%s%d", stem, number);
  FILE* f = fopen(name, out ? "wb" : "rb");
  if (!f || (out ? fwrite(data, 1, size, f) : fread(data, 1, size, f)) != size || fclose(f)) fail(name);
}

int main(int argc, char** argv) {
  long long* n = calloc(argc, sizeof *n);
  void **ins = calloc(argc, sizeof *ins), **outs = calloc(argc, sizeof *outs);
  if (argc < 8 || !n || !ins || !outs) fail("wrong number of arguments, or out of memory");
  for (int i = 1; i < argc; i++) n[i - 1] = atoll(argv[i]);
  const int inputs = (int)n[5], outputs = (int)n[6], stop = (int)n[4];
  uint8_t *weights = memory(n[0]), *arena = memory(n[1]), *scratch = memory(n[2]);
  move("weights", -1, weights, n[0], 0);
  for (int i = 0; i < inputs; i++) move("in", i, ins[i] = memory(n[7 + i]), n[7 + i], 0);
  for (int i = 0; i < outputs; i++) outs[i] = memory(n[7 + inputs + i]);
  void* library = dlopen("./program.so", RTLD_NOW);
  if (!library) fail(dlerror());
  trace_fn trace = (trace_fn)dlsym(library, "bw_trace");
  if (!trace) fail(dlerror());
  const int code = trace(ins, outs, weights, arena, scratch, n[3], stop < 0 ? INT_MAX : stop);
  for (int i = 0; i < outputs; i++) move("out", i, outs[i], n[7 + inputs + i], 1);
  if (stop >= 0) move("arena", -1, arena, n[1], 1);
  printf("%d\n", code);
  return 0;
}
"""
