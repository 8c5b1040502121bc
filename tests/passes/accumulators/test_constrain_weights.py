"""constrain-weights: what it promises holds on the weights the kernels read, for any input, in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.certificates import _unpacked, check
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.verify import verify
from bitwright.passes import Context
from bitwright.passes.accumulators.constrain_weights import ConstrainWeights
from bitwright.passes.precision.observe_ranges import ObserveRanges
from bitwright.passes.precision.quantize_int8 import QuantizeInt8
from bitwright.runtime.manifest import Certificate
from bitwright.runtime.program import Program

Read = Callable[..., Graph]
Array = np.ndarray[Any, Any]
METHODS = ["a2q", "a2q+", "axe-gptq", "axe-gpfq"]

LINEAR = """
    graph @g (%q: u8[1, 4]) -> (y = %y) level=graph {
      %s = constant {values=[0.5]} : f32[]
      %z = constant {values=[ZERO]} : u8[]
      %w = weight {ref="fc.weight"} : s8[2, 4]
      %t = constant {values=[0.25, 0.5]} : f32[2]
      %x = dequantize(%q, %s, %z) : f32[1, 4]
      %wd = dequantize(%w, %t) {axis=0} : f32[2, 4]
      %y = linear(%x, %wd) : f32[1, 2]
    }
"""
WEIGHTS = {"fc.weight": np.array([[100, 30, -100, -30], [3, -4, 0, 1]], np.int8)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, groups=16)
        self.c3, self.fc = nn.Conv2d(16, 24, 3, groups=2, stride=2), nn.Linear(24 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.c3(torch.relu(self.c2(torch.relu(self.c1(x))))))
        return self.fc(x[..., :2, :2].flatten(1))  # type: ignore[no-any-return]


def data(rows: int = 64) -> torch.Tensor:
    return torch.randn(rows, 4, 9, 9, generator=torch.Generator().manual_seed(1))


def compiled(recipe: str) -> Program:
    torch.manual_seed(0)
    return bw.compile(Net().eval(), example_inputs=data(), recipe=recipe, calibration=[data()])


def test_rows_that_fit_stay(read: Read) -> None:
    graph = read(LINEAR.replace("ZERO", "0"), WEIGHTS)
    context = Context()
    p = ConstrainWeights(bits=16)
    done = p.run(graph, context)
    verify(done)
    codes = next(w.array for k, w in done.weights.items() if k != "fc.weight")
    assert codes[1].tolist() == [3, -4, 0, 1]
    assert abs(codes[0].astype(int)).sum() < 257
    assert not p.run(done, Context()).changed_from(done)
    ((_, place, facts),) = context.remarks
    assert place == "fc"
    assert facts["l1_before"] == 260
    assert facts["changed_rows"] == 1
    assert facts["bits"] <= 16
    assert facts["weight_error"] <= facts["weight_error_rescaled"]
    untouched = ConstrainWeights(bits=18).run(graph, Context())
    assert not untouched.changed_from(graph)


@pytest.mark.parametrize("bits", [0, 1, 65, -3])
def test_widths_that_are_none(read: Read, bits: int) -> None:
    with pytest.raises(InvalidInput, match="bits from 2 to 64"):
        ConstrainWeights(bits=bits).run(read(LINEAR.replace("ZERO", "0"), WEIGHTS), Context())


def test_refusals(read: Read) -> None:
    graph = read(LINEAR.replace("ZERO", "0"), WEIGHTS)
    context = Context()
    assert not ConstrainWeights(bits=8).run(graph, context).changed_from(graph)
    assert "not even a weight of 1 fits 8 bits with 8-bit inputs: it takes 9 bits" in context.refusals[0].reason
    floats = read("""
        graph @g (%x: f32[1, 4], %a: f32[2, 4]) -> (y = %y, z = %z) level=graph {
          %w = weight {ref="w"} : f32[2, 4]
          %y = linear(%x, %w) : f32[1, 2]
          %z = matmul(%x, %a) {transpose_b=true} : f32[1, 2]
        }
    """)
    context = Context()
    assert not ConstrainWeights().run(floats, context).changed_from(floats)
    assert [r.reason for r in context.refusals] == ["its weight is not integer", "matmul has no weight of its own"]
    with pytest.raises(InvalidInput, match="calibration data"):
        ConstrainWeights(method="axe-gptq").run(graph, Context())
    assert not ConstrainWeights(only="other").run(graph, Context()).changed_from(graph)


def kernel_weights(program: Program, c: Certificate) -> tuple[Array, Array]:
    """Rows and start values, read back from the artifact, terms in the kernel's order (taps, then channels)."""
    spec = c.stored.config["spec"]["geometry"] if c.stored else {}
    shape: tuple[int, ...] = (spec["cols"], spec["depth"]) if spec["is"] == "Matrix" else (
        spec["outputs"], spec["channels"] // spec["groups"], *spec["kernel"])  # fmt: skip
    w, start = _unpacked(c, program.contents, shape)
    assert start is not None
    return w.reshape(*w.shape[:2], -1).swapaxes(1, 2).reshape(len(w), -1).astype(np.int64), start.astype(np.int64)


def adversarial(rows: Array, count: int, rng: np.random.Generator) -> Array:
    """Input codes [count, K] that push sums out: by the signs of a row, with some places flipped or random."""
    picked = rows[rng.integers(len(rows), size=count)] * rng.choice([-1, 1], (count, 1))
    x = np.where(picked > 0, 255, 0)
    noisy = rng.random(x.shape) < rng.choice([0, 0.02, 0.3], (count, 1))
    out: Array = np.where(noisy, rng.integers(0, 256, x.shape), x)
    return out


@pytest.mark.parametrize(("method", "bits"), [*((m, 16) for m in METHODS), ("a2q+", 13), ("axe-gptq", 13)])
def test_no_adversarial_input_overflows_in_the_kernels_order(method: str, bits: int) -> None:
    """10^5 inputs per layer; every prefix of the kernel's sum, and of a random order, for every output."""
    program = compiled(f"int8, constrain-weights{{bits={bits} method={method}}}")
    assert all(k.ok for k in check(program.contents))
    rng, half = np.random.default_rng(0), 1 << (bits - 1)
    for c in program.manifest.certificates:
        assert c.partial_bits <= bits
        rows, start = kernel_weights(program, c)
        shuffled = rng.permutation(rows.shape[1])
        reached = 0
        for i in range(20):
            x = adversarial(rows, 5000, rng).astype(np.int32).T.copy()
            for order in (np.arange(rows.shape[1]), *([shuffled] if i == 0 else [])):
                low = np.zeros((x.shape[1], len(rows)), np.int32) + start.astype(np.int32)
                high, now = low.copy(), low.copy()
                for k in order:
                    now += x[k, :, None] * rows[:, k].astype(np.int32)
                    np.minimum(low, now, out=low)
                    np.maximum(high, now, out=high)
                assert -half <= low.min()
                assert high.max() < half
                reached = max(reached, int(high.max()), int(-low.min()))
        assert reached > half // 4  # the bound is used


def constrained(options: str) -> tuple[Graph, list[dict[str, Any]]]:
    torch.manual_seed(0)
    x = data()
    passes = f"observe-ranges, quantize-int8, constrain-weights{{{options}}}"
    graph, report = bw.optimize(bw.capture(Net().eval(), x), passes, calibration=[x])
    return graph, [facts for name, _, facts in report.remarks if name == "constrain-weights"]


def test_the_error_is_told_and_methods_differ_as_expected() -> None:
    errors = {}
    for name in (*METHODS, "a2q+ scales=keep", "a2q+ centre=false", "axe-gptq tile=16"):
        _, told = constrained(f"bits=16 method={name}")
        assert len(told) == 4
        assert all(x["output_error"] <= x["output_error_rescaled"] for x in told[2:])
        errors[name] = sum(x["output_error"] for x in told)
    assert errors["axe-gptq tile=16"] < errors["axe-gptq"] < errors["axe-gpfq"] < errors["a2q+"]
    assert errors["a2q+ centre=false"] < errors["a2q+"] < errors["a2q+ scales=keep"]


def test_masks_and_single_scales_survive() -> None:
    torch.manual_seed(0)
    fc, x = nn.Linear(64, 16), torch.randn(32, 64)
    recipe = "nm-mask{pattern=2:4}, observe-ranges, quantize-int8{granularity=tensor}, constrain-weights{bits=15}"
    program = bw.compile(fc, example_inputs=x, recipe=recipe, calibration=[x])
    (c,) = program.manifest.certificates
    assert c.partial_bits <= 15
    assert check(program.contents)[0].ok
    assert "nm<2:4" in program.graph
    w, _ = kernel_weights(program, c)
    assert (np.count_nonzero(w.reshape(16, 16, 4), axis=2) <= 2).all()
    y, want = program(x.numpy()), fc(x).detach().numpy()
    assert np.corrcoef(y.ravel(), want.ravel())[0, 1] > 0.8


NARROW = """
    graph @g (%q: u4[1, 16]) -> (y = %y) level=graph {
      %s = constant {values=[0.5]} : f32[]
      %z = constant {values=[3]} : u4[]
      %w = weight {ref="fc.weight"} : KIND[3, 16]
      %t = constant {values=[0.25, 0.5, 0.125]} : f32[3]
      %x = dequantize(%q, %s, %z) : f32[1, 16]
      %wd = dequantize(%w, %t) {axis=0} : f32[3, 16]
      %y = linear(%x, %wd) : f32[1, 3]
    }
"""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scales", ["search", "keep"])
@pytest.mark.parametrize(("kind", "top", "bits"), [("s4", 7, 11), ("s3", 3, 10), ("ternary", 1, 8)])
def test_codes_stay_in_narrow_formats_and_bounds_are_those_of_the_inputs(
    read: Read, kind: str, top: int, bits: int, method: str, scales: str
) -> None:
    """Centring and error compensation both push codes outwards; u4 inputs move a register by 15 at most."""
    codes = np.array([[top] * 4 + [-top] * 9 + [1 - top] * 3, [-top] * 16, [1] + [0] * 15], np.int8)
    graph = read(NARROW.replace("KIND", kind), {"fc.weight": codes})
    alike = np.minimum(np.arange(40)[:, None] % 9 + np.arange(16) % 2, 15).astype(np.uint8)
    context = Context(calibration=[(row[None],) for row in alike])
    done = ConstrainWeights(bits=bits, method=method, scales=scales).run(graph, context)  # type: ignore[arg-type]
    verify(done)
    made = next(w.array for k, w in done.weights.items() if k != "fc.weight").astype(int)
    assert np.abs(made).max() <= top
    assert made.any()
    assert made[2].tolist() == codes[2].tolist()
    half = (1 << (bits - 1)) - 1
    for row in made:
        up, down = row[row > 0].sum(), -row[row < 0].sum()
        for high, low, start in ((12, -3, 0), (15, 0, 0), (15, 0, -3 * (up - down))):
            assert start + high * up - low * down <= half
            assert start + low * up - high * down >= -half - 1
    facts = context.remarks[-1][2]
    assert facts["cap"] >= (half / 16 if method == "a2q" else 2 * half / 18) - 1e-3
    assert facts["changed_rows"] >= 1


def test_bipolar_weights_are_refused(read: Read) -> None:
    codes = np.where(np.arange(48).reshape(3, 16) % 3 == 0, -1, 1).astype(np.int8)
    context, graph = Context(), read(NARROW.replace("KIND", "bipolar"), {"fc.weight": codes})
    assert not ConstrainWeights(bits=8).run(graph, context).changed_from(graph)
    assert "without a zero" in context.refusals[0].reason


def test_weights_with_two_readers_change_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(48, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.fc(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x = torch.randn(64, 48)
    graph = bw.capture(Tied(), (x,))
    context = Context(calibration=[(x.numpy(),)])
    for p in (ObserveRanges(), QuantizeInt8(), ConstrainWeights(bits=15, method="axe-gptq")):
        graph = p.run(graph, context)
        verify(graph)
    graph = graph.drop_dead()
    assert [w.array.dtype for w in graph.weights.values()].count(np.dtype(np.int8)) == 1
    assert next(r for r in context.remarks if r[0] == "constrain-weights")[2]["changed_rows"] > 0


def test_the_same_input_gives_the_same_weights() -> None:
    one, two = (constrained("bits=14 method=axe-gpfq")[0] for _ in range(2))
    assert one.same_as(two)
