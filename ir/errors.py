"""Errors a user can meet. Each says what is wrong, where, and what to do; bugs are other exceptions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class BitwrightError(Exception):
    """Base of every error bitwright raises on purpose."""


class InvalidInput(BitwrightError):
    """The caller's input is malformed: a file, a shape, a dtype, an option, a value such as NaN."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason a model cannot be compiled."""

    operator: str
    place: str
    why: str
    cure: str = ""

    def __str__(self) -> str:
        text = f"{self.operator} at {self.place}: {self.why}" if self.place else f"{self.operator}: {self.why}"
        return f"{text}\n    to go on: {self.cure}" if self.cure else text


class Unsupported(BitwrightError):
    """The model is well formed but something in it cannot be compiled; lists every problem at once."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        lines = "\n".join(f"  - {p}" for p in self.problems)
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in this model:\n{lines}")


class VerifyError(BitwrightError):
    """A graph breaks a rule of its level. After a pass this is a bug of that pass."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: ``; did you mean 'x'?`` or the empty string.

    >>> did_you_mean("nm-msk", ["nm-mask", "fold-batch-norm"])
    "; did you mean 'nm-mask'?"
    """
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
