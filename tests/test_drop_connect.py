"""fault_training: faults in training only, gradients around stuck cells, and the plain model back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.ir.errors import InvalidInput


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))


def test_faults_come_with_training_and_go_with_it() -> None:
    net = network()
    plain = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(5, 2, 4, 4)
    net.eval()
    want = net(x)
    training = bw.fault_training(net, 0.3)
    assert training.layers == ("0", "2")
    assert torch.equal(net(x), want)  # eval
    net.train()
    a, b = net(x), net(x)
    assert not torch.equal(a, want)
    assert not torch.equal(a, b)  # drawn anew
    training.finish()
    assert training.finish() is net
    assert torch.equal(net(x), want)
    assert list(net.state_dict()) == list(plain)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in plain.items())


def test_known_faults_leave_weights_of_the_right_sign() -> None:
    """With cells stuck at 0 only, a pair loses its weight where the cell of its sign is stuck, and nothing else."""
    fc = nn.Linear(40, 40)
    before = fc.weight.detach().clone()
    with bw.fault_training(fc, 0.3, high=0.0, known=True):
        read = fc.weight.detach()
    kept = read == before
    assert bool((kept | (read == 0)).all())
    assert 0.6 < float(kept.float().mean()) < 0.8
    fc = nn.Linear(40, 40)
    with bw.fault_training(fc, 0.3, high=1.0, known=True):
        read = fc.weight.detach()
    assert float((read == fc.weight).float().mean()) > 0.6  # a cell at the top leaves what its neighbour takes off


def test_the_same_seed_draws_the_same_faults() -> None:
    results = []
    for seed in (1, 1, 2):
        net = network()
        with bw.fault_training(net, 0.3, seed=seed):
            results.append(net(torch.ones(1, 2, 4, 4)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize(("high", "value"), [(0.0, 0.0), (1.0, 1.0)])
def test_what_is_stuck_reads_as_zero_or_the_largest_and_learns_nothing(high: float, value: float) -> None:
    fc = nn.Linear(2000, 1)
    with torch.no_grad():
        fc.weight.fill_(0.5)
        fc.weight[0, 0] = 1.0
    with bw.fault_training(fc, 0.2, high=high):
        read = fc.weight
        read.sum().backward()  # type: ignore[no-untyped-call]
        grad = fc.parametrizations.weight.original.grad  # type: ignore[union-attr]
    assert isinstance(grad, torch.Tensor)
    kept = (read == 0.5)[0, 1:]
    allowed = {0.0, 0.5} if high == 0 else {value, value - 1, 0.5, -0.5}
    assert set(read[0, 1:].tolist()) <= allowed
    assert float(kept.float().mean()) == pytest.approx(0.8 if high == 0 else 0.64, abs=0.05)
    assert bool((grad[0, 1:][kept] == 1).all())
    if high == 0:
        assert bool((grad[0, 1:][~kept] == 0).all())


def test_only_and_what_does_not_fit() -> None:
    net = network()
    assert bw.fault_training(net, only="2").layers == ("2",)
    assert "parametrized already" in bw.fault_training(net, only="*").refused["2"]
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    assert "shared" in bw.fault_training(shared).refused["1"]
    with pytest.raises(InvalidInput, match="names no Linear or convolution"):
        bw.fault_training(network(), only="no such layer")
    for rate, high in ((1.5, 0.5), (0.1, -0.1)):
        with pytest.raises(InvalidInput, match="is a share from 0 to 1"):
            bw.fault_training(network(), rate, high=high)
