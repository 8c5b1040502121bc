"""Which kernel runs a region: templates are asked in order of preference, and every answer has a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from bitwright.codegen.cache import key_of
from bitwright.codegen.targets.machine import cpu_name
from bitwright.codegen.tuning.space import Point, Records
from bitwright.codegen.tuning.workload import target_key, workload_key
from bitwright.codegen.tvm.cuda.registry import templates as gpu_templates
from bitwright.codegen.tvm.template import Config, Refused, Template, canonical
from bitwright.ir.errors import InvalidInput
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
    record: str = ""
    """The tuning record that the configuration comes from; empty for the template's own choice."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a compile worker gets: enough to emit one kernel."""

    template: str
    body: Graph
    config: Config
    symbol: str


@cache
def templates() -> dict[str, Template]:
    """Every kernel template of CPUs by name."""
    from bitwright.codegen.tvm.attention import AttentionTemplate
    from bitwright.codegen.tvm.attention_decode import Decode
    from bitwright.codegen.tvm.contract_template import Contract
    from bitwright.codegen.tvm.elementwise import Elementwise
    from bitwright.codegen.tvm.generic import Generic
    from bitwright.codegen.tvm.grouped.dynamic import Dynamic
    from bitwright.codegen.tvm.grouped.template import Grouped
    from bitwright.codegen.tvm.lanes.template import Lanes
    from bitwright.codegen.tvm.lut import Lut
    from bitwright.codegen.tvm.move import Move
    from bitwright.codegen.tvm.pool import Pool
    from bitwright.codegen.tvm.quantize import Quantizer
    from bitwright.codegen.tvm.rows import Rows

    known: tuple[Template, ...] = (
        Lut(), Grouped(), Lanes(), Contract(), Dynamic(), Decode(), AttentionTemplate(), Rows(), Pool(), Move(),
        Quantizer(), Elementwise(), Generic(),
    )  # fmt: skip
    return {t.name: t for t in known}


def offered(target: Target) -> dict[str, Template]:
    """The templates whose kernels run on ``target``, in order of preference."""
    return gpu_templates() if target.kind == "gpu" else templates()


def template_of(name: str) -> Template:
    """The template of this name, of whatever kind of target. Raises :class:`KeyError` where there is none."""
    return (gpu_templates() if name.startswith("cuda_") else templates())[name]


@cache
def version() -> str:
    """Hash of the code generator's own source: a change of it makes every cached kernel stale."""
    import tvm  # type: ignore[import-untyped]

    folder = Path(__file__).parent
    parts = [p.read_bytes() for p in sorted(folder.rglob("*.py"))]
    parts += [p.read_bytes() for p in sorted((folder.parent / "instructions").glob("*.py"))]
    parts += [p.read_bytes() for p in sorted((folder.parent / "cuda").rglob("*")) if p.suffix in (".py", ".h")]
    return key_of(tvm.__version__, *parts)


def choose(
    body: Graph, constants: Mapping[str, Array], target: Target, records: Records | None = None
) -> Choice | list[tuple[str, str]]:
    """The first template that takes the body, or why each one does not.

    ``constants``: arrays of the body's inputs that are weights, by the body's input name. ``records``: the best
    measured candidate is taken instead where there is one for this workload, target and code generator.
    """
    plain, renamed = positional(body, constants)
    if records is not None and (tuned := _recorded(plain, renamed, target, records)) is not None:
        return tuned
    refused: list[tuple[str, str]] = []
    for name, template in offered(target).items():
        config = template.configure(plain, renamed, target)
        if not isinstance(config, Refused):
            return _choice(plain, renamed, name, config, tuple(refused))
        refused.append((name, config.reason))
    return refused


def positional(body: Graph, constants: Mapping[str, Array]) -> tuple[Graph, dict[str, Array]]:
    """The canonical body, and its constants by the names they have there."""
    plain = canonical(body)
    pairs = zip(body.inputs, plain.inputs, strict=True)
    return plain, {new.name: constants[old.name] for old, new in pairs if old.name in constants}


def candidate(
    plain: Graph, constants: Mapping[str, Array], target: Target, template: str, point: Point
) -> Choice | Refused:
    """The kernel that ``template`` makes of a canonical body at a point of its space, or why it makes none."""
    if template not in offered(target):
        return Refused(f"there is no template {template}")
    chosen = template_of(template)
    if point and (why := chosen.space(plain, constants, target).why_not(point)):
        return Refused(why)
    config = chosen.at(plain, constants, target, point)
    return config if isinstance(config, Refused) else _choice(plain, constants, template, config, ())


def _recorded(plain: Graph, constants: Mapping[str, Array], target: Target, records: Records) -> Choice | None:
    """The best measured candidate that these weights allow."""
    key = target_key(target, _measured_on(target, records))
    for pick in records.best(workload_key(plain, constants), key, version()):
        choice = candidate(plain, constants, target, pick.template, pick.point)
        if isinstance(choice, Choice):
            told = f"tuned: {pick.label}, {pick.ratio:.2f}x of the default's time"
            config = replace(choice.config, reason="; ".join(filter(None, [choice.config.reason, told])))
            return replace(choice, config=config, record=pick.label)
    return None


def _measured_on(target: Target, records: Records) -> str:
    """The machine whose records count: this one; of a GPU, which need not be here, the one of the records."""
    if target.kind != "gpu":
        return cpu_name()
    found = records.machines(target.fingerprint)
    if len(found) > 1:
        raise InvalidInput(f"the tuning database has records of {' and '.join(found)}: give each device its own file")
    return found[0] if found else ""


def _choice(
    plain: Graph,
    constants: Mapping[str, Array],
    name: str,
    config: Config,
    refused: tuple[tuple[str, str], ...],
) -> Choice:
    """Pack, prove that the packed constants are the constants, and name the kernel by its content."""
    template = template_of(name)
    packed = tuple(template.pack(plain, config, constants))
    if why := template.verify(plain, config, constants, list(packed)):
        raise AssertionError(f"{name}: {why}")
    kernel_body = template.kernel_body(plain)
    key = key_of(version(), name, show(kernel_body), config.kernel_key())
    return Choice(kernel_body, name, config, f"k_{name}_{key[:16]}", key, packed, refused)


def compile_order(order: Order) -> bytes:
    """Emit and compile one kernel: the object file's bytes. Runs in compile workers."""
    from bitwright.codegen.tvm.adapter import build_object, machine

    func = template_of(order.template).emit(order.body, order.config, order.symbol)
    return build_object([func], machine(order.config.mcpu))
