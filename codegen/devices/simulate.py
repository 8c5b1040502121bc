"""Runs a kernel-level graph on a device: bits by its instructions' meanings, cycles and energy by the declared costs.

A step's arithmetic, the reading of its weights and that of its activations overlap: a layer takes the longest of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from bitwright.codegen.devices.cells import Faults, stuck
from bitwright.codegen.devices.contract import product, product_in_words
from bitwright.codegen.devices.gates import Activity, GatedSums
from bitwright.codegen.devices.schema import Device
from bitwright.codegen.devices.select import Selected, cure_of, select, work_of
from bitwright.codegen.devices.tables import TableSums
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput, Problem, Unsupported
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_numpy, to_torch
from bitwright.ir.types import NM, TensorType

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Layer:
    """One region on the device. ``limit``: what its cycles are bound by."""

    name: str
    origin: str
    instruction: str
    reason: str
    macs: int
    steps: int
    cycles: float
    weight_bytes: float
    activation_bytes: float
    energy: float
    limit: str


@dataclass(frozen=True)
class Schedule:
    """What a graph takes on a device."""

    device: Device
    graph: Graph
    layers: tuple[Layer, ...]
    chosen: Mapping[str, Selected]
    """By the name of the contraction's result."""

    @property
    def cycles(self) -> float:
        return sum(x.cycles for x in self.layers)

    @property
    def seconds(self) -> float:
        return self.cycles / self.device.clock

    @property
    def energy(self) -> float:
        """Joules, static power included."""
        return sum(x.energy for x in self.layers) + self.device.power * self.seconds

    @property
    def weight_bytes(self) -> float:
        return sum(x.weight_bytes for x in self.layers)


def schedule(graph: Graph, device: Device) -> Schedule:
    """Choose instructions and count; raises :class:`Unsupported` that lists every contraction without one, and
    :class:`InvalidInput` that names what does not fit the memories."""
    layers, chosen, problems = [], {}, []
    for node in graph.nodes:
        if not isinstance(node.op, ops.Region):
            continue
        body = node.op.body
        weights = weights_of(graph, node)
        for n in body.nodes:
            if not isinstance(n.op, ops.CONTRACTION):
                continue
            answer = select(n, body, weights.get(n.inputs[1]), device)
            if isinstance(answer, str) and not (n.type.dtype.is_float and device.vector.contractions):
                problems.append(Problem(n.op.spelling, n.origin or n.output, answer, cure_of(device)))
            elif isinstance(answer, str):
                chosen[n.output] = Selected(work_of(n, body), None, 0, f"on the vector unit ({answer})")
            else:
                chosen[n.output] = answer
        if not problems:
            layers.append(_layer(node, graph, device, chosen))
    if problems:
        raise Unsupported(problems)
    made = Schedule(device, graph, tuple(layers), chosen)
    _fits_memories(made)
    return made


def weights_of(graph: Graph, node: Node) -> dict[str, Array]:
    """Constant operands of a region by the names its body gives them."""
    assert isinstance(node.op, ops.Region)
    pairs = zip(node.op.body.inputs, node.inputs, strict=True)
    found = {v.name: graph.constant(value) for v, value in pairs}
    return {k: a for k, a in found.items() if isinstance(a, np.ndarray)}


def stored_bytes(t: TensorType, mask: NM | None = None) -> float:
    """Bytes of a value at its format's width; weights of a masked instruction keep their non-zeros and their places."""
    bits = float(t.dtype.bits)
    if mask is not None:
        bits = mask.density * (bits + max(1, (mask.group - 1).bit_length()))
    return t.size * bits / 8


def _layer(node: Node, graph: Graph, device: Device, chosen: Mapping[str, Selected]) -> Layer:
    assert isinstance(node.op, ops.Region)
    body = node.op.body
    constant = weights_of(graph, node)
    masks: dict[str, NM | None] = {}
    for n in body.nodes:
        if (found := chosen.get(n.output)) is not None and found.instruction is not None:
            masks[n.inputs[1]] = found.instruction.parsed.pattern
    bytes_ = {v.name: stored_bytes(v.type, masks.get(v.name)) for v in body.inputs if v.name in constant}
    for n in body.nodes:
        if (found := chosen.get(n.output)) is not None and found.words is not None:
            bytes_[n.inputs[1]] = found.words.stored_bytes(found.work.taps * found.work.channels)
        if (
            found is not None
            and found.books is not None
            and device.tables is not None
            and found.instruction is not None
        ):
            terms, bits = found.work.taps * found.work.channels, found.instruction.parsed.w.bits
            bytes_[n.inputs[1]] = found.books.stored_bytes(terms, device.tables, bits)
    weight_bytes = float(sum(map(ceil, bytes_.values())))
    activations = [v.type for v in body.inputs if v.name not in constant] + [body.types[o] for o in body.outputs]
    activation_bytes = sum(stored_bytes(t) for t in activations)
    cycles = energy = 0.0
    steps = macs = 0
    names, reasons = [], []
    for n in body.nodes:
        selected = chosen.get(n.output)
        if selected is not None:
            macs += selected.work.macs
            reasons.append(selected.reason)
        if selected is not None and selected.instruction is not None:
            names.append(selected.names)
            steps += selected.steps
            cycles += selected.steps * selected.instruction.cycles
            energy += selected.energy
            if selected.books is not None and device.tables is not None:
                filled = len(selected.books.values) * device.tables.filled
                cycles += filled * device.tables.fill_cycles
                energy += filled * device.tables.fill_energy
        elif not isinstance(n.op, ops.Constant):
            count = selected.work.macs if selected is not None else sum(t.size for t in n.types)
            cycles += count * device.vector.cycles
            energy += count * device.vector.energy
    moved = {
        "arithmetic": cycles,
        "weights": weight_bytes / device.weights.bandwidth,
        "activations": activation_bytes / device.activations.bandwidth,
    }
    limit = max(moved, key=lambda k: moved[k])
    energy += weight_bytes * device.weights.energy + activation_bytes * device.activations.energy
    origin = next((n.origin for n in body.nodes if n.output in chosen and n.origin), node.origin)
    return Layer(
        node.output, origin, " ".join(names) or "vector", "; ".join(reasons), macs, steps, float(ceil(moved[limit])),
        weight_bytes, activation_bytes, energy, limit,
    )  # fmt: skip


def _fits_memories(made: Schedule) -> None:
    device = made.device
    if made.weight_bytes > device.weights.size:
        big = sorted(made.layers, key=lambda x: -x.weight_bytes)[:3]
        raise InvalidInput(
            f"{made.graph.name} does not fit {device.name}: its weights take {made.weight_bytes:.0f} bytes, the memory "
            f"holds {device.weights.size:.0f}; the largest: {_named(big, [x.weight_bytes for x in big])}"
        )
    over = [x for x in made.layers if x.activation_bytes > device.activations.size]
    if over:
        raise InvalidInput(
            f"{made.graph.name} does not fit {device.name}: values of these layers exceed the "
            f"{device.activations.size:.0f} bytes for activations: {_named(over, [x.activation_bytes for x in over])}"
        )


def _named(layers: Sequence[Layer], sizes: Sequence[float]) -> str:
    return ", ".join(f"{x.origin or x.name} {n:.0f} bytes" for x, n in zip(layers, sizes, strict=True))


def simulate(
    made: Schedule, inputs: Sequence[Any], activity: Activity | None = None, faults: Faults | None = None
) -> list[Array]:
    """The outputs, computed by the instructions' meanings; ``inputs`` in the graph's order.

    ``activity`` counts the gates of a device that has them; ``faults`` are those of a device with cells.
    """
    from bitwright.ir.semantics import apply

    graph = made.graph
    values: dict[str, Any] = {v.name: to_torch(np.asarray(a)) for v, a in zip(graph.inputs, inputs, strict=True)}
    for node in graph.nodes:
        if isinstance(node.op, ops.Weight | ops.Constant):
            values[node.output] = to_torch(graph.constant(node.output))
        elif isinstance(node.op, ops.Region):
            _region(made, node, values, activity or Activity(), faults or Faults())
        else:
            values.update(zip(node.outputs, apply(node.op, *(values[x] for x in node.inputs)), strict=True))
    return [to_numpy(values[o]) for o in graph.outputs]


def _region(made: Schedule, node: Node, values: dict[str, Any], activity: Activity, faults: Faults) -> None:
    from bitwright.ir.semantics import apply

    assert isinstance(node.op, ops.Region)
    body = node.op.body
    inner = {v.name: values[x] for v, x in zip(body.inputs, node.inputs, strict=True)}
    for n in body.nodes:
        selected = made.chosen.get(n.output)
        if selected is not None and selected.instruction is not None and made.device.cells is not None:
            inner[n.inputs[1]] = stuck(inner[n.inputs[1]], made.device.cells, faults, n.output)
        if isinstance(n.op, ops.Constant):
            inner[n.output] = to_torch(body.constant(n.output))
        elif selected is not None and selected.words is not None:
            inner[n.output] = product_in_words(n, selected.words, *(inner[x] for x in n.inputs))
        elif selected is not None and selected.instruction is not None and made.device.tables is not None:
            looked = TableSums(made.device.tables)
            inner[n.output] = product(n, selected.instruction, inner[n.inputs[0]], inner[n.inputs[1]], sums=looked)
        elif selected is not None and selected.instruction is not None and made.device.gates is not None:
            sums = GatedSums()
            inner[n.output] = product(n, selected.instruction, inner[n.inputs[0]], inner[n.inputs[1]], sums=sums)
            activity.count(n.origin or n.output, sums.active, selected.work.macs)
        elif selected is not None and selected.instruction is not None:
            inner[n.output] = product(n, selected.instruction, *(inner[x] for x in n.inputs))
        else:
            inner.update(zip(n.outputs, apply(n.op, *(inner[x] for x in n.inputs)), strict=True))
    values.update((o, inner[i]) for o, i in zip(node.outputs, body.outputs, strict=True))
