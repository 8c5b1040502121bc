"""What ``make bench`` runs exists, and is told of in benchmarks/README.md."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "benchmarks"


def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench", FOLDER / "bench.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_is_there_and_knows_its_arguments() -> None:
    readme = (FOLDER / "README.md").read_text()
    for name, arguments in bench().SCRIPTS.items():
        text = (FOLDER / f"{name}.py").read_text()
        assert f"benchmarks/{name}.py" in readme, name
        for option in (a for a in arguments if a.startswith("--")):
            assert f'"{option}"' in text, f"{name} {option}"


def test_a_failure_is_named_and_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "bench.py").write_text((FOLDER / "bench.py").read_text())
    (tmp_path / "gemm.py").write_text("raise SystemExit(3)")
    (tmp_path / "footprint.py").write_text("print('measured')")
    line = [sys.executable, str(tmp_path / "bench.py"), "--only", "gemm,footprint"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "measured" in done.stdout
    assert "gemm" in done.stdout.splitlines()[-2]
    assert "FAILED with exit status 3" in done.stdout.splitlines()[-2]
    assert done.stdout.splitlines()[-1].endswith("done")
