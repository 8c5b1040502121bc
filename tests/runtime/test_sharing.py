"""Processes that load one file share its weights; threads of a call are as many as asked for, whatever OpenMP says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitwright as bw

LOAD = """
import sys
import numpy as np
from bitwright.runtime.program import Program
program = Program.load(sys.argv[1])
program(np.ones((1, 1024), np.float32))
print("ready", flush=True)
sys.stdin.readline()
"""
COUNT = """
import os, sys
import numpy as np
from bitwright.runtime.program import Program
def tasks(): return len(os.listdir("/proc/self/task"))
if "torch" in sys.argv:
    import torch
    torch.set_num_threads(2)
    torch.randn(512, 512) @ torch.randn(512, 512)
program = Program.load(sys.argv[1])
x = np.ones((1, 1024), np.float32)
want, start, added = program(x), tasks(), []
for threads in (1, 2, 3, 2, 1):
    assert np.array_equal(program(x, threads=threads), want)
    added.append(tasks() - start)
print(*added)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: Any) -> Path:
    """A program of 4 MiB of weights."""
    path: Path = tmp_path_factory.mktemp("shared") / "wide.bw"
    bw.compile(torch.nn.Linear(1024, 1024).eval(), example_inputs=(torch.ones(1, 1024),)).save(path)
    return path


def mapped(pid: int, path: Path) -> dict[str, int]:
    """KiB of a process's mappings of a file, by what smaps calls them."""
    total: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            inside = bool(rest) and rest[-1] == str(path)
        elif inside and rest[-1:] == ["kB"]:
            total[first[:-1]] = total.get(first[:-1], 0) + int(rest[0])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell which pages are shared")
def test_two_processes_share_the_pages_of_the_weights(program: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", LOAD, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
        for child in children:
            found = mapped(child.pid, program)
            assert found["Rss"] >= 4096  # the weights have been read
            assert found["Private_Clean"] + found["Private_Dirty"] == 0
            assert found["Pss"] <= 0.51 * found["Rss"]
    finally:
        for child in children:
            child.communicate(b"\n")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not tell how many threads run")
@pytest.mark.parametrize("company", ["alone", "torch"])
@pytest.mark.parametrize("settings", [{}, {"OMP_NUM_THREADS": "8"}, {"OMP_NUM_THREADS": "1"}, {"OMP_DYNAMIC": "TRUE"}])
def test_a_call_starts_as_many_threads_as_asked_for(program: Path, settings: dict[str, str], company: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(program), company], env={**os.environ, **settings}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two, three, again, last = map(int, done.stdout.split())
    if "OMP_DYNAMIC" in settings:  # the user lets OpenMP take fewer
        assert one == 0
        assert max(two, three, again, last) <= 2
    elif company == "alone":
        assert (one, two, three, again, last) in ((0, 1, 2, 2, 2), (0, 1, 2, 1, 1), (0, 1, 2, 1, 0))
    else:  # torch's pool may be the same one
        assert one == 0
        assert two <= 1
        assert max(three, again, last) <= 2


def test_a_limit_of_openmp_is_obeyed(program: Path) -> None:
    code = (
        "import sys, numpy as np\nfrom bitwright.runtime.program import Program\n"
        "p = Program.load(sys.argv[1])\nx = np.ones((1, 1024), np.float32)\n"
        "assert np.array_equal(p(x, threads=4), p(x))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(program)], env={**os.environ, "OMP_THREAD_LIMIT": "1"}, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()


def test_results_are_the_same_for_more_threads_than_tasks(program: Path) -> None:
    loaded, x = bw.load(program), np.random.default_rng(0).standard_normal((1, 1024)).astype(np.float32)
    np.testing.assert_array_equal(loaded(x, threads=37), loaded(x))
