"""The tuning database: one row for every candidate that was measured, or that failed and why.

SQLite in WAL mode: several tuners may write to one file, and what was committed survives kill -9. A row holds for a
workload, a target and a version of the code generator; rows of others serve as starting points only.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import secrets
import sqlite3
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from bitwright.codegen.tuning.space import Pick, Point
from bitwright.ir.errors import BitwrightError, InvalidInput

Status = Literal["ok", "refused", "compile", "wrong", "timeout", "crash", "memory"]
"""``ok``: measured, and its results were those of the reference; otherwise what went wrong."""
FORMAT = 1
APPLICATION = 0x62774454
WORTH = 0.98
"""A candidate is taken instead of the default below this share of its time."""
_WAIT = 30.0
_SCHEMA = """
CREATE TABLE workload(key TEXT PRIMARY KEY, text TEXT NOT NULL, features TEXT NOT NULL);
CREATE TABLE record(
    id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, workload TEXT NOT NULL, target TEXT NOT NULL,
    compiler TEXT NOT NULL, template TEXT NOT NULL, point TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
    seconds REAL NOT NULL, default_seconds REAL NOT NULL, ratio REAL NOT NULL, rounds INTEGER NOT NULL,
    confirmed INTEGER NOT NULL, seed INTEGER NOT NULL, machine TEXT NOT NULL, created TEXT NOT NULL);
CREATE INDEX by_workload ON record(workload, target, compiler);
"""
_COLUMNS = (
    "uid", "workload", "target", "compiler", "template", "point", "status", "reason", "seconds", "default_seconds",
    "ratio", "rounds", "confirmed", "seed", "machine", "created",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """One candidate of one workload. Times are seconds of one call on one core; ``ratio`` is its time over that of
    the default kernel in the same interleaved rounds, ``confirmed`` that it was measured a second time, longer."""

    workload: str
    target: str
    compiler: str
    template: str
    point: Point
    status: Status
    reason: str = ""
    seconds: float = 0.0
    default_seconds: float = 0.0
    ratio: float = 0.0
    rounds: int = 0
    confirmed: bool = False
    seed: int = 0
    machine: str = ""
    created: str = ""
    uid: str = ""
    id: int = 0

    @property
    def label(self) -> str:
        """What people call it; the letters tell records of merged databases apart."""
        return f"record {self.id} ({self.uid[:6]})"


@dataclass
class Database:
    """A tuning database at ``path``; created when it is opened to write.

    ``wait``: seconds to wait for another process's lock. Raises :class:`InvalidInput` for a file that is none, and
    :class:`BitwrightError` when it cannot be read or written (locked for longer, disk full).
    """

    path: Path
    write: bool = True
    wait: float = _WAIT
    connection: sqlite3.Connection = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        if not self.write and not self.path.is_file():
            raise InvalidInput(f"there is no tuning database {self.path}; `bitwright tune` makes one")
        if self.write and not self.path.parent.is_dir():
            raise InvalidInput(f"there is no folder {self.path.parent} for the tuning database {self.path.name}")
        with self._errors():
            self.connection = self._open()
            try:
                self._check_format()
            except BaseException:
                self.connection.close()
                raise

    def _open(self) -> sqlite3.Connection:
        place = self.path.resolve().as_uri()
        if self.write:
            return sqlite3.connect(place, timeout=self.wait, isolation_level=None, uri=True)
        connection = sqlite3.connect(f"{place}?mode=ro", timeout=self.wait, isolation_level=None, uri=True)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError as error:
            connection.close()
            if "unable to open" not in str(error) or self.path.with_name(self.path.name + "-wal").exists():
                raise
            # a folder that cannot be written: SQLite cannot make its shared-memory file there
            connection = sqlite3.connect(f"{place}?immutable=1", isolation_level=None, uri=True)
        return connection

    def _check_format(self) -> None:
        execute = self.connection.execute
        if self.write:
            execute("PRAGMA journal_mode=WAL")
            execute("PRAGMA synchronous=FULL")
            execute("BEGIN IMMEDIATE")
            if not execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    execute(statement)
                execute(f"PRAGMA application_id={APPLICATION}")
                execute(f"PRAGMA user_version={FORMAT}")
            execute("COMMIT")
        if execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
            raise InvalidInput(f"{self.path} is no tuning database of bitwright")
        if (found := execute("PRAGMA user_version").fetchone()[0]) != FORMAT:
            raise InvalidInput(f"{self.path} has format {found}, this bitwright reads {FORMAT}: tune into a new file")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's errors as ours: what happened to which file, and the cure."""
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "locked" in text or "busy" in text:
                why = f"another process has kept it locked for {self.wait:.0f} s: end that process, or use another file"
            elif "full" in text:
                why = "the disk is full: free some space and tune again, what was measured is kept"
            else:
                why = text
            raise BitwrightError(f"tuning database {self.path}: {why}") from error
        except sqlite3.DatabaseError as error:
            raise InvalidInput(f"{self.path} is no readable tuning database: {error}") from error

    def close(self) -> None:
        """Close the file; the write-ahead log goes into it."""
        self.connection.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- writing -------------------------------------------------------------------------------------------------

    def add_workload(self, key: str, text: str, features: Mapping[str, float]) -> None:
        """Make a workload known, if it is not."""
        values = (key, text, json.dumps(dict(features), sort_keys=True))
        with self._errors():
            self.connection.execute("INSERT OR IGNORE INTO workload VALUES (?, ?, ?)", values)

    def add(self, record: Record) -> Record:
        """Store a record, durably, and return it with its number."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        full = replace(record, uid=record.uid or secrets.token_hex(8), created=record.created or now)
        with self._errors():
            cursor = self._insert("INSERT", full)
            return replace(full, id=int(cursor.lastrowid or 0))

    def _insert(self, verb: str, r: Record) -> sqlite3.Cursor:
        row = [getattr(r, name) for name in _COLUMNS]
        row[_COLUMNS.index("point")] = json.dumps(dict(r.point), sort_keys=True)
        row[_COLUMNS.index("confirmed")] = int(r.confirmed)
        marks = ", ".join("?" * len(_COLUMNS))
        sql = f"{verb} INTO record ({', '.join(_COLUMNS)}) VALUES ({marks})"
        end = time.monotonic() + self.wait
        while True:
            try:
                return self.connection.execute(sql, row)
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.05)  # a lock that SQLite does not wait for, such as a checkpoint's

    def merge(self, other: Database) -> int:
        """Add the records of another database that are not here yet; returns how many."""
        with self._errors():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                for key, text, features in other.connection.execute("SELECT key, text, features FROM workload"):
                    self.connection.execute("INSERT OR IGNORE INTO workload VALUES (?, ?, ?)", (key, text, features))
                added = sum(max(0, self._insert("INSERT OR IGNORE", r).rowcount) for r in other.records())
                self.connection.execute("COMMIT")
            except BaseException:
                self.connection.execute("ROLLBACK")
                raise
        return added

    # --- reading -------------------------------------------------------------------------------------------------

    def records(
        self, workload: str | None = None, target: str | None = None, compiler: str | None = None
    ) -> list[Record]:
        """Records in the order they were made, of one workload, target, compiler where these are given."""
        given = {"workload": workload, "target": target, "compiler": compiler}
        asked = {k: v for k, v in given.items() if v is not None}
        where = f" WHERE {' AND '.join(f'{k}=?' for k in asked)}" if asked else ""
        with self._errors():
            sql = f"SELECT id, {', '.join(_COLUMNS)} FROM record{where} ORDER BY id"
            rows = self.connection.execute(sql, list(asked.values())).fetchall()
        return [self._record(row) for row in rows]

    def _record(self, row: Sequence[Any]) -> Record:
        values = dict(zip(("id", *_COLUMNS), row, strict=True))
        try:
            values["point"] = json.loads(values["point"])
        except ValueError as error:
            raise InvalidInput(f"{self.path}: record {values['id']} is damaged: {error}") from error
        if values["status"] not in get_args(Status) or not isinstance(values["point"], dict):
            raise InvalidInput(f"{self.path}: record {values['id']} is damaged")
        return Record(**(values | {"confirmed": bool(values["confirmed"])}))

    def workloads(self) -> dict[str, tuple[str, dict[str, float]]]:
        """Text and features of every workload, by key."""
        with self._errors():
            rows = self.connection.execute("SELECT key, text, features FROM workload").fetchall()
        return {key: (text, json.loads(features)) for key, text, features in rows}

    def machines(self, fingerprint: str) -> list[str]:
        """Names of the processors or devices that records of this target were measured on."""
        with self._errors():
            rows = self.connection.execute("SELECT DISTINCT target FROM record").fetchall()
        return sorted(key.removeprefix(f"{fingerprint}/") for (key,) in rows if key.startswith(f"{fingerprint}/"))

    def best(self, workload: str, target: str, compiler: str) -> list[Pick]:
        """Confirmed candidates that beat the default, best first; never one that failed even once."""
        groups: dict[tuple[str, str], list[Record]] = {}
        for r in self.records(workload, target, compiler):
            groups.setdefault((r.template, json.dumps(dict(r.point), sort_keys=True)), []).append(r)
        good: list[tuple[float, Record]] = []
        for tried in groups.values():
            sure = [r for r in tried if r.confirmed]
            if sure and all(r.status == "ok" for r in tried):
                good.append((statistics.median(r.ratio for r in sure), sure[-1]))
        return [cast(Pick, r) for ratio, r in sorted(good, key=lambda g: g[0]) if ratio < WORTH]
