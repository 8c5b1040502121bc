"""A model on a device that exists on paper: compiled to the kernel level, scheduled, simulated, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitwright.assemble import batch_symbol, fit_batches, refuse_broken, refuse_empty
from bitwright.codegen.devices.cells import Faults
from bitwright.codegen.devices.gates import Activity
from bitwright.codegen.devices.schema import Device
from bitwright.codegen.devices.simulate import Schedule, schedule, simulate
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.infer import bind_graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.pipeline import Lowered, lower

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Simulation:
    """What a device made of a model. ``identical``: its outputs are the reference's bits."""

    schedule: Schedule
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    expected: tuple[Array, ...]
    lowered: Lowered
    activity: Activity
    """Gates that were active and that rested; none where the device has no gates."""
    faults: Faults
    """Stuck cells, of a device that has cells."""

    @property
    def energy(self) -> float:
        """Joules: the schedule's, and those of the gates by the values that met."""
        gates = self.schedule.device.gates
        return self.schedule.energy + (self.activity.energy(gates) if gates is not None else 0.0)

    @property
    def identical(self) -> bool:
        return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in self._pairs())

    @property
    def error(self) -> float:
        """Root mean square of the difference from the reference over that of the reference."""
        pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in self._pairs()]
        size = sum(float(np.square(b).sum()) for _, b in pairs)
        return float(np.sqrt(sum(float(np.square(a - b).sum()) for a, b in pairs) / size)) if size else 0.0

    def _pairs(self) -> list[tuple[Array, Array]]:
        return list(zip(self.outputs, self.expected, strict=True))


def simulate_graph(
    graph: Graph, device: Device, recipe: Any, calibration: Sequence[Any], inputs: Any = None, batch: int = 1,
    faults: Faults | None = None,
) -> Simulation:  # fmt: skip
    """See :func:`bitwright.simulate` for the arguments and errors."""
    faults = faults or Faults()
    if faults.rate and device.cells is None:
        raise InvalidInput(f"{device.name} has no cells that could be faulty: they are declared by [options.cells]")
    refuse_broken(graph)
    batch_symbol(graph, batch)
    calibration = fit_batches(graph, calibration)
    done = lower(graph, recipe, device.target(), calibration)
    sizes = dict.fromkeys(graph.symbols, batch)
    bound = bind_graph(done.graph, sizes) if sizes else done.graph
    refuse_empty(bound)
    made = schedule(bound, device)
    given = example(bound, inputs if inputs is not None else (calibration[0] if len(calibration) else None))
    expected = tuple(to_numpy(t) for t in evaluate(bound, given))
    activity = Activity()
    outputs = tuple(simulate(made, given, activity, faults))
    return Simulation(made, tuple(given), outputs, expected, done, activity, faults)


def example(graph: Graph, data: Any) -> list[Array]:
    """Inputs of a static graph: given ones, cut to its batch, or random ones; raises :class:`InvalidInput`."""
    rng = np.random.default_rng(0)
    out = []
    for i, v in enumerate(graph.inputs):
        shape, kind = v.type.static_shape, v.type.dtype.numpy
        if data is None:
            made = rng.standard_normal(shape) if kind.kind == "f" else rng.integers(0, 2, shape)
            out.append(np.asarray(made).astype(kind))
            continue
        a = np.asarray(data[v.name] if isinstance(data, dict) else data[i])
        a = a[: shape[0]] if shape and a.ndim == len(shape) else a
        if a.shape != shape:
            raise InvalidInput(f"input {v.name!r} is {'x'.join(map(str, a.shape))}, the model takes {v.type}")
        out.append(np.ascontiguousarray(a.astype(kind)))
    return out
