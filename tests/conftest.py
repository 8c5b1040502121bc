"""Shared fixtures: ``check`` (a pass as text before and text after) and weights for text graphs."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.ir.errors import BitwrightError
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.text import parse, show
from bitwright.ir.verify import verify
from bitwright.ir.weights import Weights
from bitwright.passes._instruments import random_weights
from bitwright.passes._pass import Context, Pass

Arrays = Mapping[str, np.ndarray[Any, Any]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bless", action="store_true", help="rewrite the `after` text of check(...) calls in place")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Tests that emulate a GPU are skipped where the compiler that the emulator needs is not installed."""
    try:
        return (yield)
    except (BitwrightError, AssertionError) as error:
        if "needs a C++ compiler" in str(error):
            pytest.skip(str(error))
        raise


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: object, request: pytest.FixtureRequest) -> Generator[None]:
    """The same for what a fixture emulates."""
    try:
        return (yield)
    except (BitwrightError, AssertionError) as error:
        if "needs a C++ compiler" in str(error):
            pytest.skip(str(error))
        raise


def read_graph(text: str, weights: Arrays | None = None) -> Graph:
    """A verified graph from indented text; weights that are not given are random (seeded by position)."""
    text = textwrap.dedent(text).strip() + "\n"
    graph = parse(text)
    graph = parse(text, random_weights(graph).with_items(dict(weights or {})))
    verify(graph)
    return graph


@pytest.fixture
def read() -> Callable[..., Graph]:
    """Parse and verify a text graph, with random weights for those not given."""
    return read_graph


def random_inputs(graph: Graph, seed: int = 0, size: int = 2) -> dict[str, np.ndarray[Any, Any]]:
    """Normal floats and small integers for every input; symbols become ``size``."""
    rng = np.random.default_rng(seed)
    out: dict[str, np.ndarray[Any, Any]] = {}
    for v in graph.inputs:
        shape = [d if isinstance(d, int) else size for d in v.type.shape]
        floats = rng.standard_normal(shape)
        values = floats if v.type.dtype.is_float else rng.integers(0, 4, shape) if v.type.dtype.bits > 1 else floats > 0
        out[v.name] = np.asarray(values).astype(v.type.dtype.numpy)
    return out


@pytest.fixture
def inputs() -> Callable[..., dict[str, np.ndarray[Any, Any]]]:
    """Random inputs of a graph."""
    return random_inputs


def largest_difference(a: Graph, b: Graph, seed: int = 0) -> float:
    """Largest |difference| of two graphs' outputs on the same random inputs, over max(1, |output|)."""
    x = random_inputs(a, seed)
    worst = 0.0
    for p, q in zip(evaluate(a, x), evaluate(b, x), strict=True):
        u, v = to_numpy(p).astype(np.float64), to_numpy(q).astype(np.float64)
        assert u.shape == v.shape
        np.testing.assert_array_equal(np.isnan(u), np.isnan(v))
        u, v = np.nan_to_num(u), np.nan_to_num(v)
        worst = max(worst, float((np.abs(u - v) / np.maximum(1.0, np.abs(u))).max(initial=0.0)))
    return worst


@pytest.fixture
def difference() -> Callable[..., float]:
    """The meaning test: how far two graphs are apart on random data."""
    return largest_difference


class Check:
    """``check(pass, before=..., after=...)``: run the pass on text, compare with text."""

    def __init__(self, bless: bool, edits: list[tuple[Path, int, str]]) -> None:
        self.bless, self.edits = bless, edits

    def __call__(
        self,
        p: Pass,
        *,
        before: str,
        after: str,
        weights: Arrays | None = None,
        context: Context | None = None,
        tolerance: float | None = 1e-5,
    ) -> Graph:
        """Also holds the pass to its meaning (``tolerance`` None: not compared) and to idempotence."""
        graph = read_graph(before, weights)
        context = context or Context()
        result = p.run(graph, context)
        verify(result, p.gives)
        got = show(result).strip()
        if got != textwrap.dedent(after).strip() and self.bless:
            frame = inspect.stack()[1]
            self.edits.append((Path(frame.filename), frame.lineno, got))
        else:
            assert got == textwrap.dedent(after).strip()
        if tolerance is not None:
            assert largest_difference(graph, result) <= tolerance
        if p.takes == p.gives:
            assert not p.run(result, context).changed_from(result), "not idempotent"
        return result


def blessed(source: str, line: int, text: str) -> str:
    """The source with the ``after`` string of the check call at ``line`` replaced."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    inside = [c for c in calls if c.lineno <= line <= (c.end_lineno or 0) and any(k.arg == "after" for k in c.keywords)]
    call = max(inside, key=lambda c: c.lineno)
    node = next(k.value for k in call.keywords if k.arg == "after")
    lines = source.splitlines(keepends=True)
    indent = re.match(r" *", lines[call.lineno - 1])
    pad = (indent[0] if indent else "") + " " * 8
    new = f'"""\n{textwrap.indent(text, pad)}\n{pad[:-4]}"""'
    end = node.end_lineno or node.lineno
    head, tail = lines[node.lineno - 1][: node.col_offset], lines[end - 1][node.end_col_offset or 0 :]
    return "".join([*lines[: node.lineno - 1], head + new + tail, *lines[end:]])


_EDITS = pytest.StashKey[list[tuple[Path, int, str]]]()


@pytest.fixture
def check(request: pytest.FixtureRequest) -> Check:
    """Text before, text after; ``pytest --bless`` rewrites the latter in place."""
    edits = request.config.stash.setdefault(_EDITS, [])
    return Check(bool(request.config.getoption("--bless")), edits)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Put the blessed texts into the test files, last first so that line numbers stay right."""
    edits = session.config.stash.setdefault(_EDITS, [])
    for path, line, text in sorted(edits, key=lambda e: -e[1]):
        path.write_text(blessed(path.read_text(), line, text))


def docstring_example(cls: type[Pass]) -> tuple[str, str]:
    """The ``before:`` and ``after:`` blocks of a pass's docstring."""
    doc = textwrap.dedent("    " + (cls.__doc__ or ""))
    m = re.search(r"^ *before:\n(.*?)^ *after:\n(.*)\Z", doc, re.DOTALL | re.MULTILINE)
    assert m, f"the docstring of {cls.__name__} lacks before: and after: blocks"
    return m[1], m[2]


@pytest.fixture
def example() -> Callable[[type[Pass]], tuple[str, str]]:
    """The rewrite that a pass's docstring shows."""
    return docstring_example


__all__ = ["Weights"]
