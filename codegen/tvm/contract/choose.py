"""What a contraction can run on, and the default register tile there."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.tvm.contract import halves
from bitwright.codegen.tvm.contract.compact import compacted, compaction, compaction_of, dense_spec, is_shared
from bitwright.codegen.tvm.contract.depthwise import MAX_TAPS, height_of
from bitwright.codegen.tvm.contract.engines import engine_of
from bitwright.codegen.tvm.contract.flipped import FlippedBytes, signed_indices
from bitwright.codegen.tvm.contract.lowbit import refusal
from bitwright.codegen.tvm.contract.narrow import any_pair_fits, safe_steps, spill_of, terms_of
from bitwright.codegen.tvm.contract.nest import near_blocks
from bitwright.codegen.tvm.contract.plan import Plan, plan_of
from bitwright.codegen.tvm.contract.spec import LANES, ContractSpec, Conv, Isa, Knobs, Matrix, image_of
from bitwright.codegen.tvm.contract.tile import UNROLLED
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import U8

TASKS = 32
"""Tasks a kernel should offer, so that a few threads can share it evenly."""

_TILES = {  # (rows, vectors) of the register tile: dense, sparse
    ("u8s8", "avx512-vnni"): ((4, 4), (4, 4)),
    ("u8s8", "avx-vnni"): ((3, 4), (2, 4)),
    ("u8s8", "avx2"): ((4, 2), (8, 1)),
    ("u8s8", "portable"): ((2, 2), (2, 1)),
    ("f32", "avx512-vnni"): ((4, 4), (4, 4)),
    ("bf16", "avx512-vnni"): ((4, 4), (4, 4)),
    ("f32", "avx-vnni"): ((4, 3), (3, 2)),
    ("f32", "avx2"): ((4, 3), (3, 2)),
    ("f32", "portable"): ((2, 2), (2, 1)),
    ("u8s8", "neon-i8mm"): ((4, 4), (4, 4)),
    ("u8s8", "neon-dot"): ((4, 3), (4, 3)),
    ("u8s8", "vector"): ((2, 2), (2, 1)),
    ("f32", "neon-i8mm"): ((4, 4), (4, 2)),
    ("f32", "neon-dot"): ((4, 4), (4, 2)),
    ("f32", "vector"): ((2, 2), (2, 1)),
}
_SAFE_PAIRS_TILE = (2, 4)
_FLIPPED_TILES = (2, 4), (4, 2)
"""Of sparse kernels whose products are of magnitudes, for indices that hold the signs and for those that do not: 2.4
and 3.6 times dense for 2:4 and 1:4, where 8x1 reaches 2.1 and 3.2."""
_SHORT_SUMS_TILE = (2, 2)
"""For 16-bit sums of two or three steps, which are unrolled: partial and final sums are in registers together."""
_ROWS_512 = {1: (4,), 2: (8, 10, 9, 7, 12, 14, 6), 3: (5, 4), 4: (4, 5)}
"""Good numbers of rows per number of vectors on AVX-512, best first."""
_REST_ROWS = 5
"""A tile of fewer rows takes no less time: its sums wait for each other."""
_STREAMED_BYTES = 768 * 1024
"""Kept weights beyond this do not stay in the second-level cache."""
_STREAMED_ROWS_F32 = 64
_FEW_ROWS = 6
"""Below so many rows four vectors of outputs make the larger tile."""
REPACK_ROWS = 64
"""Rows that pay for packing a panel of a run-time operand, or unpacking one of low-bit weights, once more."""
COMPACT_ROWS = 2
"""Up to so many rows a kernel only streams weights: then bytes count more than instructions."""


def supports(spec: ContractSpec, isa: Isa) -> str | None:
    """None if a kernel can be made, otherwise the reason why not."""
    if spec.right != "constant":
        return _runtime_right(spec)
    if isinstance(spec.geometry, Matrix) and spec.geometry.batch != 1:
        return "constant weights with a batch of products: flatten the batch into the rows"
    if too_large := _too_large(spec):
        return too_large
    if spec.element == "u8s8" and not 0 <= spec.pad_value <= spec.x_hi <= U8.hi:
        return f"pad value {spec.pad_value} is no u8" + (f" up to {spec.x_hi}" if spec.x_hi < U8.hi else "")
    if spec.element == "bf16" and (why := halves.refusal(spec, isa)):
        return why
    if is_depthwise(spec):
        return "depthwise kernels have no sparse form: there is nothing to skip" if spec.pattern else None
    if is_shared(spec):
        found = compaction_of(spec, isa)
        return found if isinstance(found, str) else None
    engine = engine_of(spec, Knobs(isa, 1, 1))
    plan = plan_of(spec, engine.quad, engine.selector)
    return None if isinstance(plan, Plan) else plan


def is_depthwise(spec: ContractSpec) -> bool:
    """Whether the depthwise generator makes this kernel (grouped contractions do very large windows)."""
    g = spec.geometry
    return isinstance(g, Conv) and g.is_depthwise and g.channels > 1 and g.kernel[0] * g.kernel[1] <= MAX_TAPS


def _runtime_right(spec: ContractSpec) -> str | None:
    if spec.element != "f32":
        return "a run-time right operand is supported in f32 only"
    if not isinstance(spec.geometry, Matrix):
        return "a run-time right operand needs a matrix product"
    if spec.pattern or spec.init:
        return "a run-time right operand has neither a pattern nor initial accumulators"
    return _too_large(spec)


def _too_large(spec: ContractSpec) -> str | None:
    g = spec.geometry
    sizes = [spec.input_elements, spec.rows * spec.cols]
    if isinstance(g, Conv):
        image = image_of(g)
        sizes += [g.batch * image.height * image.width * g.channels, int(np.prod(spec.weight_shape, dtype=object))]
    else:
        sizes.append(g.batch * g.cols * g.depth)
    return f"an operand of {max(sizes)} elements is beyond 32-bit indices" if max(sizes) >= 1 << 30 else None


def pairs_are_safe(spec: ContractSpec, weight: NDArray[Any]) -> bool:
    """Whether pmaddubsw cannot saturate, whatever the activations: for the pairs as they are packed (depthwise, where
    pairs depend on the tile: for any two weights)."""
    return _safe_steps(*_behind_compaction(spec, "avx2", weight), 1) > 0


def _behind_compaction(spec: ContractSpec, isa: Isa, weight: NDArray[Any]) -> tuple[ContractSpec, NDArray[Any]]:
    """The product whose sums are taken: with shared patterns the dense one over compacted activations."""
    if not is_shared(spec):
        return spec, weight
    made = compaction(spec, isa)
    return dense_spec(spec, made, spec.cols), compacted(spec, made, weight)[0]


def _safe_steps(spec: ContractSpec, weight: NDArray[Any], most: int) -> int:
    """Consecutive steps, up to ``most``, whose sums fit 16 bits; depthwise kernels sum single pairs only."""
    if is_depthwise(spec):
        return 1 if any_pair_fits(spec, weight) else 0
    return safe_steps(spec, contraction_plan(spec, Knobs("avx2", 1, 1, safe_pairs=True)), weight, most)


def contraction_plan(spec: ContractSpec, knobs: Knobs) -> Plan:
    """The order of the products under these knobs; raises :class:`InvalidInput` when the pattern has none."""
    engine = engine_of(spec, knobs)
    plan = plan_of(spec, engine.quad, engine.selector, 8 // knobs.register_bits, _unrolled(spec, knobs))
    if isinstance(plan, str):
        raise InvalidInput(plan)
    return plan


def _unrolled(spec: ContractSpec, knobs: Knobs) -> int:
    """Vectors of weights in a block of steps: as many as the tiles that share a panel need to fetch a line each.

    At most 16 with those of all outputs: a 4x4 tile that is unrolled eight times runs at 0.85 of one unrolled twice.
    """
    if not knobs.prefetch or knobs.isa != "avx512-vnni":
        return 1
    tiles = spec.rows // min(knobs.rows, spec.rows)
    return next((n for n in (8, 4, 2) if n * knobs.vectors <= min(tiles, 16)), 1)


def default_knobs(
    spec: ContractSpec,
    isa: Isa,
    weight: NDArray[Any] | None = None,
    *,
    narrow: bool = False,
    bits: int = 8,
    panel: bool = False,
) -> Knobs:
    """The register tile to start from.

    ``weight`` lets AVX2 use pmaddubsw where that is proven exact; ``narrow`` lets it keep sums in 16 bits for as long
    as they are proven to fit. ``bits``: what a packed weight shall take (8 where no kernel unpacks fewer),
    in registers or by ``panel``.
    """
    if is_shared(spec):
        return _shared_knobs(spec, isa, weight, narrow, bits)
    steps, most = 0, spec.depth if narrow else 1
    if isa == "avx2" and spec.element == "u8s8" and weight is not None:
        steps = _safe_steps(spec, weight, most)
    compact, spill, safe = spec.rows <= COMPACT_ROWS, 0, steps > 0
    bits = 8 if refusal(spec, Knobs(isa, 1, 1, safe_pairs=safe, bits=bits, panel=panel)) else bits
    panel = panel and bits < 8
    if is_depthwise(spec) and isinstance(spec.geometry, Conv):
        quad = engine_of(spec, Knobs(isa, 1, 1)).quad
        return Knobs(isa, 2 if quad == 1 else 4, height_of(spec.geometry, quad), safe_pairs=safe)
    rows, vectors = _SAFE_PAIRS_TILE if safe else _tile(spec, isa)
    if narrow and safe:
        plan = contraction_plan(spec, Knobs(isa, 1, 1, safe_pairs=True, compact=compact, bits=bits, panel=panel))
        spill = spill_of(plan, steps)
        if spill and spill * len(plan.block.steps) < UNROLLED:
            rows, vectors = _SHORT_SUMS_TILE
    needed = ceil(spec.cols // spec.groups / LANES[isa])
    streamed = _streams_512(spec) if isa == "avx512-vnni" and needed > 2 else None
    if isa == "avx512-vnni" and not spec.pattern:
        rows, vectors = _dense_512(spec, needed)
    elif streamed:
        rows, vectors = streamed
    elif needed < vectors:
        rows, vectors = min(8, rows * vectors // needed), needed
    rows = min(rows, spec.rows)
    panels, most = spec.groups * ceil(needed / vectors), spec.rows // rows
    if spec.right != "constant" and isinstance(spec.geometry, Matrix):
        rows = min(rows, spec.geometry.rows)
        panels, most = panels * spec.geometry.batch, spec.geometry.rows // REPACK_ROWS
    most = min(most, spec.rows // REPACK_ROWS) if panel else most
    blocks = max(1, min(max(ceil(TASKS / panels), 0 if panel else near_blocks(spec)), most))
    dense = isa == "avx512-vnni" and not spec.pattern and spec.right == "constant" and vectors == 2 < needed
    prefetch = not panel and (dense or streamed is not None)
    return Knobs(isa, rows, vectors, blocks, safe, compact, prefetch, spill, bits, panel)


def _tile(spec: ContractSpec, isa: Isa) -> tuple[int, int]:
    """The tile of the instruction set."""
    knobs = Knobs(isa, 1, 1)
    if isa == "avx2" and isinstance(engine_of(spec, knobs), FlippedBytes):
        return _FLIPPED_TILES[0 if signed_indices(contraction_plan(spec, knobs)) else 1]
    return _TILES[spec.element, isa][1 if spec.pattern else 0]


def _shared_knobs(spec: ContractSpec, isa: Isa, weight: NDArray[Any] | None, narrow: bool, bits: int) -> Knobs:
    """Those of the dense product behind the compaction, with panels that divide a block of outputs."""
    made = compaction(spec, isa)
    if weight is not None:
        weight = compacted(spec, made, weight)[0]
    inner = dense_spec(spec, made, spec.cols)
    found = default_knobs(inner, isa, weight, narrow=narrow, bits=bits)
    block, lanes = min(made.outputs, spec.cols // spec.groups), LANES[isa]
    needed, rows, vectors = ceil(block / lanes), found.rows, found.vectors
    if isa == "avx512-vnni":
        rows, vectors = _divisors_512(inner, needed)
    if made.outputs // lanes % vectors:
        vectors = next(v for v in range(vectors, 0, -1) if made.outputs // lanes % v == 0)
    rows = min(rows, spec.rows)
    tasks = spec.groups * made.units(spec.cols // spec.groups)
    blocks = max(1, min(ceil(TASKS / tasks), spec.rows // rows))
    return replace(found, rows=rows, vectors=vectors, row_blocks=blocks, prefetch=isinstance(spec.geometry, Matrix))


def unsafe_sums(spec: ContractSpec, knobs: Knobs, weight: NDArray[Any]) -> str:
    """Why the 16-bit sums of these knobs are not exact for these weights; the empty string if they are."""
    if knobs.isa != "avx2" or spec.element != "u8s8" or is_depthwise(spec) or not knobs.safe_pairs:
        return "16-bit sums need the pairs of u8 x s8 products that AVX2 kernels with safe_pairs make"
    spec, weight = _behind_compaction(spec, knobs.isa, weight)
    plan = contraction_plan(spec, knobs)
    needed = min(knobs.spill * len(plan.block.steps), plan.steps)
    steps = _safe_steps(spec, weight, needed)
    if steps >= needed:
        return ""
    return f"16-bit sums of {needed} steps can overflow with these weights: only {steps} are safe"


def terms_between_spills(spec: ContractSpec, knobs: Knobs) -> int:
    """Products that a 16-bit sum takes before it is added to a 32-bit one; 0 without 16-bit sums."""
    if not knobs.spill:
        return 0
    if is_shared(spec):
        spec = dense_spec(spec, compaction(spec, knobs.isa), spec.cols)
    return terms_of(contraction_plan(spec, knobs), knobs.spill)


def _dense_512(spec: ContractSpec, needed: int) -> tuple[int, int]:
    """Rows and vectors of a dense tile: two vectors and about eight rows, which leave no small remainder.

    Measured with the next panel fetched meanwhile, over 4x4 tiles without: 1.05 at 128 rows, 1.2 at 16, 1.45 where
    the weights come from the third-level cache. Convolutions want tiles that divide the width of the image.
    """
    g, most = spec.geometry, max(_ROWS_512[2])
    if spec.right != "constant" or needed in (1, 3):
        return _divisors_512(spec, needed)
    if not isinstance(g, Conv) or (g.kernel == g.stride == (1, 1) and not any(g.padding)):
        if spec.rows < _FEW_ROWS:
            return spec.rows, min(4, needed)
        return (spec.rows if spec.rows <= most else _rows_for(spec.rows, 2)), 2
    wide = g.output[1]
    found = wide if _FEW_ROWS <= wide <= most else next((r for r in (7, 8, 10, 12, 9) if wide % r == 0), 0)
    return (found, 2) if found else _divisors_512(spec, needed)


def _streams_512(spec: ContractSpec) -> tuple[int, int] | None:
    """The tile of N:M kernels whose weights do not stay in the second-level cache, with prefetch; None for others.

    Measured over 4x4 without prefetch: 1.05 at 128 rows, 1.1 to 1.3 at 16.
    """
    if not isinstance(spec.geometry, Matrix) or spec.sparsity is None or spec.rows < _FEW_ROWS:
        return None
    keep, group = spec.sparsity
    if spec.cols * spec.depth * keep // group * (1 if spec.element == "u8s8" else 4) < _STREAMED_BYTES:
        return None
    few = spec.rows <= _STREAMED_ROWS_F32 or spec.element == "u8s8"
    return (min(8, spec.rows), 2) if few else (4, 4)


def _divisors_512(spec: ContractSpec, needed: int) -> tuple[int, int]:
    """Rows and vectors that leave no small remainders, the most vectors."""
    g = spec.geometry
    step = g.output[1] if isinstance(g, Conv) else g.rows
    vectors = next((v for v in (4, 3, 2) if needed % v == 0), min(4, needed) if needed != 5 else 3)
    return _rows_for(step, vectors), vectors


def _rows_for(total: int, vectors: int) -> int:
    """The tile whose loop over ``total`` rows takes the fewest steps, counting a small remainder as a larger one."""

    def steps(rows: int) -> int:
        rest = total % rows
        return total - rest + (max(rest, min(rows, _REST_ROWS)) if rest else 0)

    return min(_ROWS_512[vectors], key=lambda r: steps(r) if r <= total else total + r)
