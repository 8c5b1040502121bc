"""What a pass is: a frozen dataclass whose fields are its options, and ``run``: graph in, graph out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from bitwright.ir.graph import Graph, Level
from bitwright.ir.target import Target
from bitwright.ir.types import NM
from bitwright.ir.weights import Array
from bitwright.passes._trace import Measured, Trace

Batch = Sequence[Array] | Mapping[str, Array]
Price = Callable[[Graph, str, int, NM | None, bool], tuple[float, str]]
"""Seconds of one contraction, and where the figure is from. Arguments: a graph without symbols, the contraction's
value, bits of its weights (32: float), their pattern, and whether to measure rather than to predict."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a pass left something alone; a value, never an exception."""

    pass_name: str
    place: str
    reason: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" + (f" (to go on: {self.cure})" if self.cure else "")


@dataclass
class Context:
    """What the driver hands to every pass of a run: the target, calibration data, and where remarks go."""

    target: Target | None = None
    calibration: Sequence[Batch] = ()
    """Model inputs, a few batches; empty when the user gave none."""
    progress: Callable[[str, float], None] | None = None
    """Called with a label and a fraction on long work."""
    price: Price | None = None
    """Set by the driver when there is a target."""
    refusals: list[Refusal] = field(default_factory=list)
    remarks: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    """(pass, place, facts) for the report, e.g. ("nm-mask", "fc1", {"kept": 0.91})."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Results of analyses by value name, e.g. facts["ranges"]["conv1"] = (lo, hi)."""
    trace: Trace | None = None
    """What a pass saw when it evaluated its graph on the first batch, for the manager, which takes it away."""
    layers: tuple[Graph, Measured] | None = None
    """The last lossy graph that the manager evaluated, and the errors of its layers."""

    def refuse(self, pass_name: str, place: str, reason: str, cure: str = "") -> None:
        self.refusals.append(Refusal(pass_name, place, reason, cure))

    def remark(self, pass_name: str, place: str, **facts: Any) -> None:
        self.remarks.append((pass_name, place, facts))


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses set ``name`` and implement ``run``; they never mutate the graph.

    The docstring of a pass holds a ``before:`` and an ``after:`` text graph which the tests execute.
    """

    name: ClassVar[str] = ""
    takes: ClassVar[Level] = "graph"
    gives: ClassVar[Level] = "graph"
    lossy: ClassVar[bool] = False
    """True when outputs may change (the manager then measures by how much, given calibration data)."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Facts (keys of ``Context.facts``) that an earlier pass must have established."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Facts that the pass takes where there are any, with some of its options."""
    establishes: ClassVar[tuple[str, ...]] = ()
    """Facts that this pass puts into ``Context.facts``."""
    source: ClassVar[str] = ""
    """``path.py:Class`` for a pass loaded from a user's file: its spelling in text instead of the name."""

    def run(self, graph: Graph, context: Context) -> Graph:
        raise NotImplementedError

    @property
    def options(self) -> str:
        """Options that differ from their default, as text: ``pattern=2:4 only=encoder.*``."""
        from bitwright.passes._spec import show_option

        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{name.rstrip('_')}={show_option(value)}" for name, value in changed)

    def __str__(self) -> str:
        head, options = self.source or self.name, self.options
        return f"{head}{{{options}}}" if options else head
