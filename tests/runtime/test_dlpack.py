"""Arrays handed over by DLPack: the same memory on both sides, and nothing kept too long."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import BF16
from bitwright.ir.weights import Array
from bitwright.runtime import dlpack


class Shared:
    """An array of this process behind the protocol."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, **_: Any) -> Any:
        a = self.array
        return dlpack.capsule_of(a.ctypes.data, a.shape, a.dtype, dlpack.HOST, 0, a)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.HOST, 0


@pytest.mark.parametrize("kind", ["float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool"])
def test_formats_come_and_go(kind: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(kind)
    tensor = from_dlpack(Shared(array))
    assert tensor.data_ptr() == array.ctypes.data
    assert (tensor.numpy() == array).all()
    found = dlpack.view_of(tensor, 0)
    assert (found.address, found.shape, found.dtype) == (array.ctypes.data, (2, 3), array.dtype)
    assert found.contiguous


def test_bfloat16_comes_and_goes() -> None:
    tensor = torch.arange(4).bfloat16()
    found = dlpack.view_of(tensor, 0)
    assert found.dtype == BF16.numpy
    array = np.arange(4).astype(BF16.numpy)
    assert from_dlpack(Shared(array)).tolist() == [0, 1, 2, 3]


def test_gaps_and_offsets_are_seen() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    assert not dlpack.view_of(tensor.t(), 0).contiguous
    assert dlpack.view_of(tensor[1:], 0).address == tensor.data_ptr() + 16
    assert dlpack.view_of(tensor[:, :1][:1], 0).contiguous
    assert dlpack.view_of(torch.zeros(0, 3), 0).shape == (0, 3)


def test_what_a_capsule_keeps_goes_with_its_reader_or_with_itself() -> None:
    before = len(dlpack._alive)
    tensor = from_dlpack(Shared(np.zeros(3, np.float32)))
    unread = Shared(np.zeros(3, np.float32)).__dlpack__()
    assert len(dlpack._alive) == before + 2
    del tensor, unread
    gc.collect()
    assert len(dlpack._alive) == before


def test_formats_of_others_are_refused() -> None:
    with pytest.raises(InvalidInput, match="DLPack format 5 with 64 bits"):
        dlpack.view_of(torch.zeros(2, dtype=torch.complex64), 0)
    with pytest.raises(InvalidInput, match="DLPack has no format for complex64"):
        dlpack.capsule_of(0, (1,), np.dtype(np.complex64), 1, 0, None)
