"""A device as data: its instructions with their meaning, its memories, its costs. Read from TOML, checked, frozen."""

from __future__ import annotations

import tomllib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bitwright.codegen.devices.meaning import Meaning, read_meaning
from bitwright.codegen.devices.places import problem
from bitwright.codegen.devices.units import Unit, quantity
from bitwright.ir.errors import InvalidInput
from bitwright.ir.target import Rate, SparseRate, Target, in_bytes
from bitwright.ir.types import S32, U8

if TYPE_CHECKING:
    from bitwright.codegen.devices.cells import Cells
    from bitwright.codegen.devices.gates import Gates
    from bitwright.codegen.devices.tables import Tables
    from bitwright.codegen.devices.words import WordFormat


def _in(unit: Unit) -> BeforeValidator:
    return BeforeValidator(lambda v: quantity(v, unit))


Bytes = Annotated[float, _in("bytes")]
Hertz = Annotated[float, _in("hertz")]
BytesPerCycle = Annotated[float, _in("bytes/cycle")]
Bits = Annotated[float, _in("bits")]
Joule = Annotated[float, _in("joule")]
JoulePerByte = Annotated[float, _in("joule/byte")]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Memory(_Table):
    """Where weights or activations lie: bytes, bytes a cycle, joules a byte moved."""

    size: Bytes
    bandwidth: BytesPerCycle
    energy: JoulePerByte = 0.0


class Registers(_Table):
    """The registers that an instruction's operands must fit: bits in all."""

    size: Bits


class Vector(_Table):
    """The unit for everything that is no contraction: cycles and joules an element and operator.

    ``contractions``: whether it takes float contractions that no instruction runs; otherwise they are an error."""

    cycles: Annotated[float, Field(gt=0)] = 1.0
    energy: Joule = 0.0
    contractions: bool = True


class Instruction(_Table):
    """One contraction instruction.

    ``meaning``: IR text of what it computes, ``(%x: u4[b, 16], %w: s4[o, 16], %acc: s32[b, o]) -> (y = %y)``: a row of
    x of ``depth`` terms by the weights of ``lanes`` outputs. The symbols b and o stand for any size. Without ``%acc``
    it takes the whole reduction at once, ``depth`` terms a step.
    """

    name: Annotated[str, Field(pattern=r"[A-Za-z][\w.-]*")]
    lanes: Annotated[int, Field(ge=1)]
    depth: Annotated[int, Field(ge=1)]
    cycles: Annotated[float, Field(gt=0)] = 1.0
    energy: Joule = 0.0
    meaning: str
    spelling: str = ""

    @cached_property
    def parsed(self) -> Meaning:
        """The meaning as a graph; raises :class:`InvalidInput` where it is none."""
        return read_meaning(self.meaning, self.depth)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one step, zeros of a mask counted."""
        return self.lanes * self.depth

    @property
    def area(self) -> float:
        """A proxy for the multipliers' area: bits of x times bits of w of every product that is computed."""
        return self.macs * self.parsed.density * self.parsed.x.bits * self.parsed.w.bits


class Device(_Table):
    """A machine on paper."""

    name: Annotated[str, Field(pattern=r"[a-z][a-z0-9-]*")]
    title: str = ""
    source: str
    """Where the figures come from."""
    clock: Hertz
    weights: Memory
    activations: Memory
    registers: Registers
    vector: Vector = Vector()
    power: Annotated[float, Field(ge=0)] = 0.0
    """Static power in watts."""
    instruction: Annotated[tuple[Instruction, ...], Field(min_length=1)]
    options: dict[str, Any] = Field(default_factory=dict)
    """What only some devices have: ``words`` with lanes of several widths, ``gates`` that rest, ``cells`` that may be
    stuck, ``tables`` of products."""

    @cached_property
    def words(self) -> WordFormat | None:
        """``[options.words]``: weights of several widths in one word; raises :class:`pydantic.ValidationError`."""
        from bitwright.codegen.devices.words import WordFormat

        return WordFormat.model_validate(self.options["words"]) if "words" in self.options else None

    @cached_property
    def gates(self) -> Gates | None:
        """``[options.gates]``: what products of zeros do not cost; raises :class:`pydantic.ValidationError`."""
        from bitwright.codegen.devices.gates import Gates

        return Gates.model_validate(self.options["gates"]) if "gates" in self.options else None

    @cached_property
    def cells(self) -> Cells | None:
        """``[options.cells]``: weights in cells that may be stuck; raises :class:`pydantic.ValidationError`."""
        from bitwright.codegen.devices.cells import Cells

        return Cells.model_validate(self.options["cells"]) if "cells" in self.options else None

    @cached_property
    def tables(self) -> Tables | None:
        """``[options.tables]``: products that are looked up; raises :class:`pydantic.ValidationError`."""
        from bitwright.codegen.devices.tables import Tables

        return Tables.model_validate(self.options["tables"]) if "tables" in self.options else None

    @property
    def area(self) -> float:
        """The proxy of all instructions' multipliers: those of the largest, for they share them."""
        return max(i.area for i in self.instruction)

    def target(self) -> Target:
        """What passes ask: formats, rates and patterns of this device."""
        rates: dict[tuple[Any, Any], float] = {}
        for i in self.instruction:
            key = (in_bytes(i.parsed.x), in_bytes(i.parsed.w))
            if i.parsed.pattern is None:
                rates[key] = max(rates.get(key, 0.0), 2 * i.macs / i.cycles * self.clock)
        gains = []
        for i in self.instruction:
            key, nm = (in_bytes(i.parsed.x), in_bytes(i.parsed.w)), i.parsed.pattern
            if nm is not None:
                dense = rates.get(key, 2 * i.macs / i.cycles * self.clock * nm.density)
                gain = min(2 * i.macs / i.cycles * self.clock / dense, 1.5 / nm.density)
                rates.setdefault(key, dense)
                gains.append(SparseRate(key[0], nm.keep, nm.group, gain))
        bytes_per_second = self.activations.bandwidth * self.clock
        return Target(
            name=self.name, kind="device", isa="portable", mcpu="none", features=(), vector_bits=64,
            vector_registers=8, l1_bytes=int(self.activations.size), l2_bytes=int(self.activations.size),
            l3_bytes=int(self.activations.size), cores=1, memory_bandwidth=self.weights.bandwidth * self.clock,
            cache_bandwidth=bytes_per_second, vector_ops_per_second=self.clock / self.vector.cycles,
            launch_seconds=0.0, rates=tuple(Rate(x, w, S32, r) for (x, w), r in rates.items()),
            sparse=tuple(gains), activation=U8, source=self.source,
        )  # fmt: skip


def parse_device(text: str, place: str = "the device") -> Device:
    """A device from TOML text; raises :class:`InvalidInput` that names the line of every problem."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise InvalidInput(f"{place} is not TOML: {e}") from e
    try:
        device = Device.model_validate(data)
    except ValidationError as error:
        problems = [problem(text, place, e["loc"], e["msg"]) for e in error.errors()]
        raise InvalidInput("\n".join(problems)) from error
    from bitwright.codegen.devices.check import problems_of

    if found := problems_of(device):
        raise InvalidInput("\n".join(problem(text, place, loc, message) for loc, message in found))
    return device


def load_device(path: str | Path) -> Device:
    """A device from a TOML file; raises :class:`InvalidInput`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidInput(f"cannot read the device {path}: {e}") from e
    return parse_device(text, str(path))
