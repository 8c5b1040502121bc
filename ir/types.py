"""Tensor types: number format, shape, sparsity encoding. Small frozen values that print and parse."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np

from bitwright.ir.errors import InvalidInput

Kind = Literal["float", "int", "uint", "bool", "ternary", "bipolar"]
Dim = int | str
"""A static size, or a named symbol with an optional factor: ``"b"``, ``"12*b"``, ``"b*s"``."""

_IEEE = {"f64": (11, 52), "f32": (8, 23), "f16": (5, 10), "bf16": (8, 7)}


@dataclass(frozen=True, slots=True)
class DType:
    """A number format: IEEE and small floats, integers of 1 to 64 bits, bool, ternary {-1,0,1}, bipolar {-1,1}.

    >>> str(parse_dtype("f4m3")), str(parse_dtype("s4")), parse_dtype("u8").hi
    ('f4m3', 's4', 255)
    """

    kind: Kind
    bits: int
    exponent: int = 0
    mantissa: int = 0
    bias: int | None = None

    def __str__(self) -> str:
        if self.kind == "int":
            return f"s{self.bits}"
        if self.kind == "uint":
            return f"u{self.bits}"
        if self.kind == "float":
            for name, em in _IEEE.items():
                if em == (self.exponent, self.mantissa) and self.bias is None:
                    return name
            return f"f{self.exponent}m{self.mantissa}" + (f"b{self.bias}" if self.bias is not None else "")
        return self.kind

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_small_float(self) -> bool:
        """True for floats of ``ir/small_float.py``: no NaN, no infinities, no subnormals; held in f32."""
        return self.kind == "float" and (self.bias is not None or (self.exponent, self.mantissa) not in _IEEE.values())

    @property
    def is_integer(self) -> bool:
        """True for every integer-valued format, ternary and bipolar included, bool excluded."""
        return self.kind in ("int", "uint", "ternary", "bipolar")

    @property
    def lo(self) -> int:
        """Smallest integer value (integer formats and bool only)."""
        return {"int": -(1 << (self.bits - 1)), "ternary": -1, "bipolar": -1}.get(self.kind, 0)

    @property
    def hi(self) -> int:
        """Largest integer value (integer formats and bool only)."""
        return {"int": (1 << (self.bits - 1)) - 1, "uint": (1 << self.bits) - 1}.get(self.kind, 1)

    @property
    def numpy(self) -> np.dtype[Any]:
        """The array format that holds values of this type (sub-byte integers in a byte, small floats in f32)."""
        name = str(self)
        if name == "bf16":
            bf16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return bf16
        if self.kind == "float":
            return np.dtype({"f64": "float64", "f16": "float16"}.get(name, "float32"))
        if self.kind == "bool":
            return np.dtype("bool")
        width = next(w for w in (8, 16, 32, 64) if self.bits <= w)
        return np.dtype(f"{'u' if self.kind == 'uint' else ''}int{width}")


def integer(bits: int, signed: bool = True) -> DType:
    """The integer format of ``bits`` bits."""
    if not 1 <= bits <= 64:
        raise InvalidInput(f"an integer format has 1 to 64 bits, not {bits}")
    return DType("int" if signed else "uint", bits)


def small_float(exponent: int, mantissa: int, bias: int | None = None) -> DType:
    """A float of one sign bit, ``exponent`` and ``mantissa`` bits; ``bias`` None means 2^(e-1)-1."""
    return DType("float", 1 + exponent + mantissa, exponent, mantissa, bias)


F64, F32, F16, BF16 = (small_float(*_IEEE[n]) for n in ("f64", "f32", "f16", "bf16"))
BOOL, TERNARY, BIPOLAR = DType("bool", 1), DType("ternary", 2), DType("bipolar", 1)
S8, S16, S32, S64 = (integer(n) for n in (8, 16, 32, 64))
U8, U16, U32, U64 = (integer(n, signed=False) for n in (8, 16, 32, 64))

_NAMED = {str(t): t for t in (F64, F32, F16, BF16, BOOL, TERNARY, BIPOLAR)}


def parse_dtype(text: str) -> DType:
    """Parse a format name; raises :class:`InvalidInput` when it is none."""
    if text in _NAMED:
        return _NAMED[text]
    if m := re.fullmatch(r"([su])(\d+)", text):
        return integer(int(m[2]), m[1] == "s")
    if m := re.fullmatch(r"f(\d+)m(\d+)(?:b(-?\d+))?", text):
        return small_float(int(m[1]), int(m[2]), int(m[3]) if m[3] else None)
    raise InvalidInput(f"{text!r} is not a number format (f32, bf16, f4m3, s8, u4, ternary, ...)")


def dtype_of(dtype: object) -> DType:
    """The format of a NumPy dtype; raises :class:`InvalidInput` for one bitwright has no name for."""
    d = np.dtype(dtype)  # type: ignore[call-overload]
    if d == np.dtype(ml_dtypes.bfloat16):
        return BF16
    if d.kind == "b":
        return BOOL
    if d.kind in "iu":
        return integer(8 * d.itemsize, d.kind == "i")
    if d.kind == "f" and d.itemsize in (2, 4, 8):
        return {2: F16, 4: F32, 8: F64}[d.itemsize]
    raise InvalidInput(f"no number format for dtype {d}")


@dataclass(frozen=True, slots=True)
class NM:
    """Keep ``keep`` of every ``group`` along ``axis`` (always keep:group, never zeros:group).

    ``shared`` outputs carry one pattern; ``block`` consecutive elements along the axis are kept or dropped
    together, and groups then count blocks. ``transposable``: the mask is valid along the other axis too.
    """

    keep: int
    group: int
    axis: int
    shared: int = 1
    block: int = 1
    transposable: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.group <= 64:
            raise InvalidInput(f"N:M needs 1 <= keep <= group <= 64, got {self.keep}:{self.group}")
        if self.shared < 1 or self.block < 1:
            raise InvalidInput(f"shared and block are at least 1, not {self.shared} and {self.block}")

    def __str__(self) -> str:
        parts = [f"{self.keep}:{self.group}", f"axis={self.axis}"]
        parts += [f"shared={self.shared}"] if self.shared != 1 else []
        parts += [f"block={self.block}"] if self.block != 1 else []
        parts += ["transposable"] if self.transposable else []
        return f"nm<{', '.join(parts)}>"

    @property
    def density(self) -> float:
        return self.keep / self.group

    def within(self, keep: int, group: int) -> bool:
        """Whether weights of this pattern have at most ``keep`` values in every ``group`` consecutive ones.

        >>> [NM(k, g, 1).within(2, 4) for k, g in ((2, 4), (1, 4), (2, 8), (4, 8), (1, 2))]
        [True, True, True, False, True]
        """
        if self.block != 1:
            return False
        if self.group % group == 0:
            return self.keep <= keep
        return group % self.group == 0 and self.keep * (group // self.group) <= keep


@dataclass(frozen=True, slots=True)
class Block:
    """Non-zeros come in blocks of ``rows`` x ``cols``."""

    rows: int
    cols: int

    def __str__(self) -> str:
        return f"block<{self.rows}x{self.cols}>"


@dataclass(frozen=True, slots=True)
class Unstructured:
    """At most ``count`` non-zeros in every ``per`` elements along ``axis``; count 0: no fixed bound, but of all blocks
    at most the share ``kept``.

    A convolution's weights [out, in, *kernel] have their runs along the inputs (axis 1) of each tap. ``block``
    consecutive elements are kept or dropped together, and count and per then count blocks. A shorter last run
    holds its proportional share, rounded up.
    """

    count: int = 0
    per: int = 0
    axis: int = -1
    block: int = 1
    kept: float = 1.0

    def __post_init__(self) -> None:
        if not (1 <= self.count <= self.per or self.count == self.per == 0):
            raise InvalidInput(f"a fixed count needs 1 <= count <= per, got {self.count} per {self.per}")
        if not 0.0 <= self.kept <= 1.0 or (self.count and self.kept != 1.0):
            raise InvalidInput(f"kept is the share of all blocks without a fixed count, not {self.kept}")
        if self.block < 1:
            raise InvalidInput(f"block is at least 1, not {self.block}")

    def __str__(self) -> str:
        parts = [f"{self.count} per {self.per}"]
        parts += [f"axis={self.axis}"] if self.axis != -1 else []
        parts += [f"block={self.block}"] if self.block != 1 else []
        parts += [f"kept={self.kept!r}"] if self.kept != 1.0 else []
        return f"unstructured<{', '.join(parts)}>"

    @property
    def density(self) -> float:
        return self.count / self.per if self.per else self.kept


@dataclass(frozen=True, slots=True)
class Codebook:
    """Values come from a table of ``entries`` entries."""

    entries: int

    def __str__(self) -> str:
        return f"codebook<{self.entries}>"


Encoding = NM | Block | Unstructured | Codebook


def parse_encoding(text: str) -> Encoding:
    """Parse ``nm<2:4, axis=1>`` and the other encodings; raises :class:`InvalidInput`.

    >>> str(parse_encoding("nm<2:4, axis=1, shared=4>"))
    'nm<2:4, axis=1, shared=4>'
    """
    if m := re.fullmatch(r"nm<(\d+):(\d+), *axis=(-?\d+)((?:, *\w+(?:=\d+)?)*)>", text):
        options: dict[str, int | bool] = {}
        for part in filter(None, (p.strip() for p in m[4].split(","))):
            key, _, value = part.partition("=")
            if key not in ("shared", "block", "transposable"):
                raise InvalidInput(f"unknown N:M option {key!r} in {text!r}")
            options[key] = int(value) if value else True
        return NM(int(m[1]), int(m[2]), int(m[3]), **options)  # type: ignore[arg-type]
    if m := re.fullmatch(r"block<(\d+)x(\d+)>", text):
        return Block(int(m[1]), int(m[2]))
    if m := re.fullmatch(
        r"unstructured<(\d+) per (\d+)(?:, *axis=(-?\d+))?(?:, *block=(\d+))?(?:, *kept=([\d.e-]+))?>", text
    ):
        return Unstructured(int(m[1]), int(m[2]), int(m[3] or -1), int(m[4] or 1), float(m[5] or 1.0))
    if m := re.fullmatch(r"codebook<(\d+)>", text):
        return Codebook(int(m[1]))
    raise InvalidInput(f"{text!r} is not an encoding (nm<2:4, axis=1>, block<4x4>, unstructured<2 per 8>, ...)")


@dataclass(frozen=True, slots=True)
class TensorType:
    """Number format, shape and (for weights) the sparsity encoding.

    >>> str(TensorType(S8, ("b", 768), None))
    's8[b, 768]'
    """

    dtype: DType
    shape: tuple[Dim, ...]
    encoding: Encoding | None = None

    def __str__(self) -> str:
        text = f"{self.dtype}[{', '.join(map(str, self.shape))}]"
        return f"{text} {self.encoding}" if self.encoding else text

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_static(self) -> bool:
        return all(isinstance(d, int) for d in self.shape)

    @property
    def static_shape(self) -> tuple[int, ...]:
        """The shape as ints; raises :class:`InvalidInput` when a symbol is left."""
        if not self.is_static:
            raise InvalidInput(f"{self} has symbolic sizes; bind them first")
        return tuple(int(d) for d in self.shape)

    @property
    def size(self) -> int:
        """Number of elements of a static shape."""
        return int(np.prod(self.static_shape, dtype=np.int64))

    def with_dtype(self, dtype: DType) -> TensorType:
        return replace(self, dtype=dtype)

    def with_shape(self, shape: tuple[Dim, ...]) -> TensorType:
        return replace(self, shape=shape)

    def with_encoding(self, encoding: Encoding | None) -> TensorType:
        return replace(self, encoding=encoding)


def parse_type(text: str) -> TensorType:
    """Parse ``s8[b, 768] nm<2:4, axis=1>``; raises :class:`InvalidInput`."""
    m = re.fullmatch(r"\s*(\w+)\[([^\]]*)\]\s*(\S.*)?", text.rstrip())
    if not m:
        raise InvalidInput(f"{text!r} is not a tensor type such as f32[b, 768]")
    dims = tuple(parse_dim(d.strip()) for d in m[2].split(",") if d.strip())
    return TensorType(parse_dtype(m[1]), dims, parse_encoding(m[3].strip()) if m[3] else None)


def parse_dim(text: str) -> Dim:
    """Parse one shape entry: a size or a product of an optional factor and symbols."""
    if re.fullmatch(r"\d+", text):
        return int(text)
    if re.fullmatch(r"(?:\d+\*)?[A-Za-z_]\w*(?:\*[A-Za-z_]\w*)*", text):
        return text
    raise InvalidInput(f"{text!r} is not a shape entry")


def symbols_of(dim: Dim) -> tuple[str, ...]:
    """The symbols in a shape entry: ``"12*b"`` has ``("b",)``."""
    return () if isinstance(dim, int) else tuple(p for p in dim.split("*") if not p.isdigit())


def bind_dim(dim: Dim, sizes: dict[str, int]) -> Dim:
    """Replace symbols by sizes; a symbol that ``sizes`` lacks stays.

    >>> bind_dim("12*b", {"b": 2}), bind_dim("b*s", {"s": 3}), bind_dim("b", {})
    (24, '3*b', 'b')
    """
    if isinstance(dim, int):
        return dim
    factor, rest = 1, []
    for part in dim.split("*"):
        if part.isdigit():
            factor *= int(part)
        elif part in sizes:
            factor *= sizes[part]
        else:
            rest.append(part)
    if not rest:
        return factor
    return "*".join(([str(factor)] if factor != 1 else []) + rest)
