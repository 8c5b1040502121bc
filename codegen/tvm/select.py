"""Which kernel runs a region: templates are asked in order of preference, and every answer has a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bitwright.codegen.cache import key_of
from bitwright.codegen.tvm.template import Config, Refused, Template, canonical
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.text import show
from bitwright.ir.weights import Array


@dataclass(frozen=True, slots=True)
class Choice:
    """A region's kernel: the canonical body, the template's name and configuration, packed constants."""

    body: Graph
    template: str
    config: Config
    symbol: str
    key: str
    packed: tuple[Array, ...]
    refused: tuple[tuple[str, str], ...]
    """(template, reason) of the templates that were preferred but did not fit."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a compile worker gets: enough to emit one kernel."""

    template: str
    body: Graph
    config: Config
    symbol: str


@cache
def templates() -> dict[str, Template]:
    """Every kernel template by name."""
    from bitwright.codegen.tvm.attention import AttentionTemplate
    from bitwright.codegen.tvm.contract_template import Contract
    from bitwright.codegen.tvm.elementwise import Elementwise
    from bitwright.codegen.tvm.generic import Generic
    from bitwright.codegen.tvm.lut import Lut
    from bitwright.codegen.tvm.move import Move
    from bitwright.codegen.tvm.pool import Pool
    from bitwright.codegen.tvm.rows import Rows

    known: tuple[Template, ...] = (
        Lut(), Contract(), AttentionTemplate(), Rows(), Pool(), Move(), Elementwise(), Generic(),
    )  # fmt: skip
    return {t.name: t for t in known}


@cache
def version() -> str:
    """Hash of the code generator's own source: a change of it makes every cached kernel stale."""
    import tvm  # type: ignore[import-untyped]

    folder = Path(__file__).parent
    parts = [p.read_bytes() for p in sorted(folder.rglob("*.py"))]
    parts += [p.read_bytes() for p in sorted((folder.parent / "instructions").glob("*.py"))]
    return key_of(tvm.__version__, *parts)


def choose(body: Graph, constants: Mapping[str, Array], target: Target) -> Choice | list[tuple[str, str]]:
    """The first template that takes the body, or why each one does not.

    ``constants``: arrays of the body's inputs that are weights, by the body's input name.
    """
    plain = canonical(body)
    renamed = {
        new.name: constants[old.name]
        for old, new in zip(body.inputs, plain.inputs, strict=True)
        if old.name in constants
    }
    refused: list[tuple[str, str]] = []
    for name, template in templates().items():
        config = template.configure(plain, renamed, target)
        if isinstance(config, Refused):
            refused.append((name, config.reason))
            continue
        packed = tuple(template.pack(plain, config, renamed))
        if why := template.verify(plain, config, renamed, list(packed)):
            raise AssertionError(f"{name}: {why}")
        kernel_body = template.kernel_body(plain)
        key = key_of(version(), name, show(kernel_body), config.kernel_key())
        return Choice(kernel_body, name, config, f"k_{name}_{key[:16]}", key, packed, tuple(refused))
    return refused


def compile_order(order: Order) -> bytes:
    """Emit and compile one kernel: the object file's bytes. Runs in compile workers."""
    from bitwright.codegen.tvm.adapter import Machine, build_object

    func = templates()[order.template].emit(order.body, order.config, order.symbol)
    return build_object([func], Machine(order.config.mcpu))
