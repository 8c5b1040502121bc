"""Contenders in processes of their own, and races between them and programs in this one.

A peer runs in ``worker.py`` under an interpreter that has its engine: this one, or the one that an environment
variable names (``BITWRIGHT_NNCF_PYTHON`` for OpenVINO and nncf, ``BITWRIGHT_DEEPSPARSE_PYTHON``, and
``BITWRIGHT_TORCHAO_PYTHON`` for torch with torchao, which its int8 needs). Processes are pinned
to the core of the race and stopped while another contender has its turn, since some engines spin when idle.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tables
import worker
from numpy.typing import NDArray

Array = NDArray[Any]
SWEEP = 128 << 20
"""Bytes read between cold calls."""
PYTHONS = {
    "openvino": "BITWRIGHT_NNCF_PYTHON", "deepsparse": "BITWRIGHT_DEEPSPARSE_PYTHON",
    "torch": "BITWRIGHT_TORCHAO_PYTHON",
}  # fmt: skip


class Failed(Exception):
    """A peer that cannot run, with its own words: a finding, no reason to stop."""


def interpreter(engine: str) -> str:
    """The Python that has an engine; raises :class:`Failed` with the variable to set."""
    variable = PYTHONS.get(engine, "")
    if named := os.environ.get(variable, ""):
        return named
    if importlib.util.find_spec(engine) is not None:
        return sys.executable
    raise Failed(f"{engine} is not installed here; {variable} can name an interpreter that has it")


class Contender(Protocol):
    """Something to race."""

    def sample(self, seconds: float, sweep: int) -> Mapping[str, tuple[float, float]]:
        """(wall, CPU) seconds a call by name: its own, and of parts of it."""


@dataclass
class Peer:
    """An engine with a model, loaded in a process of its own."""

    name: str
    engine: str
    path: Path
    arrays: Sequence[Array]
    settings: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    cores: Sequence[int] = ()
    names: Sequence[str] = ()
    seconds: float = 0.0
    version: str = ""

    def start(self) -> None:
        """Load the model; raises :class:`Failed` with the engine's words."""
        command = [interpreter(self.engine), worker.__file__]
        cores = set(self.cores) or os.sched_getaffinity(0)
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(self.threads), "NM_SPARSE_TELEMETRY": "0"},
        )  # fmt: skip
        os.sched_setaffinity(self.process.pid, cores)
        with tempfile.TemporaryDirectory() as folder:
            inputs = Path(folder) / "inputs.npz"
            names = self.names or [f"x{i}" for i in range(len(self.arrays))]
            np.savez(inputs, **dict(zip(names, self.arrays, strict=True)))  # type: ignore[arg-type]
            answer = self._ask(
                do="load", engine=self.engine, path=str(self.path), inputs=str(inputs), threads=self.threads,
                settings=dict(self.settings),
            )  # fmt: skip
        self.seconds, self.version = answer["seconds"], answer["version"]
        self._signal(signal.SIGSTOP)

    def outputs(self) -> list[Array]:
        """Of one call."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "out.npz"
            self._awake(do="run", output=str(path))
            stored = np.load(path)
            return [stored[k] for k in stored.files]

    def sample(self, seconds: float, sweep: int) -> Mapping[str, tuple[float, float]]:
        answer = self._awake(do="sample", seconds=seconds, sweep=sweep)
        return {self.name: (answer["wall"], answer["cpu"])}

    def stop(self) -> None:
        """End the process."""
        self._signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self.log.close()

    def _awake(self, **command: Any) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        try:
            return self._ask(**command)
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.log.seek(0)
            said = " ".join(self.log.read().split())[-300:]
            raise Failed(f"{self.name}: the process ended while asked to {command['do']}: {said}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(f"{self.name}: {answer['error']}")
        return answer


@dataclass
class Ours:
    """A program in this process; with it the time of its contraction alone ("NAME: contraction")."""

    name: str
    program: Any
    arrays: Sequence[Array]
    threads: int = 1
    swept: Any = None

    def sample(self, seconds: float, sweep: int) -> Mapping[str, tuple[float, float]]:
        if sweep and self.swept is None:
            self.swept = np.ones(sweep // 8)
        values = tuple(self.arrays)
        found = worker.sample(
            lambda: self.program(*values, threads=self.threads), seconds, self.swept if sweep else None
        )
        out = {self.name: (found["wall"], found["cpu"])}
        if not sweep and (label := contraction(self.program)):
            repeats = max(3, int(seconds / max(found["wall"], 1e-6) / 2))
            steps = self.program.profile(*values, repeats=repeats, threads=self.threads)
            took = next(s.seconds for s in steps if s.label == label)
            took = min(took, found["wall"], found["cpu"])  # the clock of steps is the wall's: neighbours count in it
            out[f"{self.name}: contraction"] = (took, took)
        return out


@dataclass
class Function:
    """A function of this process."""

    name: str
    call: Callable[[], Any]

    def sample(self, seconds: float, sweep: int) -> Mapping[str, tuple[float, float]]:
        found = worker.sample(lambda: [self.call()], seconds, None)
        return {self.name: (found["wall"], found["cpu"])}


def contraction(program: Any) -> str:
    """The label of a program's only contraction, "" when it has none or several."""
    found = [x.name for x in program.report.layers if x.operations]
    return found[0] if len(found) == 1 else ""


@contextmanager
def started(peers: Sequence[Peer], failed: dict[str, str]) -> Iterator[list[Peer]]:
    """The peers that load; the others' reasons into ``failed``."""
    running: list[Peer] = []
    try:
        for peer in peers:
            try:
                peer.start()
                running.append(peer)
            except Failed as why:
                failed[peer.name] = str(why)
                if hasattr(peer, "process"):
                    peer.stop()
        yield running
    finally:
        for peer in running:
            peer.stop()


def race(
    field_: Sequence[Contender], *, rounds: int, seconds: float, sweep: int = 0, wall: bool = False
) -> tables.Times:
    """Interleaved rounds of rotating order; a sample counts min(wall, CPU), or the wall clock alone (threads)."""
    kept: dict[str, list[float]] = {}
    walls: dict[str, float] = {}
    for contender in field_:
        contender.sample(seconds, sweep)
    for index in range(rounds):
        shift = index % len(field_)
        for contender in [*field_[shift:], *field_[:shift]]:
            for name, (clock, cpu) in contender.sample(seconds, sweep).items():
                kept.setdefault(name, []).append(clock if wall else min(clock, cpu))
                walls[name] = min(walls.get(name, clock), clock)
    return tables.Times({n: tuple(v) for n, v in kept.items()}, walls)
