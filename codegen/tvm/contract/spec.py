"""What a contraction is: element types, geometry, sparsity; and the knobs of the loop nest that computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from bitwright.ir.errors import InvalidInput
from bitwright.ir.target import Isa as Isa
from bitwright.ir.types import BF16, F32, NM, S8, S32, U8, U16, DType

Element = Literal["u8s8", "f32", "bf16"]
Right = Literal["constant", "kn", "nk"]
ISAS: tuple[Isa, ...] = ("avx512-vnni", "avx-vnni", "avx2", "portable")
"""The levels of x86-64."""
NEON: tuple[Isa, ...] = ("neon-i8mm", "neon-dot")
LANES: dict[Isa, int] = {isa: 16 if isa == "avx512-vnni" else 4 if isa in NEON else 8 for isa in get_args(Isa)}
"""Accumulators (32 bits) per vector of a processor."""


def _positive(what: object, **sizes: int) -> None:
    bad = {k: v for k, v in sizes.items() if v < 1}
    if bad:
        raise InvalidInput(f"{type(what).__name__} sizes must be at least 1: {bad}")


@dataclass(frozen=True, slots=True)
class Matrix:
    """``batch`` independent products of [rows, depth] by [depth, cols].

    With a constant right operand (logical layout [cols, depth], as in a linear layer) batch is 1.
    """

    rows: int
    cols: int
    depth: int
    batch: int = 1

    def __post_init__(self) -> None:
        _positive(self, rows=self.rows, cols=self.cols, depth=self.depth, batch=self.batch)


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution over NHWC input ``[batch, height, width, channels]`` to NHWC output.

    ``padding`` is (top, left, bottom, right). Weights come as [outputs, channels/groups, *kernel].

    >>> Conv(1, 56, 56, 64, 64, (3, 3), padding=(1, 1, 1, 1)).output
    (56, 56)
    """

    batch: int
    height: int
    width: int
    channels: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1

    def __post_init__(self) -> None:
        _positive(self, batch=self.batch, height=self.height, width=self.width, channels=self.channels)
        _positive(self, outputs=self.outputs, groups=self.groups)
        for pair in (self.kernel, self.stride, self.dilation):
            _positive(self, first=pair[0], second=pair[1])
        if min(self.padding) < 0:
            raise InvalidInput(f"negative padding {self.padding}")
        if self.channels % self.groups or self.outputs % self.groups:
            raise InvalidInput(f"{self.groups} groups do not divide {self.channels} and {self.outputs} channels")
        if min(self.output) < 1:
            raise InvalidInput(f"{self} has no output")

    @property
    def output(self) -> tuple[int, int]:
        """Output height and width."""
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        top, left, bottom, right = self.padding
        sizes = (self.height + top + bottom, self.width + left + right)
        h, w = ((n - s) // t + 1 for n, s, t in zip(sizes, spans, self.stride, strict=True))
        return h, w

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.channels == self.outputs


@dataclass(frozen=True, slots=True)
class ContractSpec:
    """One contraction. The accumulator is s32 for ``u8s8`` and f32 for ``f32`` and ``bf16`` (read as 16-bit words).

    ``init``: accumulators start from a packed per-output constant (zero-point correction, or a bias).
    ``pad_value``: the activation that stands outside the image (the zero point of ``u8s8``).
    ``right``: ``constant`` packed weights, or a run-time operand of layout [K, N] (``kn``) or [N, K] (``nk``).
    ``x_hi``: the largest activation of ``u8s8``, padding included (formats below 8 bits are kept one to a byte).
    """

    element: Element
    geometry: Matrix | Conv
    pattern: NM | None = None
    init: bool = False
    pad_value: int = 0
    right: Right = "constant"
    x_hi: int = U8.hi

    @property
    def input_dtype(self) -> DType:
        return {"u8s8": U8, "bf16": U16}.get(self.element, F32)

    @property
    def operand(self) -> DType:
        """The format of the activations' values (as a target lists it)."""
        return BF16 if self.element == "bf16" else self.input_dtype

    @property
    def weight_dtype(self) -> DType:
        return {"u8s8": S8, "bf16": U16}.get(self.element, F32)

    @property
    def acc_dtype(self) -> DType:
        return S32 if self.element == "u8s8" else F32

    @property
    def rows(self) -> int:
        """Rows of the flattened output, all batches."""
        g = self.geometry
        if isinstance(g, Matrix):
            return g.batch * g.rows
        return g.batch * g.output[0] * g.output[1]

    @property
    def cols(self) -> int:
        """Columns of the flattened output (all groups)."""
        return self.geometry.cols if isinstance(self.geometry, Matrix) else self.geometry.outputs

    @property
    def groups(self) -> int:
        return self.geometry.groups if isinstance(self.geometry, Conv) else 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates, zeros counted."""
        return self.rows * self.cols * self.depth

    @property
    def depth(self) -> int:
        """Length of one dense reduction."""
        g = self.geometry
        if isinstance(g, Matrix):
            return g.depth
        return g.kernel[0] * g.kernel[1] * g.channels // g.groups

    @property
    def input_elements(self) -> int:
        g = self.geometry
        if isinstance(g, Matrix):
            return g.batch * g.rows * g.depth
        return g.batch * g.height * g.width * g.channels

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Logical layout of the constant weights."""
        g = self.geometry
        if isinstance(g, Matrix):
            return (g.cols, g.depth)
        return (g.outputs, g.channels // g.groups, *g.kernel)

    @property
    def sparsity(self) -> tuple[int, int] | None:
        """(keep, group) of the pattern in elements along the reduction."""
        p = self.pattern
        return (p.keep * p.block, p.group * p.block) if p else None


@dataclass(frozen=True, slots=True)
class Knobs:
    """The register tile and how products are formed.

    ``rows`` x ``vectors`` accumulators; ``row_blocks``: tasks that share a weight panel; ``safe_pairs``: the
    weights are proven not to saturate pmaddubsw; ``compact``: pack byte indices in time on 256-bit vectors too
    (fewer bytes to stream, more instructions); ``prefetch``: while few rows pass over a weight panel, fetch the
    next one; ``spill``: sums are kept in 16 bits and added to the accumulators every so many blocks of the plan
    (0: every product is); ``bits``: what a packed 8-bit weight takes, 8, 4 or 2: unpacked in
    registers or, if ``panel``, into scratch once for all tiles of a task, which then read bytes.
    ``rows``, ``row_blocks``, ``prefetch`` and ``spill`` do not change the packed weights.
    """

    isa: Isa
    rows: int
    vectors: int
    row_blocks: int = 1
    safe_pairs: bool = False
    compact: bool = False
    prefetch: bool = False
    spill: int = 0
    bits: int = 8
    panel: bool = False

    @property
    def register_bits(self) -> int:
        """Bits of the weights that the microkernel reads."""
        return 8 if self.panel else self.bits


@dataclass(frozen=True, slots=True)
class KernelFunc:
    """A finished kernel: ``primfunc`` for the adapter, and what a caller must know."""

    primfunc: Any
    name: str
    tasks: int
    scratch_bytes: int
    param_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Runs:
    """The reduction as nested loops over contiguous runs of ``length`` activations.

    ``loops`` holds (count, distance in elements), outermost first; the order of runs is the order of packing.
    """

    length: int
    loops: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        n = 1
        for c, _ in self.loops:
            n *= c
        return n


@dataclass(frozen=True, slots=True)
class Image:
    """Where a convolution reads: the input itself, or its padded copy in scratch (``copied``)."""

    height: int
    width: int
    copied: bool


def image_of(conv: Conv) -> Image:
    """The read extent: padded when there is padding, otherwise the input as it is."""
    if not any(conv.padding):
        return Image(conv.height, conv.width, False)
    oh, ow = conv.output
    spans = [(k - 1) * d + 1 for k, d in zip(conv.kernel, conv.dilation, strict=True)]
    height, width = ((o - 1) * s + span for o, s, span in zip((oh, ow), conv.stride, spans, strict=True))
    return Image(height, width, True)


def runs_of(spec: ContractSpec) -> Runs:
    """Taps of the kernel as runs; neighbouring taps that are contiguous in memory become one run.

    >>> runs_of(ContractSpec("f32", Conv(1, 8, 8, 3, 4, (7, 7)))).length
    21
    """
    g = spec.geometry
    if isinstance(g, Matrix):
        return Runs(g.depth, ())
    per_group, pitch = g.channels // g.groups, image_of(g).width * g.channels
    across, down = (g.kernel[1], g.dilation[1] * g.channels), (g.kernel[0], g.dilation[0] * pitch)
    length = per_group
    if mergeable(spec):
        length, across = per_group * across[0], (1, 0)
        if down[1] == length:
            length, down = length * down[0], (1, 0)
    return Runs(length, tuple(loop for loop in (down, across) if loop[0] > 1))


def mergeable(spec: ContractSpec) -> bool:
    """Whether the taps of one kernel row form one contiguous run (and no N:M group spans two taps)."""
    g, sparsity = spec.geometry, spec.sparsity
    if isinstance(g, Matrix):
        return False
    whole_groups = sparsity is None or (g.channels // g.groups) % sparsity[1] == 0
    return g.groups == 1 and (g.dilation[1] == 1 or g.kernel[1] == 1) and whole_groups
