"""What a kernel template lets the tuner choose: knobs with their values, and rules between them.

A point of a space is plain data, so that the database keeps it and a later compilation applies it again; the
template then checks it against the weights at hand (``Template.at``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from bitwright.ir.errors import InvalidInput

Setting = int | str | bool
Point = Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class Knob:
    """One choice: its values in their natural order, so that neighbours are alike."""

    name: str
    values: tuple[Setting, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition on whole points, and what it says of those that break it."""

    why: str
    holds: Callable[[Point], bool]


@dataclass(frozen=True)
class Space:
    """The points a template can run a body with; ``default`` is what it takes untuned. Without knobs: that point."""

    default: Point = field(default_factory=dict)
    knobs: tuple[Knob, ...] = ()
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        names = [k.name for k in self.knobs]
        if sorted(names) != sorted(self.default):
            raise InvalidInput(f"the default point {dict(self.default)} does not set the knobs {names}")

    def why_not(self, point: Point) -> str:
        """Why ``point`` is none of this space; the empty string if it is one."""
        values = {k.name: k.values for k in self.knobs}
        if set(values) != set(point):
            return f"it sets {sorted(point)}, the knobs are {sorted(values)}"
        if dict(point) == dict(self.default):
            return ""
        for name, value in point.items():
            if value not in values[name]:
                return f"{name}={value} is none of {list(values[name])}"
        return next((r.why for r in self.rules if not r.holds(point)), "")

    def __iter__(self) -> Iterator[dict[str, Setting]]:
        """Every point, the default first."""
        yield dict(self.default)
        names = [k.name for k in self.knobs]
        for values in itertools.product(*(k.values for k in self.knobs)):
            point = dict(zip(names, values, strict=True))
            if point != self.default and all(r.holds(point) for r in self.rules):
                yield point


class Pick(Protocol):
    """A measured candidate as kernel selection sees it."""

    @property
    def label(self) -> str:
        """What people call the record."""

    @property
    def template(self) -> str: ...

    @property
    def point(self) -> Point: ...

    @property
    def ratio(self) -> float:
        """Its time over that of the default kernel, measured in the same interleaved rounds."""


class Records(Protocol):
    """Where kernel selection asks for what was measured."""

    def best(self, workload: str, target: str, compiler: str) -> list[Pick]:
        """Candidates worth taking instead of the default, best first."""

    def machines(self, fingerprint: str) -> list[str]:
        """Processors or devices by which records of this target are filed."""
