"""A processor as a file: what a built-in target declares in Python, in TOML with units, checked and frozen.

``like`` names the target that all values which are not given come from, so that a file may be three lines long.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bitwright.codegen.devices.places import problem
from bitwright.codegen.devices.units import Unit, quantity
from bitwright.ir.errors import InvalidInput, did_you_mean
from bitwright.ir.target import Costs, Isa, LanesRate, Rate, SparseRate, Target
from bitwright.ir.types import U8, parse_dtype

WIDTHS: Mapping[Isa, tuple[int, ...]] = {
    "avx512-vnni": (512,), "avx-vnni": (256,), "avx2": (256,), "portable": (128,), "neon-i8mm": (128,),
    "neon-dot": (128,), "vector": (64, 128, 256, 512),
}  # fmt: skip
"""Vector widths in bits that the kernels of an instruction-set level are written for."""
NEEDS: Mapping[Isa, tuple[str, ...]] = {
    "avx512-vnni": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512vnni"),
    "avx-vnni": ("avx2", "fma", "avxvnni"), "avx2": ("avx2", "fma"), "neon-i8mm": ("dotprod", "i8mm"),
    "neon-dot": ("dotprod",),
}  # fmt: skip
"""Processor features, by LLVM's names, without which the kernels of a level do not run."""


def _in(unit: Unit) -> BeforeValidator:
    return BeforeValidator(lambda v: quantity(v, unit))


Bytes = Annotated[float, _in("bytes")]
Speed = Annotated[float, _in("ops/second"), Field(gt=0)]
Bandwidth = Annotated[float, _in("bytes/second"), Field(gt=0)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Vector(_Table):
    """Bits of a register, registers, and operations on 32-bit elements a second."""

    bits: int | None = None
    registers: Annotated[int | None, Field(ge=1)] = None
    speed: Speed | None = None


class Memory(_Table):
    """Data caches, bytes a second from memory and from the last cache, and what a call of a kernel takes."""

    l1: Bytes | None = None
    l2: Bytes | None = None
    l3: Bytes | None = None
    bandwidth: Bandwidth | None = None
    cache: Bandwidth | None = None
    launch: Annotated[float | None, BeforeValidator(lambda v: quantity(v, "seconds"))] = None


class RateRow(_Table):
    """Multiply-accumulates (two operations each) of one pair of formats, and the format of the sums."""

    x: str
    w: str
    acc: str
    speed: Speed
    terms: Annotated[int, Field(ge=1)] = 1


class SparseRow(_Table):
    """Speed over dense of a pattern ``keep:group``; of kernels that need it ``shared`` by so many outputs."""

    x: str
    pattern: Annotated[str, Field(pattern=r"^\d+:\d+$")]
    gain: Annotated[float, Field(gt=0)]
    shared: Annotated[int, Field(ge=1)] = 1


class LanesRow(_Table):
    """Time over dense with activations in lanes, see :class:`bitwright.ir.target.LanesRate`."""

    x: str
    shared: Annotated[int, Field(ge=1)]
    slope: float
    fixed: float


class Processor(_Table):
    """The file. ``isa``: which kernels; ``llvm``: the processor by LLVM's name, or LLVM's options."""

    kind: Literal["cpu"]
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
    source: str
    """Where the figures come from."""
    like: str = ""
    isa: Isa | None = None
    llvm: str | None = None
    features: tuple[str, ...] | None = None
    cores: Annotated[int | None, Field(ge=1)] = None
    vector: Vector = Vector()
    memory: Memory = Memory()
    rate: tuple[RateRow, ...] | None = None
    sparse: tuple[SparseRow, ...] | None = None
    lanes: tuple[LanesRow, ...] | None = None
    costs: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)


Problem = tuple[tuple[Any, ...], str]


def parse_processor(text: str, known: Mapping[str, Target], place: str = "the processor") -> Target:
    """A target from TOML text, ``like`` one of the ``known``; raises :class:`InvalidInput` with the line of each
    problem."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise InvalidInput(f"{place} is not TOML: {e}") from e
    try:
        given = Processor.model_validate(data)
    except ValidationError as error:
        raise InvalidInput("\n".join(problem(text, place, e["loc"], e["msg"]) for e in error.errors())) from error
    found = list(_problems(given, known))
    if not found:
        try:
            target = _target(given, known.get(given.like))
        except InvalidInput as e:
            found = [((), str(e))]
        else:
            found = list(_of_the_machine(target))
    if found:
        raise InvalidInput("\n".join(problem(text, place, loc, message) for loc, message in found))
    return target


def load_processor(path: str | Path, known: Mapping[str, Target]) -> Target:
    """A target from a TOML file; raises :class:`InvalidInput`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidInput(f"cannot read the processor {path}: {e}") from e
    return parse_processor(text, known, str(path))


def _values(given: Processor) -> dict[str, Any]:
    """The target's fields that the file gives."""
    v, m = given.vector, given.memory
    sizes = {f"{k}_bytes": None if n is None else int(n) for k, n in (("l1", m.l1), ("l2", m.l2), ("l3", m.l3))}
    rates = None if given.rate is None else tuple(
        Rate(parse_dtype(r.x), parse_dtype(r.w), parse_dtype(r.acc), r.speed, r.terms) for r in given.rate
    )  # fmt: skip
    sparse = None if given.sparse is None else tuple(
        SparseRate(parse_dtype(s.x), int(s.pattern.split(":")[0]), int(s.pattern.split(":")[1]), s.gain, s.shared)
        for s in given.sparse
    )  # fmt: skip
    lanes = None if given.lanes is None else tuple(
        LanesRate(parse_dtype(r.x), r.shared, r.slope, r.fixed) for r in given.lanes
    )  # fmt: skip
    out = {
        "name": given.name, "source": given.source, "isa": given.isa, "mcpu": given.llvm, "features": given.features,
        "vector_bits": v.bits, "vector_registers": v.registers, "vector_ops_per_second": v.speed, "cores": given.cores,
        "memory_bandwidth": m.bandwidth, "cache_bandwidth": m.cache, "launch_seconds": m.launch, "rates": rates,
        "sparse": sparse, "lanes": lanes, **sizes,
    }  # fmt: skip
    return {k: x for k, x in out.items() if x is not None}


def _target(given: Processor, base: Target | None) -> Target:
    values = _values(given)
    if base is not None:
        return replace(base, **values, costs=replace(base.costs, **given.costs))
    isa: Isa = values["isa"]
    values.setdefault("features", NEEDS.get(isa, ()))
    values.setdefault("cores", 1)
    values.setdefault("sparse", ())
    return Target(**values, kind="cpu", activation=U8, costs=Costs(**given.costs))


_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "isa": ("isa",), "llvm": ("mcpu",), "vector": ("vector_bits", "vector_registers", "vector_ops_per_second"),
    "memory": ("l1_bytes", "l2_bytes", "l3_bytes", "memory_bandwidth", "cache_bandwidth", "launch_seconds"),
    "rate": ("rates",),
}  # fmt: skip


def _problems(given: Processor, known: Mapping[str, Target]) -> Iterator[Problem]:
    if given.like and given.like not in known:
        yield ("like",), f"no target is called {given.like!r}{did_you_mean(given.like, list(known))}"
    if given.name in known or given.name in ("host", "c"):
        yield ("name",), f"{given.name} is the name of a target that comes along"
    if unknown := sorted(set(given.costs) - {f.name for f in fields(Costs)}):
        yield ("costs", unknown[0]), f"no cost is called {', '.join(unknown)}{did_you_mean(unknown[0], _costs())}"
    formats = False
    for table in ("rate", "sparse", "lanes"):
        for n, row in enumerate(getattr(given, table) or ()):
            for key in ("x", "w", "acc"):
                try:
                    parse_dtype(getattr(row, key, "s8"))
                except InvalidInput as e:
                    formats = True
                    yield (table, n, key), str(e)
    if not given.like and not formats:
        values = _values(given)
        for table, keys in _REQUIRED.items():
            if missing := [k for k in keys if k not in values]:
                told = ", ".join(k.split("_bytes")[0] for k in missing)
                yield (table,), f"{told} must be given where no like is (`bitwright targets` lists what to be like)"


def _costs() -> list[str]:
    return [f.name for f in fields(Costs)]


def _of_the_machine(target: Target) -> Iterator[Problem]:
    """What LLVM's processor lacks of what the kernels are made of."""
    from bitwright.codegen.tvm.adapter import processor_features

    if target.vector_bits not in WIDTHS[target.isa]:
        widths = " or ".join(map(str, WIDTHS[target.isa]))
        yield ("vector", "bits"), f"kernels of {target.isa} have vectors of {widths} bits, not {target.vector_bits}"
    arch = "aarch64" if target.isa.startswith("neon") else target.arch if target.isa == "vector" else "x86_64"
    if target.arch != arch:
        told = f"{target.isa} kernels are for {arch}, this is {target.arch}"
        yield ("isa",), f"{told} (levels: {', '.join(get_args(Isa))})"
        return
    able = processor_features(target.mcpu)
    if isinstance(able, str):
        yield ("llvm",), able
    elif lacking := [f for f in dict.fromkeys((*NEEDS.get(target.isa, ()), *target.features)) if f not in able]:
        yield ("llvm",), f"{target.mcpu} has no {', '.join(lacking)}: add -mattr=+{',+'.join(lacking)}, or a lesser isa"
