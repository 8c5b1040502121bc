"""The search: which task gets the next batch of candidates, and which candidates these are.

A task starts with its default, with other templates that take its body, and with what was best for the nearest
workloads of the database. Then a model learned from the records ranks the rest of the space; a part of each batch is
drawn at random, so that the model cannot blind itself. A new leader is measured again, longer, before it counts.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from bitwright.codegen.tuning.bench import Trial, code_of
from bitwright.codegen.tuning.measure import Case, Outcome, Request
from bitwright.codegen.tuning.model import Model, columns, distance
from bitwright.codegen.tuning.records import Database, Record
from bitwright.codegen.tuning.space import Point
from bitwright.codegen.tuning.tasks import Task, cases_of, exactness
from bitwright.ir.errors import BitwrightError
from bitwright.ir.target import Target

if TYPE_CHECKING:
    from bitwright.codegen.tvm.select import Choice, Order

_NEAREST, _AT_RANDOM, _POOL = 4, 0.25, 4000
_OLD = 4
"""Best points of the same workload under another version that are tried first."""
_LONGER = 3
_PROMISING = 0.985
_DECAY = 0.6
"""What is left of the hope in a task after a batch without a better candidate."""
_HOPELESS = 1e-3
_OWN = 4.0
"""How much more a record of the same workload counts than one of another."""
SHOWN_REASONS = 5

Place = tuple[str, str]
"""A template and a point as text."""


class Bench(Protocol):
    """Where candidates are compiled and measured: this machine, or a cluster."""

    @property
    def batch(self) -> int: ...

    def compile(self, orders: Sequence[Order]) -> Sequence[bytes | Outcome]: ...

    def measure(self, request: Request) -> Outcome: ...

    def run(self, trials: Sequence[Trial]) -> Iterable[tuple[int, Outcome, bytes]]: ...


@dataclass(frozen=True)
class Goal:
    """What records are filed under, and how candidates are measured; ``seed`` draws inputs and candidates."""

    target: Target
    target_key: str
    compiler: str
    machine: str
    seed: int = 0
    rounds: int = 15


@dataclass
class State:
    """Progress in one task: seconds of the default and the best ratio known, how much hope is left."""

    task: Task
    default: Choice
    default_seconds: float = 0.0
    best: float = 1.0
    hope: float = 1.0
    tried: set[Place] = field(default_factory=set)
    measured: int = 0
    failed: int = 0
    cases: tuple[Case, ...] = ()
    library: bytes = b""
    broken: str = ""

    @property
    def seconds(self) -> float:
        """Seconds per run of the model that the task takes with the best kernel known."""
        return (self.default_seconds or self.task.predicted) * self.best * self.task.count

    @property
    def gain(self) -> float:
        """Seconds that the next batch may be expected to save: what lies above the limit, times hope."""
        return max(0.0, self.seconds - self.task.limit * self.task.count) * self.hope


@dataclass
class Search:
    """One run of the tuner over the tasks of a model. ``told(state, seconds left)`` is called after each batch."""

    database: Database
    bench: Bench
    goal: Goal
    tasks: Sequence[Task]
    told: Callable[[State, float], None] | None = None
    states: list[State] = field(init=False)
    random: random.Random = field(init=False)
    ran: int = 0
    """Candidates measured or failed in this run."""

    def __post_init__(self) -> None:
        from bitwright.codegen.tvm.select import Choice, candidate

        self.random = random.Random(self.goal.seed)
        self.states = []
        for task in self.tasks:
            self.database.add_workload(task.key, task.text, task.features)
            choice = candidate(task.body, task.constants, self.goal.target, task.template, {})
            assert isinstance(choice, Choice), choice.reason
            self.states.append(self._resumed(State(task, choice)))

    def _resumed(self, state: State) -> State:
        """With what the database knows of this task already."""
        goal = self.goal
        for r in self.database.records(state.task.key, goal.target_key, goal.compiler):
            state.tried.add(_place(r.template, r.point))
            state.measured += r.status == "ok"
            state.failed += r.status != "ok"
            state.default_seconds = r.default_seconds or state.default_seconds
        best = self.database.best(state.task.key, goal.target_key, goal.compiler)
        state.best = min([1.0, *(p.ratio for p in best)])
        return state

    def run(self, seconds: float) -> None:
        """Give batches to the tasks with the largest expected gain until time or hope ends.

        Raises :class:`BitwrightError` with the reasons when no candidate could be measured at all.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            open_ = [s for s in self.states if not s.broken and s.hope > _HOPELESS]
            state = max(open_, key=lambda s: s.gain, default=None)
            if state is None or state.gain <= 0:
                break
            self._batch(state, end)
            if self.told is not None:
                self.told(state, max(0.0, left))
        if self.tasks and not any(s.measured for s in self.states):
            raise BitwrightError("no candidate could be measured:\n" + "\n".join(self._reasons()))

    def _reasons(self) -> list[str]:
        seen: dict[str, int] = {}
        for s in self.states:
            for r in self.database.records(s.task.key, self.goal.target_key, self.goal.compiler):
                seen[f"{r.status}: {r.reason}"] = seen.get(f"{r.status}: {r.reason}", 0) + 1
        counted = sorted(seen.items(), key=lambda x: -x[1])[:SHOWN_REASONS]
        return [f"  {count} times {why}" for why, count in counted] or ["  the time was too short for the first one"]

    # --- one batch -----------------------------------------------------------------------------------------------

    def _batch(self, state: State, end: float) -> None:
        if not self._ready(state):
            return
        before, trials, places = state.best, [], []
        for template, point in self._propose(state):
            choice = self._choice(state, template, point)
            if choice is not None:
                trials.append(Trial(_order(choice), self._request(state, choice)))
                places.append((template, point))
        if not places:
            state.hope = 0.0
            return
        for index, outcome, library in self.bench.run(trials):
            template, point = places[index]
            self._keep(state, template, point, outcome)
            if outcome.status == "ok" and outcome.ratio < min(_PROMISING, state.best):
                self._confirm(state, template, point, trials[index].request, library)
            if time.monotonic() > end:
                break
        state.hope = 1.0 if state.best < before * _PROMISING else state.hope * _DECAY

    def _ready(self, state: State) -> bool:
        """The default kernel compiled, correct and timed; otherwise the task cannot be tuned, and says so."""
        if state.library:
            return True
        made = self.bench.compile([_order(state.default)])[0]
        outcome = made if isinstance(made, Outcome) else None
        if isinstance(made, bytes):
            state.library = made
            state.cases = cases_of(state.task, self.goal.seed)
            outcome = self.bench.measure(self._request(state, state.default, made))
        assert outcome is not None
        self._keep(state, state.default.template, self._default_point(state), outcome)
        if outcome.status != "ok":
            state.broken = f"the default kernel failed: {outcome.status}: {outcome.reason}"
        return not state.broken

    def _choice(self, state: State, template: str, point: Point) -> Choice | None:
        from bitwright.codegen.tvm.select import Choice, candidate

        state.tried.add(_place(template, point))
        choice = candidate(state.task.body, state.task.constants, self.goal.target, template, point)
        if isinstance(choice, Choice):
            return choice
        self._keep(state, template, point, Outcome("refused", choice.reason))
        return None

    def _request(self, state: State, choice: Choice, library: bytes = b"") -> Request:
        tolerance, codes = exactness(state.task.body)
        return Request(
            code_of(choice, library), code_of(state.default, state.library), b"", state.cases, tolerance, codes,
            rounds=self.goal.rounds, cold_bytes=state.task.cold_bytes,
        )  # fmt: skip

    def _keep(self, state: State, template: str, point: Point, o: Outcome, confirmed: bool = False) -> None:
        """Store what became of a candidate, at once."""
        goal = self.goal
        state.tried.add(_place(template, point))
        record = Record(
            state.task.key, goal.target_key, goal.compiler, template, dict(point), o.status, o.reason, o.seconds,
            o.default_seconds, o.ratio, o.rounds, confirmed, goal.seed, goal.machine,
        )  # fmt: skip
        self.database.add(record)
        self.ran += 1
        state.measured += o.status == "ok"
        state.failed += o.status != "ok"
        state.default_seconds = o.default_seconds or state.default_seconds

    def _confirm(self, state: State, template: str, point: Point, request: Request, library: bytes) -> None:
        """Measure a leader again for longer: the best of many short measurements is partly luck."""
        candidate = replace(request.candidate, library=library)
        outcome = self.bench.measure(replace(request, candidate=candidate, rounds=request.rounds * _LONGER))
        self._keep(state, template, point, outcome, confirmed=True)
        if outcome.status == "ok":
            state.best = min(state.best, outcome.ratio)

    # --- what to try ---------------------------------------------------------------------------------------------

    def _default_point(self, state: State) -> Point:
        from bitwright.codegen.tvm.select import template_of

        task = state.task
        return template_of(task.template).space(task.body, task.constants, self.goal.target).default

    def _propose(self, state: State) -> list[tuple[str, Point]]:
        """The next batch: first what others found good, then what the model ranks best and some drawn at random."""
        fresh = [(t, p) for t, p in self._points(state) if _place(t, p) not in state.tried]
        count = self.bench.batch
        if len(fresh) <= count:
            return fresh
        first = self._first(state, fresh)[:count]
        rest = [c for c in fresh if c not in first]
        drawn = self.random.sample(rest, min(len(rest), round(count * _AT_RANDOM)))
        rest = [c for c in rest if c not in drawn]
        model = self._model(state)
        predicted = model.predict([columns(t, p, state.task.features) for t, p in rest])
        ranked = [c for _, c in sorted(zip(predicted.tolist(), rest, strict=True), key=lambda x: x[0])]
        return [*first, *drawn, *ranked][:count] if len(first) < count else first

    def _points(self, state: State) -> list[tuple[str, Point]]:
        """The space of every template that takes the body (very large ones in part, drawn anew each time)."""
        from bitwright.codegen.tvm.select import offered
        from bitwright.codegen.tvm.template import Refused

        task = state.task
        found: list[tuple[str, Point]] = []
        for name, template in offered(self.goal.target).items():
            if isinstance(template.configure(task.body, task.constants, self.goal.target), Refused):
                continue
            points = list(islice(template.space(task.body, task.constants, self.goal.target), 50 * _POOL))
            if len(points) > _POOL:
                points = [points[0], *self.random.sample(points[1:], _POOL)]
            found += [(name, p) for p in points]
        return found

    def _first(self, state: State, fresh: list[tuple[str, Point]]) -> list[tuple[str, Point]]:
        """Other templates' own choices, and the best points of the nearest workloads, while they are untried; most of
        this workload itself, as another version of the code generator or another machine had them."""
        defaults = [c for i, c in enumerate(fresh) if c[0] != state.task.template and c[0] not in dict(fresh[:i])]
        known = self.database.workloads()
        own = state.task.features
        near = sorted((k for k in known if k != state.task.key), key=lambda k: distance(own, known[k][1]))[:_NEAREST]
        best: list[Place] = []
        for key in (state.task.key, *near):
            good = sorted((r for r in self.database.records(key) if r.status == "ok"), key=lambda r: r.ratio)
            places = dict.fromkeys(_place(r.template, r.point) for r in good)
            best += list(places)[: _OLD if key == state.task.key else 2]
        order = {place: i for i, place in reversed(list(enumerate(best)))}
        found = sorted((c for c in fresh if _place(*c) in order), key=lambda c: order[_place(*c)])
        return defaults + [c for c in found if c not in defaults]

    def _model(self, state: State) -> Model:
        """Fitted to all good records of this kind of machine, those of the same workload counting more."""
        known = self.database.workloads()
        good = [r for r in self.database.records(target=self.goal.target_key) if r.status == "ok" and r.ratio > 0]
        good = [r for r in good if r.workload in known][-3000:]
        rows = [columns(r.template, r.point, known[r.workload][1]) for r in good]
        return Model.fit(rows, [r.ratio for r in good], [_OWN if r.workload == state.task.key else 1.0 for r in good])


def _place(template: str, point: Point) -> Place:
    return template, json.dumps(dict(point), sort_keys=True)


def _order(choice: Choice) -> Order:
    from bitwright.codegen.tvm.select import Order

    return Order(choice.template, choice.body, choice.config, choice.symbol)
