"""What a target is: a frozen value that declares abilities and costs and never asks the machine.

Built-in values live in ``codegen/targets``; ``codegen.targets.host()`` *returns* one for the machine at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, comb
from typing import Literal

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import NM, S8, U8, DType, Encoding, Unstructured

Isa = Literal["avx512-vnni", "avx-vnni", "avx2", "portable", "neon-i8mm", "neon-dot", "vector", "cuda"]
"""``portable``: x86-64 as it began. ``vector``: whatever LLVM makes of vectors, fused multiply-add included.
``cuda``: CUDA C++ for the architecture in ``mcpu``."""


def in_bytes(dtype: DType) -> DType:
    """What a kernel reads values of this format as: u8 or s8 if they are kept one to a byte, else the format itself.

    >>> from bitwright.ir.types import parse_dtype
    >>> str(in_bytes(parse_dtype("u4"))), str(in_bytes(parse_dtype("ternary"))), str(in_bytes(parse_dtype("s16")))
    ('u8', 's8', 's16')
    """
    return {U8.numpy: U8, S8.numpy: S8}.get(dtype.numpy, dtype) if dtype.is_integer else dtype


def unit_share(encoding: NM | Unstructured, quad: int) -> float:
    """The share of units of ``quad`` consecutive elements that hold a non-zero, if non-zeros lie anywhere allowed.

    >>> unit_share(NM(1, 4, 1, block=4), 4), unit_share(NM(1, 8, 1), 4), unit_share(Unstructured(1, 10, 1), 1)
    (0.25, 0.5, 0.1)
    """
    if encoding.block % quad == 0:
        return encoding.density
    blocks = ceil(quad / encoding.block)
    if isinstance(encoding, Unstructured):
        return 1.0 - (1.0 - encoding.density) ** blocks
    empty = comb(encoding.group - blocks, encoding.keep) if encoding.group >= blocks else 0
    return 1.0 - empty / comb(encoding.group, encoding.keep)


@dataclass(frozen=True, slots=True)
class Rate:
    """Peak multiply-accumulate speed of one operand pair: operations (2 per MAC) per second and core.

    ``terms`` above 1: ``acc`` holds partial sums only, of at least so many products, that are added to s32 ones.
    """

    x: DType
    w: DType
    acc: DType
    ops_per_second: float
    terms: int = 1


@dataclass(frozen=True, slots=True)
class SparseRate:
    """Speed of an N:M contraction over the dense one of the same operands; below 1 it is slower.

    ``shared``: of kernels that need one pattern for so many outputs (1: every output has its own).
    """

    x: DType
    keep: int
    group: int
    gain: float
    shared: int = 1


@dataclass(frozen=True, slots=True)
class Costs:
    """What kernels take beside their peaks, for the cost model. Steps are vector operations of 32 bits an element.

    Fitted to measured layers by ``benchmarks/predictions.py --fit``; of one Zen 5 core unless a target says otherwise.
    """

    linear: float = 1.0
    """Share of the peak that the inner loop of a product reaches, of integers and floats."""
    conv: float = 0.97
    """The same of a convolution."""
    attention: float = 0.89
    """The same of both products of attention, the exponentials between them included."""
    depthwise: float = 0.91
    """Steps of a product of a depthwise convolution of floats."""
    depthwise_int: float = 0.56
    """The same of 8-bit integers."""
    tile: float = 8.3e-10
    """Seconds of a tile (4 rows, 4 vectors of outputs) beside its products: clearing, loop, writing."""
    few_rows: float = 0.75
    """Share of its speed that a product of one row reaches while its weights come from the nearest cache."""
    cold: float = 0.51
    """Share of the time of moving weights that products do not hide."""
    moved: float = 0.58
    """The same of activations, moved through the last-level cache or one before it."""
    near: float = 2.5
    """Speed of the second-level cache over that of the last one."""
    cheap: float = 0.12
    """Steps of an addition, a maximum and such."""
    convert: float = 1.0
    """Steps of quantizing, dequantizing and requantizing."""
    slow: float = 9.7
    """Steps of exp, tanh, GELU and their like."""
    softmax: float = 12.0
    """Measured alone (0.19 ns a value), as no model of the fit has one outside attention."""
    norm: float = 7.1
    pool: float = 0.3
    """Steps of every value that a window reads."""
    reduce: float = 0.88
    move: float = 4.0
    """Steps of a value that is only moved."""
    generic: float = 30.0
    """Steps of one scalar operation of kernels that are not vectorised."""


@dataclass(frozen=True, slots=True)
class LanesRate:
    """Time over the dense contraction's of one whose activations lie in lanes: ``slope`` times the share of units
    (32 bits of activations) that weights are stored for, plus ``fixed``. ``shared`` outputs store the same units."""

    x: DType
    shared: int
    slope: float
    fixed: float


@dataclass(frozen=True)
class Target:
    """A machine as the passes and the code generator see it. Costs are for one core.

    ``mcpu``: the processor by LLVM's name; for other machines than x86-64 LLVM's options instead, as in
    ``-mtriple=aarch64-linux-gnu -mcpu=generic -mattr=+v8.6a,+i8mm``.
    bandwidths in bytes per second (``cache``: of the last level); ``rates`` for dense contractions, ``sparse`` for
    N:M ones; ``activation`` is the 8-bit format its integer contractions take on the left.
    """

    name: str
    kind: Literal["cpu", "gpu", "device"]
    isa: Isa
    mcpu: str
    features: tuple[str, ...]
    vector_bits: int
    vector_registers: int
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    cores: int
    memory_bandwidth: float
    cache_bandwidth: float
    vector_ops_per_second: float
    launch_seconds: float
    rates: tuple[Rate, ...]
    sparse: tuple[SparseRate, ...]
    activation: DType
    source: str
    """Where the numbers come from."""
    costs: Costs = Costs()
    lanes: tuple[LanesRate, ...] = ()

    def __post_init__(self) -> None:
        if self.vector_bits not in (64, 128, 256, 512):
            raise InvalidInput(f"target {self.name}: vector_bits must be 64, 128, 256 or 512, not {self.vector_bits}")
        if not self.rates:
            raise InvalidInput(f"target {self.name}: at least one rate is needed")
        if len({(r.x, r.w, r.acc, r.terms) for r in self.rates}) != len(self.rates):
            raise InvalidInput(f"target {self.name}: two rates for the same operands")
        for s in self.sparse:
            if not 0 < s.gain <= s.group / s.keep * 1.5:
                raise InvalidInput(f"target {self.name}: {s.keep}:{s.group} cannot gain {s.gain} times")

    @property
    def arch(self) -> str:
        """The architecture as ``uname -m`` says it, and as artifacts do; of a GPU that of its machine code."""
        if self.kind == "gpu":
            return self.mcpu
        return self.mcpu.partition("-mtriple=")[2].partition("-")[0] or "x86_64"

    def rate(self, x: DType, w: DType, partial: DType | None = None, terms: int = 0) -> float:
        """Operations per second of a dense contraction; 0.0 when the target has none for these operands. Formats
        below 8 bits count as the 8-bit ones that hold them.

        ``partial`` and ``terms``: the format of partial sums and how many products they may take.
        """
        same = [r for r in self.rates if (r.x, r.w) == (in_bytes(x), in_bytes(w))]
        full = max((r.ops_per_second for r in same if r.terms == 1), default=0.0)
        return max((r.ops_per_second for r in same if r.acc == partial and 1 < r.terms <= terms), default=full)

    def sparse_gain(self, x: DType, pattern: NM) -> float:
        """Expected speed over dense of a pattern, counted in elements as the kernels see it (blocks multiplied out).

        A pattern that is not declared is expected to reach the share of its ideal group/keep that a declared one of
        this format reaches: of the next larger group, since wider selections are slower or impossible. 0.0 when no
        declared group is as large. Of patterns that outputs share, the fastest kernel that they allow counts.
        """
        if self.kind == "gpu":  # its instructions take what they declare, and every pattern that obeys it
            fits = (s.gain for s in self.sparse if s.x == in_bytes(x) and pattern.within(s.keep, s.group))
            return max(fits, default=0.0)
        keep, group = pattern.keep * pattern.block, pattern.group * pattern.block
        same = [s for s in self.sparse if s.x == in_bytes(x) and s.group >= group and pattern.shared % s.shared == 0]
        gains = []
        for shared in {s.shared for s in same}:
            near = min((s for s in same if s.shared == shared), key=lambda s: (s.group, abs(s.keep - keep)))
            gains.append(near.gain * near.keep / near.group * group / keep)
        return max(gains, default=0.0)

    def lanes_gain(self, x: DType, share: float, shared: int = 1) -> float:
        """Expected speed over dense of weights of which this ``share`` of units is stored, the same ones for
        ``shared`` outputs; 0.0 when the target has no kernel with activations in lanes for the format."""
        fits = [r for r in self.lanes if r.x == in_bytes(x) and shared % r.shared == 0]
        return max((1.0 / (r.slope * share + r.fixed) for r in fits), default=0.0)

    def gain(self, x: DType, encoding: Encoding | None) -> float:
        """Expected speed over dense of the fastest kernel for weights of this encoding; 0.0 without one."""
        if not isinstance(encoding, NM | Unstructured):
            return 0.0
        shared = encoding.shared if isinstance(encoding, NM) else 1
        lanes = self.lanes_gain(x, unit_share(encoding, 32 // in_bytes(x).bits), shared)
        return max(lanes, self.sparse_gain(x, encoding) if isinstance(encoding, NM) else 0.0)

    @property
    def fingerprint(self) -> str:
        """What tuning records and cached kernels are keyed by."""
        return f"{self.name}/{self.isa}/{self.mcpu}/{','.join(self.features)}"
