"""What was done to a model, what it gained, and what was refused: one row per layer, per pass, per refusal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitwright.ir.errors import InvalidInput

SCHEMA_VERSION = 1


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Formats(_Row):
    """The number formats of a layer: activations in, weights, accumulator, result; empty when it has none."""

    x: str = ""
    w: str = ""
    acc: str = ""
    out: str = ""


class Layer(_Row):
    """One layer as it runs.

    ``predicted_seconds``: what the cost model expects; ``limit_seconds``: what the machine's peaks allow at best.

    ``reason``: why this kernel, or why not sparse. ``share_of_limit``: measured speed over what the machine
    could do (0 to 1). ``error``: relative error of its result against float. None: not known or not measured.
    ``accumulator``: the width its integer sums need, and what that rests on.
    ``weight``: the layer's name by its weight, as passes and refusals call it. ``figures``: numbers that passes
    remarked about it, as "pass.figure", such as "nm-mask.kept_magnitude" or "reconstruct.error_after".
    """

    name: str
    op: str = ""
    origin: str = ""
    shape: tuple[int | str, ...] = ()
    formats: Formats = Field(default_factory=Formats)
    pattern: str = ""
    density: float | None = None
    accumulator: str = ""
    kernel: str = ""
    reason: str = ""
    bytes: int | None = None
    operations: int | None = None
    predicted_seconds: float | None = None
    limit_seconds: float | None = None
    measured_seconds: float | None = None
    share_of_limit: float | None = None
    error: float | None = None
    weight: str = ""
    figures: dict[str, float] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)

    def figure(self, name: str) -> float | None:
        """The number of that name from the last pass that remarked one; None when no pass did."""
        found = [value for key, value in self.figures.items() if key.rpartition(".")[2] == name]
        return found[-1] if found else None


class PassRow(_Row):
    """One pass that ran; ``error`` is the output error it caused on the calibration set, if it may change values."""

    index: int
    name: str
    options: str = ""
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    changed: bool = False
    notes: list[str] = Field(default_factory=list)
    error: float | None = None
    diff: str = ""


class Refusal(_Row):
    """Something asked for that was not done: by which pass, where, why, and what would make it possible."""

    pass_name: str
    place: str
    reason: str
    cure: str = ""


class Report(_Row):
    """The whole record; ``machine`` and ``versions`` say where the figures come from.

    ``pipeline`` (the passes as text) and ``facts`` (what calibration found) let ``verify`` repeat the compilation.
    """

    schema_version: int = SCHEMA_VERSION
    model: str = ""
    target: str = ""
    layers: list[Layer] = Field(default_factory=list)
    passes: list[PassRow] = Field(default_factory=list)
    refusals: list[Refusal] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    pipeline: str = ""
    facts: dict[str, Any] = Field(default_factory=dict)
    machine: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    figures: dict[str, float | None] = Field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data; :meth:`from_dict` reads it back to an equal report."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that ``data`` describes; raises :class:`InvalidInput`."""
        _refuse_newer(data.get("schema_version") if isinstance(data, Mapping) else None)
        return _validated(lambda: cls.model_validate(data))

    def to_json(self) -> bytes:
        """The report as UTF-8 JSON (a NaN or infinity becomes null)."""
        return self.model_dump_json(indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes | str) -> Report:
        """The report in ``text``; raises :class:`InvalidInput`."""
        return _validated(lambda: cls.model_validate_json(text))

    def layer(self, name: str) -> Layer:
        """The row of layer ``name``; raises :class:`KeyError`."""
        for row in self.layers:
            if row.name == name:
                return row
        raise KeyError(name)

    def notes_of(self, layer: Layer) -> tuple[list[str], list[str]]:
        """Notes on why a layer is as it is, and the remarks of single passes ("nm-mask: kept 0.91") beside them."""
        remarks = tuple(f"{p.name}: " for p in self.passes)
        told = [n for n in layer.notes if n.startswith(remarks)]
        return [n for n in layer.notes if n not in told], told

    def with_seconds(self, seconds: Mapping[str, float]) -> Report:
        """A copy whose layers named in ``seconds`` carry that measured time."""
        layers = [
            row.model_copy(update={"measured_seconds": seconds[row.name]}) if row.name in seconds else row
            for row in self.layers
        ]
        return self.model_copy(update={"layers": layers})

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained HTML page."""
        from bitwright.runtime.html import write_html

        write_html(self, path)


def _refuse_newer(version: object) -> None:
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InvalidInput(
            f"the report has schema {version}, this bitwright reads up to {SCHEMA_VERSION}: upgrade bitwright"
        )


def _validated(read: Any) -> Report:
    try:
        report = read()
    except (ValidationError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        place = ".".join(map(str, first["loc"])) or "the text"
        raise InvalidInput(f"this is not a bitwright report: {place}: {first['msg']}") from error
    assert isinstance(report, Report)
    _refuse_newer(report.schema_version)
    return report
