"""A linear layer whose forward product and input gradient read one packed 2:4 weight, for training loops.

A transposable mask (arXiv 2102.08124) has two non-zeros in every row and every column of each 4x4 block, so W and
its transpose both obey 2:4, and the pattern of a block is one of 90. A block is stored as its eight values in row
order and that number; the two products read the same values, in the order of rows or of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bitwright import sparse_products
from bitwright.ir.errors import InvalidInput
from bitwright.ir.mvue import Method
from bitwright.passes.sparsity._mvue import mvue_mask
from bitwright.passes.sparsity._transposable import _ninety

BLOCK = 4
_ROWS = 8
"""Rows of W that lie together: two blocks, the rows of one matrix instruction's register."""


@dataclass(frozen=True)
class TransposableWeight:
    """A weight [outputs, inputs] as half of its elements and a byte for every 16.

    ``values``: [outputs/8, inputs/4, 2, 4, 2], element type of the weight: of each pair of 4x4 blocks one below the
    other, row by row, the two kept values, leftmost first. ``codes``: [outputs/8, inputs/4, 2] u8, the pattern's
    number among the 90. Outputs are padded to 8, inputs to 4, with zeros.
    """

    values: Tensor
    codes: Tensor
    shape: tuple[int, int]

    @staticmethod
    def pack(weight: Tensor) -> TransposableWeight:
        """Pack a matrix that obeys a transposable 2:4 mask; zeros inside the mask are fine.

        Raises :class:`InvalidInput` for another rank or type, and with the first block that obeys no such mask.
        """
        if weight.dim() != 2 or not weight.is_floating_point():
            raise InvalidInput(f"a weight is a matrix of floats, not {weight.dtype} of rank {weight.dim()}")
        outputs, inputs = weight.shape
        blocks = _blocks(weight.detach())
        table = _tables(str(weight.device))
        flat = blocks.reshape(-1, BLOCK * BLOCK)
        present = (flat != 0).to(torch.float32)
        best = (present @ table.patterns.T).max(1)
        if bool((short := best.values < present.sum(1)).any()):
            at = int(short.nonzero()[0, 0])
            half, at = at % 2, at // 2
            down, across = divmod(at, blocks.shape[1])
            row, column = down * _ROWS + half * BLOCK, across * BLOCK
            raise InvalidInput(
                f"the 4x4 block at row {row}, column {column} obeys no transposable 2:4 mask: "
                "prune it with bitwright.sparse_training(model, transposable=True) or the pass transposable-mask"
            )
        values = flat.gather(1, table.places[best.indices]).reshape(*blocks.shape[:3], BLOCK, 2)
        codes = best.indices.to(torch.uint8).reshape(blocks.shape[:3])
        return TransposableWeight(values.contiguous(), codes.contiguous(), (outputs, inputs))

    def dense(self) -> Tensor:
        """The weight [outputs, inputs] again."""
        table = _tables(str(self.values.device))
        flat = torch.zeros(self.codes.numel(), BLOCK * BLOCK, dtype=self.values.dtype, device=self.values.device)
        flat.scatter_(1, table.places[self.codes.reshape(-1).long()], self.values.reshape(-1, 2 * BLOCK))
        down, across, _ = self.codes.shape
        whole = flat.reshape(down, across, 2, BLOCK, BLOCK).permute(0, 2, 3, 1, 4).reshape(down * _ROWS, across * BLOCK)
        return whole[: self.shape[0], : self.shape[1]]

    def by_columns(self) -> Tensor:
        """[outputs/8, inputs/4, 2, 4, 2]: of each block, column by column, the two kept values, topmost first."""
        table = _tables(str(self.values.device))
        order = table.columns[self.codes.reshape(-1).long()]
        return self.values.reshape(-1, 2 * BLOCK).gather(1, order).reshape(self.values.shape)

    def metadata(self, by_columns: bool) -> Tensor:
        """Words s32 [rows/16, depth/64, 32] for the sparse tensor cores: of the product with W (rows: outputs), or with
        its transpose (``by_columns``; rows: inputs). Filled up with a pattern whose values are zeros.

        Word 4 g + t is of rows g (low half) and g + 8 (high half), elements 32 (t / 2) + 16 (t % 2) and the 15 after it
        (PTX ISA 9.0, 9.7.14.6, of 16-bit types; the halves of a step of 64 are the selectors 0 and 1).
        """
        table = _tables(str(self.values.device))
        down, across, _ = self.codes.shape
        blocks = self.codes.long().transpose(1, 2).reshape(2 * down, across)
        per = table.nibbles[int(by_columns)][blocks.T if by_columns else blocks]  # [rows / 4, depth / 4, row in block]
        rows = per.transpose(1, 2).reshape(-1, per.shape[1])
        spare = (0, -rows.shape[1] % 16, 0, -rows.shape[0] % 16)
        padded = torch.nn.functional.pad(rows, spare, value=0b0100)
        fours = padded.reshape(padded.shape[0], -1, 4)
        halves = (fours << torch.arange(0, 16, 4, device=rows.device)).sum(-1)  # [row, depth / 16]
        split = halves.reshape(halves.shape[0] // 16, 2, 8, halves.shape[1] // 4, 4)
        words = (split[:, 0] | split[:, 1] << 16).permute(0, 2, 1, 3).reshape(-1, split.shape[3], 32)
        return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of values and codes."""
        return self.values.nbytes + self.codes.nbytes


@dataclass(frozen=True)
class _Tables:
    """``patterns`` [90, 16] f32; ``places`` [90, 8]: where in a block, row by row, the kept values lie; ``columns``
    [90, 8]: which of those eight come column by column."""

    patterns: Tensor
    places: Tensor
    columns: Tensor
    nibbles: Tensor
    """[2, 90, 4]: metadata of each row, of each column: the two places of 2 bits, ascending."""


@cache
def _tables(device: str) -> _Tables:
    patterns = _ninety()
    places = patterns.bool().nonzero()[:, 1].reshape(len(patterns), 2 * BLOCK)
    columns = (places % BLOCK * BLOCK + places // BLOCK).argsort(1)
    grids = patterns.reshape(-1, BLOCK, BLOCK).bool()
    lines = torch.stack([g.nonzero()[:, 2].reshape(-1, BLOCK, 2) for g in (grids, grids.transpose(1, 2))])
    nibbles = lines[..., 0] | lines[..., 1] << 2
    return _Tables(patterns.to(device), places.to(device), columns.to(device), nibbles.to(device))


def _blocks(weight: Tensor) -> Tensor:
    """[rows/8, columns/4, 2, 4, 4], padded with zeros."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % _ROWS))
    down, across = padded.shape[0] // _ROWS, padded.shape[1] // BLOCK
    return padded.reshape(down, 2, BLOCK, across, BLOCK).permute(0, 3, 1, 2, 4)


def _product(x: Tensor, packed: TransposableWeight, by_columns: bool) -> Tensor:
    """``x`` by the weight's transpose, or by the weight; on a GPU's sparse tensor cores where they take it."""
    if not x.is_cuda or sparse_products.why_not(x, packed):
        return x @ (packed.dense() if by_columns else packed.dense().T)
    stream = int(torch.cuda.current_stream(x.device).cuda_stream)
    made = sparse_products.on(x.device.index)(x.reshape(-1, x.shape[-1]), packed, by_columns, stream=stream)
    return made.reshape(*x.shape[:-1], made.shape[-1])


class _SparseLinear(torch.autograd.Function):
    """y = x W^T + b; the gradient goes straight through to every element of W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, packed: TransposableWeight, mvue: Method | None
    ) -> Tensor:
        ctx.save_for_backward(x, packed.values, packed.codes)
        ctx.shape, ctx.mvue, ctx.biased = packed.shape, mvue, bias is not None
        y = _product(x, packed, by_columns=False)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, codes = ctx.saved_tensors
        packed = TransposableWeight(values, codes, ctx.shape)
        to_x = _product(grad, packed, by_columns=True) if ctx.needs_input_grad[0] else None
        rows = grad.reshape(-1, grad.shape[-1])
        to_bias = rows.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            sparse = rows if ctx.mvue is None else mvue_mask(rows, 2, BLOCK, 0, method=ctx.mvue, name="gradient")
            to_weight = sparse.T @ x.reshape(-1, x.shape[-1])
        return to_x, to_weight, to_bias, None, None


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    packed: TransposableWeight | None = None,
    mvue: Method | None = None,
) -> Tensor:
    """``x [..., inputs] @ weight.T + bias`` where ``weight`` [outputs, inputs] obeys a transposable 2:4 mask.

    Forward product and input gradient use the packed weight (``packed``, or made from ``weight`` here): on a GPU with
    f16 or bf16 and sizes that are multiples of 8, its sparse tensor cores; else unpacked, as dense ones. The gradient
    of ``weight`` is that of all its elements (masks are the trainer's business). ``mvue``: it is made from an
    unbiased 2:4 output gradient, along batch and time (``optimal`` or ``two-draw``; arXiv 2203.10991).
    Raises :class:`InvalidInput` as :meth:`TransposableWeight.pack`, and for shapes that do not fit.

    >>> w = torch.eye(8)
    >>> sparse_linear(torch.ones(1, 8), w).tolist()
    [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    """
    if mvue not in (None, "optimal", "two-draw"):
        raise InvalidInput(f"mvue is None, optimal or two-draw, not {mvue!r}")
    if packed is None:
        packed = TransposableWeight.pack(weight)
    elif packed.shape != tuple(weight.shape):
        raise InvalidInput(f"packed is {packed.shape[0]}x{packed.shape[1]}, weight {tuple(weight.shape)}")
    if not x.dim() or x.shape[-1] != packed.shape[1]:
        raise InvalidInput(f"x ends in {tuple(x.shape)[-1:]}, the weight takes {packed.shape[1]} inputs")
    if x.dtype != packed.values.dtype:
        raise InvalidInput(f"x is {x.dtype}, the weight {packed.values.dtype}")
    result: Tensor = _SparseLinear.apply(x, weight, bias, packed, mvue)  # type: ignore[no-untyped-call]
    return result
