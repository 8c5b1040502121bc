"""Channel coupling: which positions of weights, constants and values stand for the same channel.

Every output channel of a weight is an *atom*. Atoms travel through the graph as labels: integer arrays over some axes
of a value, moved by the data-movement operators exactly as the data is. Values that meet in an elementwise operator,
a shared weight or an attention tie their atoms together; what has no rule, and whatever the user sees, is pinned.
The rules of the operators stand in ``_channel_rules.py`` and ``_channel_views.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import NM, Codebook, Encoding

Ints = np.ndarray[Any, np.dtype[np.int64]]
Mode = Literal["permute", "prune"]
Role = Literal["out", "in", "ride"]


@dataclass(frozen=True, eq=False)
class Label:
    """The atoms at the positions of ``axes`` (ascending) of a value; ``offsets`` tell apart several positions of one
    atom, as after flattening. Both arrays have the sizes of these axes as their shape."""

    axes: tuple[int, ...]
    atoms: Ints
    offsets: Ints

    def on(self, axes: tuple[int, ...]) -> Label:
        """The same positions on other axes of the same sizes and order."""
        return replace(self, axes=axes)


@dataclass(frozen=True, eq=False)
class Use:
    """Axes of a constant that carry channels where ``node`` reads it as operand ``operand``.

    role: "out" where the node makes the channels, "in" where it sums over them, "ride" for one entry per channel.
    """

    node: Node
    operand: int
    axes: tuple[int, ...]
    label: Label
    role: Role

    @property
    def const(self) -> str:
        """The constant's value name."""
        return self.node.inputs[self.operand]


def _locked(encoding: Encoding | None, axis: int, rank: int) -> bool:
    """True when moving entries along an axis of a constant could break its sparsity encoding."""
    if encoding is None or isinstance(encoding, Codebook):
        return False
    if isinstance(encoding, NM):
        return axis == encoding.axis % rank or encoding.transposable or (axis == 0 and encoding.shared > 1)
    return True


class Trace:
    """The state of one analysis. ``mode`` permute: atoms may swap places inside a head or group, axes can be labelled
    jointly. prune: whole heads and groups are one channel, and a label has one axis, so that shapes stay boxes."""

    def __init__(self, graph: Graph, mode: Mode, heads: bool = True) -> None:
        self.graph, self.mode, self.heads = graph, mode, heads
        self.labels: dict[str, tuple[Label, ...]] = {}
        self.uses: list[Use] = []
        self.cells: list[tuple[Label, Ints]] = []
        """Labels with a key for every position: channels stay where their key stays the same."""
        self.ties: list[tuple[Label, Label]] = []
        self.blocks: list[Ints] = []
        self.pins: list[tuple[Ints, str]] = []
        self.count = 0
        self._shared: dict[tuple[str, int], Label | None] = {}

    def of(self, value: str) -> tuple[Label, ...]:
        """The labels of a value."""
        return self.labels.get(value, ())

    def size(self, value: str, axis: int) -> int:
        """A static size, 0 for a symbol."""
        d = self.graph.types[value].shape[axis]
        return d if isinstance(d, int) else 0

    def fresh(self, axis: int, size: int) -> Label:
        """New atoms along one axis."""
        self.count += size
        return Label((axis,), np.arange(self.count - size, self.count), np.zeros(size, np.int64))

    def pin(self, labels: Iterable[Label], why: str) -> None:
        """Fix these channels in place, for a reason that continues "its channels ..."."""
        self.pins += [(x.atoms.reshape(-1), why) for x in labels]

    def tie(self, a: Label, b: Label) -> None:
        """The two labels stand for the same channels, position by position."""
        if a.atoms.shape != b.atoms.shape:
            self.pin((a, b), "are tied to channels of another number")
            return
        self.ties.append((a, b))

    def unite(self, atoms: Ints) -> None:
        """Every row of a matrix of atoms becomes one channel."""
        self.blocks.append(atoms)

    def use(self, node: Node, operand: int, axes: tuple[int, ...], label: Label, role: Role = "ride") -> None:
        """A constant operand carries the label; a computed operand, or an encoding in the way, pins it."""
        value = node.inputs[operand]
        if not self.graph.is_constant(value):
            self.pin([label], f"meet %{value}, which is computed")
            return
        t = self.graph.types[value]
        if tuple(t.shape[a] for a in axes) != label.atoms.shape:
            self.pin([label], f"meet %{value}, which has no entry for each of them")
            return
        if any(_locked(t.encoding, a, t.rank) for a in axes):
            self.pin([label], f"meet %{value}, whose zeros follow {t.encoding}")
        self.uses.append(Use(node, operand, axes, label, role))

    def weight(self, node: Node, operand: int, axis: int, label: Label | None, role: Role) -> None:
        """As :meth:`use` for an axis of a weight: several layers that share the weight share the channels.

        ``label`` None: this reader needs the axis as it is.
        """
        key = node.inputs[operand], axis
        if key in self._shared:
            before = self._shared[key]
            if before is None or label is None:
                self.pin([x for x in (before, label) if x is not None], f"index %{key[0]}, which others read as it is")
            else:
                self.tie(before, label)
        self._shared[key] = label if self._shared.get(key, label) is not None else None
        if label is not None:
            self.use(node, operand, (axis,), label, role)


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that may trade places (permute) or go (prune): roots of the coupling, ascending."""

    channels: Ints
    uses: tuple[Use, ...]


@dataclass(eq=False)
class Coupling:
    """The finished analysis: ``root`` maps atoms to channels, ``pinned`` channels to the reason.

    A channel is called by its smallest atom. ``slot`` numbers the atoms of a channel: when one channel takes the place
    of another, each atom takes the place of the other's atom of the same slot.
    """

    graph: Graph
    mode: Mode
    labels: Mapping[str, tuple[Label, ...]]
    uses: tuple[Use, ...]
    root: Ints
    slot: Ints
    span: int
    """More than any offset."""
    pinned: dict[int, str] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()

    def channels(self, label: Label) -> Ints:
        """The channel at every position of a label."""
        return self.root[label.atoms]

    def reason(self, label: Label) -> str:
        """Why no channel of a label may move or go; empty when one may."""
        reasons = [self.pinned.get(int(c), "") for c in np.unique(self.channels(label))]
        return "" if "" in reasons else reasons[0]

    def places(self, label: Label) -> Ints:
        """Which of its places each flat position of a label is for its channel."""
        return (self.slot[label.atoms] * self.span + label.offsets).reshape(-1)

    def order(self, label: Label, to: Ints) -> Ints:
        """Where the entry at each flat position comes from when channel c takes the place of channel ``to[c]``."""
        roots, places = self.channels(label).reshape(-1), self.places(label)
        span = int(places.max(initial=0)) + 1
        sorted_ = np.argsort(roots * span + places, kind="stable")
        keys, wanted = (roots * span + places)[sorted_], to[roots] * span + places
        at = np.searchsorted(keys, wanted) % len(keys)
        assert np.array_equal(keys[at], wanted), "a channel without a place"
        new = np.where(to[roots] == roots, np.arange(len(roots)), sorted_[at])  # what is pinned may stand twice
        order = np.full_like(new, -1)
        order[new] = np.arange(len(new))
        assert (order >= 0).all(), "two channels in one place"
        return order


def couple(graph: Graph, mode: Mode, heads: bool = True) -> Coupling:
    """Trace all channels of a graph-level graph.

    ``heads`` False pins attention heads (prune only). The result is deterministic and refuses, through ``pinned``,
    every channel that meets an operator without a rule.
    """
    from bitwright.passes.sparsity._channel_rules import follow

    trace = Trace(graph, mode, heads)
    for node in graph.nodes:
        if not isinstance(node.op, (ops.Weight, ops.Constant)):
            follow(trace, node)
    for out, name in zip(graph.outputs, graph.output_names, strict=True):
        trace.pin(trace.of(out), f"reach output {name} (%{out})")
    root = _components(trace)
    by_channel = np.argsort(root, kind="stable")
    slot = np.empty_like(root)
    _, starts, counts = np.unique(root[by_channel], return_index=True, return_counts=True)
    slot[by_channel] = np.arange(len(root)) - starts.repeat(counts)
    every = [x for labels in trace.labels.values() for x in labels]
    span = 1 + max((int(x.offsets.max(initial=0)) for x in every), default=0)
    found = Coupling(graph, mode, trace.labels, tuple(trace.uses), root, slot, span)
    for atoms, why in trace.pins:
        for c in np.unique(root[atoms]):
            found.pinned.setdefault(int(c), why)
    if mode == "permute":
        _pin_repeated(found)
    found.groups = _groups(found, trace)
    return found


def _components(trace: Trace) -> Ints:
    """The smallest atom that each atom is tied with."""
    root = np.arange(trace.count, dtype=np.int64)
    pairs = [(x.atoms.reshape(-1), y.atoms.reshape(-1)) for x, y in trace.ties]
    pairs += [(m[:, :-1].reshape(-1), m[:, 1:].reshape(-1)) for m in trace.blocks]
    if not pairs:
        return root
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    while True:
        low = np.minimum(root[a], root[b])
        new = root.copy()
        np.minimum.at(new, root[a], low)  # hook the trees onto each other, then shorten them
        np.minimum.at(new, root[b], low)
        while not np.array_equal(new, new[new]):
            new = new[new]
        if np.array_equal(new, root):
            return root
        root = new


def _sites(found: Coupling, trace: Trace) -> Iterable[tuple[Ints, Ints]]:
    """(channel, key) of every position, one pair of arrays for each place where channels stand.

    The key of a tie holds the places on both sides: channels that trade places then meet the same partners.
    """
    big = (int(found.slot.max(initial=0)) + 1) * found.span
    for labels in found.labels.values():
        for x in labels:
            yield found.channels(x).reshape(-1), found.places(x)
    for x, y in trace.ties:
        yield found.channels(x).reshape(-1), found.places(x) * big + found.places(y)
    for x, keys in trace.cells:
        yield found.channels(x).reshape(-1), keys.reshape(-1) * big + found.places(x)


def _pin_repeated(found: Coupling) -> None:
    """A channel that stands twice at one place of a value has no unambiguous way to move."""
    for value, labels in found.labels.items():
        for x in labels:
            pairs = np.stack([found.channels(x).reshape(-1), found.places(x)])
            unique, counts = np.unique(pairs, axis=1, return_counts=True)
            for c in np.unique(unique[0, counts > 1]):
                found.pinned.setdefault(int(c), f"stand twice in %{value}")


def _groups(found: Coupling, trace: Trace) -> tuple[Group, ...]:
    """Channels that stand at the same sites, in the same number and with the same keys."""
    signature, seen = np.zeros(len(found.root), np.int64), 1
    for roots, keys in _sites(found, trace):
        order = np.lexsort((keys, roots))
        ids, starts = np.unique(roots[order], return_index=True)
        what: dict[tuple[int, bytes], int] = {}
        for c, part in zip(ids, np.split(keys[order], starts[1:]), strict=True):
            content = part.tobytes() if found.mode == "permute" else b""
            signature[c] = what.setdefault((int(signature[c]), content), seen + len(what))
        seen += len(what)
    members: dict[int, list[int]] = {}
    for c in np.unique(found.root):
        if int(c) not in found.pinned:
            members.setdefault(int(signature[c]), []).append(int(c))
    home = {c: key for key, cs in members.items() for c in cs}
    uses: dict[int, list[Use]] = {key: [] for key in members}
    for u in found.uses:
        for key in dict.fromkeys(home[int(c)] for c in np.unique(found.channels(u.label)) if int(c) in home):
            uses[key].append(u)
    return tuple(Group(np.array(cs, np.int64), tuple(uses[key])) for key, cs in members.items())


__all__ = ["Coupling", "Group", "Ints", "Label", "Mode", "Trace", "Use", "couple"]
