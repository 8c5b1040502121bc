"""Threads inside one call and calls from many threads: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright.runtime.program import Program
from tests.zoo import ZOO

Array = np.ndarray[Any, np.dtype[Any]]
Make = Callable[[str, str], tuple[Program, list[list[Array]]]]
CASES = [("digits", "float"), ("resnet18", "int8"), ("bert_base", "int8")]


@pytest.fixture(scope="module")
def make() -> Make:
    """A program of a zoo model and several inputs for it, built once."""
    made: dict[tuple[str, str], tuple[Program, list[list[Array]]]] = {}

    def build(name: str, recipe: str) -> tuple[Program, list[list[Array]]]:
        if (name, recipe) not in made:
            module, inputs = ZOO[name]()
            arrays = [x.numpy() for x in inputs]
            program = bw.compile(bw.capture(module, inputs), recipe=recipe, calibration=[arrays])
            made[name, recipe] = program, [[np.roll(a, i, axis=-1) for a in arrays] for i in range(6)]
        return made[name, recipe]

    return build


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_any_number_of_threads_gives_the_same_bits(make: Make, name: str, recipe: str) -> None:
    program, batches = make(name, recipe)
    for batch in batches:
        want = program(*batch, threads=1)
        for threads in (2, 3):
            for _ in range(5):
                np.testing.assert_array_equal(program(*batch, threads=threads), want)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_calls_at_once_do_not_disturb_each_other(make: Make, name: str, recipe: str, threads: int) -> None:
    program, batches = make(name, recipe)
    want = [program(*b) for b in batches]
    assert any(not np.array_equal(want[0], w) for w in want[1:])
    with ThreadPoolExecutor(4) as pool:
        jobs = [(i, pool.submit(program, *batches[i], threads=threads)) for i in list(range(len(batches))) * 10]
        for i, job in jobs:
            np.testing.assert_array_equal(job.result(), want[i])


def test_different_programs_run_at_once(make: Make) -> None:
    programs = [make(*case) for case in CASES]
    want = [p(*b[0]) for p, b in programs]
    with ThreadPoolExecutor(6) as pool:
        jobs = [(i, pool.submit(programs[i][0], *programs[i][1][0], threads=2)) for i in (0, 1, 2) * 15]
        for i, job in jobs:
            np.testing.assert_array_equal(job.result(), want[i])


def test_threads_are_chosen_when_compiling_and_travel_with_the_file(tmp_path: Any) -> None:
    module, inputs = ZOO["digits"]()
    program = bw.compile(module, example_inputs=inputs, threads=2)
    assert program.threads == 2
    program.save(tmp_path / "digits.bw")
    loaded = bw.load(tmp_path / "digits.bw")
    assert (loaded.threads, bw.load(tmp_path / "digits.bw", threads=1).threads) == (2, 1)
    np.testing.assert_array_equal(loaded(*inputs), program(*inputs, threads=1))


def test_compiling_in_several_threads_at_once(tmp_path: Any) -> None:
    """Compilations share caches and TVM: they may wait for each other, but not mix."""
    modules = [ZOO["digits"](), ZOO["vit_small"]()] * 2
    with ThreadPoolExecutor(4) as pool:
        made = [
            pool.submit(bw.compile, bw.capture(m, x), cache_dir=tmp_path / f"{i}") for i, (m, x) in enumerate(modules)
        ]
        for job, (module, inputs) in zip(made, modules, strict=True):
            want = module(*inputs).detach().numpy()
            np.testing.assert_allclose(job.result()(*inputs), want, atol=1e-4 * float(np.ptp(want)))
