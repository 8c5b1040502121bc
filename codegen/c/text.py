"""Writing C: identifiers, types, literals, index arithmetic on text, and a block writer with scopes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import BOOL, F32, F64, S64, U32, U64, DType

Index = int | str
"""An index known while writing, or a C expression (``int32_t``; parenthesised when it is a sum)."""
Idx = tuple[Index, ...]
_KEYWORDS = frozenset(
    "auto break case char const continue default do double else enum extern float for goto if inline int long register "
    "restrict return short signed sizeof static struct switch typedef union unsigned void volatile while main".split()
)


def identifier(name: str, taken: set[str] | None = None) -> str:
    """A C identifier made of ``name``, not in ``taken`` (where it is entered).

    >>> identifier("/block.1/Conv"), identifier("3x"), identifier("for")
    ('block_1_Conv', 'v3x', 'v_for')
    """
    text = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "v"
    if text[0].isdigit():
        text = f"v{text}"
    if text in _KEYWORDS:
        text = f"v_{text}"
    base, n = text, 1
    while taken is not None and text in taken:
        n += 1
        text = f"{base}_{n}"
    if taken is not None:
        taken.add(text)
    return text


def memory_type(dtype: DType) -> str:
    """The C type of an element in memory; formats below 8 bits take a byte. Raises :class:`InvalidInput` for formats C
    does not have."""
    if dtype == BOOL:
        return "uint8_t"
    if dtype.is_integer:
        name = dtype.numpy.name
        return f"{name}_t"
    if dtype in (F32, F64):
        return "float" if dtype == F32 else "double"
    raise InvalidInput(f"C99 has no number format {dtype}")


def carried(dtype: DType) -> str:
    """The C type that single values of ``dtype`` are computed in: ``int32_t`` for everything it holds."""
    if dtype in (F32, F64):
        return memory_type(dtype)
    if dtype == U32:
        return "uint32_t"
    return memory_type(dtype) if dtype in (S64, U64) else "int32_t"


def literal(value: Any, dtype: DType) -> str:
    """A constant of the carried type of ``dtype``, exactly."""
    if dtype in (F32, F64):
        v = float(np.float32(value)) if dtype == F32 else float(value)
        if math.isinf(v) or math.isnan(v):
            big = "bw_infinity()" if math.isinf(v) else "bw_nan()"
            return f"(-{big})" if v < 0 else big
        text = (repr(v) if len(repr(v)) < 6 else v.hex()) + ("f" if dtype == F32 else "")
        return f"({text})" if text.startswith("-") else text
    return integer(int(value), carried(dtype))


def integer(value: int, ctype: str = "int32_t") -> str:
    """An integer literal of a C type; the smallest value of a type has no literal of its own.

    >>> integer(-5), integer(-(1 << 31)), integer(7, "int64_t")
    ('(-5)', '(-2147483647 - 1)', 'INT64_C(7)')
    """
    if ctype == "uint32_t":
        return f"{value}u"
    if ctype == "uint64_t":
        return f"UINT64_C({value})"
    if ctype == "int64_t":
        if value == -(1 << 63):
            return "(-INT64_C(9223372036854775807) - 1)"
        return f"INT64_C({value})" if value >= 0 else f"(-INT64_C({-value}))"
    if value == -(1 << 31):
        return "(-2147483647 - 1)"
    return str(value) if value >= 0 else f"({value})"


def table_type(values: np.ndarray[Any, Any]) -> str:
    """The smallest C type that holds every value of a constant table (flash is what a small machine lacks)."""
    if values.dtype.kind == "f":
        return memory_type(F32 if values.dtype == np.float32 else F64)
    lo, hi = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for bits in (8, 16, 32):
        if lo >= 0 and hi < 1 << bits:
            return f"uint{bits}_t"
        if -(1 << (bits - 1)) <= lo and hi < 1 << (bits - 1):
            return f"int{bits}_t"
    return "int64_t"


# --- index arithmetic ----------------------------------------------------------------------------------------


def plus(a: Index, b: Index) -> Index:
    """a + b.

    >>> plus(1, 2), plus("i", 0), plus("i", 3), plus("i", -1)
    (3, 'i', '(i + 3)', '(i - 1)')
    """
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if a == 0:
        return b
    if b == 0:
        return a
    if isinstance(b, int) and b < 0:
        return f"({a} - {-b})"
    return f"({a} + {b})"


def times(a: Index, b: int) -> Index:
    if isinstance(a, int):
        return a * b
    return 0 if b == 0 else a if b == 1 else f"{a} * {b}"


def over(a: Index, b: int) -> Index:
    """a / b for a >= 0."""
    return a // b if isinstance(a, int) else a if b == 1 else f"({a} / {b})"


def rest(a: Index, b: int) -> Index:
    """a % b for a >= 0."""
    return a % b if isinstance(a, int) else 0 if b == 1 else f"({a} % {b})"


def flatten(idx: Sequence[Index], shape: Sequence[int]) -> Index:
    """Row-major position of ``idx`` in ``shape``.

    >>> flatten(("i", 0, "j"), (2, 1, 3))
    '(i * 3 + j)'
    """
    stride, total = 1, 0
    terms: list[str] = []
    for i, n in zip(reversed(idx), reversed(shape), strict=True):
        if n != 1:
            t = times(i, stride)
            if isinstance(t, int):
                total += t
            else:
                terms.insert(0, t)
        stride *= n
    if not terms:
        return total
    text = " + ".join(terms) + (f" + {total}" if total else "")
    return text if len(terms) == 1 and not total and "*" not in text else f"({text})"


def unflatten(at: Index, shape: Sequence[int]) -> Idx:
    """The index of row-major position ``at``."""
    out: list[Index] = []
    real = [k for k, n in enumerate(shape) if n != 1]
    for k in reversed(range(len(shape))):
        if shape[k] == 1:
            out.append(0)
        else:
            out.append(at if k == real[0] else rest(at, shape[k]))
            at = over(at, shape[k])
    return tuple(reversed(out))


# --- blocks --------------------------------------------------------------------------------------------------


class Writer:
    """C statements with indentation, fresh names, and a memory of values per scope."""

    def __init__(self, indent: int = 1) -> None:
        self.lines: list[str] = []
        self.indent = indent
        self.count = 0
        self.scopes: list[dict[Any, str]] = [{}]

    def put(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    def name(self, hint: str = "t") -> str:
        self.count += 1
        return f"{hint}{self.count}"

    def let(self, ctype: str, expression: str, hint: str = "t") -> str:
        """A named value; literals and names stay what they are."""
        if re.fullmatch(r"[A-Za-z_]\w*|\(?-?[\d.]+u?\)?", expression):
            return expression
        name = self.name(hint)
        self.put(f"const {ctype} {name} = {expression};")
        return name

    def variable(self, ctype: str, start: str, hint: str = "s") -> str:
        name = self.name(hint)
        self.put(f"{ctype} {name} = {start};")
        return name

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.put(f"{head} {{")
        self.indent += 1
        self.scopes.append({})
        yield
        self.scopes.pop()
        self.indent -= 1
        self.put("}")

    @contextmanager
    def loop(self, end: int, hint: str = "i", step: int = 1) -> Iterator[Index]:
        """``for (i = 0; i < end; i += step)``; a single turn is no loop."""
        if 0 < end <= step:
            yield 0
            return
        i = self.name(hint)
        with self.block(f"for (int32_t {i} = 0; {i} < {end}; {f'{i} += {step}' if step > 1 else f'++{i}'})"):
            yield i

    def recall(self, key: Any) -> str | None:
        return next((s[key] for s in reversed(self.scopes) if key in s), None)

    def remember(self, key: Any, value: str) -> None:
        self.scopes[-1][key] = value
