"""Contractions of f32 on ordinary lanes: emulated against the reference, machine code, packing, choice of tiles."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.codegen.targets import GPUS
from bitwright.codegen.tvm.cuda.mma import MmaConfig
from bitwright.codegen.tvm.cuda.simt import Simt
from bitwright.ir import ops
from tests.codegen.cuda.product_cases import (
    Product,
    check,
    configured,
    conv,
    draw,
    linear,
    machine_code,
    matmul,
    refused,
    shaped,
)

T = Simt()


def test_linear_layers_of_odd_shapes() -> None:
    rng = np.random.default_rng(1)
    bias, residual = draw(rng, (70,), "f32"), draw(rng, (37, 70), "f32")
    after = [(ops.Unary("relu"), ("v0",)), (ops.Binary("add"), ("v1", "residual"))]
    products = [
        linear(rng, "f32", 37, 70, 131, after=after, more={"bias": bias, "residual": residual}),
        linear(rng, "f32", 3, 70, 515),
    ]
    assert configured(T, products[1], "cuda-sm80").tile.split > 1
    assert check(T, products, orders=(1, 2)) == []


def test_convolutions() -> None:
    rng = np.random.default_rng(2)
    products = [
        conv(rng, "f32", (2, 9, 11, 3), (20, 3, 3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
        conv(
            rng, "f32", (1, 9, 11, 32), (48, 16, 3, 2), stride=(1, 2), padding=(1, 0, 2, 1), dilation=(2, 1), groups=2
        ),
    ]
    assert check(T, products) == []


def test_products_of_two_computed_operands() -> None:
    rng = np.random.default_rng(3)
    products = [
        matmul(rng, "f32", (3, 20, 37), (3, 37, 23), False), matmul(rng, "f32", (3, 20, 37), (3, 24, 37), True),
        matmul(rng, "f32", (3, 20, 40), (3, 40, 24), False, constant=True),
    ]  # fmt: skip
    assert check(T, products) == []


def tiles() -> list[Product]:
    """One layer cut in every way of some points of the space."""
    base = linear(np.random.default_rng(4), "f32", 150, 200, 650)
    space = T.space(base.case.body, base.constants, GPUS["cuda-sm80"])
    points = list(space)[:: max(sum(1 for _ in space) // 12, 1)]
    return [Product(base.case, base.weights, p) for p in points]


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_tiles_stages_and_parts(many: bool) -> None:
    assert check(T, tiles() if many else tiles()[1:4]) == []


@pytest.mark.nightly
def test_ten_thousand_tiles() -> None:
    """A thread's sums are 64; blocks of 64 by 8 sums."""
    point = {"warps_outs": 1, "warps_rows": 1, "each": 2, "stages": 2, "split": 1, "raster": 4}
    p = linear(np.random.default_rng(5), "f32", 100 * 8 - 3, 100 * 64 - 5, 40)
    assert check(T, [Product(p.case, p.weights, point)]) == []


@pytest.mark.parametrize("target", ["cuda-sm80", "cuda-sm90"])
def test_machine_code(target: str) -> None:
    config, made, text = machine_code(T, shaped("f32", 4096, 4096, 1024), target)
    assert (config.tile.outs, config.tile.rows) == (128, 128)
    assert made.resources["kern"].registers <= 255
    assert all(word in text for word in ("FFMA", "LDGSTS.E.BYPASS", "LDS.128", "STG.E.128"))
    products = text.count("FFMA ")
    assert products >= 1024
    assert products > 5 * text.count("LDS")


def test_packed_weights_unpack() -> None:
    p = linear(np.random.default_rng(6), "f32", 9, 70, 50)
    config = configured(T, p, "cuda-sm80")
    packed = T.pack(p.case.body, config, p.constants)
    assert T.verify(p.case.body, config, p.constants, packed) == ""
    packed[0][0, 49, 69] += 1
    assert "do not unpack" in T.verify(p.case.body, config, p.constants, packed)
    packed = T.pack(p.case.body, config, p.constants)
    packed[0][0, 49, 70] = 1
    assert "where there are none" in T.verify(p.case.body, config, p.constants, packed)


def test_only_f32_is_taken() -> None:
    assert "no product of f16 by f16" in refused(T, linear(np.random.default_rng(7), "f16", 8, 8, 8))
    answer = T.configure(shaped("f32", 64, 64, 64).case.body, {}, GPUS["cuda-sm80"])
    assert isinstance(answer, MmaConfig)
    assert answer.product.left == "rows"
