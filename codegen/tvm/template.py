"""What a kernel template is: it recognises a region body, chooses a configuration, packs constants, emits TIR.

The C function of every kernel is ``void NAME(int32_t begin, int32_t end, T0* p0, T1* p1, ...)``: ``[begin, end)`` is
a range of its outer tasks, pointers come in the order of ``Config.args``, a per-thread ``uint8_t* scratch`` last when
``scratch_bytes`` is not zero. All shapes are static. Tasks write disjoint parts of the outputs. Loads may run past the
end of a buffer by up to 64 bytes; stores never.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from bitwright.codegen.tuning.space import Point, Space
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Value
from bitwright.ir.target import Target
from bitwright.ir.weights import Array


@dataclass(frozen=True, slots=True)
class Arg:
    """One pointer of the kernel: the body's i-th input, its i-th output, or the i-th packed constant."""

    kind: Literal["input", "output", "packed"]
    index: int


@dataclass(frozen=True)
class Config:
    """A template's decision for one body; frozen and picklable (it travels to compile workers).

    Templates subclass it with their own knobs. ``reason`` says why this kernel, for the report; ``inplace`` lists
    (output, input) pairs that may share storage.
    """

    tasks: int = 1
    scratch_bytes: int = 0
    args: tuple[Arg, ...] = ()
    isa: str = "portable"
    mcpu: str = "x86-64"
    reason: str = ""
    inplace: tuple[tuple[int, int], ...] = ()

    def kernel_key(self) -> str:
        """What of the configuration the generated code depends on."""
        return repr(replace(self, reason=""))


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a template does not take a body."""

    reason: str


class Template:
    """Base of kernel templates. Stateless; registered in ``select.py`` in order of preference."""

    name: ClassVar[str] = ""

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Decide whether and how to run ``body`` (static shapes, canonical names).

        ``constants`` holds the arrays of those body inputs that are weights. Looks at values only where the choice
        depends on them (sparsity pattern, safe accumulation); the emitted code must be correct for ``pack``'s result.
        """
        raise NotImplementedError

    def space(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Space:
        """What the tuner may choose for a body that :meth:`configure` takes; nothing unless overridden."""
        return Space()

    def at(self, body: Graph, constants: Mapping[str, Array], target: Target, point: Point) -> Config | Refused:
        """:meth:`configure` with the knobs of ``point``; refuses what these weights do not allow."""
        if point:
            return Refused(f"the kernel has no knobs {sorted(point)}")
        return self.configure(body, constants, target)

    def pack(self, body: Graph, config: Config, constants: Mapping[str, Array]) -> list[Array]:
        """Constants in the layout the kernel reads, in the order of the "packed" args (none by default)."""
        return []

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        """The TIR PrimFunc of the kernel, exported under ``symbol``. Depends on ``body`` and ``config`` only."""
        raise NotImplementedError

    def kernel_body(self, body: Graph) -> Graph:
        """The part of the body that the code depends on (the body itself unless overridden)."""
        return body

    def verify(self, body: Graph, config: Config, constants: Mapping[str, Array], packed: list[Array]) -> str:
        """Unpack ``packed`` and compare with the constants: the empty string, or what differs."""
        return ""

    def layout(self, body: Graph, config: Config) -> Mapping[str, Any]:
        """What :meth:`unpack` must know of a configuration; of JSON's types."""
        return {}

    def unpack(self, layout: Mapping[str, Any], packed: list[Array], shape: tuple[int, ...]) -> Array:
        """The weights of ``shape`` that packed arrays (flat) hold, to prove what a program says of them.

        Raises :class:`InvalidInput` for a template that does not read them back.
        """
        raise InvalidInput(f"weights packed for {self.name} are not read back")


def plain_args(body: Graph) -> tuple[Arg, ...]:
    """All inputs, then all outputs: the argument order of templates that pack nothing."""
    inputs = tuple(Arg("input", i) for i in range(len(body.inputs)))
    return inputs + tuple(Arg("output", i) for i in range(len(body.outputs)))


def canonical(body: Graph) -> Graph:
    """The body with position names (``i0``, ``v3``) and no origins, so that equal kernels have equal text."""
    names = {v.name: f"i{k}" for k, v in enumerate(body.inputs)}
    for k, o in enumerate(o for n in body.nodes for o in n.outputs):
        names[o] = f"v{k}"
    inputs = tuple(Value(names[v.name], v.type) for v in body.inputs)
    nodes = tuple(
        replace(n, inputs=tuple(names[x] for x in n.inputs), outputs=tuple(names[o] for o in n.outputs), origin="")
        for n in body.nodes
    )
    outputs = tuple(names[o] for o in body.outputs)
    return replace(body, name="body", inputs=inputs, nodes=nodes, outputs=outputs, output_names=outputs)
