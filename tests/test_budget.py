"""Size stays small because a test says so: a module within 400 lines, a pass within 150, each pass tested."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ir", "passes", "frontends", "codegen", "runtime", "src/bitwright", "examples", "docs", "benchmarks")
MODULE_LINES, PASS_LINES = 400, 150
LARGER = {"ir/ops.py": 700}
"""Modules that may be longer, each with its own limit: a list of declarations reads best in one place."""


def modules(folder: str) -> list[Path]:
    paths = (ROOT / folder).rglob("*.py") if "/" not in folder else (ROOT / folder).glob("*.py")
    return sorted(p for p in paths if "__pycache__" not in p.parts)


def passes() -> list[Path]:
    """One file a pass: the modules of the themed folders below ``passes``."""
    return [p for p in modules("passes") if p.parent.parent == ROOT / "passes" and not p.name.startswith("_")]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_are_within_the_budget(folder: str) -> None:
    names = {str(p.relative_to(ROOT)): lines(p) for p in modules(folder)}
    assert {n: k for n, k in names.items() if k > LARGER.get(n, MODULE_LINES)} == {}


def test_exceptions_are_still_needed() -> None:
    assert [n for n in LARGER if lines(ROOT / n) <= MODULE_LINES] == []


def test_passes_are_within_the_budget() -> None:
    assert {p.name: lines(p) for p in passes() if lines(p) > PASS_LINES} == {}


def test_each_pass_has_a_test_of_its_name() -> None:
    tests = {t.stem.removeprefix("test_") for t in (ROOT / "tests" / "passes").rglob("test_*.py")}
    assert {p.stem for p in passes()} - tests == set()
