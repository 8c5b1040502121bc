"""The generic GPU kernel against the interpreter: every operator and number format, emulated."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from bitwright.codegen.cuda.machine_code import compile_cuda
from bitwright.codegen.targets import GPUS
from bitwright.codegen.tvm.cuda.generic import CudaGeneric, CudaGenericConfig
from bitwright.ir import ops
from tests.codegen.cuda.emulated import Batch, taken
from tests.codegen.kernel_batch import Case
from tests.codegen.test_generic import FAMILIES, Maker
from tests.codegen.test_generic_random import FLOATS, KINDS, PATTERNS
from tests.codegen.test_generic_random import case as masked
from tests.codegen.test_generic_random import values as drawn
from tests.codegen.test_generic_small_float import all_cases


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_family(family: Callable[[Maker], None]) -> None:
    m = Maker(3)
    family(m)
    failures = Batch(CudaGeneric(), m.cases).run()
    assert not failures, f"{len(failures)} of {len(m.cases)}:\n" + "\n".join(failures[:40])


def exact(cases: list[Case]) -> list[Case]:
    """The reference's bits are wanted."""
    return [replace(c, rtol=0.0, atol=0.0) for c in cases]


def test_sums_of_small_floats_bit_for_bit() -> None:
    failures = Batch(CudaGeneric(), exact(all_cases())).run()
    assert not failures, "\n".join(failures[:20])


def test_random_masks_bit_for_bit() -> None:
    cases = [
        masked(ops.UnbiasedMask(k, g, -1, 7 * n, how), drawn("normal", (9, 2 * g + g // 2), FLOATS[n % 4], n), 5 - n)
        for n, (k, g, how) in enumerate(PATTERNS)
    ]
    for kind, how in itertools.product(KINDS, ("optimal", "two-draw")):
        if (kind, how) != ("infinite", "two-draw"):
            cases.append(masked(ops.UnbiasedMask(2, 4, 1, 5, how), drawn(kind, (40, 6), FLOATS[0], 3), 11))
    failures = Batch(CudaGeneric(), exact(cases)).run()
    assert not failures, "\n".join(failures[:20])


def test_memory_of_threads_is_bounded() -> None:
    """Operators that need memory of their own get threads that take several tasks each."""
    m = Maker(0)
    m.add(ops.Attention(0.5), *(m.array(8, 512, 4) for _ in range(3)))
    m.add(ops.TopK(20, 1), m.array(70000, 30))
    for case in m.cases:
        config = taken(CudaGeneric(), case.body, GPUS["cuda-sm90"])
        assert isinstance(config, CudaGenericConfig)
        assert config.own_bytes
        assert config.work_bytes <= 65 << 20
        assert config.each * config.grid[0] * config.threads >= config.tasks


def test_machine_code_has_no_spills() -> None:
    m = Maker(0)
    m.add(ops.Linear(), m.array(20, 30), m.array(40, 30))
    m.add(ops.MaxPool((3, 3), (2, 2), (1, 1, 1, 1), (), True), m.array(1, 9, 9, 16))
    m.add(ops.Softmax(1), m.array(40, 50))
    batch = Batch(CudaGeneric(), m.cases)
    batch.emit()
    for arch in ("sm_80", "sm_90a"):
        assert all(not r.spill_stores for r in compile_cuda(batch.text, arch).resources.values())
