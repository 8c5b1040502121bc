"""From a kernel-level graph to a program: choose kernels, compile them, plan memory, write main, link."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitwright.codegen.cache import Cache, key_of
from bitwright.codegen.jobs import Job, compile_all
from bitwright.codegen.link import compiler_for, find_compiler, link
from bitwright.codegen.main_c import Variant, main_c
from bitwright.codegen.plan import Arg, Buffer, Plan, Step, plan
from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.errors import Problem, Unsupported
from bitwright.ir.graph import Graph, Node, subgraph
from bitwright.ir.target import Target
from bitwright.ir.types import TensorType
from bitwright.ir.weights import Array

if TYPE_CHECKING:
    from bitwright.codegen.cuda.launches import Launch
    from bitwright.codegen.tuning.space import Records
    from bitwright.codegen.tvm.select import Choice
    from bitwright.codegen.tvm.template import Config

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One step of the program for the report: the region's node, what was chosen, bytes of its packed weights.

    ``config`` and ``packed_types``: the template's decisions and the element types of its packed weights, from which
    they are read back.
    """

    node: Node
    template: str
    symbol: str
    reason: str
    refused: tuple[tuple[str, str], ...]
    tasks: int
    weight_bytes: int
    config: Config
    packed_types: tuple[str, ...]
    record: str
    """The tuning record it was chosen by; empty for the template's own choice."""


@dataclass(frozen=True, slots=True)
class Built:
    """A linked program: the shared library, the weight blob, the plan, and one row per kernel."""

    library: bytes
    weights: Array
    plan: Plan
    graph: Graph
    kernels: tuple[Kernel, ...]
    source: str
    compiled: int
    notes: tuple[str, ...]
    launches: tuple[Launch, ...] = ()
    """Of a program for a GPU, whose ``library`` is a bundle of kernels."""


def build(
    graph: Graph,
    target: Target,
    *,
    rows: int = 1,
    row_inputs: Sequence[int] = (),
    row_outputs: Sequence[int] = (),
    cache: Cache | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    records: Records | None = None,
) -> Built:
    """Build a static kernel-level graph for ``target``.

    ``rows``, ``row_inputs``, ``row_outputs``: the chunk of a symbolic batch the graph was bound to and the bytes
    per row of each input and output. ``records``: measured kernels are taken from there.
    Raises :class:`Unsupported` listing every region without a kernel.
    """
    cc = compiler_for(target.arch)
    find_compiler(cc)  # its lack is told before kernels are compiled
    from bitwright.codegen.tvm.select import Order, compile_order

    graph, choices = select(graph, target, records)
    orders = {c.key: c for c in choices.values()}
    jobs = [Job(c.key, c.symbol, Order(c.template, c.body, c.config, c.symbol)) for c in orders.values()]
    before = (cache.misses if cache else 0) or 0

    def report(done: int, total: int, name: str) -> None:
        if progress is not None:
            progress(f"compile {name}", done / max(total, 1))

    objects = compile_all(compile_order, jobs, workers, cache=cache, progress=report)
    symbols = {c.symbol: objects[c.key] for c in orders.values()}
    steps, buffers, data = program_of(graph, choices)
    made = plan(steps, buffers, graph.outputs)
    blob = blob_of(made, data)
    notes: list[str] = []
    source = main_c([Variant(made, rows, tuple(row_inputs), tuple(row_outputs))], features=target.features)
    compiled = (cache.misses - before) if cache else len(jobs)
    library = _linked(symbols, source, cc, notes, cache)
    kernels = tuple(row_of(n, choices[n.output]) for n in graph.nodes if n.output in choices)
    return Built(library, blob, made, graph, kernels, source, compiled, tuple(notes))


def blob_of(made: Plan, data: Mapping[str, Array]) -> Array:
    """The weights as planned; bytes from a cache line's start on, where a program uses them in place."""
    raw = np.zeros(made.weights_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    blob = raw[start : start + made.weights_bytes]
    for name, array in data.items():
        at = made.weight_offsets[name]
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        blob[at : at + flat.size] = flat
    return blob


def _linked(objects: Mapping[str, bytes], source: str, cc: str | None, notes: list[str], cache: Cache | None) -> bytes:
    """The program's library, from the cache if these objects and this C text were linked before."""
    command = find_compiler(cc)
    key = key_of("library", command, source, *(part for name in objects for part in (name, objects[name])))
    found = cache.get(key) if cache else None
    if found is None:
        found = link(objects, source, openmp=True, cc=cc, notes=notes)
        if cache and not notes:  # what it could not do is told every time
            cache.put(key, found)
    return found


def row_of(node: Node, choice: Choice) -> Kernel:
    """The report's row of a region and its kernel."""
    nbytes = sum(p.nbytes for p in choice.packed)
    config, types = choice.config, tuple(p.dtype.name for p in choice.packed)
    return Kernel(
        node, choice.template, choice.symbol, config.reason, choice.refused, config.tasks, nbytes, config, types,
        choice.record,
    )  # fmt: skip


def select(graph: Graph, target: Target, records: Records | None = None) -> tuple[Graph, dict[str, Choice]]:
    """A kernel for every region; regions that no template takes whole are split into single operators."""
    from bitwright.codegen.tvm.select import choose

    choices: dict[str, Choice] = {}
    split: dict[str, list[tuple[str, str]]] = {}
    for node in graph.nodes:
        if isinstance(node.op, ops.Region):
            answer = choose(node.op.body, constants_of(graph, node), target, records)
            if isinstance(answer, list):
                split[node.output] = answer
            else:
                choices[node.output] = answer
    if not split:
        return graph, choices
    problems = [
        Problem(
            n.op.body.nodes[-1].op.spelling, n.origin or n.output, "; ".join(f"{t}: {w}" for t, w in split[n.output])
        )
        for n in graph.nodes
        if n.output in split and isinstance(n.op, ops.Region) and _computing(n.op.body) < 2
    ]
    if problems:
        raise Unsupported(problems)
    graph = split_regions(graph, set(split))
    rest, more = select(graph, target, records)
    return rest, choices | more


def _computing(body: Graph) -> int:
    return sum(not isinstance(n.op, ops.Constant) for n in body.nodes)


def split_regions(graph: Graph, outputs: set[str]) -> Graph:
    """Every node of these regions becomes a region of its own (reshapes become views)."""
    rw = Rewriter(graph)
    for node in graph.nodes:
        if node.output not in outputs:
            rw.keep(node)
            continue
        assert isinstance(node.op, ops.Region)
        body = node.op.body
        here = dict(zip((v.name for v in body.inputs), rw.of(*node.inputs), strict=True))
        for n in body.nodes:
            if isinstance(n.op, ops.Constant):
                continue
            if isinstance(n.op, ops.Reshape):
                here[n.output] = rw.emit(n.op, here[n.inputs[0]], name=n.output, origin=n.origin)
                continue
            literals = [body.producers[x] for x in n.inputs if body.is_constant(x)]
            single, reads = subgraph(body, [*dict.fromkeys(literals), n], n.outputs)
            op = ops.Region(single, node.op.role if n is body.nodes[-1] else "generic")
            outs = rw.append(op, [here[x] for x in reads], n.outputs, n.types, n.origin)
            here.update(zip(n.outputs, outs, strict=True))
        rw.replace(node, *(here[o] for o in body.outputs))
    return rw.done()


def constants_of(graph: Graph, node: Node) -> dict[str, Array]:
    """Arrays of the body's inputs that are weights, by the body's input name (views of weights included)."""
    assert isinstance(node.op, ops.Region)
    out: dict[str, Array] = {}
    for value, inner in zip(node.inputs, node.op.body.inputs, strict=True):
        array = graph.constant(value)
        if isinstance(array, np.ndarray):
            out[inner.name] = array
    return out


def nbytes_of(t: TensorType) -> int:
    """Bytes of a static value."""
    return t.size * int(t.dtype.numpy.itemsize)


def program_of(graph: Graph, choices: Mapping[str, Choice]) -> tuple[list[Step], list[Buffer], dict[str, Array]]:
    """Steps and buffers for the planner, and the weight arrays by buffer name."""
    buffers = [Buffer(v.name, nbytes_of(v.type), "input") for v in graph.inputs]
    steps: list[Step] = []
    data: dict[str, Array] = {}
    packed_as: dict[tuple[str, int, str], str] = {}
    plain: dict[str, Buffer] = {}
    for node in graph.nodes:
        if isinstance(node.op, ops.Weight):
            array = graph.weights[node.op.ref].array
            plain[node.output] = Buffer(node.output, array.nbytes, "weight")
            data[node.output] = array
        elif isinstance(node.op, ops.Reshape):
            buffers.append(Buffer(node.output, nbytes_of(node.type), "alias", node.inputs[0], 0))
        else:
            choice = choices[node.output]
            buffers += [Buffer(o, nbytes_of(t)) for o, t in zip(node.outputs, node.types, strict=True)]
            names = []
            for i, array in enumerate(choice.packed):
                key = (choice.template, i, _content(array))
                if key not in packed_as:
                    packed_as[key] = f"{node.output}#packed{i}"
                    buffers.append(Buffer(packed_as[key], array.nbytes, "weight"))
                    data[packed_as[key]] = array
                names.append(packed_as[key])
            work = getattr(choice.config, "work_bytes", 0)
            buffers += [Buffer(f"{node.output}#work", work)] if work else []
            steps.append(_step(node, choice, names))
    used = {a.buffer for s in steps for a in s.args} | set(graph.outputs)
    used |= {b.alias_of for b in buffers if b.kind == "alias"}
    buffers += [b for name, b in plain.items() if name in used]
    return steps, buffers, {k: v for k, v in data.items() if k in used or "#packed" in k}


def _content(array: Array) -> str:
    import hashlib

    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{array.dtype}{array.shape}" + hashlib.blake2b(flat.data if flat.size else b"", digest_size=16).hexdigest()


def _step(node: Node, choice: Choice, packed: Sequence[str]) -> Step:
    args = []
    for a in choice.config.args:
        if a.kind == "input":
            args.append(Arg(node.inputs[a.index]))
        elif a.kind == "packed":
            args.append(Arg(packed[a.index]))
        else:
            args.append(Arg(node.outputs[a.index], access="w"))
    if getattr(choice.config, "work_bytes", 0):
        args.append(Arg(f"{node.output}#work", access="w"))
    where = {(a.kind, a.index): i for i, a in enumerate(choice.config.args)}
    inplace = tuple((where["output", o], where["input", i]) for o, i in choice.config.inplace)
    config = choice.config
    return Step(choice.symbol, config.tasks, tuple(args), config.scratch_bytes, node.output, inplace)


__all__ = ["Built", "Kernel", "blob_of", "build", "constants_of", "nbytes_of", "program_of", "row_of", "select"]
