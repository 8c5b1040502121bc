"""Whether a device can be: operands fit its registers, sums fit their accumulators or say how they do not."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from bitwright.codegen.devices.schema import Device, Instruction
from bitwright.codegen.devices.words import word_problems
from bitwright.ir.errors import InvalidInput
from bitwright.ir.numerics import safe_terms
from bitwright.ir.types import BIPOLAR, NM, TERNARY

OPTIONS = ("words", "gates", "cells", "tables")
"""Tables of ``[options]``."""
Problem = tuple[tuple[Any, ...], str]


def problems_of(device: Device) -> list[Problem]:
    """(place, message) of everything that contradicts itself."""
    out: list[Problem] = []
    names = [i.name for i in device.instruction]
    for n, i in enumerate(device.instruction):
        place = ("instruction", n)
        if names.index(i.name) != n:
            out.append(((*place, "name"), f"two instructions are called {i.name}"))
        try:
            _ = i.parsed
        except InvalidInput as e:
            out.append(((*place, "meaning"), str(e)))
            continue
        out += [((*place, key), text) for key, text in _fits(device, i)]
    for memory in ("weights", "activations"):
        if getattr(device, memory).bandwidth <= 0:
            out.append(((memory, "bandwidth"), "a bandwidth is above zero"))
    if device.clock <= 0:
        out.append((("clock",), "a clock is above zero"))
    return out or _options(device)


def _options(device: Device) -> list[Problem]:
    """What only some devices have."""
    out: list[Problem] = []
    for name in OPTIONS:
        try:
            getattr(device, name)
        except ValidationError as error:
            out += [(_place(f"options.{name}", e["loc"]), e["msg"]) for e in error.errors()]
    if unknown := [k for k in device.options if k not in OPTIONS]:
        out.append((("options",), f"no device has {', '.join(unknown)}; options are {', '.join(OPTIONS)}"))
    if out:
        return out
    if device.gates is not None and (wide := [i.name for i in device.instruction if not _ternary(i)]):
        out.append((("options.gates",), f"gates multiply ternary by ternary, {', '.join(wide)} something else"))
    if device.cells is not None and (
        narrow := [i.name for i in device.instruction if not _holds(i, device.cells.levels)]
    ):
        reach = f"{-device.cells.levels} to {device.cells.levels}"
        out.append(
            (("options.cells", "levels"), f"pairs of cells read as {reach}: too wide for w of {', '.join(narrow)}")
        )
    if device.tables is not None and (signed := [i.name for i in device.instruction if i.parsed.x.kind != "uint"]):
        out.append((("options.tables",), f"digits are those of unsigned activations, {', '.join(signed)} takes others"))
    return out + ([] if device.words is None else list(word_problems(device, device.words)))


def _holds(i: Instruction, levels: int) -> bool:
    w = i.parsed.w
    return w.is_integer and w.lo <= -levels and levels <= w.hi and w != BIPOLAR


def _ternary(i: Instruction) -> bool:
    return i.parsed.x == TERNARY and i.parsed.w == TERNARY


def _place(table: str, loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """The table and key of a value within the options: a list of tables has a header of its own."""
    nested = len(loc) > 1 and isinstance(loc[1], int)
    return (f"{table}.{loc[0]}", *loc[1:3]) if nested else (table, *loc[:1])


def operand_bits(i: Instruction) -> tuple[float, float, float]:
    """Bits that one step holds of x, of weights (with the indices of a mask) and of running sums."""
    m = i.parsed
    weight = m.w.bits + (_index_bits(m.pattern) if m.pattern else 0)
    return i.depth * m.x.bits, i.macs * m.density * weight, i.lanes * (m.acc.bits if m.acc else 32)


def _index_bits(nm: NM) -> int:
    return max(1, (nm.group - 1).bit_length())


def _fits(device: Device, i: Instruction) -> list[tuple[str, str]]:
    out = []
    x, w, acc = operand_bits(i)
    if (total := x + w + acc) > device.registers.size:
        out.append((
            "lanes",
            f"one step holds {total:.0f} bits ({x:.0f} of x, {w:.0f} of weights, {acc:.0f} of sums), the registers "
            f"{device.registers.size:.0f}: fewer lanes or terms",
        ))  # fmt: skip
    steps = steps_that_fit(i)
    if steps is not None and steps < 1 and not i.parsed.saturates:
        out.append((
            "meaning",
            f"the {i.depth} products of one step can exceed {i.parsed.acc}, and the meaning neither widens nor "
            "saturates: add a saturate, or a wider %acc",
        ))  # fmt: skip
    return out


def steps_that_fit(i: Instruction) -> int | None:
    """Steps whose sums fit the accumulator whatever the operands; None: any number, or sums that are no integers."""
    m = i.parsed
    if m.acc is None or not m.acc.is_integer or not m.x.is_integer:
        return None
    terms = safe_terms(m.acc.bits, m.x.lo, m.x.hi, m.w.lo, m.w.hi)
    kept = i.depth * m.density
    return None if terms is None else int(terms // kept)
