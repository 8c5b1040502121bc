"""constrained_training: the cap holds after every step, the loss falls, and the compiled program needs the width."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.a2q_training import ConstrainedTraining
from bitwright.certificates import check


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    )


def problem(rows: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(rows, 1, 8, 8, generator=g)
    y = torch.arange(rows) % 3
    for i in range(3):
        x[y == i, 0, 2 * i : 2 * i + 3] += 0.5
    return x, y


def holds(training: ConstrainedTraining, bits: int) -> None:
    half = ((1 << (bits - 1)) - 1) / 255
    for codes in training.codes().values():
        flat = codes.long().reshape(len(codes), -1)
        assert int(flat.clamp(min=0).sum(1).max()) <= half
        assert int((-flat).clamp(min=0).sum(1).max()) <= half


@pytest.mark.parametrize("bits", [16, 13])
def test_training_stays_within_the_width_and_learns(bits: int) -> None:
    net = model()
    x, y = problem()
    keys = list(net.state_dict())
    training = bw.constrained_training(net, bits=bits)
    assert training.layers == ("0", "2", "5")
    holds(training, bits)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        (loss + 1e-3 * training.penalty()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        holds(training, bits)
    assert losses[-1] < 0.5 * losses[0]
    want = net(x).detach().numpy()
    codes = training.codes()
    assert training.finish() is training.finish() is net
    assert sorted(net.state_dict()) == sorted(keys)
    np.testing.assert_allclose(net(x).detach().numpy(), want, rtol=1e-5, atol=1e-5)
    recipe = f"int8, constrain-weights{{bits={bits}}}"
    program = bw.compile(net.eval(), example_inputs=x, recipe=recipe, calibration=[x])
    assert all(k.ok for k in check(program.contents))
    assert all(c.partial_bits <= bits for c in program.manifest.certificates)
    told = [x.figure("weight_error") for x in program.report.layers if x.figure("cap") is not None]
    assert len(told) == 3
    assert max(t for t in told if t is not None) < 0.02  # nothing but what rounding the codes to 8 bits had moved
    assert int(codes["5"].abs().max()) > 1
    agree = (program(x.numpy()).argmax(1) == want.argmax(1)).mean()
    assert agree > 0.95


def test_zeros_stay_and_layers_are_chosen() -> None:
    net = model()
    with torch.no_grad():
        net[5].weight[:, ::2] = 0.0  # type: ignore[index]
    x, y = problem(32)
    with bw.constrained_training(net, bits=15, only="0|5", except_="0", keep_zeros=True) as training:
        assert training.layers == ("5",)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert not bool(net.state_dict()["5.weight"][:, ::2].any())
    with pytest.raises(bw.errors.InvalidInput, match="finished"):
        training.codes()


def test_bad_requests() -> None:
    with pytest.raises(bw.errors.InvalidInput, match="selects no"):
        bw.constrained_training(model(), bits=16, only="none")
    with pytest.raises(bw.errors.InvalidInput, match="not even"):
        bw.constrained_training(model(), bits=8)
    net = model()
    bw.constrained_training(net, bits=16)
    with pytest.raises(bw.errors.InvalidInput, match="parametrization already"):
        bw.constrained_training(net, bits=16)
