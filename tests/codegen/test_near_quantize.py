"""Quantize behind an approximated function: off by one code at ties only; NaN, infinities and the ends as elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.tvm.contract_template import Contract
from bitwright.ir.text import parse
from tests.codegen import harness as h

ROWS, COLS = 4000, 16


@pytest.mark.parametrize("target", ["x86-avx512-vnni", "x86-avx2", "x86-portable"])
@pytest.mark.parametrize(("kind", "scale", "zero"), [("u8", 0.03125, 9), ("u8", 0.0271, 0), ("u4", 0.4, 3)])
def test_codes(target: str, kind: str, scale: float, zero: int) -> None:
    body = parse(
        f"""
        graph @g (%x: f32[{ROWS}, {COLS}], %w: f32[{COLS}, {COLS}], %s: f32[], %z: {kind}[]) -> (y = %y)
            level=integer {{
          %h = linear(%x, %w) : f32[{ROWS}, {COLS}]
          %g = gelu(%h) : f32[{ROWS}, {COLS}]
          %y = quantize(%g, %s, %z) {{dtype={kind}}} : {kind}[{ROWS}, {COLS}]
        }}
    """.replace("\n            level", " level")
    )
    x = np.linspace(-12, 12, ROWS * COLS, dtype=np.float32)
    x[:64] = np.repeat([np.nan, np.inf, -np.inf, 1e30], 16)  # whole rows: the product with a diagonal is NaN
    x[64:80] = 3e4
    constants: dict[str, Any] = {
        "w": np.eye(COLS, dtype=np.float32), "s": np.array(scale, np.float32), "z": np.array(zero, np.uint8),
    }  # fmt: skip
    inputs = [x.reshape(ROWS, COLS), *constants.values()]
    (got,) = h.Kernel(Contract(), body, BUILTIN[target], constants)(inputs)
    (want,) = h.expected(body, inputs)
    np.testing.assert_array_equal(got[:5], want[:5])
    off = np.abs(got.astype(int) - want.astype(int))
    assert off.max() <= 1

    assert np.count_nonzero(off) < 20  # of 64000: values within the error of GELU from the middle between two codes
    assert {int(got.min()), int(got.max())} == {int(want.min()), int(want.max())}
