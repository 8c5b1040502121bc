"""Quantities with units as people write them in a device's file: ``64 KiB``, ``200 MHz``, ``8 B/cycle``, ``3 pJ``."""

from __future__ import annotations

import re
from typing import Literal

Unit = Literal["bytes", "hertz", "bytes/cycle", "joule", "joule/byte", "bits", "ops/second", "bytes/second", "seconds"]
_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "n": 1e-9, "p": 1e-12, "f": 1e-15}
_FORMS: dict[Unit, tuple[str, str]] = {
    "bytes": (r"([kmg]i?|)b", "64 KiB"),
    "hertz": (r"([kmg]|)hz", "200 MHz"),
    "bytes/cycle": (r"(|ki)b/cycle", "8 B/cycle"),
    "joule": (r"([munpfµ]|)j", "3 pJ"),
    "joule/byte": (r"([munpfµ]|)j/b", "1 pJ/B"),
    "bits": (r"()bits?", "128 bits"),
    "ops/second": (r"([kmgt]|)op/s", "40 Gop/s"),
    "bytes/second": (r"([kmgt]|)b/s", "20 GB/s"),
    "seconds": (r"([munp]|)s", "30 ns"),
}


def quantity(value: object, unit: Unit) -> float:
    """The number in bytes, hertz, joules, ...; raises :class:`ValueError` that shows how to write it.

    >>> quantity("64 KiB", "bytes"), quantity("200 MHz", "hertz"), quantity("8 B/cycle", "bytes/cycle")
    (65536.0, 200000000.0, 8.0)
    """
    form, example = _FORMS[unit]
    m = re.fullmatch(rf"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*{form}\s*", str(value), re.IGNORECASE)
    if not m:
        raise ValueError(f'{value!r} is not a quantity such as "{example}"')
    prefix = m[2] or ""
    factor = _SMALL[prefix.lower()] if unit.startswith(("joule", "seconds")) else _SIZES[prefix.lower()]
    return float(m[1]) * factor
