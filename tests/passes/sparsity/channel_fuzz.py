"""Random graphs full of views, heads, shared weights and residual sums: where a wrong coupling would show."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.types import F32, TensorType

Random = np.random.Generator
WIDTHS = (4, 6, 8, 12)


class _Maker:
    """Grows one graph; every step takes values made before."""

    def __init__(self, seed: int) -> None:
        self.rng, self.b = np.random.default_rng(seed), Builder("fuzz")
        self.values = [self.b.input("x", TensorType(F32, (2, 6, 5)))]
        self.weights: dict[tuple[int, ...], str] = {}

    def shape(self, value: str) -> tuple[int, ...]:
        return self.b.types[value].static_shape

    def weight(self, shape: tuple[int, ...], shared: bool = False) -> str:
        """A random weight; some are used by several layers."""
        if shared and shape in self.weights and self.rng.random() < 0.3:
            return self.weights[shape]
        array = (self.rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        self.weights[shape] = self.b.weight("w", array)
        return self.weights[shape]

    def any(self) -> str:
        recent = self.values[-4:]
        return str(self.rng.choice(recent if self.rng.random() < 0.8 else self.values))

    def step(self) -> None:
        steps: list[Callable[[str], str | None]] = [
            self.linear, self.linear, self.linear, self.pointwise, self.both, self.both, self.constant, self.cut,
            self.join, self.fold, self.turn, self.norm, self.mix, self.attend, self.image, self.reduce,
        ]  # fmt: skip
        made = steps[self.rng.integers(len(steps))](self.any())
        if made is not None and self.b.types[made].size <= 20_000:
            self.values.append(made)

    def linear(self, x: str) -> str:
        width = int(self.rng.choice(WIDTHS))
        more = [self.weight((width,))] if self.rng.random() < 0.5 else []
        return self.b.emit(ops.Linear(), x, self.weight((width, self.shape(x)[-1]), True), *more)

    def pointwise(self, x: str) -> str:
        return self.b.emit(ops.Unary(str(self.rng.choice(["tanh", "relu", "neg", "silu"]))), x)

    def both(self, x: str) -> str | None:
        same = [v for v in self.values if self.shape(v) == self.shape(x)]
        fn = str(self.rng.choice(["add", "mul", "sub"]))
        return self.b.emit(ops.Binary(fn), x, str(self.rng.choice(same)))

    def constant(self, x: str) -> str:
        thin = tuple(d if self.rng.random() < 0.5 else 1 for d in self.shape(x))
        return self.b.emit(ops.Binary("add"), x, self.weight(thin[int(self.rng.integers(len(thin))) :]))

    def cut(self, x: str) -> str | None:
        axis = int(self.rng.integers(1, len(self.shape(x))))
        n = self.shape(x)[axis]
        start, step = int(self.rng.integers(n)), int(self.rng.choice([1, 1, 1, 2]))
        return self.b.emit(ops.Slice(axis, start, int(self.rng.integers(start, n)) + 1, step), x)

    def join(self, x: str) -> str:
        axis = int(self.rng.integers(1, len(self.shape(x))))

        def rest(v: str) -> tuple[int, ...]:
            return tuple(d for i, d in enumerate(self.shape(v)) if i != axis)

        fits = [v for v in self.values if len(self.shape(v)) == len(self.shape(x)) and rest(v) == rest(x)]
        return self.b.emit(ops.Concat(axis), x, str(self.rng.choice(fits)))

    def fold(self, x: str) -> str | None:
        """Split an axis in two, or merge two neighbours."""
        shape = list(self.shape(x))
        axis = int(self.rng.integers(1, len(shape)))
        if len(shape) > 2 and self.rng.random() < 0.5:
            axis = max(axis, 2)
            shape[axis - 1 : axis + 1] = [shape[axis - 1] * shape[axis]]
        else:
            parts = [k for k in range(2, shape[axis]) if shape[axis] % k == 0]
            if not parts or len(shape) > 4:
                return None
            k = int(self.rng.choice(parts))
            shape[axis : axis + 1] = [k, shape[axis] // k]
        return self.b.emit(ops.Reshape(tuple(shape)), x)

    def turn(self, x: str) -> str:
        rank = len(self.shape(x))
        if self.rng.random() < 0.3:
            return self.b.emit(ops.Flip((int(self.rng.integers(1, rank)),)), x)
        return self.b.emit(ops.Transpose((0, *(int(i) + 1 for i in self.rng.permutation(rank - 1)))), x)

    def norm(self, x: str) -> str:
        shape = self.shape(x)
        kind = self.rng.integers(4)
        if kind == 0:
            return self.b.emit(ops.LayerNorm(), x, self.weight(shape[-1:]), self.weight(shape[-1:]))
        if kind == 1:
            axes = min(2, len(shape) - 1)
            return self.b.emit(ops.RmsNorm(axes), x, self.weight(shape[-axes:]))
        if kind == 2:
            groups = next(g for g in (4, 3, 2, 1) if shape[1] % g == 0)
            return self.b.emit(ops.GroupNorm(groups), x, self.weight(shape[1:2]), self.weight(shape[1:2]))
        return self.b.emit(ops.Softmax(int(self.rng.integers(1, len(shape)))), x)

    def mix(self, x: str) -> str:
        axis = int(self.rng.integers(1, len(self.shape(x))))
        kind = self.rng.integers(4)
        if kind == 0:
            index = self.b.constant(self.rng.integers(0, self.shape(x)[axis], 3))
            return self.b.emit(ops.Gather(axis), x, index)
        if kind == 1:
            return self.b.emit(ops.Tile(tuple(2 if i == axis else 1 for i in range(len(self.shape(x))))), x)
        if kind == 2:
            low = [1 if i == axis else 0 for i in range(len(self.shape(x)))]
            return self.b.emit(ops.Pad((*low, *[0] * len(low))), x)
        return self.b.emit(ops.CumSum(axis), x)

    def attend(self, x: str) -> str | None:
        shape = self.shape(x)
        if len(shape) != 3:
            return None
        heads, size, shared = (
            int(self.rng.choice([2, 4])),
            int(self.rng.choice([1, 2, 4])),
            int(self.rng.choice([1, 2])),
        )

        def split(n: int) -> str:
            made = self.b.emit(ops.Linear(), x, self.weight((n * size, shape[-1])))
            cut = self.b.emit(ops.Reshape((shape[0], shape[1], n, size)), made)
            return self.b.emit(ops.Transpose((0, 2, 1, 3)), cut)

        q, k, v = split(heads), split(heads // shared), split(heads // shared)
        if shared == 1 and self.rng.random() < 0.5:
            scores = self.b.emit(ops.MatMul(transpose_b=True), q, k)
            out = self.b.emit(ops.MatMul(), self.b.emit(ops.Softmax(), scores), v)
            return self.merged(out, heads * size)
        mask = [self.weight((heads, shape[1], shape[1]))] if self.rng.random() < 0.3 else []
        out = self.b.emit(ops.Attention(0.5, bool(self.rng.random() < 0.5), shared), q, k, v, *mask)
        return self.merged(out, heads * size)

    def merged(self, heads: str, width: int) -> str:
        back = self.b.emit(ops.Transpose((0, 2, 1, 3)), heads)
        return self.b.emit(ops.Reshape((*self.shape(back)[:2], width)), back)

    def image(self, x: str) -> str | None:
        shape = self.shape(x)
        if len(shape) < 3 or len(shape) > 4:
            return None
        ones, c, n = [1] * (len(shape) - 2), shape[1], int(self.rng.choice(WIDTHS))
        kind = self.rng.integers(4)
        if kind == 0:
            return self.b.emit(ops.Conv(), x, self.weight((n, c, *ones), True), self.weight((n,)))
        if kind == 1:
            times = int(self.rng.choice([1, 2]))
            return self.b.emit(ops.Conv(groups=c), x, self.weight((c * times, 1, *ones)), self.weight((c * times,)))
        if kind == 2 and c % 2 == 0:
            return self.b.emit(ops.Conv(groups=2), x, self.weight((n, c // 2, *ones)))
        return self.b.emit(ops.ConvTranspose(), x, self.weight((c, n, *ones)), self.weight((n,)))

    def reduce(self, x: str) -> str | None:
        shape = self.shape(x)
        if len(shape) < 3:
            return None
        fn = str(self.rng.choice(["mean", "sum", "max"]))
        return self.b.emit(ops.Reduce(fn, (int(self.rng.integers(1, len(shape))),), bool(self.rng.random() < 0.5)), x)


def fuzzed(seed: int, steps: int = 14) -> Graph:
    """A graph of about ``steps`` operators; its output is a linear layer over the last value, and now and then more."""
    m = _Maker(seed)
    m.values.append(m.linear(m.values[0]))
    for _ in range(steps):
        m.step()
    out = m.b.emit(ops.Linear(), m.values[-1], m.weight((3, m.shape(m.values[-1])[-1])))
    extra = [m.any()] if m.rng.random() < 0.15 else []
    return m.b.finish([out, *extra], ["y", "z"][: 1 + len(extra)])
