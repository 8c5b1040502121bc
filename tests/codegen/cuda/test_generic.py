"""The generic GPU kernel against the interpreter: every operator and number format, emulated."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bitwright.codegen.tvm.cuda.generic import CudaGeneric
from tests.codegen.cuda.emulated import Batch
from tests.codegen.test_generic import FAMILIES, Maker


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_family(family: Callable[[Maker], None]) -> None:
    m = Maker(3)
    family(m)
    failures = Batch(CudaGeneric(), m.cases).run()
    assert not failures, f"{len(failures)} of {len(m.cases)}:\n" + "\n".join(failures[:40])
