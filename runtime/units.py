"""Figures as people read them: the report's page, the terminal tables and the demo print through here."""

from __future__ import annotations

import math

UNKNOWN = "-"


def _scaled(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    for factor, unit in steps:
        if abs(value) >= factor:
            return f"{significant(value / factor)} {unit}"
    factor, unit = steps[-1]
    return f"{significant(value / factor)} {unit}"


def significant(value: float) -> str:
    """Three significant digits, never scientific, no digits that say nothing.

    >>> significant(1234.5), significant(12.345), significant(0.01234), significant(0)
    ('1,234', '12.3', '0.0123', '0')
    """
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(digits, 0), 9)}f}"


def seconds(value: float | None) -> str:
    """A duration.

    >>> seconds(0.0000123), seconds(2.5), seconds(None)
    ('12.3 µs', '2.50 s', '-')
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return _scaled(value, ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")))


def size(value: float | None) -> str:
    """A number of bytes.

    >>> size(123), size(36864), size(91_000_000)
    ('123 B', '36.9 kB', '91.0 MB')
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:.0f} B" if abs(value) < 1000 else _scaled(value, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def rate(value: float | None) -> str:
    """Operations per second.

    >>> rate(2.5e11)
    '250 Gop/s'
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return _scaled(value, ((1e12, "Top/s"), (1e9, "Gop/s"), (1e6, "Mop/s")))


def count(value: float | None) -> str:
    """A large number.

    >>> count(9_437_184), count(12)
    ('9.44 M', '12')
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:.3g}" if abs(value) < 1000 else _scaled(value, ((1e9, "G"), (1e6, "M"), (1e3, "k")))


def percent(value: float | None) -> str:
    """A share; small ones keep their meaning.

    >>> percent(0.834), percent(0.00042), percent(None)
    ('83 %', '0.042 %', '-')
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{100 * value:.0f} %" if value == 0 or abs(value) >= 0.095 else f"{100 * value:.2g} %"


def accuracy(value: float) -> str:
    """A share of right answers, where a tenth of a percent matters.

    >>> accuracy(0.99556)
    '99.6 %'
    """
    return f"{100 * value:.1f} %"
