"""The order in which one reduction run is consumed: steps, windows, index vectors.

A *step* is one multiply-accumulate instruction per accumulator: ``quad`` (4 for 8-bit, 1 otherwise) products per
lane. Dense steps read consecutive activations. A sparse step selects them from a *window* of activations by
indices that are packed in time: one index vector serves several consecutive steps, each uses its own bits.
The same plan drives packing, unpacking and code generation, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from bitwright.codegen.tvm.contract.spec import ContractSpec, runs_of


@dataclass(frozen=True, slots=True)
class Selector:
    """What the instruction set can select from.

    ``loads``: activations a load can bring, ascending, the last one being the farthest a selection reaches;
    ``shared``: one load of the largest size serves several windows; ``bits``: field widths of packed indices,
    narrowest first; ``word``: bits shared by the fields of one lane; ``in_window``: stored indices count from
    the window (nothing to add at run time).
    """

    loads: tuple[int, ...]
    shared: bool
    bits: tuple[int, ...]
    word: int
    in_window: bool = False

    @property
    def window(self) -> int:
        return self.loads[-1]


@dataclass(frozen=True, slots=True)
class Slot:
    """One product of a step: the ``nth`` non-zero of group ``group`` (in the block); None stands for a zero."""

    group: int
    nth: int


@dataclass(frozen=True, slots=True)
class Step:
    """One multiply-accumulate per accumulator.

    ``start``: first activation of the load it selects from, relative to the block; ``vector`` and ``shift``:
    where its indices are; ``add``: what to add to them per slot; ``base``: what was added when packing.
    """

    slots: tuple[Slot | None, ...]
    start: int
    vector: int = 0
    shift: int = 0
    add: tuple[int, ...] = ()
    base: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """The repeated unit of a run: ``advance`` activations, ``groups`` groups, ``vectors`` index vectors."""

    steps: tuple[Step, ...]
    advance: int
    groups: int
    vectors: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A run is ``full`` times ``block``, then ``tail``. ``group`` activations hold ``keep`` non-zeros.

    Weights of ``fields`` consecutive steps of a block share a vector.
    """

    length: int
    keep: int
    group: int
    quad: int
    sparse: bool
    bits: int
    load: int
    block: Block
    full: int
    tail: Block | None
    fields: int = 1

    @property
    def groups(self) -> int:
        return ceil(self.length / self.group)

    @property
    def steps(self) -> int:
        return self.full * len(self.block.steps) + (len(self.tail.steps) if self.tail else 0)

    def weight_vectors(self, block: Block) -> int:
        """Vectors of weights (per vector of outputs) that a block takes."""
        return ceil(len(block.steps) / self.fields)

    @property
    def all_weight_vectors(self) -> int:
        return self.full * self.weight_vectors(self.block) + (self.weight_vectors(self.tail) if self.tail else 0)

    @property
    def vectors(self) -> int:
        return self.full * self.block.vectors + (self.tail.vectors if self.tail else 0)

    def walk(self) -> list[tuple[Step, int, int]]:
        """Every step with the number of its block's first group and first index vector."""
        out = [
            (step, n * self.block.groups, n * self.block.vectors) for n in range(self.full) for step in self.block.steps
        ]
        if self.tail:
            out += [(s, self.full * self.block.groups, self.full * self.block.vectors) for s in self.tail.steps]
        return out


def plan_of(spec: ContractSpec, quad: int, selector: Selector, fields: int = 1, unroll: int = 1) -> Plan | str:
    """The plan of one run, or the reason why the pattern has none on this instruction set.

    ``fields``: steps whose weights share a vector; ``unroll``: vectors of weights in a block of a dense plan. The
    order of the products depends on neither.
    """
    length = runs_of(spec).length
    if spec.sparsity is None:
        return _dense(length, quad, fields, unroll)
    keep, group = spec.sparsity
    if group > selector.window:
        return f"a group of {group} does not fit the {selector.window} activations one selection reaches"
    return replace(_sparse(length, keep, group, quad, selector), fields=fields)


def _dense(length: int, quad: int, fields: int, unroll: int) -> Plan:
    def block(steps: int) -> Block:
        made = (Step(tuple(Slot(n * quad + q, 0) for q in range(quad)), n * quad) for n in range(steps))
        return Block(tuple(made), steps * quad, steps * quad, 0)

    full, rest = divmod(ceil(length / quad), fields * unroll)
    return Plan(length, 1, 1, quad, False, 0, quad, block(fields * unroll), full, block(rest) if rest else None, fields)


def _sparse(length: int, keep: int, group: int, quad: int, selector: Selector) -> Plan:
    per_window = _groups_per_window(keep, group, quad, selector)
    window = per_window * group
    if selector.in_window:
        bits = next(b for b in selector.bits if window <= 1 << b)
    else:
        bits = next(b for b in selector.bits if group <= 1 << b)
    fields = selector.word // bits
    steps_per_window = ceil(per_window * keep / quad)
    load = next(n for n in selector.loads if window <= n)
    share = load if selector.shared and load == selector.window and load % window == 0 else 0
    windows = 1
    if fields % steps_per_window == 0:
        windows = max(fields // steps_per_window, share // window if steps_per_window == 1 else 1)
    block = _block(windows, per_window, keep, group, quad, bits, selector, share)
    groups = ceil(length / group)
    full, rest = divmod(groups, block.groups)
    tail = _tail(block, rest) if rest else None
    return Plan(length, keep, group, quad, True, bits, load, block, full, tail)


def _groups_per_window(keep: int, group: int, quad: int, selector: Selector) -> int:
    """Fewest groups whose non-zeros waste the fewest slots of whole steps."""
    counts = range(1, selector.window // group + 1)
    if quad == 1:
        return counts[-1] if selector.word > 8 else 1
    return min(counts, key=lambda n: (ceil(n * keep / quad) * quad / (n * keep), n))


def _block(
    windows: int, per_window: int, keep: int, group: int, quad: int, bits: int, selector: Selector, share: int
) -> Block:
    steps: list[Step] = []
    fields = selector.word // bits
    for w in range(windows):
        first = w * per_window * group
        start = first // share * share if share else first
        every: list[Slot | None] = [Slot(w * per_window + g, n) for g in range(per_window) for n in range(keep)]
        every += [None] * (-len(every) % quad)
        for s in range(0, len(every), quad):
            slots = tuple(every[s : s + quad])
            offsets = tuple(slot.group * group - start if slot else 0 for slot in slots)
            stored = selector.in_window or bits == 8
            zero = (0,) * quad
            vector, field = divmod(len(steps), fields)
            steps.append(
                Step(slots, start, vector, field * bits, zero if stored else offsets, offsets if stored else zero)
            )
    return Block(tuple(steps), windows * per_window * group, windows * per_window, ceil(len(steps) / fields))


def _tail(block: Block, groups: int) -> Block:
    """The steps of ``block`` that touch its first ``groups`` groups."""
    steps = tuple(s for s in block.steps if any(slot and slot.group < groups for slot in s.slots))
    return Block(steps, 0, groups, 1 + max(s.vector for s in steps))
