"""The rewrite a docstring shows is the rewrite the pass does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bitwright.passes._pass import Context, Pass
from bitwright.passes.registry import PASSES, describe, load

RANGES = {"x": (-1.0, 3.0), "h": (0.0, 2.0), "y": (-2.0, 2.0)}


@pytest.mark.parametrize("name", [n for n in PASSES if n != "observe-ranges"])
def test_docstring_rewrite(name: str, example: Callable[[type[Pass]], tuple[str, str]], check: Any) -> None:
    cls = load(name)
    before, after = example(cls)
    tolerance = None if cls.lossy or cls.takes != cls.gives else 1e-5
    check(cls(), before=before, after=after, context=Context(facts={"ranges": RANGES}), tolerance=tolerance)


@pytest.mark.parametrize("name", list(PASSES))
def test_name_and_description(name: str) -> None:
    assert load(name).name == name
    assert describe(name).endswith(".")
