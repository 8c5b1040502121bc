"""The text form of passes: ``fold-batch-norm, nm-mask{pattern=2:4 only=encoder.*}, int8`` and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bitwright.ir.errors import InvalidInput, did_you_mean
from bitwright.ir.types import DType, parse_dtype
from bitwright.passes._pass import Pass

_ITEM = re.compile(r'\s*([^\s{},"]+)\s*(?:\{((?:"(?:[^"\\]|\\.)*"|[^"{}])*)\})?\s*')
_OPTION = re.compile(r'[\s,]*([\w-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^\s,{}"]*)')


def parse_passes(text: str, extra: Iterable[type[Pass]] = ()) -> tuple[Pass, ...]:
    """Passes from text; recipe names stand for their passes (an option goes to each that has it), ``path.py:Class``
    for a pass of the user's.

    ``extra`` are pass classes of the caller, found by their name. Raises :class:`InvalidInput`.

    >>> [str(p) for p in parse_passes("fold-batch-norm, nm-mask{pattern=1:4 only=encoder.*}")]
    ['fold-batch-norm', 'nm-mask{pattern=1:4 only=encoder.*}']
    """
    own = {cls.name: cls for cls in extra}
    out: list[Pass] = []
    at = 0
    while text[at:].strip():
        m = _ITEM.match(text, at)
        if not m:
            raise InvalidInput(
                f"cannot read the pass list at {text[at : at + 30]!r}: expected name{{option=value ...}}"
            )
        out += _expand(m[1], m[2], own)
        at = m.end()
        if at < len(text):
            if text[at] != ",":
                raise InvalidInput(
                    f"cannot read the pass list at {text[at : at + 30]!r}: passes are separated by commas"
                )
            at += 1
    return tuple(out)


def parse_pass(text: str, extra: Iterable[type[Pass]] = ()) -> Pass:
    """One pass from text; raises :class:`InvalidInput` when it is none or several."""
    found = parse_passes(text, extra)
    if len(found) != 1:
        raise InvalidInput(f"{text!r} is {len(found)} passes, expected one")
    return found[0]


def _expand(name: str, options: str | None, own: dict[str, type[Pass]]) -> tuple[Pass, ...]:
    from bitwright.passes.pipelines import RECIPES
    from bitwright.passes.registry import PASSES, load

    if name in RECIPES and name not in own:
        return _recipe(name, parse_passes(RECIPES[name]), options or "")
    if name in own:
        cls = own[name]
    elif name in PASSES or ":" in name:
        cls = load(name)
    else:
        raise InvalidInput(f"no pass or recipe is called {name!r}{did_you_mean(name, [*PASSES, *RECIPES, *own])}")
    return (_make(cls, name, options or ""),)


def _recipe(name: str, passes: tuple[Pass, ...], text: str) -> tuple[Pass, ...]:
    """The passes of a recipe; each option goes to every pass that has it."""
    given = _options(name, text)
    known = dict.fromkeys(f.name.rstrip("_") for p in passes for f in fields(p))
    for key in given:
        if key not in known:
            listed = f" ({', '.join(known)})" if known else " (they have none)"
            raise InvalidInput(f"no pass of {name} has an option {key!r}{did_you_mean(key, known) or listed}")
    return tuple(replace(p, **_values(type(p), name, given)) for p in passes)


def _options(name: str, text: str) -> dict[str, str]:
    """Options by name, values as they are written."""
    values: dict[str, str] = {}
    at = 0
    while text[at:].strip(" \t\n,"):
        m = _OPTION.match(text, at)
        if not m:
            raise InvalidInput(f"{name}: cannot read options at {text[at:].strip()!r}: expected option=value")
        key = m[1].replace("-", "_")
        if key in values:
            raise InvalidInput(f"{name}: option {m[1]!r} is given twice")
        values[key] = m[2]
        at = m.end()
    return values


def _values(cls: type[Pass], name: str, given: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a pass out of options; those that it has not are left out."""
    hints, known = get_type_hints(cls), {f.name.rstrip("_"): f.name for f in fields(cls)}
    return {known[k]: _value(hints[known[k]], v, f"{name}: option {k}") for k, v in given.items() if k in known}


def _make(cls: type[Pass], name: str, text: str) -> Pass:
    known, given = {f.name.rstrip("_"): f for f in fields(cls)}, _options(name, text)
    for key in given:
        if key not in known:
            listed = f" ({', '.join(known)})" if known else " (it has none)"
            raise InvalidInput(f"{name} has no option {key!r}{did_you_mean(key, known) or listed}")
    lacking = [k for k, f in known.items() if f.default is MISSING and k not in given]
    if lacking:
        raise InvalidInput(f"{name} needs option {lacking[0]!r}: {name}{{{lacking[0]}=...}}")
    return cls(**_values(cls, name, given))


def _value(kind: Any, raw: str, where: str) -> Any:
    text = re.sub(r"\\(.)", r"\1", raw[1:-1]) if raw.startswith('"') else raw
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise InvalidInput(f"{where} is one of {', '.join(get_args(kind))}, not {text!r}")
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise InvalidInput(f"{where} is true or false, not {text!r}")
        return text == "true"
    if kind is DType:
        return parse_dtype(text)
    try:
        return kind.parse(text) if hasattr(kind, "parse") else kind(text)
    except InvalidInput as e:
        raise InvalidInput(f"{where}: {e}") from e
    except ValueError as e:
        raise InvalidInput(f"{where} takes {kind.__name__}, not {text!r}") from e


def show_option(value: Any) -> str:
    """An option's value as text that :func:`parse_passes` reads back."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value) if isinstance(value, float) else str(value)
    if text and re.fullmatch(r'[^\s,{}"]+', text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


__all__ = ["parse_pass", "parse_passes", "show_option"]
