"""Where in a TOML file a problem is."""

from __future__ import annotations

import re
from typing import Any


def problem(text: str, place: str, loc: tuple[Any, ...], message: str) -> str:
    """``place:line: table.key: message`` for a key such as ("instruction", 1, "lanes") of TOML text."""
    line = line_of(text, loc)
    at = f"{place}:{line}" if line else place
    return f"{at}: {'.'.join(map(str, loc)) or 'the file'}: {message.removeprefix('Value error, ')}"


def line_of(text: str, loc: tuple[Any, ...]) -> int:
    """The line of a key such as ("instruction", 1, "lanes"): of the key, else of its table; 0 when neither is there."""
    lines = text.splitlines()
    table = str(loc[0]) if loc else ""
    nth = loc[1] if len(loc) > 1 and isinstance(loc[1], int) else 0
    key = next((str(x) for x in reversed(loc[1:]) if isinstance(x, str)), "")
    heads = [i for i, s in enumerate(lines) if re.match(rf"\s*\[\[?{re.escape(table)}\]\]?\s*(#.*)?$", s)]
    if not heads:
        return next((i + 1 for i, s in enumerate(lines) if re.match(rf"\s*{re.escape(table)}\s*=", s)), 0)
    start = heads[min(nth, len(heads) - 1)]
    for i in range(start + 1, len(lines)):
        if re.match(r"\s*\[", lines[i]):
            break
        if key and re.match(rf"\s*{re.escape(key)}\s*=", lines[i]):
            return i + 1
    return start + 1
