"""What there is to tune in a model: each distinct workload once, with how much of the run time it accounts for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bitwright.codegen.build import constants_of, nbytes_of, select
from bitwright.codegen.cost import cost_of
from bitwright.codegen.tuning.inputs import drawn
from bitwright.codegen.tuning.measure import Case
from bitwright.codegen.tuning.workload import describe, workload_key
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.target import Target
from bitwright.ir.weights import Array
from bitwright.ir.work import macs

TOLERANCE = 1e-3
"""Error of float results that a kernel may have, relative to the largest value: sums in other orders, polynomials."""
_GATHERS = (ops.Gather,)


@dataclass
class Task:
    """One workload of a model: a canonical body, weights of one of its layers, and how often it runs.

    ``predicted`` and ``limit``: seconds of one call by the cost model, and at the target's peak. ``template``: what
    runs it untuned. ``cold_bytes``: what the rest of the model touches between two calls, as far as caches notice.
    """

    key: str
    text: str
    body: Graph
    constants: dict[str, Array]
    count: int
    names: list[str]
    template: str
    predicted: float
    limit: float
    cold_bytes: int = 0
    features: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The first layer's name, and how many share its kernel."""
        return self.names[0] + (f" and {self.count - 1} more" if self.count > 1 else "")


def tasks_of(graph: Graph, target: Target) -> list[Task]:
    """The tasks of a static kernel-level graph, those of the largest predicted share first."""
    from bitwright.codegen.tvm.select import positional

    graph, choices = select(graph, target)
    tasks: dict[str, Task] = {}
    touched = sum(p.nbytes for c in choices.values() for p in c.packed)
    touched += sum(nbytes_of(t) for n in graph.nodes if isinstance(n.op, ops.Region) for t in n.types)
    resident = min(touched, 2 * target.l2_bytes)
    for node in graph.nodes:
        if not isinstance(node.op, ops.Region):
            continue
        plain, constants = positional(node.op.body, constants_of(graph, node))
        key = workload_key(plain, constants)
        if key in tasks:
            tasks[key].count += 1
            tasks[key].names.append(node.origin or node.output)
            continue
        template = choices[node.output].template
        cost = cost_of(plain, target, generic=template.endswith("generic"))
        tasks[key] = Task(
            key, describe(plain, constants), plain, constants, 1, [node.origin or node.output], template,
            cost.seconds, cost.limit, resident, features_of(plain, constants, target),
        )  # fmt: skip
    return sorted(tasks.values(), key=lambda t: -t.predicted * t.count)


def features_of(body: Graph, constants: Mapping[str, Array], target: Target) -> dict[str, float]:
    """Numbers that tell workloads apart, for the cost model and to find the nearest: logarithms of sizes and work,
    densities, and what the root does."""
    out: dict[str, float] = {"isa." + target.isa: 1.0}
    root = next((n for n in body.nodes if macs(n, body)), None)
    work = sum(macs(n, body) for n in body.nodes)
    out["work"] = math.log2(1 + work)
    out["bytes"] = math.log2(1 + sum(v.type.size * v.type.dtype.numpy.itemsize for v in body.inputs))
    out["steps"] = float(sum(not isinstance(n.op, ops.Constant) for n in body.nodes))
    out["op." + (root or body.nodes[-1]).op.spelling] = 1.0
    if root is not None:
        x, w = body.types[root.inputs[0]], body.types[root.inputs[1]]
        cols = int(root.type.static_shape[-1])
        out |= {"rows": math.log2(root.type.size / cols), "cols": math.log2(cols)}
        out["depth"] = math.log2(max(1, work // max(1, root.type.size)))
        out |= {f"x.{x.dtype}": 1.0, f"w.{w.dtype}": 1.0, "groups": math.log2(getattr(root.op, "groups", 1))}
        array = constants.get(root.inputs[1])
        out["density"] = 1.0 if array is None else round(np.count_nonzero(array) / max(1, array.size), 2)
    return out


def cases_of(task: Task, seed: int) -> tuple[Case, ...]:
    """Fresh random inputs and adversarial ones from the workload's types, with the results of the reference."""
    types = [v.type for v in task.body.inputs]
    return tuple(_case(task, values) for values in drawn(task.key, types, gathers(task.body), seed))


def gathers(body: Graph) -> bool:
    """Whether inputs are used as indices."""
    return any(isinstance(n.op, _GATHERS) for n in body.nodes)


def _case(task: Task, values: Sequence[Array]) -> Case:
    pairs = zip(task.body.inputs, values, strict=True)
    inputs = [task.constants.get(v.name, a) for v, a in pairs]
    with np.errstate(all="ignore"):
        outputs = [to_numpy(t) for t in evaluate(task.body, inputs)]
    return Case(tuple(map(np.ascontiguousarray, inputs)), tuple(map(np.ascontiguousarray, outputs)))


def exactness(body: Graph) -> tuple[float, bool]:
    """(tolerance of float results, whether integer results come from floats and may be one step off)."""
    floats = any(t.dtype.is_float for v, t in body.types.items() if not body.is_constant(v))
    return (TOLERANCE, True) if floats else (0.0, False)
