"""quantize-channels: widths by output, the best within an average, and words of a device that hold them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

import bitwright as bw
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.passes import Context
from bitwright.passes.precision._channel_codes import BITS, by_average, by_counts, codes_by_width, merged, row_errors
from bitwright.passes.precision.quantize_channels import QuantizeChannels
from tests.test_devices import captured

Read = Callable[..., Graph]
NETWORK = """
    graph @g (%x: f32[3, 12]) -> (y = %y) level=graph {
      %w = weight {ref="fc.weight"} : f32[7, 12]
      %y = linear(%x, %w) : f32[3, 7]
    }
"""


def codes_of(graph: Graph) -> np.ndarray:
    (key,) = (n.output for n in graph.nodes if n.op.name == "weight")
    return np.asarray(graph.constant(key))


def widths(codes: np.ndarray) -> list[int]:
    return [1 if (np.abs(r) == 1).all() else 2 if np.abs(r).max() <= 1 else 4 for r in codes]


def test_counts_are_kept_and_needier_outputs_get_more_bits(read: Read) -> None:
    w = np.random.default_rng(0).standard_normal((7, 12)).astype(np.float32) * np.arange(1, 8)[:, None]
    context = Context()
    out = QuantizeChannels(counts="2/3/2").run(read(NETWORK, {"fc.weight": w.astype(np.float32)}), context)
    found = widths(codes_of(out))
    assert sorted(found) == [1, 1, 2, 2, 2, 4, 4]
    assert {found[5], found[6]} == {4}  # the largest weights lose most
    facts = context.remarks[0][2]
    assert (facts["outputs_4_bits"], facts["outputs_2_bits"], facts["outputs_1_bits"]) == (2, 3, 2)


@pytest.mark.parametrize("bits", [1.0, 1.5, 2.0, 2.75, 4.0])
def test_the_average_is_kept_and_no_other_choice_is_much_better(bits: float) -> None:
    rng = np.random.default_rng(int(bits * 4))
    w = torch.from_numpy(rng.standard_normal((7, 20)) * 2.0 ** rng.integers(-2, 3, (7, 1))).float()
    errors = row_errors(w, codes_by_width(w))
    choice = by_average(errors, bits)
    used = sum(BITS[c] for c in choice)
    assert used <= bits * 7
    rows = np.arange(7)
    best = min(
        errors[rows, list(c)].sum() for c in itertools.product(range(3), repeat=7) if sum(BITS[i] for i in c) <= used
    )
    assert errors[rows, choice].sum() == pytest.approx(best)  # on the hull: nothing of as many bits is better


def test_codes_stand_for_each_outputs_own_width() -> None:
    w = torch.from_numpy(np.random.default_rng(1).standard_normal((6, 5, 3, 3))).float()
    codes = codes_by_width(w)
    made = merged(codes, choice := by_counts(row_errors(w, codes), (1, 2, 3)))
    for row, n in enumerate(choice):
        assert torch.equal(made.real()[row], codes[n].real()[row])
    assert str(made.levels.dtype) == "s4"


def test_masked_weights_have_no_single_bit(read: Read) -> None:
    text = NETWORK.replace("f32[7, 12]\n", "f32[7, 12] nm<2:4, axis=1>\n", 1)
    w = np.random.default_rng(2).standard_normal((7, 12)).astype(np.float32)
    w[:, ::2] = 0
    graph = read(text, {"fc.weight": w})
    out = QuantizeChannels(bits=2).run(graph, Context())
    assert (codes_of(out)[:, ::2] == 0).all()
    with pytest.raises(InvalidInput, match="counts=2/3/2 do not fit fc: 7 outputs none of which can have one bit"):
        QuantizeChannels(counts="2/3/2").run(graph, Context())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (QuantizeChannels(bits=0.5), "bits is 1 to 4 on average, not 0.5"),
        (QuantizeChannels(counts="7"), "outputs of 4, 2 and 1 bits, as 8/4/4, not '7'"),
        (QuantizeChannels(counts="1/1/1"), "counts=1/1/1 do not fit fc: 7 outputs$"),
    ],
)
def test_options_that_do_not_fit(read: Read, options: QuantizeChannels, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        options.run(read(NETWORK), Context())


def test_what_is_left_alone_is_told(read: Read) -> None:
    graph = read(NETWORK)
    context = Context()
    once = QuantizeChannels().run(graph, context)
    assert not QuantizeChannels().run(once, context).changed_from(once)
    assert [r.reason for r in context.refusals] == ["quantized already"]


def test_words_of_the_device_hold_the_widths() -> None:
    graph, example = captured("digits")
    passes = "observe-ranges, quantize-channels{bits=1.5}, quantize-int8"
    done = bw.simulate(graph, "simd124", recipe=passes, calibration=[example])
    assert done.identical
    used = {i for x in done.schedule.layers for i in x.instruction.split()}
    assert {"mac2", "mac1"} <= used
    wide = bw.simulate(graph, "simd124", recipe=passes.replace("1.5", "4"), calibration=[example])
    assert done.schedule.weight_bytes < wide.schedule.weight_bytes
