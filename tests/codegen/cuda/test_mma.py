"""Products on tensor cores (``mma.sync``): emulated against the reference, machine code, packing, choice of tiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitwright.codegen.targets import GPUS
from bitwright.codegen.tuning.space import Point
from bitwright.codegen.tvm.cuda.mma import Mma
from bitwright.codegen.tvm.cuda.mma_spec import Tile, default
from bitwright.codegen.tvm.cuda.products import product_of
from bitwright.codegen.tvm.template import Config, Refused
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.types import F32, S8, S64, U8, parse_type
from tests.codegen.cuda.product_cases import (
    Product,
    check,
    configured,
    conv,
    draw,
    linear,
    machine_code,
    main_loop,
    matmul,
    refused,
    shaped,
)
from tests.codegen.kernel_batch import Case, body_of

T = Mma()
KINDS = ("f16", "bf16", "s8", "u8")


def point(
    outs: int, rows: int, warps: tuple[int, int], depth: int = 64, stages: int = 3, split: int = 1, *,
    raster: int = 4, kernel: str = "dense",
) -> Point:  # fmt: skip
    return {
        "outs": outs, "rows": rows, "warps_outs": warps[0], "warps_rows": warps[1], "depth": depth, "stages": stages,
        "split": split, "raster": raster, "kernel": kernel,
    }  # fmt: skip


SHAPES = ((13, 200, 66), (70, 131, 260), (1, 70, 131), (8, 65, 512), (37, 10, 72), (130, 64, 100))


def odd(kind: str, shapes: tuple[tuple[int, int, int], ...]) -> list[Product]:
    rng = np.random.default_rng(1)
    zero = {"u8": 131, "s8": -5}.get(kind, 0)
    return [
        linear(rng, kind, *shape, sparse=sparse, zero=zero)
        for k, shape in enumerate(shapes)
        for sparse in ((False, True) if len(shapes) > 2 else (k == 1,))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_of_odd_shapes(kind: str) -> None:
    assert check(T, odd(kind, SHAPES[:2]), orders=(1, 2)) == []


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_of_more_odd_shapes(kind: str) -> None:
    assert check(T, odd(kind, SHAPES), orders=(3, 4)) == []


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_every_alignment_of_rows(many: bool) -> None:
    rng = np.random.default_rng(2)
    lengths = (16, 24, 28, 30, 31, 64, 65, 129) if many else (28, 129)
    products = [linear(rng, kind, 21, 40, k) for kind in ("u8", "f16") for k in lengths]
    assert check(T, products) == []


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_tiles_stages_parts_and_orders_of_blocks(many: bool) -> None:
    rng = np.random.default_rng(3)
    points = [
        point(64, 32, (1, 2), stages=5, split=4), point(128, 128, (2, 2)), point(64, 64, (2, 2), stages=2),
        point(128, 64, (2, 2), 128, 4), point(256, 8, (4, 1), split=3), point(64, 64, (1, 4), raster=1, split=2),
        point(64, 128, (2, 4), 128, 2),
    ]  # fmt: skip
    sparse = [
        point(256, 8, (4, 1), 128, 3, 3, kernel="2:4"), point(64, 64, (1, 4), 128, kernel="2:4"),
        point(128, 128, (2, 2), 128, 2, kernel="2:4"), point(128, 32, (2, 2), 256, 2, 2, kernel="2:4"),
    ]  # fmt: skip
    some = slice(None) if many else slice(1)
    products = [linear(rng, "u8", 150, 200, 650, zero=9, point=p) for p in points[some]]
    for kind in ("s8", "f16"):
        products += [linear(rng, kind, 150, 200, 650, zero=9, sparse=True, point=p) for p in sparse[some]]
    assert check(T, products) == []


def test_what_follows_is_fused() -> None:
    rng = np.random.default_rng(4)
    m, s = rng.integers(1 << 29, 1 << 30, 70).astype(np.int32), rng.integers(39, 42, 70).astype(np.int32)
    requantize = (ops.Requantize(U8, 7, 1), ("v0", "m", "s"))
    products = [
        linear(rng, "u8", 33, 70, 96, zero=3, after=[requantize], more={"m": m, "s": s}),
        linear(
            rng, "s8", 33, 64, 96, sparse=True,
            after=[
                (ops.Requantize(S8, -7, 1), ("v0", "m", "s")), (ops.Dequantize(), ("v1", "scale")),
                (ops.Binary("add"), ("v2", "residual")), (ops.Unary("relu"), ("v3",)),
            ],
            more={
                "m": m[:64], "s": s[:64], "scale": np.array(0.25, np.float32),
                "residual": draw(rng, (33, 64), "f32"),
            },
        ),
        linear(
            rng, "f16", 33, 72, 100,
            after=[(ops.Unary("gelu"), ("v0",)), (ops.Binary("mul"), ("v1", "residual"))],
            more={"bias": draw(rng, (72,), "f16"), "residual": draw(rng, (33, 72), "f16")},
        ),
        linear(rng, "bf16", 33, 71, 100, after=[(ops.Unary("silu"), ("v0",))], more={"bias": draw(rng, (71,), "bf16")}),
        linear(rng, "f16", 12, 40, 64, after=[(ops.Cast(F32), ("v0",))]),
    ]  # fmt: skip
    assert check(T, products) == []


def convolutions(kind: str) -> list[Product]:
    rng = np.random.default_rng(5)
    zero, one = {"u8": 7, "s8": -9}.get(kind, 0), (1, 1, 1, 1)
    narrow, deep = (1, 9, 11, 12), (1, 9, 11, 32)
    return [
        conv(rng, kind, (2, 9, 11, 16), (40, 16, 3, 3), padding=one, sparse=True, zero=zero),
        conv(rng, kind, (2, 9, 11, 3), (20, 3, 3, 3), stride=(2, 2), padding=one, zero=zero),
        conv(rng, kind, deep, (44, 16, 3, 2), stride=(1, 2), groups=2, zero=zero),
        conv(rng, kind, narrow, (40, 12, 3, 2), stride=(1, 2), padding=(1, 0, 2, 1), dilation=(2, 1), zero=zero),
        conv(rng, kind, (2, 9, 11, 16), (40, 16, 3, 3), padding=one, zero=zero),
        conv(rng, kind, (1, 19, 32), (46, 16, 3), padding=(1, 2), dilation=(2,), groups=2, sparse=True, zero=zero),
        conv(rng, kind, (1, 5, 6, 4, 8), (24, 8, 3, 2, 2), stride=(1, 2, 1), padding=(1, 1, 1, 1, 0, 0), zero=zero),
        conv(rng, kind, (2, 8, 8, 32), (48, 16, 1, 1), groups=2, zero=zero),
        conv(rng, kind, (2, 7, 7, 64), (64, 64, 1, 1), stride=(2, 2), zero=zero),
    ]


@pytest.mark.parametrize("kind", ["u8", "f16"])
def test_convolutions(kind: str) -> None:
    first = {"u8": slice(0, 2), "f16": slice(2, 4)}[kind]
    assert check(T, convolutions(kind)[first]) == []


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_more_convolutions(kind: str) -> None:
    assert check(T, convolutions(kind), orders=(5,)) == []


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_products_of_two_computed_operands(many: bool) -> None:
    rng = np.random.default_rng(6)
    products = [
        matmul(rng, "f16", (3, 20, 37), (3, 37, 23), False), matmul(rng, "s8", (3, 20, 48), (3, 24, 48), True),
        matmul(rng, "f16", (3, 20, 40), (3, 40, 24), False, constant=True),
    ]  # fmt: skip
    if many:
        products += [
            matmul(rng, "bf16", (3, 70, 40), (3, 24, 40), True), matmul(rng, "f16", (2, 3, 20, 40), (40, 24), False),
            matmul(rng, "u8", (20, 33), (70, 33), True), matmul(rng, "f16", (130, 200), (200, 264), False),
            matmul(rng, "f16", (3, 20, 40), (3, 40, 24), False),
        ]  # fmt: skip
    assert check(T, products, orders=(1, 2)) == []


def test_zero_points_of_batches_vectors_and_operands_that_are_read_again() -> None:
    rng = np.random.default_rng(14)
    x, w = draw(rng, (20, 64), "f16"), draw(rng, (64, 64), "f16")
    again = ((ops.Linear(), ("x", "w")), (ops.Binary("add"), ("v0", "x")), (ops.Unary("relu"), ("v1",)))
    batch = {"x": draw(rng, (3, 20, 48), "u8"), "w": draw(rng, (3, 48, 26), "s8")}
    vector = {"x": draw(rng, (70,), "f16"), "w": draw(rng, (33, 70), "f16")}
    deep = {"x": draw(rng, (2, 3, 5, 70), "u8"), "w": draw(rng, (33, 70), "s8")}
    bodies = [
        (body_of(*again, inputs={"x": x, "w": w}, outputs=("v1", "v2")), {"x": x, "w": w}),
        (body_of((ops.IntMatMul(False, 7), ("x", "w")), inputs=batch), batch),
        (body_of((ops.Linear(), ("x", "w")), inputs=vector), vector),
        (body_of((ops.IntLinear(x_zero=255), ("x", "w")), inputs=deep), deep),
    ]
    assert check(T, [Product(Case(str(body.outputs), body, inputs)) for body, inputs in bodies]) == []


def test_values_that_are_not_numbers_stay_in_their_rows() -> None:
    rng = np.random.default_rng(7)
    p = linear(rng, "f16", 20, 40, 67)
    p.case.inputs["x"][3, 66], p.case.inputs["x"][5, 0], p.case.inputs["w"][7, 66] = np.nan, np.inf, np.inf
    assert check(T, [p]) == []


@pytest.mark.parametrize("call", ["bw_cp_async_wait1();", "__syncthreads();"])
def test_a_missing_wait_or_barrier_in_a_kernel_is_seen(call: str) -> None:
    p = linear(np.random.default_rng(13), "s8", 70, 64, 640, point=point(64, 64, (1, 4)))

    def spoil(text: str) -> str:
        """The kernel without the call in its main loop."""
        start = text.index("for (int turn")
        assert call in text[start:]
        return text[:start] + text[start:].replace(call, "", 1)

    assert check(T, [p], orders=range(1, 7), spoil=spoil) != []
    assert check(T, [p], orders=range(1, 7)) == []


def test_negative_zero_and_not_a_number_survive_packing() -> None:
    p = linear(np.random.default_rng(8), "f16", 4, 80, 64, sparse=True)
    w = p.case.inputs["w"]
    w[w == 0] = -0.0
    w[3, 5:8] = (0, np.nan, 0)
    config = configured(T, p, "cuda-sm80")
    assert config.product.sparse
    packed = T.pack(p.case.body, config, p.constants)
    assert T.verify(p.case.body, config, p.constants, packed) == ""
    packed[0].reshape(-1)[1000] ^= 1
    assert "do not unpack" in T.verify(p.case.body, config, p.constants, packed)


WORDS = {"f16": "HMMA{}.F32 ", "bf16": "HMMA{}.F32.BF16 ", "s8": "IMMA{}.S8.S8", "u8": "IMMA{}.S8.U8"}
SM_BYTES = {"cuda-sm80": 164 << 10, "cuda-sm90": 228 << 10}
"""Shared memory of a multiprocessor; the system takes a kilobyte of it for each block."""


@pytest.mark.parametrize("target", ["cuda-sm80", "cuda-sm90"])
@pytest.mark.parametrize(
    ("kind", "sparse"),
    [
        ("f16", False), ("f16", True), ("u8", False), ("s8", True),
        *(pytest.param(k, s, marks=pytest.mark.nightly) for k, s in (("bf16", False), ("bf16", True), ("u8", True))),
    ],
)  # fmt: skip
def test_machine_code_is_what_is_meant(kind: str, sparse: bool, target: str) -> None:
    config, made, text = machine_code(T, shaped(kind, 4096, 4096, 1024, sparse), target)
    shape = {(2, False): ".16816", (2, True): ".SP.16832", (1, False): ".16832", (1, True): ".SP.16864"}
    meant = WORDS[kind].format(shape[config.product.size, sparse])
    assert config.product.sparse == sparse
    stored = "STG.E.64" if config.product.size == 2 else "STG.E.128"
    assert all(w in text for w in (meant, "LDGSTS.E.BYPASS", "LDSM.16.M88.4", "LDS.128", stored))
    loop = main_loop(text, meant)
    assert len(loop) < 4 * sum(meant in x for x in loop)  # issue slots a product, of the eight that the unit is busy
    registers = -(-made.resources["kern"].registers // 8) * 8 * config.threads
    shared = config.tile.shared_bytes(config.product) + 1024
    resident = config.tile.resident(config.product, GPUS[target].l1_bytes)
    assert min(65536 // registers, SM_BYTES[target] // shared) >= resident >= (1 if config.threads > 128 else 2)


@pytest.mark.parametrize("target", ["cuda-sm80", "cuda-sm90"])
@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_convolutions_and_small_tiles_do_not_spill(target: str, many: bool) -> None:
    rng = np.random.default_rng(9)
    machine_code(T, conv(rng, "f16", (32, 28, 28, 128), (256, 128, 3, 3), padding=(1, 1, 1, 1)), target)
    machine_code(T, shaped("f16", 8, 4096, 4096, True), target)
    if many:
        image = (32, 28, 28, 128)
        machine_code(T, conv(rng, "u8", image, (128, 128, 3, 3), padding=(1, 1, 1, 1), zero=3, sparse=True), target)
        machine_code(T, conv(rng, "f16", (32, 56, 56, 64), (64, 64, 3, 3), padding=(1, 1, 1, 1)), target)
        machine_code(T, matmul(rng, "f16", (12, 512, 64), (12, 64, 512), False), target)
        machine_code(T, matmul(rng, "s8", (12, 512, 64), (12, 512, 64), True), target)
        machine_code(T, shaped("s8", 16, 4096, 4096), target)
        machine_code(T, shaped("bf16", 2048, 16, 512), target)


def test_refusals() -> None:
    rng = np.random.default_rng(10)
    linear_f32, computed = linear(rng, "f32", 8, 8, 8), replace(linear(rng, "u8", 8, 8, 8, zero=2), weights=())
    assert "no product of f32 by f32" in refused(T, linear_f32)
    assert "computed at run time" in refused(T, computed)
    assert "transposed" in refused(T, matmul(rng, "s8", (4, 8), (8, 4), False))
    assert "broadcast" in refused(T, matmul(rng, "f16", (2, 4, 8), (3, 1, 8, 4), False))
    assert "groups of 1 by 1" in refused(T, conv(rng, "u8", (1, 4, 4, 8), (8, 1, 3, 3), groups=8))
    large = product_of(linear_body(8, 1 << 17, 1 << 13), {"w": np.zeros(0)})
    assert not isinstance(large, Refused)
    assert default(large[1], 108, 163 << 10)[0].packed_bytes(large[1]) == 1 << 31
    wide = product_of(with_sums(linear(rng, "u8", 8, 8, 8)).case.body, {})
    assert isinstance(wide, Refused)
    assert "sums of s64" in wide.reason


def with_sums(p: Product) -> Product:
    """The integer layer with sums of 64 bits."""
    x, w = p.case.inputs["x"], p.case.inputs["w"]
    return replace(p, case=replace(p.case, body=body_of((ops.IntLinear(acc=S64), ("x", "w")), inputs={"x": x, "w": w})))


def taken(p: Product) -> Config:
    """The template's own choice."""
    config = T.configure(p.case.body, p.constants, GPUS["cuda-sm80"])
    assert isinstance(config, Config)
    return config


def test_the_pattern_is_taken_from_values_and_can_be_asked_for() -> None:
    rng = np.random.default_rng(11)
    dense, sparse = linear(rng, "f16", 64, 128, 64), linear(rng, "f16", 64, 128, 64, sparse=True)
    assert not configured(T, dense, "cuda-sm80").product.sparse
    large = taken(shaped("f16", 4096, 4096, 4096, True)).reason
    assert "2:4 weights, 1.9x over dense by counting, tiles of 256 outputs by 128 rows" in large
    assert "bound by shared memory" in large
    few = taken(linear(rng, "f16", 64, 16, 64, sparse=True))
    assert "too few outputs" in few.reason
    assert "64 bytes" in few.reason
    space = T.space(sparse.case.body, sparse.constants, GPUS["cuda-sm80"])
    asked = {**space.default, "kernel": "dense"}
    assert not configured(T, replace(sparse, point=asked, sparse=False), "cuda-sm80").product.sparse
    assert "run dense: no gain" in taken(linear(rng, "s8", 40, 65, 64, sparse=True)).reason
    answer = T.at(dense.case.body, dense.constants, GPUS["cuda-sm80"], {**space.default, "kernel": "2:4"})
    assert isinstance(answer, Refused)
    assert "do not obey 2:4" in answer.reason


def test_tiles_follow_the_shape() -> None:
    def tile(kind: str, rows: int, outs: int, k: int, sparse: bool = False) -> Tile:
        return configured(T, shaped(kind, rows, outs, k, sparse), "cuda-sm80").tile

    assert (tile("f16", 4096, 4096, 512).outs, tile("f16", 4096, 4096, 512).rows) == (128, 128)
    assert (tile("f16", 4096, 4096, 512, True).outs, tile("f16", 4096, 4096, 512, True).rows) == (256, 128)
    assert tile("f16", 4, 4096, 4096).rows == 8
    assert tile("f16", 4, 4096, 4096).split > 1
    assert tile("f16", 40960, 10, 512).outs == 16
    assert tile("s8", 100352, 64, 576, True).outs == 64
    space = T.space(shaped("f16", 64, 256, 640).case.body, shaped("f16", 64, 256, 640).constants, GPUS["cuda-sm80"])
    assert sum(1 for p in space if p["kernel"] == "dense") > 50


def test_every_default_is_a_tile_without_fault() -> None:
    for rows in (1, 8, 9, 16, 17, 33, 64, 100, 4096):
        for outs in (1, 16, 17, 33, 64, 65, 1000, 4096):
            for k in (8, 64, 1000, 8192):
                for sparse in (False, True):
                    found = product_of(linear_body(rows, outs, k), {"w": np.zeros(0)})
                    assert not isinstance(found, Refused)
                    p = replace(found[1], sparse=sparse and outs > 32)
                    made, why = default(p, 132, 227 * 1024)
                    assert made.fault(p, 163 * 1024) == "", why


def linear_body(rows: int, outs: int, k: int) -> Graph:
    b = Builder("body")
    b.input("x", parse_type(f"f16[{rows}, {k}]"))
    b.input("w", parse_type(f"f16[{outs}, {k}]"))
    return b.finish([b.emit(ops.Linear(), "x", "w")])


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", [False, True])
def test_ten_thousand_tiles(kind: str, sparse: bool) -> None:
    """Blocks of one launch, of 64 by 64 and 64 by 8 sums each, values fresh in each."""
    rng = np.random.default_rng(12)
    kernel = "2:4" if sparse else "dense"
    depth = 128 if sparse else 64
    products = [
        linear(rng, kind, 50 * rows - 3, 100 * 64 - 5, 2 * depth, sparse=sparse, point=p)
        for rows, p in (
            (64, point(64, 64, (1, 2), depth, 2, kernel=kernel)),
            (8, point(64, 8, (1, 1), depth, 2, kernel=kernel)),
        )
    ]
    assert check(T, products) == []
