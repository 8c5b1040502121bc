"""The static memory plan: where every value of a program lies, and which steps must wait for each other.

A program is a list of kernel calls over named buffers. Intermediate values share one arena by lifetime;
graph inputs and outputs are the caller's memory; weights lie in one blob. Nothing is allocated at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from bitwright.codegen.packing import Span, lower_bound, pack
from bitwright.ir.errors import VerifyError

Kind = Literal["input", "output", "value", "weight", "alias"]
Access = Literal["r", "w", "rw"]
Space = Literal["input", "output", "arena", "weight"]

ALIGN = 64
"""Every buffer starts at a multiple of this many bytes."""
PAD = 64
"""Readable bytes behind every value and behind the weights: kernels may read (never write) past the end."""
COPY = "bw_copy"
"""The ``kernel_symbol`` of a plain copy: argument 0 is written, argument 1 is read."""
COPY_BLOCK = 1 << 16
"""Bytes one task of a copy step moves."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """A named piece of memory of ``nbytes`` bytes.

    ``alias``: a view of ``alias_of`` that starts ``offset`` bytes into it (chains are allowed).
    ``weight``: ``offset`` is its place in the weight blob, -1 lets :func:`plan` place it.
    """

    name: str
    nbytes: int
    kind: Kind = "value"
    alias_of: str = ""
    offset: int = -1


@dataclass(frozen=True, slots=True)
class Arg:
    """One pointer argument: ``offset`` bytes into ``buffer``; ``nbytes`` -1 means up to the buffer's end."""

    buffer: str
    offset: int = 0
    access: Access = "r"
    nbytes: int = -1


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel call over the tasks ``[0, tasks)``.

    ``scratch_bytes`` above 0: the kernel takes a last ``uint8_t* scratch`` of that size, one per thread.
    ``inplace``: pairs (index of a written argument, index of a read one) that may share memory when the
    read value dies here; only for kernels whose task i reads nothing that another task writes.
    """

    kernel_symbol: str
    tasks: int
    args: tuple[Arg, ...]
    scratch_bytes: int = 0
    label: str = ""
    inplace: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Where an argument lies: ``offset`` bytes into a space; ``index`` numbers inputs and outputs."""

    space: Space
    index: int
    offset: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer of :func:`plan`: all that the generated C needs.

    ``places[s][a]`` is argument a of step s, ``barriers[s]`` says that step s waits for all threads first.
    ``bound_bytes`` is what no arena can go below (largest sum of values live at once, with padding).
    """

    steps: tuple[Step, ...]
    places: tuple[tuple[Place, ...], ...]
    barriers: tuple[bool, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: Mapping[str, int]
    offsets: Mapping[str, int]
    weight_offsets: Mapping[str, int]
    arena_bytes: int
    bound_bytes: int
    scratch_bytes: int
    weights_bytes: int


@dataclass(slots=True)
class _Storage:
    """Memory that one or several values (merged by in-place steps) occupy, with its lifetime in steps."""

    nbytes: int
    first: int = -1
    last: int = -1
    kind: Kind = "value"
    members: list[str] = field(default_factory=list)


def align(nbytes: int) -> int:
    """``nbytes`` rounded up to :data:`ALIGN`."""
    return -(-nbytes // ALIGN) * ALIGN


def place_weights(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of weights laid one behind the other, and the size of the blob with its padding.

    >>> place_weights({"a": 10, "b": 64})
    ({'a': 0, 'b': 64}, 192)
    """
    offsets, end = {}, 0
    for name, nbytes in sizes.items():
        offsets[name] = end
        end = align(end + nbytes)
    return offsets, end + PAD


def copy_step(target: str, source: str, nbytes: int, label: str = "") -> Step:
    """A step that copies ``nbytes`` bytes of buffer ``source`` to buffer ``target``."""
    args = (Arg(target, 0, "w", nbytes), Arg(source, 0, "r", nbytes))
    return Step(COPY, max(1, -(-nbytes // COPY_BLOCK)), args, 0, label or f"copy {source} to {target}")


def plan(steps: Sequence[Step], buffers: Sequence[Buffer], outputs: Sequence[str] | None = None) -> Plan:
    """Place every value of a program given as steps in execution order.

    ``outputs`` names the graph outputs in order, buffers of any kind; None means those of kind ``output`` as
    declared. A value is written straight into the caller's memory when it can be, otherwise (an input, a
    weight, part of another value, the same value twice) a copy step is added. Raises :class:`VerifyError`
    for a program that reads unwritten values, leaves its buffers, or names what does not exist.
    """
    table = _Table(buffers)
    steps, out_names = _bind_outputs(list(steps), table, outputs)
    for index, step in enumerate(steps):
        _check_step(index, step, table)
    storages = _share_in_place(steps, table, _lifetimes(steps, table))
    unique = list({id(s): s for s in storages.values()}.values())
    arena = [s for s in unique if s.kind == "value" and s.first >= 0]
    spans = [Span(align(s.nbytes) + PAD, s.first, s.last) for s in arena]
    where, arena_bytes = pack(spans)
    offsets = {name: at for s, at in zip(arena, where, strict=True) for name in s.members}
    weight_offsets, weights_bytes = table.weights()
    inputs = tuple(b.name for b in buffers if b.kind == "input")
    names = {"input": inputs, "output": out_names}

    def place(arg: Arg) -> Place:
        root, start = table.resolve(arg.buffer)
        kind = table[root].kind
        if kind == "weight":
            return Place("weight", 0, weight_offsets[root] + start + arg.offset)
        storage = storages[root]
        if storage.kind == "value":
            return Place("arena", 0, offsets[root] + start + arg.offset)
        owner = next(m for m in storage.members if table[m].kind == storage.kind)
        space: Space = "input" if storage.kind == "input" else "output"
        return Place(space, names[space].index(owner), start + arg.offset)

    places = tuple(tuple(place(a) for a in s.args) for s in steps)
    return Plan(
        steps=tuple(steps),
        places=places,
        barriers=_barriers(steps, places, table),
        inputs=inputs,
        outputs=tuple(out_names),
        sizes={b.name: b.nbytes for b in table.values()},
        offsets=offsets,
        weight_offsets=weight_offsets,
        arena_bytes=arena_bytes,
        bound_bytes=lower_bound(spans),
        scratch_bytes=align(max((s.scratch_bytes for s in steps), default=0)),
        weights_bytes=weights_bytes,
    )


class _Table(dict[str, Buffer]):
    """Buffers by name, with views resolved to the memory they lie in."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        super().__init__()
        for b in buffers:
            if b.name in self:
                raise VerifyError(f"plan: buffer {b.name!r} is declared twice")
            if b.nbytes < 0:
                raise VerifyError(f"plan: buffer {b.name!r} has {b.nbytes} bytes")
            self[b.name] = b
        for b in buffers:
            root, start = self.resolve(b.name)
            if start < 0 or start + b.nbytes > self[root].nbytes:
                room = self[root].nbytes
                raise VerifyError(f"plan: {b.name!r} ({b.nbytes} bytes at {start}) leaves {root!r} ({room} bytes)")

    def resolve(self, name: str) -> tuple[str, int]:
        """The buffer that holds ``name``, and the offset in it."""
        start, seen = 0, {name}
        while (b := self.known(name)).kind == "alias":
            start += max(b.offset, 0)
            name = b.alias_of
            if name in seen:
                raise VerifyError(f"plan: buffer {name!r} is a view of itself")
            seen.add(name)
        return name, start

    def known(self, name: str) -> Buffer:
        if name not in self:
            raise VerifyError(f"plan: there is no buffer {name!r}")
        return self[name]

    def extent(self, arg: Arg) -> tuple[str, int, int]:
        """(root buffer, first byte, end byte) of an argument."""
        root, start = self.resolve(arg.buffer)
        nbytes = arg.nbytes if arg.nbytes >= 0 else self[arg.buffer].nbytes - arg.offset
        return root, start + arg.offset, start + arg.offset + nbytes

    def weights(self) -> tuple[dict[str, int], int]:
        weights = [b for b in self.values() if b.kind == "weight"]
        given = {b.name: b.offset for b in weights if b.offset >= 0}
        for name, at in given.items():
            if at % ALIGN:
                raise VerifyError(f"plan: weight {name!r} lies at {at}, not a multiple of {ALIGN}")
        end = align(max((at + self[name].nbytes for name, at in given.items()), default=0))
        free, size = place_weights({b.name: b.nbytes for b in weights if b.offset < 0})
        return given | {name: end + at for name, at in free.items()}, end + size


def _bind_outputs(
    steps: list[Step], table: _Table, outputs: Sequence[str] | None
) -> tuple[list[Step], tuple[str, ...]]:
    """Turn values into outputs where that is possible, add copies where it is not."""
    if outputs is None:
        return steps, tuple(b.name for b in table.values() if b.kind == "output")
    names: list[str] = []
    for index, name in enumerate(outputs):
        root, start = table.resolve(name)
        buffer, whole = table[root], start == 0 and table[root].nbytes == table[name].nbytes
        if whole and buffer.kind in ("value", "output") and root not in names:
            table[root] = replace(buffer, kind="output")
            names.append(root)
            continue
        target = f"{name}#out{index}"
        table[target] = Buffer(target, table[name].nbytes, "output")
        steps.append(copy_step(target, name, table[name].nbytes, f"output {index}: copy of {name}"))
        names.append(target)
    if left := [b.name for b in table.values() if b.kind == "output" and b.name not in names]:
        raise VerifyError(f"plan: {left[0]!r} is of kind output but not among the outputs")
    return steps, tuple(names)


def _check_step(index: int, step: Step, table: _Table) -> None:
    where = f"plan: step {index} ({step.label or step.kernel_symbol})"
    if not 0 <= step.tasks < 1 << 31:
        raise VerifyError(f"{where} has {step.tasks} tasks; between 0 and 2^31-1 can be numbered")
    for number, arg in enumerate(step.args):
        size = table.known(arg.buffer).nbytes
        root, low, high = table.extent(arg)
        if arg.offset < 0 or high < low or arg.offset + (high - low) > size:
            end = arg.offset + high - low
            raise VerifyError(f"{where}: argument {number} uses bytes up to {end} of {arg.buffer!r}, which has {size}")
        if "w" in arg.access and table[root].kind in ("input", "weight"):
            raise VerifyError(f"{where} writes {root!r}, which is a graph {table[root].kind}")
    for pair in step.inplace:
        if not all(0 <= i < len(step.args) for i in pair):
            raise VerifyError(f"{where}: in-place pair {pair} names an argument that does not exist")


def _lifetimes(steps: Sequence[Step], table: _Table) -> dict[str, _Storage]:
    """A storage for each buffer that is not a view or a weight, alive from its first to its last use."""
    storages = {
        b.name: _Storage(b.nbytes, kind=b.kind, members=[b.name])
        for b in table.values()
        if b.kind not in ("alias", "weight")
    }
    for index, step in enumerate(steps):
        touched = [(table.resolve(a.buffer)[0], a.access) for a in step.args]
        for root, access in sorted(touched, key=lambda t: t[1] != "r"):  # reads happen first
            if root not in storages:
                continue
            storage = storages[root]
            if storage.first < 0 and access != "w" and storage.kind != "input":
                name = step.label or step.kernel_symbol
                raise VerifyError(f"plan: step {index} ({name}) reads {root!r} before anything wrote it")
            storage.first = index if storage.first < 0 else storage.first
            storage.last = index
    for storage in storages.values():
        if storage.kind == "output" and storage.first < 0:
            raise VerifyError(f"plan: nothing writes output {storage.members[0]!r}")
    return storages


def _share_in_place(steps: Sequence[Step], table: _Table, storages: dict[str, _Storage]) -> dict[str, _Storage]:
    """Merge the storage of a value that dies at an in-place step with that of the step's result."""
    for index, step in enumerate(steps):
        for out, src in step.inplace:
            source, target = table.extent(step.args[src])[0], table.extent(step.args[out])[0]
            if source not in storages or target not in storages:
                continue
            a, b = storages[source], storages[target]
            if a is b or a.kind != "value" or a.last != index or b.first != index:
                continue
            if not _covers(step, table, (out, src), (source, target)):
                continue
            merged = _Storage(max(a.nbytes, b.nbytes), a.first, b.last, b.kind, a.members + b.members)
            if b.kind == "output" and a.nbytes > b.nbytes:
                continue
            storages.update({name: merged for name in merged.members})
    return storages


def _covers(step: Step, table: _Table, pair: tuple[int, int], roots: tuple[str, str]) -> bool:
    """True when both arguments are whole buffers and no undeclared argument of the step touches them."""
    out, src = pair
    allowed = {out} | {i for o, i in step.inplace if o == out}
    for number, arg in enumerate(step.args):
        root, low, high = table.extent(arg)
        if root in roots and (number not in allowed or (low, high) != (0, table[root].nbytes)):
            return False
    return out != src


def _barriers(steps: Sequence[Step], places: Sequence[Sequence[Place]], table: _Table) -> tuple[bool, ...]:
    """For each step, whether something since the last barrier wrote what it uses or used what it writes."""
    answer: list[bool] = []
    pending: list[tuple[tuple[Space, int], int, int, bool]] = []
    for step, spots in zip(steps, places, strict=True):
        mine: list[tuple[tuple[Space, int], int, int, bool]] = []
        for arg, spot in zip(step.args, spots, strict=True):
            _, low, high = table.extent(arg)
            if spot.space != "weight" and high > low:
                key, size = (spot.space, spot.index), high - low
                mine.append((key, spot.offset, spot.offset + size, "w" in arg.access))
        clash = any(
            k == k2 and low < high2 and low2 < high and (w or w2)
            for k, low, high, w in mine
            for k2, low2, high2, w2 in pending
        )
        answer.append(clash)
        pending = mine if clash else pending + mine
    return tuple(answer)
