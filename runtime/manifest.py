"""What a compiled program says about itself: inputs, outputs, memory, processor features, versions."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import parse_dtype, symbols_of

SCHEMA_VERSION = 1
ABI_VERSION = 1
"""Version of the C interface (``bw_abi_version``) that this loader calls."""
_LIMIT = 1 << 44
Bytes = Annotated[int, Field(ge=0, le=_LIMIT)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Frozen):
    """An input or output: its name, number format (``f32``, ``s8``, ...) and shape.

    At most the first entry is symbolic: the program's batch symbol, or a multiple of it (``"12*b"``).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def symbolic(self) -> bool:
        return any(isinstance(d, str) for d in self.shape)

    @property
    def factor(self) -> int:
        """Leading size per row of the batch; 0 for a static shape."""
        if not self.symbolic:
            return 0
        return math.prod(int(p) for p in str(self.shape[0]).split("*") if p.isdigit())

    @property
    def row_bytes(self) -> int:
        """Bytes per row of the batch; 0 for a static shape."""
        return self.factor * math.prod(int(d) for d in self.shape[1:]) * self.itemsize

    @property
    def itemsize(self) -> int:
        return int(parse_dtype(self.dtype).numpy.itemsize)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


class Result(_Frozen):
    """Where a step leaves its first result, and which value of the captured model it stands for.

    ``space`` arena or output (number ``index``), ``offset`` in bytes. ``reference``: the value's name in the
    captured graph, empty when it has none. Codes mean (code - zero) * scale when ``scale`` is given;
    ``last``: the value is laid out channels last, the reference channels first.
    """

    space: str
    index: int = 0
    offset: Bytes = 0
    dtype: str = "f32"
    shape: tuple[int, ...] = ()
    reference: str = ""
    scale: float | None = None
    zero: int = 0
    last: bool = False


class StepRow(_Frozen):
    """One step of the program in the order ``bw_profile`` counts; ``rows`` of the chunk it belongs to."""

    label: str
    kernel: str
    rows: int = 1
    result: Result | None = None


class Pointer(_Frozen):
    """An argument of a launch: ``offset`` bytes into a space; ``index`` numbers inputs and outputs."""

    space: Literal["input", "output", "arena", "weight", "scratch"]
    index: Annotated[int, Field(ge=0)] = 0
    offset: Bytes = 0


class Launch(_Frozen):
    """One launch of a GPU program: a kernel of its bundle; or, where ``nbytes`` is not 0, a copy of so many bytes from
    the second argument to the first."""

    kernel: str
    grid: tuple[int, int, int] = (1, 1, 1)
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    shared_bytes: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    args: tuple[Pointer, ...] = ()
    nbytes: Bytes = 0

    @model_validator(mode="after")
    def _possible(self) -> Launch:
        most = ((1 << 31) - 1, 65535, 65535)
        if not all(1 <= n <= m for n, m in zip(self.grid, most, strict=True)):
            raise ValueError(f"{self.kernel}: no device takes {self.grid} blocks")
        if self.nbytes and len(self.args) != 2:
            raise ValueError(f"{self.kernel}: a copy has two arguments, not {len(self.args)}")
        return self


class Stored(_Frozen):
    """Where and how the weights of a contraction lie among the program's weights.

    ``layout``: ``plain``, or the kernel template that packed them, with its decisions in ``config``.
    ``places``: (offset in bytes, elements, element type) of each array, in the order of packing.
    """

    layout: str
    places: tuple[tuple[Bytes, Bytes, str], ...] = ()
    config: dict[str, Any] = Field(default_factory=dict)


class Certificate(_Frozen):
    """How wide the accumulator of one integer contraction must be, and the input that shows it.

    Sums are over k of (x - ``x_zero``) * (w - ``w_zero``). ``kind`` is what the proof rests on: the number formats
    (``type``), the weights, the weights and narrower proven input bounds ``x``, or codes that calibration met
    (``calibrated``, no proof). ``range``: of the final sum, ``bits`` hold it; ``partial_range``: of the sum of any of
    the terms, in any order; ``register_range``: of a register that starts from -x_zero * sum(w) and adds products of
    codes in any order, as the kernels do; ``partial_bits`` hold the last two. ``type_bits``, ``weight_bits``,
    ``range_bits``: the same width from less and from more knowledge. ``on_overflow``: a register that wraps needs room
    for the final sum only. ``headroom``: unused bits of ``acc_bits``, partial sums included. ``observed``: codes that
    calibration met and the width for them, beside the proof. ``safe_terms``: products of any order that always fit.

    ``rows``: the weight rows (outputs) that reach ``range``, lowest first. ``low`` and ``high``: one bit for each term
    of that row, first bit highest, base64: the input takes its upper bound where the bit is set, else its lower one.
    Without weights each term of the sum takes the pair ``low_pair`` or ``high_pair`` of (x, w). ``digest``: of the
    weights as integers in logical order. ``step``: label of the program's step that computes it.
    """

    value: str
    step: str
    kind: Literal["type", "weights", "weights+ranges", "calibrated"]
    acc_bits: int
    on_overflow: Literal["wrap", "saturate"] = "wrap"
    x: tuple[int, int]
    x_zero: int = 0
    w: tuple[int, int]
    w_zero: int = 0
    terms: int | None = None
    range: tuple[int, int] = (0, 0)
    partial_range: tuple[int, int] = (0, 0)
    register_range: tuple[int, int] | None = None
    bits: int = 0
    partial_bits: int = 0
    type_bits: int = 0
    weight_bits: int | None = None
    range_bits: int | None = None
    observed: tuple[int, int] | None = None
    observed_bits: int | None = None
    headroom: int = 0
    safe_terms: int | None = None
    rows: tuple[int, int] | None = None
    low: str = ""
    high: str = ""
    low_pair: tuple[int, int] | None = None
    high_pair: tuple[int, int] | None = None
    digest: str = ""
    stored: Stored | None = None

    @property
    def needs(self) -> int:
        """Bits that the kernel's register needs."""
        return self.bits if self.on_overflow == "wrap" else self.partial_bits

    def __str__(self) -> str:
        if self.terms is None:
            return (
                f"{self.safe_terms} terms fit {self.acc_bits} bits" if self.safe_terms else "any number of terms fits"
            )
        seen = f", {self.observed_bits} seen" if self.observed_bits is not None else ""
        return f"needs {self.needs} of {self.acc_bits} bits ({self.kind}{seen})"


class Manifest(_Frozen):
    """Everything the loader needs to know. Checks itself: raises pydantic's ValidationError.

    ``batch``: the batch symbol, empty when all shapes are static. ``chunks``: the row counts the program has
    code for. ``input_alignment``: bytes the kernels want inputs aligned to (1: natural alignment of the
    elements). ``input_padding``: bytes the kernels may read behind an input. ``certificates``: one for each integer
    contraction. ``tuning``: the tuning record that each tuned layer's kernel was chosen by. ``device``: what runs it,
    empty for the processor; then ``launches`` are its steps and ``scratch_bytes`` are zero before the first of them.
    """

    schema_version: int = SCHEMA_VERSION
    name: str = "program"
    target: str = ""
    arch: str = ""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    batch: str = ""
    chunks: tuple[int, ...] = (1,)
    arena_bytes: Bytes = 0
    scratch_bytes: Bytes = 0
    weights_bytes: Bytes = 0
    input_alignment: Annotated[int, Field(ge=1, le=64)] = 1
    input_padding: Annotated[int, Field(ge=0, le=4096)] = 64
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    features: tuple[str, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    steps: tuple[StepRow, ...] = ()
    certificates: tuple[Certificate, ...] = ()
    tuning: dict[str, str] = Field(default_factory=dict)
    device: Literal["", "cuda"] = ""
    launches: tuple[Launch, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [t.name for t in self.inputs]
        if len(set(names)) != len(names):
            raise ValueError("two inputs have the same name")
        if not self.chunks or min(self.chunks) < 1 or max(self.chunks) > _LIMIT:
            raise ValueError(f"chunks {self.chunks} are not row counts")
        if len(set(self.chunks)) != len(self.chunks) or (not self.batch and self.chunks != (1,)):
            raise ValueError(f"chunks {self.chunks} do not fit batch symbol {self.batch!r}")
        if self.input_alignment & (self.input_alignment - 1):
            raise ValueError(f"input alignment {self.input_alignment} is not a power of two")
        for tensor in (*self.inputs, *self.outputs):
            _check_tensor(tensor, self.batch)
        if self.batch and not any(t.symbolic for t in self.inputs):
            raise ValueError(f"no input has the batch symbol {self.batch!r}")
        _check_launches(self)
        return self


def _check_launches(m: Manifest) -> None:
    if bool(m.device) != bool(m.launches) and m.steps:
        raise ValueError(f"device {m.device!r} with {len(m.launches)} launches")
    sizes = {"arena": m.arena_bytes, "weight": m.weights_bytes, "scratch": m.scratch_bytes}
    ports = {"input": m.inputs, "output": m.outputs}
    for launch in m.launches:
        for p in launch.args:
            room = sizes.get(p.space, _LIMIT)
            if (p.space in ports and p.index >= len(ports[p.space])) or p.offset > room:
                raise ValueError(f"{launch.kernel}: an argument lies outside of its {p.space}")


def _check_tensor(tensor: TensorSpec, batch: str) -> None:
    try:
        parse_dtype(tensor.dtype)
    except InvalidInput as error:
        raise ValueError(f"{tensor.name}: {error}") from error
    for index, dim in enumerate(tensor.shape):
        if isinstance(dim, int):
            if not 0 <= dim <= _LIMIT:
                raise ValueError(f"{tensor.name}: size {dim}")
        elif index or symbols_of(dim) != (batch,) or not batch:
            raise ValueError(f"{tensor.name}: only the first size may depend on the batch, got {tensor.shape}")
    sizes = [d for d in tensor.shape if isinstance(d, int)]
    if math.prod(sizes) * max(1, tensor.factor) * tensor.itemsize > _LIMIT:
        raise ValueError(f"{tensor.name}: {tensor.shape} is too large")
    if tensor.symbolic and tensor.factor < 1:
        raise ValueError(f"{tensor.name}: {tensor.shape[0]!r} is always zero")


def parse_manifest(text: bytes) -> Manifest:
    """The manifest in UTF-8 JSON ``text``; raises :class:`InvalidInput`, for a newer schema saying so."""
    try:
        data = json.loads(text)
        version = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            maker = str(data.get("versions", {}).get("bitwright", "a newer bitwright"))
            raise InvalidInput(
                f"the program was written by bitwright {maker} with schema {version};"
                f" this one reads up to schema {SCHEMA_VERSION}: upgrade bitwright or compile the model again"
            )
        return Manifest.model_validate(data)
    except InvalidInput:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "manifest"
        raise InvalidInput(f"the manifest is wrong: {place}: {first['msg']}") from error
    except (ValueError, RecursionError, AttributeError) as error:
        raise InvalidInput(f"the manifest is not readable: {error}") from error
