"""Device functions that kernels call by name: each has a spelling (CUDA C++, PTX) and a meaning (C++ of the emulator).

A kernel's text calls ``bw_*``; :func:`prelude` gives the texts of those it calls. To add an instruction, add an
:class:`Instruction` to a module here and list the module in :data:`MODULES`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module

MODULES = ("warp", "memory", "mma", "mma_sparse", "hopper", "wgmma", "grid", "pull", "halves", "simt")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One device function ``name``.

    ``spelling``: its definition in CUDA C++. ``meaning``: its definition for the emulator, which may use ``bw::`` of
    ``emulator.h``. ``arch``: the lowest compute capability that has it (80, 89, 90; 900 stands for sm_90a only).
    ``sass``: what the machine code shows where it is used, a regular expression; empty: nothing particular.
    """

    name: str
    spelling: str
    meaning: str
    arch: int = 80
    sass: str = ""


@cache
def known() -> dict[str, Instruction]:
    """All instructions by name."""
    found: dict[str, Instruction] = {}
    for module in MODULES:
        for made in import_module(f"{__name__}.{module}").instructions():
            assert made.name not in found, made.name
            found[made.name] = made
    return found


def used(text: str) -> list[Instruction]:
    """The instructions that a kernel's text calls, in a fixed order."""
    named = set(re.findall(r"\bbw_\w+", text))
    if missing := named - set(known()):
        raise KeyError(f"no instruction {', '.join(sorted(missing))}")
    return [known()[name] for name in sorted(named)]


def prelude(text: str, *, emulated: bool) -> str:
    """Definitions of all that ``text`` calls."""
    return "\n".join(i.meaning if emulated else i.spelling for i in used(text))
