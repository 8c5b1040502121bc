"""What runs with activations in lanes, and the tile and cut of the reduction to start from."""

from __future__ import annotations

from math import ceil
from typing import Any

from numpy.typing import NDArray

from bitwright.codegen.tuning.space import Knob, Point, Rule, Setting, Space
from bitwright.codegen.tvm.contract.spec import LANES, NEON, ContractSpec, Conv, Isa
from bitwright.codegen.tvm.lanes.emit import WIDE
from bitwright.codegen.tvm.lanes.packing import counts_of
from bitwright.codegen.tvm.lanes.spec import WORD, LanesKnobs, Shape, quad_of
from bitwright.ir.types import NM, Encoding, Unstructured

Array = NDArray[Any]
_VECTORS = {16: {1: 8, 2: 8, 4: 4}, 8: {1: 8, 2: 4, 4: 2}}
"""Vectors of rows per outputs that share entries, by lanes: a load serves as many products as registers allow."""
LANES_BYTES, SHARED_BYTES = 48 * 1024, 32 * 1024
"""Activations of a K block (measured with a first-level cache of 48 KiB). Outputs that share nothing read few of them
at a time and gain from fewer blocks; where others do not fit one block, they stream from smaller ones."""
SHORT_BYTES, SHORT_VECTORS, MOST_VECTORS = 32 * 1024, 4, 8
"""A reduction so short is not cut: fewer rows leave it in the first-level cache together with their sums."""
SUMS_BYTES = 256 * 1024
"""Sums of a block of outputs, which stay in the second-level cache."""
PARTS, FEWEST = 4, 256
"""Tasks a kernel should offer if that leaves each so many outputs."""
PADDING = 1.05
"""Entries a fixed count may waste."""


def refusal(spec: ContractSpec, isa: Isa) -> str:
    """Why no such kernel can be made, or the empty string."""
    g, lanes = spec.geometry, LANES[isa]
    if spec.right != "constant" or (not isinstance(g, Conv) and g.batch != 1):
        return "only constant weights have entries"
    if spec.groups != 1:
        return "grouped convolutions have short reductions"
    if isa in (*NEON, "vector"):
        return f"there are no kernels with activations in lanes for {isa}"
    if spec.element == "u8s8" and isa == "portable":
        return "portable code has no 8-bit products of four to a lane"
    quad, run = quad_of(spec), g.channels if isinstance(g, Conv) else g.depth
    if run % quad:
        return f"{run} channels are no multiple of {quad}"
    if spec.rows < lanes:
        return f"{spec.rows} rows do not fill the {lanes} lanes of a vector"
    largest = max(spec.input_elements, spec.rows * spec.cols, spec.cols * spec.depth)
    return f"an operand of {largest} elements is beyond 32-bit indices" if largest >= 1 << 30 else ""


def sharings(encoding: Encoding | None) -> tuple[int, ...]:
    """How many outputs may share entries under a pattern: of 1, 2 and 4 those that divide what it shares.

    >>> sharings(NM(1, 4, 1, shared=16)), sharings(NM(1, 4, 1))
    ((1, 2, 4), (1,))
    """
    shared = encoding.shared if isinstance(encoding, NM) else 1
    return tuple(n for n in (1, 2, 4) if shared % n == 0)


def filled(spec: ContractSpec, isa: Isa) -> float:
    """The share of lanes that hold a row."""
    lanes = LANES[isa]
    return spec.rows / (ceil(spec.rows / lanes) * lanes)


def default_knobs(
    spec: ContractSpec,
    isa: Isa,
    kept: Array,
    shared: int,
    encoding: Encoding | None = None,
    *,
    safe_pairs: bool = False,
    point: Point | None = None,
) -> LanesKnobs:
    """The tile to start from, for weights whose kept units (bool [groups of outputs, units]) are these.

    A fixed number of entries, if that wastes little, otherwise row pointers. ``shared`` is 1, 2 or 4. A ``point`` of
    :func:`knobs_of` sets the vectors, the bytes of a K block and the outputs of a task.
    """
    point, lanes, units = point or {}, LANES[isa], kept.shape[1]
    short = units * SHORT_VECTORS * lanes * WORD <= SHORT_BYTES
    most = min(_VECTORS[lanes][shared], SHORT_VECTORS if short else MOST_VECTORS)
    needed = ceil(spec.rows / lanes)
    vectors = int(point.get("vectors", ceil(needed / ceil(needed / most))))
    pitch = vectors * lanes * WORD
    near = int(point.get("near", near_bytes(units, pitch, shared)))
    block = _block(units, max(1, near // pitch), _period(encoding, quad_of(spec)))
    outputs = _outputs(spec.cols, pitch, ceil(needed / vectors), lanes * WIDE, block if block == units else 0)
    outputs = int(point.get("outputs", outputs))
    knobs = LanesKnobs(isa, vectors, shared, block, outputs, (), safe_pairs)
    counts = counts_of(kept, block)
    full = units // block
    most_full, most_last = (int(counts[:, part].max(initial=0)) for part in (slice(0, full), slice(full, None)))
    padded = (most_full * full + most_last) * len(kept)
    return (
        LanesKnobs(isa, vectors, shared, block, outputs, (most_full, most_last), safe_pairs)
        if padded <= PADDING * max(1, int(counts.sum()))
        else knobs
    )


def near_bytes(units: int, pitch: int, shared: int) -> int:
    """Bytes that the activations of a K block may take."""
    return LANES_BYTES if shared == 1 or units * pitch <= LANES_BYTES else SHARED_BYTES


def knobs_of(spec: ContractSpec, knobs: LanesKnobs, sharing: tuple[int, ...]) -> Space:
    """What may be tuned about a kernel that starts from ``knobs``: outputs that share entries, vectors of rows, outputs
    of a task, bytes of activations of a K block."""
    lanes, shape = LANES[knobs.isa], Shape(spec, knobs)
    step, most = lanes * WIDE, 8 if lanes == 4 * WIDE else 4
    needed = ceil(spec.rows / lanes)
    default: dict[str, Setting] = {
        "shared": knobs.shared, "vectors": knobs.vectors, "outputs": knobs.outputs,
        "near": near_bytes(shape.units, shape.pitch, knobs.shared),
    }  # fmt: skip
    outputs = sorted({knobs.outputs, *(min(n * step, ceil(spec.cols / step) * step) for n in (1, 2, 4, 8, 16))})
    listed = (
        Knob("shared", sharing), Knob("vectors", tuple(n for n in range(1, most + 1) if n <= needed)),
        Knob("outputs", tuple(outputs)), Knob("near", tuple(k * 1024 for k in (16, 24, 32, 48, 64, 96))),
    )  # fmt: skip
    registers = 2 * most

    def fits(point: Point) -> bool:
        return int(point["shared"]) * int(point["vectors"]) <= registers

    return Space(default, listed, (Rule(f"the sums take more than {registers} registers", fits),))


def _block(units: int, most: int, period: int) -> int:
    """Units of a K block: equal parts of at most ``most``, whole periods of the pattern."""
    if units <= most:
        return units
    if period > most:
        period = 1
    parts = ceil(units / (most // period * period))
    return ceil(units / parts / period) * period


def _period(encoding: Encoding | None, quad: int) -> int:
    """Units after which a pattern allows as many entries again."""
    if isinstance(encoding, NM):
        return max(1, encoding.group * encoding.block // quad)
    if isinstance(encoding, Unstructured) and encoding.per:
        return max(1, encoding.per * encoding.block // quad)
    return 1


def _outputs(cols: int, pitch: int, row_blocks: int, step: int, block: int) -> int:
    """Outputs of a task: their sums fit a cache, and there are a few tasks (an even number) where rows give few.

    ``block``: units of the only K block, or 0 if there are several: their activations are read again for every block
    of outputs, so the fewer of these the better; one K block leaves them in the first-level cache beside few sums.
    """
    room = max(step * pitch, LANES_BYTES - block * pitch) if block else SUMS_BYTES
    parts = ceil(cols * pitch / room)
    if row_blocks < PARTS:
        wanted = min(ceil(PARTS / row_blocks), cols // FEWEST)
        parts = max(parts, wanted - wanted % 2)
    return ceil(ceil(cols / max(1, parts)) / step) * step
