"""The source layout: five links, one name per module, and imports that stay light."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ir", "passes", "frontends", "codegen", "runtime")
HEAVY = ("torch", "tvm", "tvm_ffi", "onnx", "onnxruntime", "matplotlib")


def loaded_after(code: str) -> set[str]:
    """Top-level module names in ``sys.modules`` of a fresh interpreter after ``code``."""
    script = f"{code}\nimport sys\nprint('MODULES', *sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("MODULES"))
    return set(line.split()[1:])


@pytest.mark.parametrize("folder", FOLDERS)
def test_link_resolves_to_the_real_folder(folder: str) -> None:
    link = ROOT / "src" / "bitwright" / folder
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / folder
    module = importlib.import_module(f"bitwright.{folder}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve().parent == ROOT / folder


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {p.parent for f in FOLDERS for p in (ROOT / f).rglob("*.py")}
    assert {f for f in folders if not (f / "__init__.py").exists()} == set()


def test_no_module_is_loaded_under_its_bare_name() -> None:
    bare = {m for m in sys.modules if m.partition(".")[0] in FOLDERS}
    assert bare == set(), "import bitwright.<folder>, never <folder>: two names are two copies of every class"


def test_import_is_light() -> None:
    assert loaded_after("import bitwright").isdisjoint(HEAVY)


def test_command_line_is_light() -> None:
    assert loaded_after("import bitwright.cli").isdisjoint(HEAVY)


def test_runtime_is_light() -> None:
    code = "import bitwright.runtime.artifact, bitwright.runtime.report, bitwright.runtime.html"
    assert loaded_after(code).isdisjoint(HEAVY)
