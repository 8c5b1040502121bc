"""Rounding methods: never worse than nearest, better where they should be, masks kept, the same every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.passes.precision.formats import quantize_codes
from bitwright.passes.precision.rounding import PAPER, Rates, adaquant, adaround, gpfq, gptq, gram_of, nearest
from bitwright.passes.sparsity._inputs import lowered, rows
from bitwright.passes.sparsity.masks import nm_mask
from tests import digits_networks

METHODS = ("nearest", "adaround", "adaquant", "gptq", "gpfq")


def random_layer(
    outputs: int = 24, size: int = 32, count: int = 256, groups: int = 0, seed: int = 0, mixed: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and inputs whose features are correlated (``mixed``) or independent."""
    g = torch.Generator().manual_seed(seed)
    lead = (groups,) if groups else ()
    x = torch.randn(*lead, count, size, generator=g)
    if mixed:
        x = (x @ torch.randn(*lead, size, size, generator=g) / size**0.5).relu()
    return torch.randn(*lead, outputs, size, generator=g) / size**0.5, x


def run(
    method: str, w: torch.Tensor, x: torch.Tensor, bits: Any, symmetric: bool = True, mask: Any = None, **options: Any
) -> Any:
    flat = w.reshape(-1, w.shape[-1])
    c = quantize_codes(flat, bits, symmetric, range="mse", mask=None if mask is None else mask.reshape(flat.shape))
    scale, zero = (t.reshape(*w.shape[:-1], 1) for t in (c.scale, c.zero))
    if method == "adaquant":
        return adaquant(w, x, scale, zero, c.levels, mask, **{"iterations": 120, **options})
    if method == "adaround":
        options = {"iterations": 200, **options}
    call: Any = {"nearest": nearest, "adaround": adaround, "gptq": gptq, "gpfq": gpfq}[method]
    return call(w, gram_of(x), scale, zero, c.levels, mask, **options)


def true_error(result: Any, w: torch.Tensor, x: torch.Tensor) -> float:
    """The error taken from outputs."""
    want = x.double() @ w.double().transpose(-1, -2)
    got = x.double() @ result.real().transpose(-1, -2)
    if result.bias is not None:
        got = got + result.bias.unsqueeze(-2)
    return float((got - want).square().sum() / want.square().sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (3, True), ("ternary", True), (8, True)])
@pytest.mark.parametrize("groups", [0, 3])
def test_never_worse_than_nearest(method: str, bits: Any, symmetric: bool, groups: int) -> None:
    w, x = random_layer(groups=groups)
    result = run(method, w, x, bits, symmetric)
    assert result.error <= result.error_nearest
    assert result.codes.shape == w.shape
    assert true_error(result, w, x) == pytest.approx(result.error, rel=1e-3)
    if method not in ("nearest",) and bits != 8:
        assert result.error < 0.93 * result.error_nearest
    again = run(method, w, x, bits, symmetric)
    assert torch.equal(again.codes, result.codes)
    assert torch.equal(again.scale, result.scale)


@pytest.mark.parametrize("method", ["adaround", "adaquant", "gptq", "gpfq"])
def test_better_on_correlated_inputs(method: str) -> None:
    w, x = random_layer(32, 64, 400, seed=1)
    x = torch.cat([x, x[:, :16] + 0.1 * x[:, 16:32]], 1)
    w = torch.cat([w, w[:, :16]], 1)
    result = run(method, w, x, 4)
    assert result.error < 0.85 * result.error_nearest


def test_gptq_is_exact_where_there_is_room() -> None:
    """Two equal inputs: what one code misses the other makes up for; order and damping matter little there."""
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)).expand(100, 2)
    w = torch.tensor([[0.26, 0.26]])
    c = quantize_codes(torch.tensor([[1.0, -1.0]]), 3)
    found = gptq(w, gram_of(x), c.scale[:, None], None, c.levels, damping=1e-6)
    assert float(found.real().sum()) == pytest.approx(2 / 3, abs=1e-6)  # 0.52 is nearer to 2/3 than 0
    assert nearest(w, gram_of(x), c.scale[:, None], None, c.levels).real().tolist() == [[pytest.approx(1 / 3)] * 2]
    assert found.error <= found.error_nearest
    w, x = random_layer(seed=3)
    ordered, plain = (run("gptq", w, x, 3, order=order) for order in (True, False))
    assert not torch.equal(ordered.codes, plain.codes)
    with pytest.raises(InvalidInput, match="damping"):
        run("gptq", w, x, 3, damping=-1.0)


def test_gptq_with_group_scales() -> None:
    w, x = random_layer(16, 64)
    w[:, 32:] *= 20
    c = quantize_codes(w, 4, axis=1, group=32, range="mse")
    grouped = gptq(w, gram_of(x), c.spread(c.scale), None, c.levels)
    assert grouped.error < 0.9 * grouped.error_nearest
    assert torch.equal(grouped.scale, c.spread(c.scale).double())
    dead = x.clone()
    dead[:, 5] = 0.0
    assert gptq(w, gram_of(dead), c.spread(c.scale), None, c.levels).error < grouped.error_nearest


def test_gpfq_against_the_original_inputs() -> None:
    """With the inputs of a rounded prefix, errors of the prefix are made up for too."""
    w, x = random_layer(seed=5)
    moved = x + 0.3 * x.roll(1, 1)
    c = quantize_codes(w, 4, range="mse")
    args = (c.scale[:, None], None, c.levels)
    aware = gpfq(w, gram_of(moved), *args, cross=(moved.double().T @ x.double()))
    blind = gpfq(w, gram_of(moved), *args)
    want = x.double() @ w.double().T

    def error(real: torch.Tensor) -> float:
        return float((moved.double() @ real.T - want).square().sum())

    assert error(aware.real()) < 0.7 * error(blind.real())
    with pytest.raises(InvalidInput, match="cross has shape"):
        gpfq(w, gram_of(moved), *args, cross=torch.zeros(2, 2))


@pytest.mark.parametrize("rates", [PAPER, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_adaquant_learns_the_activation_too(rates: Rates | None, symmetric: bool) -> None:
    w, x = random_layer(32, 64, 512)
    bias = torch.linspace(-1, 1, 32)
    result = run("adaquant", w, x, 4, symmetric, x_bits=4, bias=bias, relu=True, rates=rates, iterations=400)
    assert result.error < 0.85 * result.error_nearest
    step, zero = result.input
    assert 0 <= zero <= 15
    xq = ((x / step).round() + zero).clamp(0, 15).sub(zero) * step
    want, got = (x @ w.T + bias).relu(), (xq.double() @ result.real().T + bias + result.bias).relu()
    assert float((got - want).square().sum() / want.square().sum()) == pytest.approx(result.error, rel=1e-3)


def test_adaround_learns_up_or_down() -> None:
    w, x = random_layer(seed=2)
    result = run("adaround", w, x, 4, iterations=1500)
    at = w.double() / result.scale
    assert bool(((result.codes == at.floor().clamp(-8, 7)) | (result.codes == at.ceil().clamp(-8, 7))).all())
    assert result.error < run("adaround", w, x, 4, iterations=50).error
    with pytest.raises(InvalidInput, match="bipolar codes cannot"):
        run("adaround", w, x, "bipolar")
    with pytest.raises(InvalidInput, match="iterations"):
        run("adaround", w, x, 4, iterations=0)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(METHODS), st.sampled_from([4, 8]), st.booleans(), st.sampled_from([0, 2]), st.integers(0, 999))
def test_every_method_keeps_every_zero(method: str, bits: int, symmetric: bool, groups: int, seed: int) -> None:
    w, x = random_layer(8, 16, 64, groups, seed)
    mask = nm_mask(w, 2, 4)
    result = run(method, w * mask, x, bits, symmetric, mask, **({"iterations": 30} if "ada" in method else {}))
    assert bool((result.codes == result.zero)[~mask].all())
    assert bool((result.real()[~mask] == 0).all())
    assert result.error <= result.error_nearest
    form = quantize_codes(w[..., 0], bits, symmetric, axis=None).levels
    assert form.lo <= float(result.codes.min()) <= float(result.codes.max()) <= form.hi
    assert torch.equal(result.codes, result.codes.round())


@pytest.fixture(scope="module")
def real_layers() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Weights and inputs of the layers of a trained digits network."""
    from bitwright.ir.interpret import evaluate, to_torch
    from bitwright.passes import parse_passes, run_pipeline

    network = digits_networks.captured(digits_networks.trained("plain"))
    graph, _ = run_pipeline(network, parse_passes("fold-constants, simplify, fold-batch-norm"))
    batch = digits_networks.data().batches(1, 128)[0]
    seen = {graph.inputs[0].name: to_torch(batch[0])}
    evaluate(graph, batch, observe=seen.__setitem__)
    out = []
    for n in graph.nodes:
        if isinstance(n.op, ops.Linear) or (isinstance(n.op, ops.Conv) and n.op.groups == 1):
            array: Any = graph.constant(n.inputs[1])
            kernel = array.shape[2:] if isinstance(n.op, ops.Conv) else ()
            out.append((n.output, lowered(n.op, array), torch.cat(list(rows(n.op, seen[n.inputs[0]], kernel)))[:1500]))
    return out


@pytest.mark.parametrize("method", ["adaround", "adaquant", "gptq", "gpfq"])
def test_real_layers(real_layers: list[tuple[str, torch.Tensor, torch.Tensor]], method: str) -> None:
    gains = []
    for _, w, x in real_layers:
        options: dict[str, Any] = {"iterations": 300, "rates": None} if method == "adaquant" else {}
        result = run(method, w, x, 4, **options)
        assert result.error <= result.error_nearest
        gains.append(result.error / result.error_nearest)
    assert len(gains) >= 3
    assert sum(gains) / len(gains) < 0.75


def test_what_does_not_fit() -> None:
    w, x = random_layer()
    c = quantize_codes(w, 4)
    s = c.scale[:, None]
    for call, message in [
        (lambda: nearest(w, torch.eye(3), s, None, c.levels), r"Gram matrix \[3, 3\] do not fit"),
        (lambda: nearest(w * float("nan"), gram_of(x), s, None, c.levels), "weights have NaN"),
        (lambda: gram_of(x * float("nan")), "NaN or infinities"),
        (lambda: adaquant(w, x[:, :3], s, None, c.levels), "do not fit"),
        (lambda: adaquant(w, x * float("inf"), s, None, c.levels), "NaN or infinities"),
        (lambda: run("nearest", w, x, "bipolar", mask=w > 0), "use ternary"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            call()  # type: ignore[no-untyped-call]
