"""What the project must reach against its peers, as claims that a race settles, and their table.

A claim compares one contender of ours with the fastest of some peers: the peer's time over ours, of whole calls on both
sides, quantizing and dequantizing included. In brackets the ratio of our contraction alone to the peer's whole call:
what a kernel gives inside a network, and decides nothing. Shares of the bound are of the contraction. What cannot be
measured is not left out: it is a row with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import tables


@dataclass(frozen=True)
class Claim:
    """``ours`` against the fastest contender whose name begins with one of ``against``, at least ``least`` times as
    fast; or, without ``against``, a share of ``bound`` (operations or bytes a second) of at least ``least``."""

    work: str
    ours: str
    against: tuple[str, ...]
    least: float
    aim: float | None = None


@dataclass(frozen=True)
class Quoted:
    """A peer that is not here: its time in the study of 2026-11-20 over that of a peer that is.

    The time used is that ratio times what the present peer takes in this run.
    """

    name: str
    ms: float
    base: tuple[str, ...]
    base_ms: float


@dataclass(frozen=True)
class Row:
    """A line of the table; ``ratio`` is of whole calls (None: not measured, ``note`` says why), ``inner`` of the
    contraction."""

    work: str
    ours: str
    against: str
    ours_ms: float | None
    against_ms: float | None
    ratio: float | None
    inner: float | None
    least: float
    aim: float | None
    share: float | None
    note: str = ""

    @property
    def status(self) -> str:
        return "not measured" if self.ratio is None else tables.verdict(self.ratio >= self.least)


@dataclass
class Group:
    """Everything measured in one race."""

    times: tables.Times
    work: Mapping[str, float] = field(default_factory=dict)
    """Operations or bytes of a call by contender, and ``bound`` of them a second at most."""
    bound: float = 0.0
    missing: Mapping[str, str] = field(default_factory=dict)
    """Contenders that did not run, with the reason."""
    quoted: Sequence[Quoted] = ()

    def fastest(self, names: Sequence[str]) -> str | None:
        """Among the contenders whose name is or begins with one of ``names``, contractions aside."""
        able = [n for n in self.times.rounds if n.startswith(tuple(names)) and not n.endswith(": contraction")]
        return self.times.fastest(able) if able else None

    def settle(self, claim: Claim) -> Row:
        """Compare, or say what is missing."""
        inner = f"{claim.ours}: contraction"
        inner = inner if inner in self.times.rounds else claim.ours
        if claim.ours in self.missing or claim.ours not in self.times.rounds:
            why = self.missing.get(claim.ours, "not in this race")
            return self._empty(claim, ", ".join(claim.against) or "share of the bound", why)
        seconds = self.times.median(inner)
        amount = self.work.get(claim.ours, 0.0)
        share = amount / seconds / self.bound if amount and self.bound else None
        if not claim.against:
            took = seconds * 1e3
            return Row(claim.work, inner, "share of the bound", took, None, share, None, claim.least, claim.aim, share)
        whole = self.times.median(claim.ours)
        peer, note = self.fastest(claim.against), ""
        if peer is not None:
            took = self.times.median(peer)
            ratio, alone = self.times.ratio(peer, claim.ours), self.times.ratio(peer, inner)
        else:
            quote = next((q for q in self.quoted if q.name.startswith(claim.against)), None)
            base = self.fastest(quote.base) if quote else None
            if quote is None or base is None:
                why = next((w for n, w in self.missing.items() if n.startswith(claim.against)), "no such peer here")
                return self._empty(claim, ", ".join(claim.against), why)
            took = self.times.median(base) * quote.ms / quote.base_ms
            peer, ratio, alone = quote.name, took / whole, took / seconds
            note = f"quoted, 2026-11-20: {quote.ms:g} ms where {base} took {quote.base_ms:g}"
        alone = None if inner == claim.ours else alone
        return Row(
            claim.work, claim.ours, peer, whole * 1e3, took * 1e3, ratio, alone, claim.least, claim.aim, share, note
        )

    def _empty(self, claim: Claim, against: str, why: str) -> Row:
        return Row(claim.work, claim.ours, against, None, None, None, None, claim.least, claim.aim, None, why)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(rows: Sequence[Row]) -> str:
    """Markdown of one group."""
    heads = [
        "work",
        "ours",
        "ms",
        "against",
        "ms",
        "ratio",
        "(contraction)",
        "at least",
        "aim",
        "of the bound",
        "",
        "note",
    ]
    lines = [
        [
            r.work, r.ours, _number(r.ours_ms, ".3f"), r.against, _number(r.against_ms, ".3f"), _number(r.ratio, ".2f"),
            f"({r.inner:.2f})" if r.inner else "", f"{r.least:g}", _number(r.aim, "g"), _number(r.share, ".0%"),
            r.status, r.note,
        ]
        for r in rows
    ]  # fmt: skip
    return tables.markdown(heads, lines)


def merge(name: str, rows: Sequence[Row], times: Mapping[str, Any], env: Mapping[str, Any]) -> None:
    """Write the group into results/must_reach.json and the page again; the other groups keep their own figures."""
    path = tables.RESULTS / "must_reach.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {"environment": dict(env), "rows": [asdict(r) | {"status": r.status} for r in rows], "times": times}
    pages = []
    for group, found in known.items():
        lines = [Row(**{k: v for k, v in r.items() if k != "status"}) for r in found["rows"]]
        pages.append(tables.heading(group, found["environment"]).replace("# ", "## ", 1) + "\n" + table(lines))
    states = [r["status"] for found in known.values() for r in found["rows"]]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    tables.save("must_reach", f"# What must be reached: {counts}\n\n{__doc__}\n" + "\n".join(pages), known)
