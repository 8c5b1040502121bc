"""What an attention body reads and writes: operands behind reshapes and transposes, as strides of its inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitwright.codegen.tvm.pointwise import why_unsupported
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import BF16, BOOL, F16, F32

Shape = tuple[int, ...]
LIMIT = 1 << 31


class Unfit(Exception):
    """Why a body is not for this template."""


@dataclass(frozen=True)
class View:
    """Elements of a buffer: size and stride per axis, from ``offset`` on."""

    shape: Shape
    strides: Shape
    offset: int = 0

    @staticmethod
    def whole(shape: Shape) -> View:
        return View(shape, tuple(math.prod(shape[k + 1 :]) for k in range(len(shape))))

    def transposed(self, perm: Shape) -> View:
        return View(tuple(self.shape[p] for p in perm), tuple(self.strides[p] for p in perm), self.offset)

    def untransposed(self, perm: Shape) -> View:
        """The view whose transpose by ``perm`` this is."""
        back = [0] * len(perm)
        for k, p in enumerate(perm):
            back[p] = k
        return self.transposed(tuple(back))

    def reshaped(self, shape: Shape) -> View:
        """The same elements in row-major order under another shape, if strides can say that."""
        old = [(n, s) for n, s in zip(self.shape, self.strides, strict=True) if n != 1]
        strides = [0] * len(shape)
        at = 0
        k = 0
        while k < len(shape):
            if shape[k] == 1:
                k += 1
                continue
            end, have, want, stop = at + 1, old[at][0], shape[k], k + 1
            while have != want:
                if have < want:
                    have, end = have * old[end][0], end + 1
                else:
                    want, stop = want * shape[stop], stop + 1
            if any(old[i][1] != old[i + 1][0] * old[i + 1][1] for i in range(at, end - 1)):
                raise Unfit("a reshape that is no view")
            step = old[end - 1][1]
            for j in reversed(range(k, stop)):
                strides[j] = step
                step *= shape[j]
            at, k = end, stop
        return View(shape, tuple(strides), self.offset)

    def sliced(self, op: ops.Slice) -> View:
        axis = op.axis % len(self.shape)
        size = -(-(op.stop - op.start) // op.step)
        shape = (*self.shape[:axis], size, *self.shape[axis + 1 :])
        strides = (*self.strides[:axis], self.strides[axis] * op.step, *self.strides[axis + 1 :])
        return View(shape, strides, self.offset + op.start * self.strides[axis])

    def broadcast(self, shape: Shape) -> View:
        extra = len(shape) - len(self.shape)
        strides = tuple(s if n != 1 else 0 for n, s in zip(self.shape, self.strides, strict=True))
        return View(shape, (0,) * extra + strides, self.offset)


@dataclass(frozen=True)
class Operand:
    """A matrix per batch index: ``name`` is the body's input (empty for the output)."""

    name: str
    batch: Shape
    """Stride per batch axis."""
    row: int
    col: int
    offset: int = 0


@dataclass(frozen=True)
class Attend:
    """The body: one attention and the pointwise operators behind it."""

    node: Node
    op: ops.Attention
    batch: Shape
    rows: int
    keys: int
    depth: int
    width: int
    q: Operand
    k: Operand
    v: Operand
    mask: Operand | None
    out: Operand
    after: tuple[Node, ...]


def attend_of(body: Graph) -> Attend:
    """The body as an attention; raises :class:`Unfit`."""
    if not all(t.is_static and 0 < t.size < LIMIT for t in body.types.values()):
        raise Unfit("symbolic, empty or huge tensors")
    found = [n for n in body.nodes if isinstance(n.op, ops.Attention)]
    if len(found) != 1 or len(body.outputs) != 1:
        raise Unfit("not one attention with one output")
    node = found[0]
    op = node.op
    assert isinstance(op, ops.Attention)
    shapes = [body.types[x].static_shape for x in node.inputs]
    out = node.type.static_shape
    batch = out[:-2]
    seen = {node.output}
    q, k, v = (
        _operand(body, x, batch, op.kv_groups if i in (1, 2) else 1, seen) for i, x in enumerate(node.inputs[:3])
    )
    if any(body.types[o.name].dtype not in (F32, F16, BF16) for o in (q, k, v)):
        raise Unfit("attention of a format other than f32, f16, bf16")
    keys = shapes[1][-2]
    mask = None
    if len(node.inputs) == 4:
        mask = _operand(body, node.inputs[3], batch, 1, seen)
        if body.types[mask.name].dtype not in (F32, F16, BF16, BOOL):
            raise Unfit("a mask of integers")
    after, target = _behind(body, node, seen)
    if any(n.outputs[0] not in seen and not isinstance(n.op, ops.Constant) for n in body.nodes):
        raise Unfit("work beside the attention")
    return Attend(node, op, batch, out[-2], keys, shapes[0][-1], out[-1], q, k, v, mask, target, after)


def _operand(body: Graph, name: str, batch: Shape, groups: int, seen: set[str]) -> Operand:
    """The operand as strides of a body input."""
    chain: list[Node] = []
    while (node := body.producers.get(name)) is not None:
        if not isinstance(node.op, (ops.Reshape, ops.Transpose, ops.Slice, ops.Expand)):
            raise Unfit(f"{node.op.spelling} before the attention")
        chain.append(node)
        seen.add(node.output)
        name = node.inputs[0]
    view = View.whole(body.types[name].static_shape)
    for node in reversed(chain):
        view = _through(view, node)
    rank = len(batch) + 2
    view = View(
        (1,) * (rank - len(view.shape)) + view.shape, (0,) * (rank - len(view.shape)) + view.strides, view.offset
    )
    lead = view.shape[:-2]
    whole = (*batch[:-1], batch[-1] // groups) if groups > 1 else batch
    if len(lead) > len(batch) or any(n not in (1, m) for n, m in zip(lead, whole, strict=True)):
        raise Unfit("batch axes that do not broadcast")
    strides = tuple(s if n != 1 else 0 for n, s in zip(lead, view.strides[:-2], strict=True))
    row, col = (s if n != 1 else 0 for n, s in zip(view.shape[-2:], view.strides[-2:], strict=True))
    return Operand(name, strides, row, col, view.offset)


def _through(view: View, node: Node) -> View:
    op = node.op
    if isinstance(op, ops.Transpose):
        return view.transposed(op.perm)
    if isinstance(op, ops.Slice):
        return view.sliced(op)
    if isinstance(op, ops.Expand):
        return view.broadcast(node.type.static_shape)
    return view.reshaped(node.type.static_shape)


def _behind(body: Graph, node: Node, seen: set[str]) -> tuple[tuple[Node, ...], Operand]:
    """The pointwise operators behind the attention, and where its results go."""
    views: list[Node] = []
    after: list[Node] = []
    name = node.output
    while name != body.outputs[0]:
        users = body.users[name]
        if len(users) != 1:
            raise Unfit("a result with several users")
        user = users[0]
        if isinstance(user.op, (ops.Transpose, ops.Reshape)):
            views.append(user)
        else:
            _check_after(body, user, name)
            after.append(user)
        name = user.output
        seen.add(name)
    if body.users[name]:
        raise Unfit("a result with several users")
    view = View.whole(body.types[name].static_shape)
    for v in reversed(views):
        before = body.types[v.inputs[0]].static_shape
        view = view.untransposed(v.op.perm) if isinstance(v.op, ops.Transpose) else view.reshaped(before)
    return tuple(after), Operand("", view.strides[:-2], view.strides[-2], view.strides[-1])


def _check_after(body: Graph, user: Node, name: str) -> None:
    if not isinstance(user.op, ops.POINTWISE):
        raise Unfit(f"{user.op.spelling} behind the attention")
    for x in user.inputs:
        if x == name:
            continue
        maker = body.producers.get(x)
        if body.types[x].size != 1 or not (maker is None or isinstance(maker.op, ops.Constant)):
            raise Unfit("an operand behind the attention that is not a scalar")
    if user.type.size != body.types[name].size or user.type.rank != body.types[name].rank:
        raise Unfit("a broadcast behind the attention")
    if why := why_unsupported(user.op, [body.types[x].dtype for x in user.inputs]):
        raise Unfit(why)
