"""If, Loop, Scan, sequences and optionals: resolved while importing, or refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitwright.frontends.onnx.call import Call
from bitwright.frontends.onnx.importer import TooLarge
from bitwright.frontends.onnx.ops_shape import split_sizes
from bitwright.frontends.onnx.reader import dtype_of_element
from bitwright.frontends.onnx.values import Nothing, Poison, Seq, Val, Value
from bitwright.ir.errors import InvalidInput, Problem
from bitwright.ir.types import BOOL


def _if(c: Call) -> Sequence[Value]:
    cond = c.x()
    c.ignore("then_branch", "else_branch")
    if cond.handle is not None:
        branch = "then_branch" if bool(cond.handle.array.reshape(())) else "else_branch"
        return c.importer.run_graph(c.graph(branch), (), c.scope)
    origin = c.importer.origin
    sides = [c.importer.run_graph(c.graph(b), (), c.scope) for b in ("then_branch", "else_branch")]
    c.importer.origin = origin
    flag = c.reshape(cond, ())
    return [_choose(c, flag, a, b) for a, b in zip(*sides, strict=True)]


def _choose(c: Call, flag: Val, a: Value, b: Value) -> Value:
    if isinstance(a, Poison) or isinstance(b, Poison):
        return Poison()
    if not isinstance(a, Val) or not isinstance(b, Val) or a.type != b.type:
        c.known(flag, "condition (its branches give different types)")
        raise AssertionError
    return c.where(flag, a, b)


def _loop(c: Call) -> Sequence[Value]:
    trips = c.importer.limits.trips
    count: int | None = None
    if c.value(0) is not None:
        count = int(c.const(0, "trip count").reshape(()))
    cond: Value = c.opt(1) or c.literal(True, BOOL)
    carried: list[Value] = [v if v is not None else Nothing() for v in c.ins[2:]]
    body = c.graph("body")
    scans: list[list[Val]] = [[] for _ in range(len(body.output) - 1 - len(carried))]
    done = 0
    while count is None or done < count:
        if not bool(c.known(_tensor(cond), "condition").reshape(())):
            break
        if done >= trips:
            raise c.refuse(f"a loop of more than {trips} iterations is not unrolled")
        before = len(c.importer.problems)
        outs = c.importer.run_graph(body, [c.literal(done), cond, *carried], c.scope)
        if len(c.importer.problems) > before or any(isinstance(o, Poison) for o in outs):
            return [Poison() for _ in c.node.output]
        cond, carried = outs[0], outs[1 : 1 + len(carried)]
        for column, v in zip(scans, outs[1 + len(carried) :], strict=True):
            column.append(_tensor(v))
        done += 1
    return [*carried, *(_stack(c, column, body, i + 1 + len(carried)) for i, column in enumerate(scans))]


def _tensor(v: Value) -> Val:
    if not isinstance(v, Val):
        raise InvalidInput("a tensor was expected")
    return v


def _stack(c: Call, column: list[Val], body: object, at: int, axis: int = 0) -> Val:
    """Scan results of one output, one below the other."""
    if column:
        return c.concat([c.unsqueeze(v, axis) for v in column], axis)
    info = body.output[at].type.tensor_type  # type: ignore[attr-defined]
    dims = [d.dim_value for d in info.shape.dim]
    return c.literal(np.zeros((0, *dims)), dtype_of_element(info.elem_type, c.importer.origin))


def _scan(c: Call) -> Sequence[Value]:
    body, n = c.graph("body"), c.int_("num_scan_inputs")
    ins = list(c.ins)
    if c.since < 9:
        return _scan_8(c)
    states: list[Value] = [_tensor(v) for v in ins[: len(ins) - n] if v is not None]
    feeds = [_tensor(v) for v in ins[len(ins) - n :] if v is not None]
    axes = c.ints("scan_input_axes") or (0,) * n
    backwards = c.ints("scan_input_directions") or (0,) * n
    outputs = len(body.output) - len(states)
    out_axes = c.ints("scan_output_axes") or (0,) * outputs
    out_back = c.ints("scan_output_directions") or (0,) * outputs
    if not n or len(feeds) != n or len(axes) != n or outputs < 0:
        raise InvalidInput("the operands of Scan do not fit its body")
    return _run_scan(c, body, states, feeds, (axes, backwards, out_axes, out_back))


def _run_scan(
    c: Call, body: object, states: list[Value], feeds: list[Val], how: tuple[tuple[int, ...], ...]
) -> Sequence[Value]:
    axes, backwards, out_axes, out_back = how
    axes = tuple(c.axis(a, f.rank) for a, f in zip(axes, feeds, strict=True))
    steps = c.size(feeds[0], axes[0])
    if steps > c.importer.limits.trips:
        raise c.refuse(f"a scan of more than {c.importer.limits.trips} steps is not unrolled")
    columns: list[list[Val]] = [[] for _ in out_axes]
    for t in range(steps):
        now: list[Value] = []
        for f, a, back in zip(feeds, axes, backwards, strict=True):
            i = steps - 1 - t if back else t
            now.append(c.squeeze(c.slice(f, a, i, i + 1), a))
        before = len(c.importer.problems)
        outs = c.importer.run_graph(body, [*states, *now], c.scope)  # type: ignore[arg-type]
        if len(c.importer.problems) > before or any(isinstance(o, Poison) for o in outs):
            return [Poison() for _ in c.node.output]
        states = outs[: len(states)]
        for column, v in zip(columns, outs[len(states) :], strict=True):
            column.append(_tensor(v))
    stacked = []
    for i, column in enumerate(columns):
        column = column[::-1] if out_back[i] else column
        axis = c.axis(out_axes[i], column[0].rank + 1) if column else 0
        stacked.append(_stack(c, column, body, len(states) + i, axis))
    return [*states, *stacked]


def _scan_8(c: Call) -> Sequence[Value]:
    """Operator set 8: a leading batch axis and an optional operand of lengths; batch by batch."""
    body, n = c.graph("body"), c.int_("num_scan_inputs")
    if c.value(0) is not None:
        raise c.refuse("sequence lengths are not supported")
    ins = [_tensor(v) for v in c.ins[1:] if v is not None]
    directions = c.ints("directions") or (0,) * n
    batch = c.size(ins[0], 0)
    outputs = len(body.output) - (len(ins) - n)
    parts: list[Sequence[Value]] = []
    if batch > c.importer.limits.trips:
        raise TooLarge(Problem("Scan", c.importer.origin, "too many batches"))
    for b in range(batch):
        one = [c.squeeze(c.slice(x, 0, b, b + 1), 0) for x in ins]
        how = ((0,) * n, directions, (0,) * outputs, (0,) * outputs)
        parts.append(_run_scan(c, body, list(one[: len(ins) - n]), one[len(ins) - n :], how))
    if any(isinstance(v, Poison) for p in parts for v in p):
        return [Poison() for _ in c.node.output]
    return [c.concat([c.unsqueeze(_tensor(p[i]), 0) for p in parts], 0) for i in range(len(parts[0]))]


# --- sequences and optionals ----------------------------------------------------------------------------------------


def _construct(c: Call) -> Seq:
    return Seq(tuple(c.all()))


def _empty(c: Call) -> Seq:
    c.ignore("dtype")
    return Seq(())


def _position(c: Call, i: int, size: int, end: int) -> int:
    """A constant position in a sequence; ``end`` when it is absent."""
    if c.value(i) is None:
        return end
    p = int(c.const(i, "position").reshape(()))
    if not -size <= p <= size:
        raise InvalidInput(f"position {p} in a sequence of {size}")
    return p + size if p < 0 else p


def _at(c: Call) -> Val:
    items = c.seq().items
    p = _position(c, 1, len(items), 0)
    if p >= len(items):
        raise InvalidInput(f"position {p} in a sequence of {len(items)}")
    return items[p]


def _insert(c: Call) -> Seq:
    items = list(c.seq().items)
    items.insert(_position(c, 2, len(items), len(items)), c.x(1))
    return Seq(tuple(items))


def _erase(c: Call) -> Seq:
    items = list(c.seq().items)
    p = _position(c, 1, len(items), len(items) - 1)
    if not 0 <= p < len(items):
        raise InvalidInput(f"position {p} in a sequence of {len(items)}")
    return Seq(tuple(items[:p] + items[p + 1 :]))


def _length(c: Call) -> Val:
    return c.literal(len(c.seq().items))


def _concat_from(c: Call) -> Val:
    items = c.seq().items
    if not items:
        raise InvalidInput("an empty sequence cannot be joined")
    if c.int_("new_axis"):
        axis = c.axis(c.int_("axis"), items[0].rank + 1)
        return c.concat([c.unsqueeze(v, axis) for v in items], axis)
    return c.concat(items, c.axis(c.int_("axis"), items[0].rank))


def _split_to(c: Call) -> Seq:
    x = c.x()
    axis = c.axis(c.int_("axis"), x.rank)
    keep = bool(c.int_("keepdims", 1))
    if c.value(1) is None:
        sizes = [1] * c.size(x, axis)
    else:
        given = c.const(1, "split")
        if given.ndim == 0:
            step, size = int(given), c.size(x, axis)
            if step < 1:
                raise InvalidInput(f"split {step}")
            sizes = [min(step, size - i) for i in range(0, size, step)]
        else:
            sizes = split_sizes(c, x, axis, 0, tuple(int(g) for g in given))
        keep = True
    if len(sizes) > 4096:
        raise c.refuse(f"a sequence of {len(sizes)} tensors")
    ends = np.cumsum(sizes).tolist()
    parts = [c.slice(x, axis, e - s, e) for s, e in zip(sizes, ends, strict=True)]
    return Seq(tuple(p if keep else c.squeeze(p, axis) for p in parts))


def _sequence_map(c: Call) -> Sequence[Value]:
    body, sequence = c.graph("body"), c.seq()
    if len(sequence.items) > c.importer.limits.trips:
        raise c.refuse(f"a sequence of {len(sequence.items)} tensors is not unrolled")
    columns: list[list[Val]] = [[] for _ in body.output]
    for i, item in enumerate(sequence.items):
        others = [v.items[i] if isinstance(v, Seq) else v for v in c.ins[1:]]
        outs = c.importer.run_graph(body, [item, *(o for o in others if o is not None)], c.scope)
        for column, v in zip(columns, outs, strict=True):
            column.append(_tensor(v))
    return [Seq(tuple(column)) for column in columns]


def _optional(c: Call) -> Value:
    return c.value(0) or Nothing()


def _has_element(c: Call) -> Val:
    return c.literal(c.value(0) is not None, BOOL)


def _get_element(c: Call) -> Value:
    v = c.value(0)
    if v is None:
        raise InvalidInput("the optional is empty")
    return v


TABLE = {
    ("", "If"): _if, ("", "Loop"): _loop, ("", "Scan"): _scan, ("", "SequenceConstruct"): _construct,
    ("", "SequenceEmpty"): _empty, ("", "SequenceAt"): _at, ("", "SequenceInsert"): _insert,
    ("", "SequenceErase"): _erase, ("", "SequenceLength"): _length, ("", "ConcatFromSequence"): _concat_from,
    ("", "SplitToSequence"): _split_to, ("", "SequenceMap"): _sequence_map, ("", "Optional"): _optional,
    ("", "OptionalHasElement"): _has_element, ("", "OptionalGetElement"): _get_element,
}  # fmt: skip
