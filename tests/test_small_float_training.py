"""Fine-tuning under small-float sums: bits, estimators on cases worked out by hand, stages, and the way back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.ir.errors import InvalidInput
from bitwright.ir.interpret import evaluate
from bitwright.ir.semantics_small_float import Sums
from bitwright.passes.accumulators._small_float_gradient import SmallFloatDots

WIDE, NARROW = (5, 10, 16), (2, 1, 1)
"""NARROW holds 0.5, 0.75, 1, 1.5, 2, 3, 4 and 6."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, stride=2, padding=(1, 0))
        self.fc1, self.fc2 = nn.Linear(8 * 4 * 3, 16, bias=False), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.fc1(torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1)))
        out: Tensor = self.fc2(y)
        return out


@pytest.mark.parametrize(
    ("x", "product", "chunk", "value", "immediate", "recursive"),
    [
        # 4, 4 + 4 overflows to 6, 6 - 1 = 5 is cut to 4
        ([4, 4, -1], WIDE, 3, 4, [1, 0, 1], [0, 0, 1]),
        # the same between chunks, and in one of two chunks
        ([4, 4, -1], WIDE, 1, 4, [1, 0, 1], [0, 0, 1]),
        ([4, 4, -1, 1], WIDE, 2, 6, [1, 0, 1, 1], [0, 0, 1, 1]),
        # 4 + 0.5 stays 4: swamped
        ([4, 0.5, 2], WIDE, 3, 6, [1, 0, 1], [1, 0, 1]),
        # 1 - 0.75 is below 0.5: zero
        ([1, -0.75, 2], WIDE, 3, 2, [1, 0, 1], [0, 0, 1]),
        # the chunk 1 - 2 makes the sum 0.75 - 1 = -0.25: zero; then 2 + 2
        ([0.75, 0, 1, -2, 2, 2], WIDE, 2, 4, [1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]),
        # products: 0.25 becomes zero, 8 becomes 6 and then 6 + -4 = 2
        ([0.25, 8, -4], NARROW, 3, 2, [0, 0, 1], [0, 0, 1]),
        # exact cancellation is no underflow, and zeros are not swamped
        ([2, -2, 0, 1], WIDE, 4, 1, [1, 1, 1, 1], [1, 1, 1, 1]),
    ],
)
def test_estimators(x: list[float], product: Any, chunk: int, value: float, immediate: Any, recursive: Any) -> None:
    for how, mask in (("identity", [1] * len(x)), ("immediate", immediate), ("recursive", recursive)):
        a, b = torch.tensor([x], dtype=torch.float32, requires_grad=True), torch.ones(1, len(x), requires_grad=True)
        y = SmallFloatDots.apply(a, b, Sums(product, NARROW, chunk), how)  # type: ignore[no-untyped-call]
        y.backward(torch.tensor([[2.0]]))
        assert y.item() == value
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad[0].tolist() == [2.0 * m for m in mask], how
        assert b.grad[0].tolist() == [2.0 * m * v for m, v in zip(mask, x, strict=True)], how


@pytest.mark.parametrize("how", ["immediate", "recursive"])
@pytest.mark.parametrize("shape", [(5, 40, 3), (3, 17, 40), (400, 33, 7)])
def test_estimators_of_a_batch_are_those_of_its_sums(how: Any, shape: tuple[int, int, int]) -> None:
    rows, k, outputs = shape
    rng = torch.Generator().manual_seed(0)
    a, b, g = (torch.randn(s, generator=rng) for s in ((rows, k), (outputs, k), (rows, outputs)))
    sums = Sums((3, 3, 4), (3, 3, 3), 5)
    together = [t.clone().requires_grad_() for t in (a, b)]
    SmallFloatDots.apply(*together, sums, how).backward(g)  # type: ignore[no-untyped-call]
    alone = [t.clone().requires_grad_() for t in (a, b)]
    picked = range(min(rows, 6))
    for i in picked:
        for j in range(outputs):
            y = SmallFloatDots.apply(alone[0][i : i + 1], alone[1][j : j + 1], sums, how)  # type: ignore[no-untyped-call]
            y.backward(g[i : i + 1, j : j + 1])
    assert together[0].grad is not None
    assert alone[0].grad is not None
    torch.testing.assert_close(together[0].grad[list(picked)], alone[0].grad[list(picked)])
    if rows == len(picked):
        torch.testing.assert_close(together[1].grad, alone[1].grad)
    exact = g @ b
    assert not torch.allclose(together[0].grad, exact)
    wide = [t.clone().requires_grad_() for t in (a, b)]
    SmallFloatDots.apply(*wide, Sums((5, 23, 20), (5, 23, 20), 5), how).backward(g)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(wide[0].grad, exact, rtol=1e-3, atol=1e-4)


def test_the_bits_of_the_pass() -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(5, 1, 8, 8)
    for options in ({}, {"acc": "f4m3b5", "rounding": "nearest"}, {"product": "f5m6b16", "chunk": 4}):
        text = " ".join(f"{k}={v}" for k, v in options.items())
        graph, _ = bw.optimize(bw.capture(net, (x,)), f"small-float-sums{{{text}}}", target="host")
        with torch.no_grad(), bw.small_float_training(net, stages=["full"], **options) as training:
            assert training.layers == ("conv1", "conv2", "fc1", "fc2")
            got = net(x)
        np.testing.assert_array_equal(got.numpy(), np.asarray(evaluate(graph, [x.numpy()])[0]))
        with torch.no_grad():
            assert not torch.equal(net(x), got)


def test_one_image_and_other_padding() -> None:
    torch.manual_seed(0)
    for conv, x in (
        (nn.Conv2d(2, 3, 3, padding=(1, 2), dilation=2), torch.randn(2, 9, 9)),
        (nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), torch.randn(4, 2, 9)),
        (nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), torch.randn(2, 1, 3, 4, 5)),
        (nn.Conv2d(1, 2, (3, 5), padding="same"), torch.randn(2, 1, 6, 6)),
    ):
        want = conv(x)
        with bw.small_float_training(conv, acc="f5m20b16", product="f5m20b20"):
            torch.testing.assert_close(conv(x), want, rtol=1e-4, atol=1e-4)


def test_two_stages() -> None:
    fc = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1.0, 1.0]])
    with torch.no_grad():
        fc.weight.copy_(torch.tensor([[2.0**-14, 2.0**-15]]))
    training = bw.small_float_training(fc)
    assert training.stage == "no-underflow"
    assert fc(x).item() == 2.0**-14 + 2.0**-15
    assert training.advance() == "full"
    assert fc(x).item() == 0
    with pytest.raises(InvalidInput, match="last of the stages"):
        training.advance()
    training.finish()
    training.finish()
    assert "forward" not in vars(fc)
    assert fc(x).item() == 2.0**-14 + 2.0**-15
    with pytest.raises(InvalidInput, match="finished"):
        training.advance()


@pytest.mark.parametrize("estimator", ["identity", "recursive"])
def test_training_recovers_what_the_sums_cost(estimator: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 24)
    target = torch.relu(x @ torch.randn(24, 1)) - 1
    net = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))

    def train(steps: int, rate: float) -> float:
        optimizer = torch.optim.Adam(net.parameters(), rate)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), target).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return nn.functional.mse_loss(net(x), target).item()

    plain = train(300, 1e-2)
    training = bw.small_float_training(net, acc="f3m3b4", estimator=estimator)
    training.advance()
    shot = nn.functional.mse_loss(net(x), target).item()
    assert shot > 3 * plain
    training = _again(training, estimator)
    train(40, 5e-3)
    training.advance()
    assert train(20, 2e-3) < 0.5 * shot
    names = [n for n, _ in net.named_parameters()]
    assert training.finish() is net
    assert [n for n, _ in net.named_parameters()] == names
    assert list(net.state_dict()) == names


def _again(training: Any, estimator: Any) -> Any:
    return bw.small_float_training(training.finish(), acc="f3m3b4", estimator=estimator)


def test_refused_and_wrong() -> None:
    class Own(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=2), Own(4, 4), nn.ReLU())
    with bw.small_float_training(net) as training:
        assert training.layers == ("0",)
        assert set(training.refused) == {"1", "2"}
        with pytest.raises(InvalidInput, match="replaced already"):
            bw.small_float_training(net, only="0")
    with pytest.raises(InvalidInput, match="names no Linear"):
        bw.small_float_training(net, only="x")
    for options, message in (
        ({"acc": "f0m7b10"}, "exponent 0"), ({"acc": "s16"}, "floating-point"), ({"acc": "f11m52b1000"}, "f64"),
        ({"chunk": 0}, "chunk"), ({"rounding": "up"}, "rounding"), ({"estimator": "exact"}, "estimator"),
        ({"stages": ()}, "stages"), ({"stages": ("last",)}, "stages"), ({"stages": "full"}, "stages"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=message):
            bw.small_float_training(net, **options)
        assert "forward" not in vars(net[0])
