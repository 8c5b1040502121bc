"""Sparse training: masks with straight-through gradients, masked decay, schedule, phases, resuming, the way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bitwright as bw
from bitwright.ir import ops
from bitwright.ir.patterns import violation
from bitwright.ir.types import NM
from bitwright.passes.sparsity.masks import nm_mask
from bitwright.training import SparseTraining


class Small(nn.Module):
    """One convolution, two Linear layers, and three that no 2:4 mask fits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.depthwise(self.stem(x)))).amax((2, 3))
        return self.head(torch.relu(self.fc(x)))  # type: ignore[no-any-return]


Y = torch.arange(32) % 10
G = torch.Generator().manual_seed(1)
X = 2 * torch.randn(10, 1, 6, 6, generator=G)[Y] + 0.2 * torch.randn(32, 1, 6, 6, generator=G)


def loss_of(model: nn.Module) -> Tensor:
    return functional.cross_entropy(model(X), Y)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, training: SparseTraining | None) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if training:
            training.step()


def test_the_gradient_goes_straight_through_and_the_decay_is_added_once() -> None:
    fc, x, g = nn.Linear(8, 4), torch.randn(3, 8), torch.randn(3, 4)
    training = bw.sparse_training(fc, "2:4", decay=0.25)
    weight = fc.parametrizations["weight"].original  # type: ignore[index,union-attr]
    mask, dense = nm_mask(weight, 2, 4), weight.detach().clone()
    assert torch.equal(training.masks[""], mask)
    assert torch.equal(fc.weight, torch.where(mask, dense, 0.0))
    assert torch.equal(fc(x), functional.linear(x, mask * dense, fc.bias))
    fc(x).backward(g)
    want = g.T @ x + 0.25 * (~mask) * dense
    torch.testing.assert_close(weight.grad, want, rtol=1e-6, atol=1e-6)
    fc(x).backward(g)  # a second pass accumulates its gradient, and no second decay
    torch.testing.assert_close(weight.grad, want + g.T @ x, rtol=1e-6, atol=1e-6)
    training.step()
    fc(x).backward(g)
    torch.testing.assert_close(weight.grad, 2 * want + g.T @ x, rtol=1e-6, atol=1e-6)


def test_masks_change_on_schedule_and_flips_are_counted() -> None:
    model = Small()
    training = bw.sparse_training(model, refresh_every=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first = training.masks
    steps(model, optimizer, 2, training)
    assert all(torch.equal(first[n], m) for n, m in training.masks.items())
    steps(model, optimizer, 5, training)
    assert [r.step for r in training.history] == [3, 6]
    flips = {n: float((m != first[n]).double().mean()) for n, m in training.masks.items()}
    assert flips["fc"] > 0
    assert 0 < training.history[0].flip_rate < 1
    only_one = bw.sparse_training(copy.deepcopy(training.finish()), "1:4", refresh_every=100)
    before = only_one.masks
    torch.nn.init.normal_(only_one._layers[0].parameter)
    entry = only_one.refresh()
    after = only_one.masks
    assert entry.layers == {n: float((before[n] != after[n]).double().mean()) for n in after}
    total = sum(m.numel() for m in after.values())
    assert entry.flip_rate == pytest.approx(sum(int((before[n] != after[n]).sum()) for n in after) / total)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("transposable", [False, True])
def test_training_learns_and_every_layer_obeys_the_pattern(kind: str, transposable: bool) -> None:
    model = Small()
    training = bw.sparse_training(model, "2:4", transposable=transposable, refresh_every=10)
    assert training.layers == ("conv", "fc", "head")
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training.attach(optimizer)
    start = float(loss_of(model).detach())
    steps(model, optimizer, 60, None)
    assert training.steps == 60
    assert float(loss_of(model).detach()) < start - 0.3
    for name, mask in training.masks.items():
        across, down = NM(2, 4, 1, transposable=transposable), NM(2, 4, 0)
        array = mask.numpy()
        assert violation(array, across) == "", name
        assert not transposable or violation(array, down) == ""
        assert array.mean() == 0.5 if name != "head" or not transposable else 0.4 < array.mean() <= 0.5
    model.eval()
    with torch.no_grad():
        want = model(X)
        assert torch.equal(training.finish()(X), want)
    assert violation(model.conv.weight.detach().numpy(), across) == ""


@pytest.mark.parametrize(
    ("pattern", "options"),
    [("1:8", {}), ("4:8", {"shared": 4}), ("1:2", {"block": 4}), ("5:8", {"method": "s-ste"}), ("4:4", {})],
)
def test_any_pattern(pattern: str, options: dict[str, Any]) -> None:
    model = Small()
    before = list(model.state_dict())
    training = bw.sparse_training(model, pattern, refresh_every=2, **options)
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 4, training)
    training.finish()
    keep, group = (int(n) for n in pattern.split(":"))
    nm = NM(keep, group, 1, options.get("shared", 1), options.get("block", 1))
    for module in (model.conv, model.fc):
        assert violation(module.weight.detach().numpy(), nm) == ""
        assert type(module) in (nn.Conv2d, nn.Linear)
    assert list(model.state_dict()) == before


def test_finish_gives_the_plain_model_back_and_the_compiler_finds_the_pattern() -> None:
    model = Small()
    parameters, keys = list(map(id, model.parameters())), list(model.state_dict())
    with bw.sparse_training(model, "2:4", only="conv|fc", mvue="optimal") as training:
        assert list(model.state_dict()) != keys
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        steps(model, optimizer, 3, training)
    assert (list(model.state_dict()), list(map(id, model.parameters()))) == (keys, parameters)
    assert "forward" not in vars(model.fc)
    assert training.finish() is model
    graph, _ = bw.optimize(bw.capture(model.eval(), (X,)), "detect-sparsity")
    found = {n.op.ref: n.type.encoding for n in graph.nodes if isinstance(n.op, ops.Weight)}
    assert found["conv.weight"] == found["fc.weight"] == NM(2, 4, 1)
    assert not isinstance(found["head.weight"], NM)
    with pytest.raises(bw.errors.InvalidInput, match="is finished"):
        training.step()
    before = model.fc.weight.detach().clone()
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    assert model.fc.weight.grad is not None
    assert torch.equal(model.fc.weight, before)


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ({}, "nm-mask{pattern=2:4}"),
        ({"transposable": True}, "transposable-mask{pattern=2:4 method=exact}"),
        ({"pattern": "4:8", "transposable": True}, "transposable-mask{pattern=4:8}"),
        ({"pattern": "2:8", "shared": 2}, "nm-mask{pattern=2:8 shared=2}"),
    ],
)
def test_masks_are_those_of_the_passes(options: dict[str, Any], recipe: str) -> None:
    model = Small()
    graph, report = bw.optimize(bw.capture(model.eval(), (X,)), recipe)
    training = bw.sparse_training(model, **options)
    training.finish()
    weights = {n.op.ref.removesuffix(".1"): n.op.ref for n in graph.nodes if isinstance(n.op, ops.Weight)}
    for name in ("conv", "fc", "head"):
        want = graph.weights[weights[f"{name}.weight"]].array
        assert (model.get_parameter(f"{name}.weight").detach().numpy() == want).all()
    refused = {r.place for r in report.refusals if r.place in dict(model.named_modules())}
    assert refused == set(training.refused)


def test_unbiased_gradients_in_bfloat16() -> None:
    fc = nn.Linear(16, 8)
    with bw.sparse_training(fc, mvue="optimal"), torch.autocast("cpu", torch.bfloat16):
        y: Tensor = fc(torch.ones(5, 16))
        y.float().square().sum().backward()  # type: ignore[no-untyped-call]
        assert fc.bias.grad is not None
        assert fc.bias.grad.dtype == torch.float32
    assert fc.weight.grad is not None
    assert fc.weight.grad.dtype == torch.float32


def test_an_error_inside_leaves_the_dense_weights() -> None:
    fc = nn.Linear(8, 4)
    dense = fc.weight.detach().clone()
    with pytest.raises(KeyError), bw.sparse_training(fc):
        raise KeyError
    assert torch.equal(fc.weight, dense)
    assert type(fc) is nn.Linear


@pytest.mark.parametrize("method", ["sr-ste", "s-ste"])
def test_frozen_masks_and_dense_finetuning(method: Any) -> None:
    model = Small()
    training = bw.sparse_training(model, refresh_every=1, method=method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    steps(model, optimizer, 2, training)
    with torch.no_grad():
        before = model(X)
        training.freeze()
        assert torch.equal(model(X), before)
    masks, outside = training.masks, training._layers[1].parameter.detach()[~training.masks["fc"]].clone()
    steps(model, optimizer, 3, training)
    assert all(torch.equal(masks[n], m) for n, m in training.masks.items())
    assert len(training.history) == 2
    assert torch.equal(training._layers[1].parameter[~masks["fc"]], outside)  # neither gradient nor decay
    training.dense_finetune()
    assert torch.equal(model.fc.weight, training._layers[1].parameter)
    steps(model, optimizer, 1, training)
    assert len(training.history) == 2
    training.enable()
    assert violation(model.fc.weight.detach().numpy(), NM(2, 4, 1)) == ""
    assert len(training.history) == 3
    training.freeze()
    with torch.no_grad():
        before = model(X)
        training.enable()
        torch.testing.assert_close(model(X), before)  # of S-STE, the scale is not applied twice
    training.disable()
    training.finish()
    assert method == "s-ste" or int((model.fc.weight == 0).sum()) < 32  # dense at the end stays dense


@pytest.mark.parametrize(
    "options", [{}, {"transposable": True}, {"mvue": "optimal"}, {"mvue": "two-draw", "method": "s-ste"}]
)
def test_resumed_training_agrees_bit_by_bit(options: dict[str, Any]) -> None:
    def start() -> tuple[Small, SparseTraining, torch.optim.Optimizer]:
        model = Small()
        training = bw.sparse_training(model, refresh_every=4, **options)
        return model, training, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, training, optimizer = start()
    steps(model, optimizer, 6, training)
    saved = copy.deepcopy((model.state_dict(), training.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, 7, training)
    other, resumed, second = start()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-1.5)
    for part, state in zip((other, resumed, second), saved, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    steps(other, second, 7, resumed)
    assert resumed.history == training.history
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(bw.errors.InvalidInput, match=r"the saved state has pattern nm<2:4"):
        bw.sparse_training(Small(), "1:4").load_state_dict(saved[1])


class Tied(nn.Module):
    """Two layers with one weight; a head that shares its weight with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.a, self.b = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12)
        self.b.weight, self.head.weight = self.a.weight, self.embed.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.head(self.b(torch.relu(self.a(self.embed(i)))))  # type: ignore[no-any-return]


def test_shared_weights() -> None:
    model = Tied()
    training = bw.sparse_training(model, decay=0.5)
    assert training.layers == ("a",)
    assert training.refused == {"head": "weight is shared with embed, which is not chosen"}
    layer = training._layers[0]
    with pytest.raises(bw.errors.InvalidInput, match="weight is shared with b, which is not chosen"):
        bw.sparse_training(Tied(), only="a")
    reference = Tied()
    plain = reference.a.weight
    with torch.no_grad():
        plain.mul_(training.masks["a"])
    for m in (model, reference):
        m(torch.arange(4)).square().sum().backward()
    masked = ~training.masks["a"] * layer.parameter.detach()
    assert layer.parameter.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(layer.parameter.grad, plain.grad + 0.5 * masked)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    training.finish()
    assert model.a.weight is model.b.weight
    assert violation(model.b.weight.detach().numpy(), NM(2, 4, 1)) == ""


def test_layers_left_dense_are_named_with_the_reason() -> None:
    model = Small()
    model.add_module("up", nn.ConvTranspose2d(8, 8, 2))
    model.fc.weight.requires_grad_(False)
    training = bw.sparse_training(model, transposable=True)
    assert training.refused == {
        "stem": "1 input channels are not a multiple of 4",
        "depthwise": "depthwise convolution has no reduction over channels",
        "fc": "weight is not trained (requires_grad is False)",
        "up": "transposed convolution: no sparse kernel",
    }
    assert training.layers == ("conv", "head")
    training.finish()
    again = bw.sparse_training(model, "2:8", except_="head", shared=8)
    assert again.layers == ("conv",)
    with pytest.raises(bw.errors.InvalidInput, match="head: 10 outputs are not a multiple of shared=8"):
        bw.sparse_training(model, "2:8", only="head", shared=8)
    with pytest.raises(bw.errors.InvalidInput, match="conv: weight is parametrized already"):
        bw.sparse_training(model, only="conv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "nothing"}, "only=nothing except_= names no Linear or convolution"),
        ({"pattern": "5:4"}, "1 <= keep <= group <= 64"),
        ({"refresh_every": 0}, "refresh_every is a whole number of steps, at least 1, not 0"),
        ({"decay": float("nan")}, "decay is a number of at least 0, not nan"),
        ({"method": "ste"}, "method is sr-ste or s-ste, not 'ste'"),
        ({"mvue": "best"}, "mvue is None, optimal or two-draw, not 'best'"),
        ({"mvue": "two-draw", "pattern": "1:4"}, "two-draw keeps 2 of a group, not 1"),
        ({"mvue": "optimal", "only": "conv"}, "mvue is for Linear layers"),
        ({"method": "s-ste", "transposable": True}, "s-ste thresholds each group on its own"),
        ({"shared": 2, "transposable": True}, "a transposable mask has neither shared nor block"),
        ({"pattern": "2:16"}, "stem: 1 input channels are not a multiple of 16; "),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    pattern = options.pop("pattern", "2:4")
    model = Small()
    model.head = nn.Linear(8, 10)
    with pytest.raises(bw.errors.InvalidInput, match=message.replace("(", r"\(")):
        bw.sparse_training(model, pattern, **options)
    assert list(model.state_dict()) == list(Small().state_dict())


def test_steps_are_counted_by_one_party() -> None:
    model = Small()
    training = bw.sparse_training(model)
    with pytest.raises(bw.errors.InvalidInput, match="trains none of the masked weights"):
        training.attach(torch.optim.SGD(model.stem.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training.attach(optimizer)
    for again in (training.step, lambda: training.attach(optimizer)):
        with pytest.raises(bw.errors.InvalidInput, match="attached"):
            again()
    training.finish()
    steps(model, optimizer, 1, None)
    assert training.steps == 0
