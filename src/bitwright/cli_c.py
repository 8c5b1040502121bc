"""``bitwright compile --target c``: C sources instead of a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bitwright.ir.errors import InvalidInput

if TYPE_CHECKING:
    from bitwright.c_program import CProgram
    from bitwright.ir.graph import Graph

Writer = Callable[["Graph", str, dict[str, Any]], "CProgram"]


def wanted(target: str, flash: str, ram: str, cc: str) -> Writer | None:
    """What compiles to C when the target asks for it; None otherwise. Raises :class:`InvalidInput` for budgets that do
    not apply."""
    if target != "c":
        if flash or ram:
            raise InvalidInput("--flash and --ram are budgets of --target c")
        return None
    from bitwright import cli_show, driver
    from bitwright.c_program import kib, parse_size
    from bitwright.codegen.c.toolchain import toolchain

    chain = toolchain(cc)
    limits = [parse_size(text) if text else None for text in (flash, ram)]

    def compiled(graph: Graph, name: str, common: dict[str, Any]) -> CProgram:
        program = driver.compile_c(graph, name=name, **common)
        why = chain.missing()
        if why and any(limits):
            raise InvalidInput(f"a budget needs the compiler: {why}")
        if why:
            cli_show.console().print(f"sizes of code are not known: {why}", markup=False)
            return program
        found = program.check_budget(limits[0], limits[1], chain)
        cli_show.console().print(
            f"{chain.name}: {kib(found.flash)} of flash ({kib(found.tables)} of constants, {kib(found.code)} of code), "
            f"{kib(found.ram)} of static RAM (no plan needs less than {kib(program.source.bound_bytes)})"
        )
        return program

    return compiled
