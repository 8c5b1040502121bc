"""The generated pages say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["passes.md", "targets.md", "ops.md"])
def test_page_is_current(name: str) -> None:
    assert (DOCS / name).read_text() == generator().pages()[name], f"docs/{name} is not current: run `make docs`"


def test_every_pass_says_what_it_does() -> None:
    text = generator().passes_page()
    assert "\n\n\n" not in text
    assert "Stub" not in text
