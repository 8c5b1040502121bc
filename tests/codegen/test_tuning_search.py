"""The search on a bench that answers at once: what it proposes, keeps, resumes, and how kernel selection uses it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.codegen.targets.machine import cpu_name
from bitwright.codegen.tuning.bench import Trial
from bitwright.codegen.tuning.measure import Outcome, Request
from bitwright.codegen.tuning.records import Database, Record
from bitwright.codegen.tuning.search import Goal, Search
from bitwright.codegen.tuning.tasks import Task, cases_of, exactness, tasks_of
from bitwright.codegen.tuning.workload import target_key, workload_key
from bitwright.codegen.tvm.select import Choice, candidate, choose, templates, version
from bitwright.codegen.tvm.template import Refused
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.types import parse_type
from tests.codegen import harness as h

TARGET = h.target()
KEY = target_key(TARGET, cpu_name())
WEIGHT = np.random.default_rng(0).integers(-127, 128, (48, 64)).astype(np.int8)


def body(zero: int = 3, rows: int = 24) -> Graph:
    """An integer linear layer with 32-bit results."""
    b = Builder("body", level="integer")
    x, w = b.input("x", parse_type(f"u8[{rows}, 64]")), b.input("w", parse_type("s8[48, 64]"))
    return b.finish([b.emit(ops.IntLinear(x_zero=zero), x, w)])


def model(rows: Sequence[int] = (24, 24, 8)) -> Graph:
    """Layers of a kernel-level graph; the first two are the same workload."""
    b = Builder("model", level="kernel")
    outs = []
    for n, r in enumerate(rows):
        x = b.input(f"x{n}", parse_type(f"u8[{r}, 64]"))
        outs.append(b.emit(ops.Region(body(n, r), "generic"), x, b.weight(f"w{n}", WEIGHT), origin=f"layer{n}"))
    return b.finish(outs)


class FakeBench:
    """Measures a made-up time of each candidate: the fewer rows, the better; or fails in a given way."""

    batch = 6

    def __init__(self, fail: Outcome | None = None) -> None:
        self.fail, self.seen = fail, list[str]()

    def compile(self, orders: Sequence[Any]) -> list[bytes | Outcome]:
        self.seen += [o.config.kernel_key() for o in orders]
        return [repr(getattr(o.config, "knobs", "")).encode() for o in orders]

    def measure(self, request: Request) -> Outcome:
        if self.fail is not None:
            return self.fail
        rows = int(request.candidate.library.split(b"rows=")[1].split(b",")[0])
        return Outcome("ok", "", rows * 1e-6, 4e-6, rows / 4, request.rounds)

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Outcome, bytes]]:
        for n, library in enumerate(self.compile([t.order for t in trials])):
            assert isinstance(library, bytes)
            if b"rows=" not in library:
                yield n, Outcome("compile", "as made up"), b""
                continue
            from dataclasses import replace

            request = trials[n].request
            yield n, self.measure(replace(request, candidate=replace(request.candidate, library=library))), library


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "tuning.sqlite") as made:
        yield made


def goal(seed: int = 0) -> Goal:
    return Goal(TARGET, KEY, version(), cpu_name(), seed, rounds=2)


def tasks() -> list[Task]:
    return tasks_of(model(), TARGET)


def test_layers_with_equal_kernels_are_one_task() -> None:
    found = tasks()
    assert [(t.count, t.names) for t in found] == [(2, ["layer0", "layer1"]), (1, ["layer2"])]
    assert found[0].predicted > 0
    assert found[0].key != found[1].key
    assert found[0].name == "layer0 and 1 more"


def test_a_workload_is_its_meaning_not_its_zero_points() -> None:
    held = {"w": WEIGHT}
    assert workload_key(body(0), held) == workload_key(body(7), held)
    assert workload_key(body(0), held) != workload_key(body(0, 25), held)
    assert workload_key(body(0), held) != workload_key(body(0), {})
    sparse = np.where(np.arange(64) % 4 == 0, WEIGHT, 0).astype(np.int8)
    assert workload_key(body(0), held) != workload_key(body(0), {"w": sparse})


def test_cases_are_the_references_answers_on_fresh_inputs() -> None:
    task = tasks()[0]
    first, other = cases_of(task, 1), cases_of(task, 2)
    assert len(first) == 3
    assert not np.array_equal(first[0].inputs[0], other[0].inputs[0])
    assert set(np.unique(first[2].inputs[0])) == {0, 255}
    x, w = (first[2].inputs[i].astype(np.int64) for i in (0, 1))
    assert np.array_equal(first[2].outputs[0], (x - 0) @ w.T)
    assert exactness(task.body) == (0.0, False)


def test_the_search_finds_the_best_point_and_tries_nothing_twice(database: Database) -> None:
    bench = FakeBench()
    Search(database, bench, goal(), tasks()).run(60.0)
    for task in tasks():
        best = database.best(task.key, KEY, version())
        assert best[0].point["rows"] == 1
        records = database.records(task.key)
        plain = [repr(sorted(r.point.items())) + r.template for r in records if not r.confirmed]
        assert len(plain) == len(set(plain))


def test_a_second_run_goes_on_where_the_first_ended(database: Database) -> None:
    Search(database, FakeBench(), goal(), tasks()[:1]).run(60.0)
    before = len(database.records())
    again = Search(database, FakeBench(), goal(1), tasks()[:1])
    assert again.states[0].best == 0.25
    assert len(again.states[0].tried) > 5
    again.run(0.5)
    repeated = [r for r in database.records()[before:] if not r.confirmed and r.point != records_default(again)]
    earlier = {repr(sorted(r.point.items())) + r.template for r in database.records()[:before]}
    assert not [r for r in repeated if repr(sorted(r.point.items())) + r.template in earlier]


def test_what_another_version_found_best_is_tried_first(database: Database) -> None:
    task = tasks()[0]
    database.add_workload(task.key, task.text, task.features)
    points = [{"rows": 3, "vectors": 1}, {"rows": 2, "vectors": 1}]
    for ratio, point in zip((0.7, 0.5), points, strict=True):
        old = record(task, ratio=ratio, point=point)
        database.add(Record(old.workload, old.target, "an older version", old.template, old.point, "ok", ratio=ratio))
    search = Search(database, FakeBench(), goal(), tasks()[:1])
    assert search.states[0].best == 1.0
    same = [p for template, p in search._propose(search.states[0]) if template == "contract"]
    assert [(p["rows"], p["vectors"]) for p in same[:2]] == [(2, 1), (3, 1)]


def records_default(search: Search) -> dict[str, Any]:
    task = search.states[0].task
    return dict(templates()[task.template].space(task.body, task.constants, TARGET).default)


def test_nothing_measured_is_an_error_with_the_reasons(database: Database) -> None:
    from bitwright.ir.errors import BitwrightError

    bench = FakeBench(Outcome("crash", "the kernel died of SIGILL"))
    with pytest.raises(BitwrightError, match=r"no candidate could be measured:\n.*crash: the kernel died of SIGILL"):
        Search(database, bench, goal(), tasks()).run(1.0)
    assert {r.status for r in database.records()} == {"crash"}


def test_every_point_of_the_space_makes_a_kernel_or_says_why_not() -> None:
    task = tasks()[0]
    space = templates()["contract"].space(task.body, task.constants, TARGET)
    points = list(space)
    assert len(points) > 20
    made = [candidate(task.body, task.constants, TARGET, "contract", p) for p in points[:40]]
    assert all(isinstance(c, Choice) for c in made)
    plain, untuned = made[0], choose(task.body, task.constants, TARGET)
    assert isinstance(plain, Choice)
    assert isinstance(untuned, Choice)
    assert plain.key == untuned.key


# --- what kernel selection takes ---------------------------------------------------------------------------------


def record(task: Task, **changes: Any) -> Record:
    space = templates()["contract"].space(task.body, task.constants, TARGET)
    point = {**space.default, "rows": 2, "vectors": 1, "blocks": 4} | changes.pop("point", {})
    values: dict[str, Any] = {"template": "contract", "status": "ok", "ratio": 0.8, "confirmed": True} | changes
    return Record(task.key, KEY, version(), point=point, **values)


def test_selection_takes_the_best_record_and_says_so(database: Database) -> None:
    task = tasks()[0]
    stored = database.add(record(task))
    choice = choose(task.body, task.constants, TARGET, database)
    assert isinstance(choice, Choice)
    assert choice.record == stored.label
    assert f"tuned: {stored.label}, 0.80x of the default's time" in choice.config.reason
    assert (choice.config.knobs.rows, choice.config.knobs.vectors) == (2, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "changes",
    [
        {"point": {"rows": 1000}}, {"point": {"kernel": "2:4"}}, {"point": {"nonsense": 1}}, {"template": "none"},
        {"point": {"unpack": "panel"}}, {"confirmed": False}, {"ratio": 1.2}, {"status": "wrong"},
    ],
)  # fmt: skip
def test_selection_leaves_what_cannot_be_right(database: Database, changes: dict[str, Any]) -> None:
    task = tasks()[0]
    database.add(record(task, **changes))
    choice = choose(task.body, task.constants, TARGET, database)
    assert isinstance(choice, Choice)
    assert choice.record == ""


def test_templates_without_knobs_have_one_point() -> None:
    b = Builder("body", level="integer")
    x = b.input("x", parse_type("f32[4, 4]"))
    plain = b.finish([b.emit(ops.Unary("relu"), x)])
    assert list(templates()["elementwise"].space(plain, {}, TARGET)) == [{}]
    refused = templates()["elementwise"].at(plain, {}, TARGET, {"rows": 1})
    assert isinstance(refused, Refused)
