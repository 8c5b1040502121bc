"""Compiling in processes: results, cache, progress, failures that name the job."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from bitwright.codegen.cache import Cache
from bitwright.codegen.jobs import Job, compile_all
from bitwright.ir.errors import BitwrightError

MODULE = """
import os, signal, sys, time

def work(payload):
    print("noise on stdout")
    if payload == "raise": raise ValueError("bad kernel")
    if payload == "exit": os._exit(3)
    if payload == "kill": os.kill(os.getpid(), signal.SIGKILL)
    return f"{payload}".encode() * 3

def slow(payload):
    time.sleep(payload)
    return str(os.getpid()).encode()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that workers can import."""
    (tmp_path / "bw_job_functions.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("bw_job_functions", None)
    return importlib.import_module("bw_job_functions")


def jobs(*payloads: object) -> list[Job]:
    return [Job(f"key{p}", f"kernel {p}", p) for p in payloads]


@pytest.mark.parametrize("in_process", [True, False, None])
def test_every_key_gets_its_result(module: ModuleType, in_process: bool | None) -> None:
    seen: list[tuple[int, int, str]] = []
    results = compile_all(
        module.work, jobs(*range(5)) + jobs(0, 1), 2, in_process=in_process, progress=lambda *a: seen.append(a)
    )
    assert results == {f"key{i}": f"{i}".encode() * 3 for i in range(5)}
    assert [(done, total) for done, total, _ in seen] == [(i + 1, 5) for i in range(5)]
    assert {name for *_, name in seen} == {f"kernel {i}" for i in range(5)}


def test_what_the_cache_knows_is_not_computed(module: ModuleType, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    compile_all(module.work, jobs(1, 2), 1, cache=cache)
    seen: list[str] = []
    results = compile_all(module.work, jobs(1, 2, 3), 1, cache=cache, progress=lambda d, t, n: seen.append(n))
    assert seen == ["kernel 3"]
    assert len(results) == 3
    assert compile_all(module.work, [], 2, in_process=False) == {}


@pytest.mark.parametrize("in_process", [True, False])
def test_an_exception_names_the_job(module: ModuleType, in_process: bool) -> None:
    with pytest.raises(BitwrightError, match=r"compiling kernel raise failed.*ValueError: bad kernel"):
        compile_all(module.work, jobs(1, "raise", 2), 1, in_process=in_process)


@pytest.mark.parametrize(("payload", "how"), [("exit", "exit code 3"), ("kill", "signal 9")])
def test_a_dead_worker_names_the_job(module: ModuleType, payload: str, how: str) -> None:
    with pytest.raises(BitwrightError, match=rf"died while compiling kernel {payload} \({how}\)"):
        compile_all(module.work, jobs(1, payload, 2), 2, in_process=False)


def test_a_function_that_workers_cannot_import_is_an_error() -> None:
    def local(payload: object) -> bytes:
        return b""

    with pytest.raises(BitwrightError, match="cannot be given the first job"):
        compile_all(local, jobs(1), 1, in_process=False)
    assert compile_all(local, jobs(1), 1, in_process=True) == {"key1": b""}


def test_workers_join_in_when_there_is_much_to_do(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.codegen.jobs._STARTUP", 0.3)
    work: Callable[[object], bytes] = module.slow
    many = [Job(f"k{i}", f"k{i}", 0.1) for i in range(40)]
    used = set(compile_all(work, many, 3).values())
    assert os.getpid() in {int(p) for p in used}
    assert len(used) > 1


def test_scripts_without_a_main_guard_work(tmp_path: Path, module: ModuleType) -> None:
    (tmp_path / "script.py").write_text(
        "from bitwright.codegen.jobs import Job, compile_all\nimport bw_job_functions\n"
        "r = compile_all(bw_job_functions.work, [Job(str(i), str(i), i) for i in range(4)], 2, in_process=False)\n"
        "def mine(p): return b'm'\n"
        "r |= compile_all(mine, [Job('mine', 'mine', 0)], 2, in_process=False)\n"
        "import sys; print(len(r), file=sys.stderr)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stderr.strip().splitlines()[-1] == "5"
