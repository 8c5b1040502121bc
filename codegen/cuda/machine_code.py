"""Machine code of kernels: NVRTC makes a cubin of a text, nvdisasm shows it. Neither needs a GPU or a driver."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitwright.codegen.cuda.instructions import prelude
from bitwright.ir.errors import BitwrightError, InvalidInput

_HERE = Path(__file__).parent
_NEEDED = 'compiling for an NVIDIA GPU needs NVRTC: pip install "bitwright[cuda]"'
_FLAGS = ("-std=c++17", "-fmad=false", "-default-device", "--ptxas-options=-v", "-diag-suppress=177")


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel takes: registers a thread, bytes of stack and of spills a thread."""

    registers: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """A cubin for one architecture, its kernels' resources by name, and what the assembler warns of or advises."""

    cubin: bytes
    resources: dict[str, Resources]
    warnings: tuple[str, ...] = ()


def require_compiler() -> None:
    """Raise :class:`InvalidInput` that says what to install where NVRTC or CUDA's headers are missing."""
    _nvrtc()
    _includes()


def compile_cuda(text: str, arch: str) -> Compiled:
    """Compile kernels for ``arch`` (``sm_80``, ``sm_90a``).

    Raises :class:`InvalidInput` without NVRTC, :class:`BitwrightError` with the compiler's messages.
    """
    nvrtc = _nvrtc()
    unit = (_HERE / "device.h").read_text() + prelude(text, emulated=False) + "\n" + text
    options = [f"-arch={arch}", *_FLAGS, *(f"-I{p}" for p in _includes())]
    _, program = nvrtc.nvrtcCreateProgram(unit.encode(), b"kernel.cu", 0, [], [])
    try:
        error = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BitwrightError(f"NVRTC refuses a kernel for {arch}:\n{log[:4000]}")
        size = nvrtc.nvrtcGetCUBINSize(program)[1]
        cubin = b" " * size
        nvrtc.nvrtcGetCUBIN(program, cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(cubin, _resources(log), _warnings(log))


def _text(size_of: Any, get: Any, program: Any) -> str:
    text = b" " * size_of(program)[1]
    get(program, text)
    return str(text, errors="replace").rstrip("\0 \n")


@cache
def _nvrtc() -> Any:
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        raise InvalidInput(_NEEDED)
    from cuda.bindings import nvrtc

    return nvrtc


@cache
def _includes() -> tuple[Path, ...]:
    spec = find_spec("nvidia")
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found = tuple(h.parent for root in roots for h in root.glob("*/include/cuda_fp16.h"))
    if not found:
        raise InvalidInput(_NEEDED)
    return found


_ENTRY = re.compile(
    r"Function properties for (\w+)\n\D*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)


def _resources(log: str) -> dict[str, Resources]:
    return {
        name: Resources(int(registers), int(stack), int(stores), int(loads))
        for name, stack, stores, loads, registers in _ENTRY.findall(log)
    }


def _warnings(log: str) -> tuple[str, ...]:
    r"""Lines in which ptxas warns or advises: wgmma that it serializes, ``setmaxnreg`` that it ignores.

    >>> _warnings("ptxas info    : Used 8 registers\nptxas info    : (C7510) Potential Performance Loss: wgmma ..")
    ('ptxas info    : (C7510) Potential Performance Loss: wgmma ..',)
    """
    told = re.compile(r"ptxas.*(warning|\(C\d+\)|Performance Loss)")
    return tuple(x for x in log.splitlines() if told.search(x))


def sass(cubin: bytes) -> str:
    """The machine code as text. Raises :class:`InvalidInput` without nvdisasm."""
    tool = _nvdisasm()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), file.name], capture_output=True, text=True, check=True).stdout


@cache
def _nvdisasm() -> Path:
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for tool in Path(root).glob("*/bin/nvdisasm"):
            return tool
    raise InvalidInput("showing GPU machine code needs nvdisasm: pip install nvidia-cuda-nvdisasm")
