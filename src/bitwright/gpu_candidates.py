"""Candidates compiled ahead, for a machine that has a device but no compiler: a folder to carry there.

``bitwright tune MODEL --target cuda-sm90 --prepare FOLDER`` writes it; ``python -m bitwright.gpu_candidates FOLDER --db
tuning.sqlite`` measures it where the device is, with NumPy, pydantic and cuda-bindings alone, and goes on where an
earlier run ended; ``bitwright tune --merge`` brings the records back. The folder holds machine code: measure only one
that you would run as a program.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from bitwright.codegen.cache import key_of
from bitwright.codegen.tuning.bench import LocalBench, alone, code_of
from bitwright.codegen.tuning.inputs import drawn
from bitwright.codegen.tuning.measure import Case, Code, Outcome, Request
from bitwright.codegen.tuning.records import Database, Record
from bitwright.codegen.tuning.worker import Worker
from bitwright.gpu_tuning import OpenDriver, device_name, measured_on, open_device
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.ir.files import save
from bitwright.ir.target import Target
from bitwright.ir.types import parse_type

if TYPE_CHECKING:
    from bitwright.codegen.tuning.tasks import Task
    from bitwright.codegen.tvm.select import Choice

Array = NDArray[Any]
FORMAT = 1
SAMPLED = 1 << 16
"""Elements of a result that are compared, at most."""
_ROUNDS, _LONGER, _PROMISING = 15, 3, 0.985
_UNLIMITED = 1 << 46
_FILE = "candidates.json"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Candidate(_Model):
    """A kernel, or the reason why there is none. ``arrays``: files of its packed weights."""

    template: str
    point: dict[str, int | str | bool]
    status: str = "ok"
    reason: str = ""
    kernel: str = ""
    symbol: str = ""
    scratch_bytes: int = 0
    work_bytes: int = 0
    args: tuple[tuple[str, int], ...] = ()
    arrays: tuple[str, ...] = ()


class Prepared(_Model):
    """A workload. ``inputs``: types; ``constants``: files of those inputs that are weights, by position; ``outputs``:
    a file for each case with the values that are compared. The first candidate is the default."""

    key: str
    text: str
    name: str
    features: dict[str, float]
    inputs: tuple[str, ...]
    indices: bool
    constants: dict[int, str]
    outputs: tuple[str, ...]
    tolerance: float
    codes: bool
    cold_bytes: int
    candidates: tuple[Candidate, ...]


class Folder(_Model):
    """What ``candidates.json`` says; tasks in the order of their share of the model's time."""

    format: int
    arch: str
    fingerprint: str
    compiler: str
    seed: int
    tasks: tuple[Prepared, ...]


# --- writing -------------------------------------------------------------------------------------------------------


def prepare(
    tasks: Sequence[Task], target: Target, folder: str | Path, *, most: int = 32, seed: int = 0, jobs: int | None = None
) -> int:
    """Compile at most ``most`` candidates of each task into ``folder``; returns how many there are.

    ``seed`` draws inputs and candidates. Raises :class:`InvalidInput` for a folder that holds something.
    """
    from bitwright.codegen.tvm.cuda.compile import compile_gpu
    from bitwright.codegen.tvm.select import version

    root = Path(folder)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InvalidInput(f"{root} exists and is not empty: name a new folder")
    root.mkdir(parents=True, exist_ok=True)
    with LocalBench(jobs, compile=compile_gpu) as bench:
        made = tuple(_prepared(task, target, root, bench, most, seed) for task in tasks)
    about = Folder(
        format=FORMAT, arch=target.mcpu, fingerprint=target.fingerprint, compiler=version(), seed=seed, tasks=made
    )
    save(root / _FILE, about.model_dump_json(indent=1))
    return sum(len(t.candidates) for t in made)


def _prepared(task: Task, target: Target, root: Path, bench: LocalBench, most: int, seed: int) -> Prepared:
    from bitwright.codegen.tuning.tasks import cases_of, exactness, gathers
    from bitwright.codegen.tvm.select import Choice, Order

    choices: list[tuple[str, dict[str, Any], Choice]] = []
    for template, point in _points(task, target, most, seed):
        choice = _choice(task, target, template, point)
        if isinstance(choice, Choice):
            choices.append((template, point, choice))
    libraries = bench.compile([Order(c.template, c.body, c.config, c.symbol) for _, _, c in choices])
    candidates = [_written(root, *c, made) for c, made in zip(choices, libraries, strict=True)]
    tolerance, codes = exactness(task.body)
    rng = np.random.default_rng(seed)
    return Prepared(
        key=task.key, text=task.text, name=task.name, features=task.features,
        inputs=tuple(str(v.type) for v in task.body.inputs), indices=gathers(task.body),
        constants={
            i: _array(root, task.constants[v.name])
            for i, v in enumerate(task.body.inputs) if v.name in task.constants
        },
        outputs=tuple(_sampled(root, case, rng) for case in cases_of(task, seed)),
        tolerance=tolerance, codes=codes, cold_bytes=task.cold_bytes, candidates=tuple(candidates),
    )  # fmt: skip


def _points(task: Task, target: Target, most: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """The default, every other template's own choice, then points drawn from all spaces."""
    from bitwright.codegen.tvm.select import offered
    from bitwright.codegen.tvm.template import Refused

    firsts: list[tuple[str, dict[str, Any]]] = []
    rest: list[tuple[str, dict[str, Any]]] = []
    for name, template in offered(target).items():
        if isinstance(template.configure(task.body, task.constants, target), Refused):
            continue
        points = list(islice(template.space(task.body, task.constants, target), 100_000))
        own = [(name, dict(points[0]))]
        firsts = own + firsts if name == task.template else firsts + own
        rest += [(name, dict(p)) for p in points[1:]]
    drawn_points = random.Random(seed).sample(rest, max(0, min(len(rest), most - len(firsts))))
    return firsts + drawn_points


def _choice(task: Task, target: Target, template: str, point: dict[str, Any]) -> Any:
    from bitwright.codegen.tvm.select import candidate

    return candidate(task.body, task.constants, target, template, point)


def _written(root: Path, template: str, point: dict[str, Any], choice: Choice, library: bytes | Outcome) -> Candidate:
    if isinstance(library, Outcome):
        return Candidate(template=template, point=point, status=library.status, reason=library.reason)
    code = code_of(choice)
    path = root / "kernels" / f"{choice.key}.zip"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(library)
    return Candidate(
        template=template, point=point, kernel=path.name, symbol=code.symbol, scratch_bytes=code.scratch_bytes,
        work_bytes=code.work_bytes, args=code.args, arrays=tuple(_array(root, a) for a in code.packed),
    )  # fmt: skip


def _array(root: Path, array: Array) -> str:
    """The file of an array; equal ones share it."""
    flat = np.ascontiguousarray(array)
    name = key_of(str(flat.dtype), flat.shape, flat.tobytes())[:24] + ".npz"
    path = root / "arrays" / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        kind, shape = str(flat.dtype), np.array(flat.shape, np.int64)
        np.savez_compressed(path, raw=flat.reshape(-1).view(np.uint8), dtype=np.array(kind), shape=shape)
    return name


def _read(root: Path, name: str) -> Array:
    with np.load(root / "arrays" / name, allow_pickle=False) as file:
        import ml_dtypes

        kind = str(file["dtype"])
        dtype = np.dtype(getattr(ml_dtypes, kind) if hasattr(ml_dtypes, kind) else kind)
        array: Array = file["raw"].view(dtype).reshape(tuple(file["shape"]))
        return array


def _sampled(root: Path, case: Case, rng: np.random.Generator) -> str:
    """Places and values of at most :data:`SAMPLED` elements of each output."""
    held: dict[str, Array] = {}
    for i, output in enumerate(case.outputs):
        count = min(output.size, SAMPLED)
        places = np.sort(rng.choice(output.size, count, replace=False)) if count < output.size else np.arange(count)
        held[f"places{i}"], held[f"shape{i}"] = places.astype(np.int64), np.array(output.shape, np.int64)
        values = np.ascontiguousarray(output.reshape(-1)[places])
        held[f"values{i}"], held[f"dtype{i}"] = values.view(np.uint8), np.array(str(output.dtype))
    name = key_of(*(a.tobytes() for a in held.values()))[:24] + ".case.npz"
    (root / "arrays").mkdir(exist_ok=True)
    np.savez_compressed(root / "arrays" / name, **held)  # type: ignore[arg-type]
    return name


# --- measuring -----------------------------------------------------------------------------------------------------


def opened(folder: str | Path) -> Folder:
    """Read ``candidates.json``. Raises :class:`InvalidInput` where there is none, or of another version."""
    path = Path(folder) / _FILE
    if not path.is_file():
        raise InvalidInput(f"{folder} holds no {_FILE}: `bitwright tune --prepare` makes such a folder")
    try:
        data = json.loads(path.read_text())
        if data.get("format") != FORMAT:
            raise InvalidInput(
                f"{path} has format {data.get('format')}, this bitwright reads {FORMAT}: prepare it again"
            )
        return Folder.model_validate(data)
    except (ValueError, ValidationError, AttributeError) as error:
        raise InvalidInput(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def measure(
    folder: str | Path,
    database: Database,
    minutes: float,
    *,
    open_driver: OpenDriver | None = None,
    device: str = "",
    rounds: int = _ROUNDS,
    told: Callable[[str], None] | None = None,
) -> int:
    """Measure what ``database`` does not know yet for at most ``minutes``; every result is stored at once.

    ``open_driver`` and ``device``: another device than this machine's first; ``rounds``: of candidate and default by
    turns. Returns how many were measured or failed.
    Raises :class:`BitwrightError` with the reasons where nothing at all could be measured.
    """
    about, root, end, ran = opened(folder), Path(folder), time.monotonic() + minutes * 60, 0
    device = device or device_name(about.arch)
    key = f"{about.fingerprint}/{device}"
    worker = Worker(partial(measured_on, open_driver or partial(open_device, about.arch)), memory=_UNLIMITED)
    try:
        for task in about.tasks:
            database.add_workload(task.key, task.text, task.features)
            known = database.records(task.key, key, about.compiler)
            done = {(r.template, json.dumps(dict(r.point), sort_keys=True)) for r in known}
            cases: tuple[Case, ...] = ()
            for index, c in enumerate(task.candidates):
                if (c.template, json.dumps(c.point, sort_keys=True)) in done:
                    continue
                if time.monotonic() > end:
                    break
                cases = cases or _cases(root, task, about.seed)
                filed = partial(_record, task, c, about, key, device)
                outcome = _tried(worker, root, task, c, cases, rounds)
                database.add(filed(outcome))
                ran += 1
                if told is not None:
                    took = f"{outcome.ratio:.2f}x of the default" if outcome.status == "ok" else outcome.reason
                    told(f"{task.name}: {c.template}: {outcome.status}: {took}")
                if index == 0 and outcome.status != "ok":
                    break  # there is nothing to compare the others with
                if outcome.status == "ok" and outcome.ratio < _PROMISING:
                    database.add(filed(_tried(worker, root, task, c, cases, rounds * _LONGER), confirmed=True))
    finally:
        worker.stop()
    seen = [r for t in about.tasks for r in database.records(t.key, key, about.compiler)]
    if about.tasks and not any(r.status == "ok" for r in seen):
        reasons = "\n".join(sorted({f"  {r.status}: {r.reason}" for r in seen})) or "  the time was too short"
        raise BitwrightError(f"no candidate could be measured:\n{reasons}")
    return ran


def _cases(root: Path, task: Prepared, seed: int) -> tuple[Case, ...]:
    """The inputs, drawn again, and the results to compare with."""
    import ml_dtypes

    types = [parse_type(t) for t in task.inputs]
    constants = {i: _read(root, name) for i, name in task.constants.items()}
    cases = []
    for values, name in zip(drawn(task.key, types, task.indices, seed), task.outputs, strict=True):
        inputs = tuple(np.ascontiguousarray(constants.get(i, v)) for i, v in enumerate(values))
        outputs, places = [], []
        with np.load(root / "arrays" / name, allow_pickle=False) as file:
            for i in range(sum(k.startswith("places") for k in file.files)):
                kind = str(file[f"dtype{i}"])
                dtype = np.dtype(getattr(ml_dtypes, kind) if hasattr(ml_dtypes, kind) else kind)
                whole = np.zeros(tuple(file[f"shape{i}"]), dtype)
                whole.reshape(-1)[file[f"places{i}"]] = file[f"values{i}"].view(dtype)
                outputs.append(whole)
                places.append(file[f"places{i}"])
        cases.append(Case(inputs, tuple(outputs), tuple(places)))
    return tuple(cases)


def _code(root: Path, c: Candidate) -> Code:
    packed = tuple(_read(root, name) for name in c.arrays)
    library = (root / "kernels" / c.kernel).read_bytes()
    return Code(library, c.symbol, 1, c.scratch_bytes, c.args, packed, c.work_bytes)


def _tried(worker: Worker, root: Path, task: Prepared, c: Candidate, cases: tuple[Case, ...], rounds: int) -> Outcome:
    if c.status != "ok":
        return Outcome(c.status, c.reason)  # type: ignore[arg-type]
    request = Request(
        _code(root, c), _code(root, task.candidates[0]), b"", cases, task.tolerance, task.codes,
        rounds=rounds, cold_bytes=task.cold_bytes,
    )  # fmt: skip
    with alone():
        reply = worker.call(request, request.seconds + 10.0)
    if reply.fate == "ok":
        outcome: Outcome = reply.value
        return outcome
    return Outcome("timeout" if reply.fate == "timeout" else "crash", str(reply.value))


def _record(
    task: Prepared, c: Candidate, about: Folder, key: str, device: str, o: Outcome, confirmed: bool = False
) -> Record:
    return Record(
        task.key, key, about.compiler, c.template, c.point, o.status, o.reason, o.seconds, o.default_seconds, o.ratio,
        o.rounds, confirmed, about.seed, device,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m bitwright.gpu_candidates FOLDER --db FILE --minutes 10``; 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m bitwright.gpu_candidates", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--db", type=Path, default=Path("tuning.sqlite"))
    parser.add_argument("--minutes", type=float, default=10.0)
    given = parser.parse_args(arguments)
    try:
        with Database(given.db) as database:
            ran = measure(given.folder, database, given.minutes, told=lambda line: print(line, flush=True))
    except BitwrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{ran} candidates; bring {given.db} back: bitwright tune --merge {given.db} --db tuning.sqlite")
    return 0


if __name__ == "__main__":
    sys.exit(main())
