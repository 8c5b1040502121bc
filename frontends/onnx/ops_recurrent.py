"""RNN, GRU and LSTM, unrolled over a fixed number of steps; the input products are one Linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bitwright.frontends.onnx.call import Call
from bitwright.frontends.onnx.ops_index import take_along
from bitwright.frontends.onnx.values import Val
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import S64

Activation = Callable[[Val], Val]
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_DEFAULT = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
_PLAIN = {"relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid", "softsign": "softsign", "softplus": "softplus"}


@dataclass
class Cell:
    """One direction's weights and activations."""

    r: Val
    r_bias: Val | None
    peephole: list[Val] | None
    acts: list[Activation]
    clip: float


def _activations(c: Call, kind: str, directions: int) -> list[list[Activation]]:
    a = c.attributes.get("activations")
    c.ignore("activations")
    names = [s.decode() for s in a.strings] if a is not None else list(_DEFAULT[kind]) * directions
    per = len(_DEFAULT[kind])
    if len(names) != per * directions:
        raise InvalidInput(f"activations {names} for {directions} directions")
    alphas, betas = list(c.floats("activation_alpha") or ()), list(c.floats("activation_beta") or ())
    made = [_activation(c, name.lower(), alphas, betas) for name in names]
    return [made[d * per : (d + 1) * per] for d in range(directions)]


def _activation(c: Call, name: str, alphas: list[float], betas: list[float]) -> Activation:
    def take(values: list[float], default: float) -> float:
        return values.pop(0) if values else default

    if name in _PLAIN:
        return lambda x: c.unary(_PLAIN[name], x)
    if name == "leakyrelu":
        slope = take(alphas, 0.01)
        return lambda x: c.emit(ops.LeakyRelu(slope), x)
    if name == "elu":
        alpha = take(alphas, 1.0)
        return lambda x: c.emit(ops.Elu(alpha), x)
    if name in ("affine", "hardsigmoid", "scaledtanh"):
        alpha, beta = (
            take(alphas, 0.2 if name == "hardsigmoid" else 1.0),
            take(betas, 0.5 if name == "hardsigmoid" else 0.0),
        )
        if name == "scaledtanh":
            return lambda x: c.mul(c.unary("tanh", c.mul(x, beta)), alpha)
        if name == "affine":
            return lambda x: c.add(c.mul(x, alpha), beta)
        return lambda x: c.emit(ops.Clamp(0.0, 1.0), c.add(c.mul(x, alpha), beta))
    raise c.refuse(f"activation {name!r} is not supported")


def _part(c: Call, x: Val, i: int, of: int, axis: int) -> Val:
    each = c.size(x, axis) // of
    return c.slice(x, axis, i * each, (i + 1) * each)


def _recurrent(c: Call) -> tuple[Val, ...]:
    kind = c.node.op_type
    x, w, r, bias, lengths = c.x(0), c.x(1), c.x(2), c.opt(3), c.opt(4)
    states = [c.opt(5), c.opt(6)][: 2 if kind == "LSTM" else 1]
    c.ignore("hidden_size", "output_sequence")
    direction, layout = c.text("direction", "forward"), c.int_("layout")
    if layout:
        x = c.transpose(x, (1, 0, 2))
        states = [None if s is None else c.transpose(s, (1, 0, 2)) for s in states]
    steps, directions, hidden = c.size(x, 0), c.size(w, 0), c.size(r, 2)
    if direction not in ("forward", "reverse", "bidirectional") or directions != 1 + (direction == "bidirectional"):
        raise InvalidInput(f"direction {direction!r} with {directions} sets of weights")
    if steps > c.importer.limits.trips:
        raise c.refuse(f"a recurrence over more than {c.importer.limits.trips} steps is not unrolled")
    if c.int_("input_forget"):
        raise c.refuse("coupled input and forget gates are not supported")
    if lengths is not None and lengths.handle is not None and bool((lengths.handle.array == steps).all()):
        lengths = None
    acts, clip = _activations(c, kind, directions), c.float_("clip")
    linear = bool(c.int_("linear_before_reset"))
    results = []
    for d in range(directions):
        reverse = direction == "reverse" or d == 1
        first = [_initial(c, s, d, (x.dims[1], hidden), x) for s in states]
        peephole = c.opt(7) if kind == "LSTM" else None
        p = (
            None
            if peephole is None
            else [_part(c, c.squeeze(c.slice(peephole, 0, d, d + 1), 0), i, 3, 0) for i in range(3)]
        )
        wd, rd = (c.squeeze(c.slice(v, 0, d, d + 1), 0) for v in (w, r))
        both = None if bias is None else c.squeeze(c.slice(bias, 0, d, d + 1), 0)
        w_bias, r_bias = (None, None) if both is None else (_part(c, both, 0, 2, 0), _part(c, both, 1, 2, 0))
        projected = c.emit(
            ops.Linear(), _reversed(c, x, lengths) if reverse else x, wd, *([] if w_bias is None else [w_bias])
        )
        cell = Cell(rd, r_bias, p, acts[d], clip)
        step = {"RNN": _rnn_step, "GRU": _gru_step(linear), "LSTM": _lstm_step}[kind]
        ys, last = _unroll(c, step, cell, projected, first, lengths)
        y = c.concat([c.unsqueeze(v, 0) for v in ys], 0)
        results.append((_reversed(c, y, lengths) if reverse else y, *last))
    return _joined(c, results, bool(layout))


def _initial(c: Call, state: Val | None, d: int, shape: tuple[object, int], x: Val) -> Val:
    if state is None:
        return c.expand(c.scalar(0, x.type.dtype), shape)  # type: ignore[arg-type]
    return c.squeeze(c.slice(state, 0, d, d + 1), 0)


def _reversed(c: Call, x: Val, lengths: Val | None) -> Val:
    """Backwards in time; each sequence within its own length."""
    if lengths is None:
        return c.emit(ops.Flip((0,)), x)
    steps = c.size(x, 0)
    t, n = c.literal(np.arange(steps)[:, None]), c.reshape(c.cast(lengths, S64), (1, x.dims[1]))
    return take_along(c, x, c.where(c.binary("lt", t, n), c.sub(c.sub(n, t), 1), t), 0)


def _unroll(c: Call, step: Callable[[Call, Cell, Val, list[Val]], list[Val]], cell: Cell, x: Val, states: list[Val],
            lengths: Val | None) -> tuple[list[Val], list[Val]]:  # fmt: skip
    ys = []
    for t in range(c.size(x, 0)):
        c.importer.step()
        new = step(c, cell, c.squeeze(c.slice(x, 0, t, t + 1), 0), states)
        y = new[0]
        if lengths is not None:
            alive = c.unsqueeze(c.binary("gt", c.cast(lengths, S64), t), 1)
            new = [c.where(alive, a, b) for a, b in zip(new, states, strict=True)]
            y = c.where(alive, y, c.scalar(0, y.type.dtype))
        ys.append(y)
        states = new
    return ys, states


def _clipped(c: Call, cell: Cell, x: Val) -> Val:
    return c.emit(ops.Clamp(-cell.clip, cell.clip), x) if cell.clip else x


def _recur(c: Call, h: Val, r: Val, bias: Val | None) -> Val:
    return c.emit(ops.Linear(), h, r, *([] if bias is None else [bias]))


def _rnn_step(c: Call, cell: Cell, x: Val, states: list[Val]) -> list[Val]:
    return [cell.acts[0](_clipped(c, cell, c.add(x, _recur(c, states[0], cell.r, cell.r_bias))))]


def _gru_step(linear: bool) -> Callable[[Call, Cell, Val, list[Val]], list[Val]]:
    def step(c: Call, cell: Cell, x: Val, states: list[Val]) -> list[Val]:
        h, n = states[0], c.size(states[0], 1)
        rb = cell.r_bias
        r_zr, r_h = c.slice(cell.r, 0, 0, 2 * n), c.slice(cell.r, 0, 2 * n, 3 * n)
        b_zr, b_h = (None, None) if rb is None else (c.slice(rb, 0, 0, 2 * n), c.slice(rb, 0, 2 * n, 3 * n))
        zr = cell.acts[0](_clipped(c, cell, c.add(c.slice(x, 1, 0, 2 * n), _recur(c, h, r_zr, b_zr))))
        z, r = c.slice(zr, 1, 0, n), c.slice(zr, 1, n, 2 * n)
        inner = c.mul(r, _recur(c, h, r_h, b_h)) if linear else _recur(c, c.mul(r, h), r_h, b_h)
        new = cell.acts[1](_clipped(c, cell, c.add(c.slice(x, 1, 2 * n, 3 * n), inner)))
        return [c.add(c.mul(c.add(c.unary("neg", z), 1.0), new), c.mul(z, h))]

    return step


def _lstm_step(c: Call, cell: Cell, x: Val, states: list[Val]) -> list[Val]:
    h, old = states
    gates = c.add(x, _recur(c, h, cell.r, cell.r_bias))
    i, o, f, g = (_part(c, gates, k, 4, 1) for k in range(4))
    p = cell.peephole
    if p is not None:
        i, f = c.add(i, c.mul(p[0], old)), c.add(f, c.mul(p[2], old))
    i, f, g = (cell.acts[a](_clipped(c, cell, v)) for a, v in ((0, i), (0, f), (1, g)))
    new = c.add(c.mul(f, old), c.mul(i, g))
    o = o if p is None else c.add(o, c.mul(p[1], new))
    return [c.mul(cell.acts[0](_clipped(c, cell, o)), cell.acts[2](new)), new]


def _joined(c: Call, results: list[tuple[Val, ...]], batch_first: bool) -> tuple[Val, ...]:
    y = c.concat([c.unsqueeze(r[0], 1) for r in results], 1)
    last = [c.concat([c.unsqueeze(r[i], 0) for r in results], 0) for i in range(1, len(results[0]))]
    if batch_first:
        y = c.transpose(y, (2, 0, 1, 3))
        last = [c.transpose(v, (1, 0, 2)) for v in last]
    return (y, *last)


TABLE = {("", kind): _recurrent for kind in _GATES}
