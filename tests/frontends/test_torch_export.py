"""Capture as a whole: the zoo, symbolic sizes, names, origins, weights, refusals, other kinds of input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from bitwright.frontends.torch_export import capture
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput, Unsupported
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.text import parse, show
from bitwright.ir.types import parse_type
from bitwright.ir.verify import verify
from tests.zoo import ZOO, digits, gpt2_small, minilm, minilm_path, resnet18


def largest_error(graph: Graph, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    """Difference to eager torch over the range of its output."""
    with torch.no_grad():
        want = module(*inputs)
    (have,) = evaluate(graph, inputs)
    assert have.shape == want.shape
    return float((have - want).abs().max() / (want.max() - want.min()))


def count(graph: Graph, kind: type[ops.Op]) -> int:
    """How many nodes are of one operator."""
    return sum(isinstance(n.op, kind) for n in graph.nodes)


@pytest.mark.parametrize("name", ZOO)
def test_zoo_model_equals_eager(name: str) -> None:
    module, inputs = ZOO[name]("tiny")
    graph = capture(module, inputs)
    verify(graph, "graph")
    assert largest_error(graph, module, inputs) < 1e-4
    assert show(parse(show(graph))) == show(graph)
    assert parse(show(graph), graph.weights) == graph
    assert all(n.origin for n in graph.nodes)


@pytest.mark.parametrize("name", ZOO)
def test_zoo_model_with_symbolic_batch(name: str) -> None:
    module, inputs = ZOO[name]("tiny")
    graph = capture(module, tuple(x[:1] for x in inputs), dynamic_batch=True)
    verify(graph, "graph")
    assert all(v.type.shape[0] == "b" for v in graph.inputs)
    assert graph.types[graph.outputs[0]].shape[0] == "b"
    for size in (1, 3):
        resized = tuple(torch.cat([x, x])[:size] for x in inputs)
        assert largest_error(graph, module, resized) < 1e-4


@pytest.mark.skipif(minilm_path() is None, reason="the package with the real weights is not installed")
def test_real_minilm_ranks_sentences() -> None:
    from transformers import AutoTokenizer

    module, _ = minilm("full")
    tokenizer: Any = AutoTokenizer.from_pretrained(str(minilm_path()))
    texts = ["a cat sits on the mat", "a kitten rests on a rug", "stock prices fell on monday"]
    batch = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
    inputs = (batch["input_ids"], batch["attention_mask"])
    graph = capture(module, inputs)
    assert count(graph, ops.Attention) == 6
    assert largest_error(graph, module, inputs) < 1e-4
    (vectors,) = evaluate(graph, inputs)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.5 > 0.3 > far


def test_whole_operators_stay_whole() -> None:
    module, inputs = ZOO["vit_small"]("tiny")
    graph = capture(module, inputs)
    assert (count(graph, ops.Attention), count(graph, ops.LayerNorm), count(graph, ops.Linear)) == (2, 5, 13)


# --- symbolic sizes --------------------------------------------------------------------------------------------


class Positions(nn.Module):
    """Position embeddings, a causal mask and lengths: what a symbolic sequence meets."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 64 * 4).reshape(64, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = x.shape[1]
        x = x + self.table[:s] + self.table[torch.arange(s, device=x.device) + 1]
        mask = torch.ones(s, s, dtype=torch.bool).tril()
        scores = (x @ x.transpose(1, 2)).masked_fill(~mask, float("-inf")).softmax(-1)
        return (scores @ x).reshape(-1, 4) / s


def test_symbolic_sequence_with_plain_names() -> None:
    module, x = Positions(), torch.randn(2, 5, 4)
    graph = capture(module, x, dynamic_shapes={"x": {0: "batch", 1: "time"}})
    verify(graph)
    assert graph.inputs[0].type == parse_type("f32[batch, time, 4]")
    assert graph.types[graph.outputs[0]] == parse_type("f32[batch*time, 4]")
    assert largest_error(graph, module, (torch.randn(3, 7, 4),)) < 1e-5


def test_dim_objects_and_lists_name_symbols() -> None:
    dims = [torch.export.Dim("n"), torch.export.Dim("m", max=63), None]
    graph = capture(Positions(), torch.randn(2, 5, 4), dynamic_shapes=(dims,))
    assert graph.inputs[0].type == parse_type("f32[n, m, 4]")


def test_too_free_dims_are_refused_with_torchs_advice() -> None:
    dims = [torch.export.Dim("n"), torch.export.Dim("m"), None]
    with pytest.raises(Unsupported, match=r"to go on: declare m = Dim\('m', max=6"):
        capture(Positions(), torch.randn(2, 5, 4), dynamic_shapes=(dims,))


def test_batch_symbol_may_be_named() -> None:
    module, inputs = digits("tiny")
    assert capture(module, inputs, dynamic_batch="n").symbols == ("n",)


def test_automatic_dims_get_names() -> None:
    auto = torch.export.Dim.AUTO
    graph = capture(Positions(), torch.randn(2, 5, 4), dynamic_shapes={"x": {0: auto, 1: auto}})
    assert graph.inputs[0].type == parse_type("f32[b, s, 4]")


def test_size_that_is_no_product_is_refused() -> None:
    class Grow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, torch.zeros(1, 4)]) * 2

    with pytest.raises(Unsupported, match=r"a size depends on the input as b \+ 1.*\n.*make that dimension static"):
        capture(Grow(), torch.randn(3, 4), dynamic_batch=True)


def test_specialised_batch_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 6)

    with pytest.raises(Unsupported, match="make the sizes static"):
        capture(Fixed(), torch.randn(3, 4), dynamic_batch=True)


# --- inputs and outputs ------------------------------------------------------------------------------------------


class Trees(nn.Module):
    """Nested inputs and outputs, constants among them."""

    def forward(self, pair: Any, *, scale: float = 1.0, extra: Any = None, table: Any = None) -> Any:
        a, b = pair
        y = (a + b) * scale
        z = y if table is None else y + table["bias"]
        return {"sum": y, "parts": (a, [b, z]), "none": None}


def test_trees_flatten_to_names() -> None:
    pair, table = (torch.randn(2, 3), torch.randn(2, 3)), {"bias": torch.randn(3)}
    inputs = {"pair": pair, "scale": 2.5, "extra": None, "table": table}
    graph = capture(Trees(), inputs)
    assert [v.name for v in graph.inputs] == ["pair_0", "pair_1", "table_bias"]
    assert graph.output_names == ("sum", "parts_0", "parts_1_0", "parts_1_1")
    results = evaluate(graph, {"pair_0": pair[0], "pair_1": pair[1], "table_bias": table["bias"]})
    expected = Trees()(**inputs)
    torch.testing.assert_close(results[0], expected["sum"])
    torch.testing.assert_close(results[3], expected["parts"][1][1])


def test_single_output_and_graph_name() -> None:
    module, inputs = digits("tiny")
    graph = capture(module, inputs, name="lenet")
    assert (graph.name, graph.output_names) == ("lenet", ("output",))
    assert capture(module, inputs[0]).name == "Digits"


def test_module_outputs_keep_their_field_names() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    graph = capture(BertModel(config), {"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    assert graph.output_names == ("last_hidden_state", "pooler_output")


def test_training_mode_is_restored() -> None:
    module, inputs = resnet18("tiny")
    module.train()
    module.get_submodule("bn1").eval()
    capture(module, inputs)
    assert module.training
    assert not module.get_submodule("bn1").training
    assert module.get_submodule("layer1").training


def test_exported_program_is_taken_as_it_is() -> None:
    module, inputs = digits("tiny")
    program = torch.export.export(module, inputs, strict=False)
    graph = capture(program)
    assert graph.name == "main"
    assert largest_error(graph, module, inputs) < 1e-5
    dynamic = torch.export.export(module, inputs, dynamic_shapes={"x": {0: torch.export.Dim("n")}}, strict=False)
    assert capture(dynamic).inputs[0].type == parse_type("f32[b, 1, 8, 8]")


def test_wrong_inputs_are_the_users() -> None:
    module, _ = digits("tiny")
    with pytest.raises(InvalidInput, match=r"does not fit|do not fit Digits\.forward"):
        capture(module, (torch.randn(1), torch.randn(1)))
    with pytest.raises(InvalidInput, match="Digits does not run on the example inputs"):
        capture(module, torch.randn(2, 5, 8, 8))
    with pytest.raises(InvalidInput, match="not both"):
        capture(module, torch.randn(2, 1, 8, 8), dynamic_batch=True, dynamic_shapes={"x": None})


# --- weights and origins -----------------------------------------------------------------------------------------


def test_weights_share_the_modules_storage_and_names() -> None:
    module, inputs = digits("tiny")
    graph = capture(module, inputs)
    assert set(graph.weights) == set(dict(module.named_parameters()))
    array = graph.weights["conv1.weight"].array
    assert not array.flags.writeable
    assert array.__array_interface__["data"][0] == module.get_parameter("conv1.weight").data_ptr()


def test_tied_weights_share_a_key() -> None:
    module, inputs = gpt2_small("tiny")
    graph = capture(module, inputs)
    embeddings = [k for k, h in graph.weights.items() if h.array.shape == (99, 32)]
    assert len(embeddings) == 1
    (value,) = (n.output for n in graph.nodes if isinstance(n.op, ops.Weight) and n.op.ref == embeddings[0])
    assert {type(n.op) for n in graph.users[value]} == {ops.Gather, ops.Linear}


def test_origins_name_module_and_line() -> None:
    module, inputs = resnet18("tiny")
    graph = capture(module, inputs)
    place = next(n.origin for n in graph.nodes if isinstance(n.op, ops.Conv) and "layer1" in n.origin)
    path, _, line = place.partition(", zoo.py:")
    assert path == "layer1.0.conv1"
    source = (Path(__file__).parent.parent / "zoo.py").read_text().splitlines()
    assert "self.conv1(x)" in source[int(line) - 1]


def test_buffers_and_lifted_constants() -> None:
    class Buffers(nn.Module):
        scale: torch.Tensor
        shift: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
            self.register_buffer("shift", torch.arange(3.0), persistent=False)
            self.plain = torch.tensor([5.0, 6.0, 7.0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale + self.shift.flip(0) * 2 + self.plain + torch.tensor([1.0, 0.0, 0.0])

    module, x = Buffers(), torch.randn(2, 3)
    graph = capture(module, x)
    verify(graph)
    assert "scale" in graph.weights
    assert {n.op.spelling for n in graph.nodes} == {"weight", "constant", "mul", "add"}, "shift.flip(0) * 2 is folded"
    torch.testing.assert_close(evaluate(graph, [x])[0], module(x))


def test_half_precision_weights_are_kept() -> None:
    module, x = nn.Linear(4, 3).to(torch.bfloat16), torch.randn(2, 4).to(torch.bfloat16)
    graph = capture(module, x)
    verify(graph)
    assert graph.types["weight"] == parse_type("bf16[3, 4]")
    torch.testing.assert_close(evaluate(graph, [x])[0], module(x))


def test_large_uniform_constants_stay_small() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.zeros(64, 64)

    graph = capture(Masked(), torch.randn(64, 64))
    assert len(graph.weights) == 0


# --- quantized programs ------------------------------------------------------------------------------------------


class Quantized(nn.Module):
    """The operators that PT2E's conversion leaves, written out."""

    def __init__(self) -> None:
        super().__init__()
        import torch.ao.quantization.fx._decomposed

        generator = torch.Generator().manual_seed(0)
        self.register_buffer("w", torch.randint(-127, 128, (3, 4), generator=generator).to(torch.int8))
        self.register_buffer("w4", torch.randint(-8, 8, (3, 4), generator=generator).to(torch.int8))
        self.register_buffer("scales", torch.tensor([0.01, 0.02, 0.03]))
        self.register_buffer("zeros", torch.zeros(3, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.ops.quantized_decomposed
        y = q.quantize_per_tensor(x, 0.05, 3, 0, 255, torch.uint8)
        y = q.dequantize_per_tensor(y, 0.05, 3, 0, 255, torch.uint8)
        w = q.dequantize_per_channel(self.w, self.scales, self.zeros, 0, -127, 127, torch.int8)
        w4 = q.dequantize_per_channel(self.w4, self.scales, self.zeros, 0, -8, 7, torch.int8)
        return F.linear(y, w) + F.linear(y, w4)


def test_quantized_operators_come_in_unchanged() -> None:
    module, x = Quantized(), torch.randn(5, 4)
    graph = capture(module, x)
    verify(graph)
    assert count(graph, ops.Quantize) == 1
    assert count(graph, ops.Dequantize) == 3
    assert graph.types["w"] == parse_type("s8[3, 4]")
    assert {str(t.dtype) for t in graph.types.values()} >= {"u8", "s8", "s4"}
    torch.testing.assert_close(evaluate(graph, [x])[0], module(x))


# --- refusals ----------------------------------------------------------------------------------------------------


class Refused(nn.Module):
    """Several things that cannot be captured, and one thing twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.fft.rfft(self.inner(x)).abs()
        z = torch.linalg.inv(x[:, :, :3]) + torch.linalg.inv(x[:, :, 1:])
        total: torch.Tensor = y.sum() + z.sum() + torch.rand_like(x).sum() + F.relu(x).cumprod(1).sum()
        return total


class Named(nn.Module):
    """A parameter with the name of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.x


def test_inputs_keep_their_names_beside_parameters() -> None:
    module, x = Named(), torch.randn(2, 3)
    graph = capture(module, x)
    verify(graph)
    assert [v.name for v in graph.inputs] == ["x"]
    assert set(graph.weights) == {"x"}
    torch.testing.assert_close(evaluate(graph, [x])[0], module(x).detach())


def test_all_problems_at_once() -> None:
    with pytest.raises(Unsupported) as caught:
        capture(Refused(), torch.randn(2, 3, 4))
    problems = {p.operator: p for p in caught.value.problems}
    assert {"aten._fft_r2c.default", "aten.rand_like.default", "aten.cumprod.default"} <= set(problems)
    inverse = next(p for name, p in problems.items() if "inv" in name)
    assert "test_torch_export.py:" in inverse.place
    assert "(and 1 more)" in inverse.place
    assert all(p.cure for p in problems.values())


def test_data_dependent_sizes_are_refused() -> None:
    class Selects(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0]

    with pytest.raises(Unsupported, match=r"the result's size depends on the data(.|\n)*torch\.where"):
        capture(Selects(), torch.randn(4))


def test_data_dependent_branches_are_refused() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(Unsupported, match=r"torch\.export at Branches"):
        capture(Branches(), torch.randn(4))


def test_written_buffers_are_refused() -> None:
    class Counter(nn.Module):
        seen: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return x * self.seen

    with pytest.raises(Unsupported, match="writes to 'seen'"):
        capture(Counter(), torch.randn(4))


def test_training_programs_are_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    program = torch.export.export(module, (torch.randn(2, 4),), strict=False)
    with pytest.raises(Unsupported, match="eval"):
        capture(program)


def test_long_recurrences_are_refused_before_they_unroll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.frontends.torch_export.STEP_LIMIT", 5)
    with pytest.raises(Unsupported, match="6 time steps of 1 layers unroll to more than"):
        capture(nn.LSTM(4, 4, batch_first=True), torch.randn(1, 6, 4))


def test_complex_numbers_are_refused() -> None:
    class Complex(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.view_as_real(torch.complex(x, x) * 2)

    with pytest.raises(Unsupported, match="complex64 tensors are not supported"):
        capture(Complex(), torch.randn(4))


def test_random_numbers_never_fold() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(4)

    with pytest.raises(Unsupported, match="draws random numbers"):
        capture(Noise(), torch.randn(4))


def test_the_interpreter_takes_arrays() -> None:
    module, inputs = digits("tiny")
    graph = capture(module, inputs)
    (y,) = evaluate(graph, {"x": np.asarray(inputs[0])})
    with torch.no_grad():
        torch.testing.assert_close(y, module(*inputs))
