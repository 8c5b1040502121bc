"""``torch.compile(module, backend="bitwright")``: same results, weights frozen, refusals instead of fallbacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.ir.errors import Unsupported
from bitwright.torch_backend import _Compiled, bitwright_backend


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.norm(self.conv(x)))
        return self.head(h.flatten(1)), h.mean((2, 3))


def assert_close(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_backend_is_registered() -> None:
    assert "bitwright" in torch._dynamo.list_backends()


def test_results_are_the_modules() -> None:
    module, x = Small().eval(), torch.randn(2, 3, 4, 4)
    fast = torch.compile(module, backend="bitwright", fullgraph=True)
    with torch.no_grad():
        assert_close(fast(x), module(x))
        assert_close(fast(-x), module(-x))


def test_another_batch_size_compiles_another_program() -> None:
    module = Small().eval()
    fast = torch.compile(module, backend="bitwright")
    with torch.no_grad():
        for rows in (2, 3, 5):
            x = torch.randn(rows, 3, 4, 4)
            assert_close(fast(x), module(x))


def test_options_reach_the_compiler() -> None:
    module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.randn(64, 32)
    options: Any = {"recipe": "int8", "calibration": [x.numpy()]}
    fast = torch.compile(module, backend="bitwright", options=options)
    with torch.no_grad():
        got, want = fast(x), module(x)
    span = want.max() - want.min()
    assert 0 < (got - want).abs().max() < 0.03 * span


def test_gradients_are_refused() -> None:
    fast = torch.compile(Small().eval(), backend="bitwright")
    with pytest.raises(Exception, match=r"no gradients[\s\S]*no_grad") as caught:
        fast(torch.randn(2, 3, 4, 4))
    assert isinstance(caught.value, Unsupported) or "Unsupported" in str(caught.value)


def test_sizes_become_numbers_and_constants_stay() -> None:
    graph = torch.fx.Graph()
    size, x = graph.placeholder("s"), graph.placeholder("x")
    double = graph.call_function(lambda n: 2 * n, (size,))
    y = graph.call_function(torch.reshape, (x, (double, -1)))
    graph.output((y, 7, None))
    module = torch.fx.GraphModule(nn.Module(), graph)
    compiled = bitwright_backend(module, [torch.SymInt, torch.zeros(3, 4)])
    assert isinstance(compiled, _Compiled)
    got, seven, nothing = compiled(2, torch.arange(12.0).reshape(3, 4))
    assert got.tolist() == torch.arange(12.0).reshape(4, 3).tolist()
    assert (seven, nothing) == (7, None)
