"""The knobs of kernels with activations in lanes: the default point is the untuned kernel, others are exact as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitwright.codegen.tvm.lanes.template import Lanes, LanesConfig
from bitwright.codegen.tvm.template import Config, Refused, canonical
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.target import Isa
from tests.codegen.harness import Kernel, runnable
from tests.codegen.lanes.test_template import inputs_of, linear, of_pattern, on

Array = np.ndarray[Any, Any]
BODY = linear(100, 136, 256, "nm<1:4, axis=1, shared=4, block=4>")
VALUES = inputs_of(BODY, of_pattern(136, 256, 1, 4, 4, 4, True))
HELD = {n: a for n, a in zip((v.name for v in canonical(BODY).inputs), VALUES, strict=True) if n != "i0"}
ISA: Isa = "avx512-vnni"


class At(Lanes):
    """The template at one point of its space."""

    def __init__(self, point: dict[str, Any]) -> None:
        self.point = point

    def configure(self, body: Any, constants: Any, target: Any) -> Config | Refused:
        return self.at(body, constants, target, self.point)


def test_the_default_point_is_the_untuned_kernel() -> None:
    body, lanes = canonical(BODY), Lanes()
    space = lanes.space(body, HELD, on(ISA))
    assert {k.name for k in space.knobs} == {"shared", "vectors", "outputs", "near"}
    assert lanes.at(body, HELD, on(ISA), space.default) == lanes.configure(body, HELD, on(ISA))


@pytest.mark.skipif(not runnable(ISA), reason=f"this machine has no {ISA}")
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize(("vectors", "outputs", "near"), [(1, 64, 16384), (4, 64, 98304), (3, 192, 16384)])
def test_points_are_exact(shared: int, vectors: int, outputs: int, near: int) -> None:
    point = {"shared": shared, "vectors": vectors, "outputs": outputs, "near": near}
    assert Lanes().space(canonical(BODY), HELD, on(ISA)).why_not(point) == ""
    kernel = Kernel(At(point), BODY, on(ISA), {v.name: a for v, a in zip(BODY.inputs, VALUES, strict=True)})
    assert isinstance(kernel.config, LanesConfig)
    assert (kernel.config.tile.shared, kernel.config.tile.vectors, kernel.config.tile.outputs) == (
        shared,
        vectors,
        outputs,
    )
    np.testing.assert_array_equal(kernel(VALUES, ranges=3)[0], to_numpy(evaluate(BODY, VALUES)[0]))


def test_registers_limit_the_tile() -> None:
    space = Lanes().space(canonical(BODY), HELD, on(ISA))
    assert "registers" in space.why_not({"shared": 4, "vectors": 7, "outputs": 64, "near": 16384})


def test_sharing_that_the_pattern_lacks_is_refused() -> None:
    body = canonical(linear(100, 136, 256, "unstructured<0 per 0>"))
    made = Lanes().at(body, HELD, on(ISA), {"shared": 4, "vectors": 4, "outputs": 64, "near": 16384})
    assert isinstance(made, Refused)
    assert "4 outputs share" in made.reason
