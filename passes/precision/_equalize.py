"""Cross-layer equalization on arrays: one pair of weights, or all layers of a model until nothing moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitwright.ir import ops
from bitwright.ir.weights import Array
from bitwright.passes.precision._follow import Reach
from bitwright.passes.precision._rescale import input_channels, largest_by_channel

TINY = 1e-30
"""A range below this is a dead channel: left alone."""


def equalizing_scale(first: Array, second: Array) -> Array:
    """sqrt(first / second) by channel, 1 where either range is zero: dividing the one and multiplying the other by
    it makes both sqrt(first * second) (Nagel et al. 2019, equation 11)."""
    alive = (first > TINY) & (second > TINY)
    found: Array = np.where(alive, np.sqrt(first / np.where(alive, second, 1.0)), 1.0)
    return found


def equalize_pair(first: Array, bias: Array | None, second: Array) -> tuple[Array, Array | None, Array, Array]:
    """Two linear weights [C, K] and [O, C] with something positively homogeneous between them, equalized.

    Returns (first, bias, second, scale[C]) in the formats given; the composed function does not change.
    """
    s = equalizing_scale(largest_by_channel(first).max(1), largest_by_channel(second).max(0))
    new_bias = None if bias is None else (bias / s).astype(bias.dtype)
    return (first / s[:, None]).astype(first.dtype), new_bias, (second * s).astype(second.dtype), s


@dataclass
class Layer:
    """Weight magnitudes of a layer [O, columns], the input channel of each, and the factors found so far."""

    size: Array
    channel: Array
    bias: Array
    divide: Array
    multiply: Array

    @staticmethod
    def of(op: ops.Op, weight: Array, bias: Array | None) -> Layer:
        """A linear or convolution layer whose factors are all one."""
        channel = input_channels(op, weight.shape)
        start = np.zeros(len(weight)) if bias is None else np.abs(bias.astype(np.float64))
        ones = np.ones(len(weight)), np.ones(int(channel.max(initial=-1)) + 1)
        return Layer(largest_by_channel(weight), channel, start, *ones)

    def made(self) -> Array:
        """Largest magnitude of each output channel's weights."""
        found: Array = (self.size * self.multiply[self.channel]).max(1, initial=0.0) / self.divide
        return found

    def read(self) -> Array:
        """Largest magnitude of the weights that read each input channel."""
        found = np.zeros(len(self.multiply))
        np.maximum.at(found, self.channel, self.size / self.divide[:, None])
        return found * self.multiply


@dataclass
class Group:
    """A value whose channels are scaled: the layer that makes it, what reads it, the factor by channel."""

    producer: str
    reach: Reach
    scale: Array


def solve(layers: Mapping[str, Layer], groups: Sequence[Group], sweeps: int, tolerance: float = 1e-6) -> int:
    """Equalize group after group until no factor moves by more than ``tolerance``; returns the sweeps it took.

    A channel is not amplified so far that its bias exceeds the layer's largest: weights of almost nothing beside a
    bias would otherwise stretch the range of the activations without bound.
    """
    for sweep in range(sweeps):
        worst = 0.0
        for g in groups:
            layer = layers[g.producer]
            reads = np.zeros(len(g.scale))
            for name, ids in g.reach.readers.items():
                np.maximum.at(reads, ids, layers[name].read())
            step = equalizing_scale(layer.made(), reads)
            floor = layer.bias / max(float(layer.bias.max(initial=0.0)), TINY) / layer.divide
            step = np.maximum(step, np.minimum(floor, 1.0))
            layer.divide = layer.divide * step
            g.scale = g.scale * step
            for name, ids in g.reach.readers.items():
                layers[name].multiply = layers[name].multiply * step[ids]
            worst = max(worst, float(np.abs(np.log(step)).max(initial=0.0)))
        if worst < tolerance:
            return sweep + 1
    return sweeps


def spread(layer: Layer) -> float:
    """Largest over smallest range of the output channels' weights: what one scale for all has to cover."""
    made = layer.made()
    alive = made[made > TINY]
    return float(alive.max() / alive.min()) if alive.size else 1.0


def absorbed(op: ops.Op, weight: Array, constant: Array) -> Array:
    """What a constant in each input channel adds to each output channel, without padding."""
    total = weight.astype(np.float64).reshape(*weight.shape[:2], -1).sum(2)
    found: Array = (total * constant[input_channels(op, weight.shape)]).sum(1)
    return found


__all__ = ["Group", "Layer", "absorbed", "equalize_pair", "equalizing_scale", "solve", "spread"]
