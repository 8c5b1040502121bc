"""Tuning on a Ray cluster: the workers of this machine's bench as actors, on nodes that have the target.

A node says what it can measure by a resource named :func:`resource_of` (``ray start --resources``). Ray restarts,
moves and ends the actors; a candidate whose node died is measured on another one and is no failure of the candidate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bitwright.codegen.tuning.bench import LocalBench, Trial
from bitwright.codegen.tuning.measure import Outcome, Request
from bitwright.ir.errors import BitwrightError
from bitwright.ir.target import Target

if TYPE_CHECKING:
    from bitwright.codegen.tvm.select import Order

_ATTEMPTS = 5


def resource_of(target: Target) -> str:
    """The Ray resource that a node which runs ``target`` offers: one unit for each measurement at a time."""
    return "bitwright-" + hashlib.blake2b(target.fingerprint.encode(), digest_size=6).hexdigest()


class Node:
    """What an actor does: this machine's bench."""

    def __init__(self, jobs: int | None) -> None:
        self.bench = LocalBench(jobs)

    def compile(self, order: Order) -> bytes | Outcome:
        """The library of one kernel, or what went wrong."""
        return self.bench.compile([order])[0]

    def measure(self, request: Request) -> Outcome:
        """What became of one linked candidate."""
        return self.bench.measure(request)

    def trial(self, trial: Trial) -> tuple[Outcome, bytes]:
        """Compile and measure one candidate."""
        ((_, outcome, library),) = self.bench.run([trial])
        return outcome, library


class RayBench:
    """The bench of a cluster: an actor for every unit of the target's resource.

    Joins the running cluster (``RAY_ADDRESS``). Raises :class:`BitwrightError` without Ray, or when no node offers
    the target.
    """

    def __init__(self, target: Target, jobs: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise BitwrightError("Ray is not installed: pip install 'bitwright[cluster]'") from error
        self.ray: Any = ray
        if not ray.is_initialized():
            ray.init(address="auto", log_to_driver=False)
        self.resource, self.jobs = resource_of(target), jobs
        self.actors: list[Any] = []
        self._refresh()

    def _refresh(self) -> None:
        """One actor for each unit of the resource that living nodes offer."""
        units = int(self.ray.cluster_resources().get(self.resource, 0))
        if units < 1:
            raise BitwrightError(
                f"no node of the Ray cluster measures this target: start nodes that run it with"
                f" --resources '{{\"{self.resource}\": 1}}'"
            )
        while len(self.actors) < units:
            remote = self.ray.remote(Node).options(resources={self.resource: 1}, num_cpus=0)
            self.actors.append(remote.remote(self.jobs))

    @property
    def batch(self) -> int:
        """Candidates that are asked for at once."""
        return 4 * len(self.actors)

    def compile(self, orders: Sequence[Order]) -> list[bytes | Outcome]:
        """A library for each order, or what went wrong with it."""
        return [answer for _, answer in sorted(self._spread("compile", orders), key=lambda a: a[0])]

    def measure(self, request: Request) -> Outcome:
        """Measure one candidate on any node."""
        ((_, outcome),) = self._spread("measure", [request])
        return outcome  # type: ignore[no-any-return]

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Outcome, bytes]]:
        """(position, outcome, library) of every trial, as they come."""
        for index, (outcome, library) in self._spread("trial", trials):
            yield index, outcome, library

    def _spread(self, method: str, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Give the items to idle actors; those of an actor that died go to another one."""
        todo, idle = [(index, 0) for index in range(len(items))], list(self.actors)
        running: dict[Any, tuple[int, int, Any]] = {}
        while todo or running:
            while todo and idle:
                (index, attempt), actor = todo.pop(0), idle.pop()
                running[getattr(actor, method).remote(items[index])] = (index, attempt, actor)
            done, _ = self.ray.wait(list(running), num_returns=1)
            index, attempt, actor = running.pop(done[0])
            try:
                yield index, self.ray.get(done[0])
                idle.append(actor)
            except self.ray.exceptions.RayActorError as error:
                if attempt >= _ATTEMPTS:
                    raise BitwrightError(f"candidates cannot be measured: {attempt} nodes died: {error}") from error
                todo.insert(0, (index, attempt + 1))
                self.actors = [a for a in self.actors if a is not actor]
                known = len(self.actors)
                if not running:
                    self._refresh()
                idle += self.actors[known:]

    def close(self) -> None:
        """End the actors; the cluster stays."""
        for actor in self.actors:
            self.ray.kill(actor)
        self.actors = []

    def __enter__(self) -> RayBench:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
