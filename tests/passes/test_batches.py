"""Calibration data that is read batch by batch: folders and torch DataLoaders, and what the driver makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bitwright.assemble import fit_batches
from bitwright.driver import batches, optimize
from bitwright.ir.errors import InvalidInput
from bitwright.passes._batches import LazyBatches
from tests.conftest import read_graph

TEXT = """
graph @g (%x: f32[2, 3]) -> (y = %y) level=graph {
  %w = weight {ref="fc.weight"} : f32[4, 3]
  %y = linear(%x, %w) : f32[2, 4]
}
"""


def test_a_sequence_that_expands_its_source() -> None:
    asked: list[int] = []

    def expand(n: int) -> list[int]:
        asked.append(n)
        return [10 * n + i for i in range(n)]

    found = LazyBatches([1, 0, 3], expand)
    assert len(found) == 4
    assert list(found) == list(found) == [10, 30, 31, 32]
    assert (found[0], found[-1], found[1:3]) == (10, 32, [30, 31])
    asked.clear()
    assert found[0] == 10
    assert asked == [1]
    with pytest.raises(IndexError, match="batch 4 of 4"):
        found[4]


class Rows(TensorDataset):
    """Counts what is read."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        Rows.reads += 1
        return super().__getitem__(index)  # type: ignore[no-untyped-call]


def test_a_loader_is_read_on_every_pass() -> None:
    rows = torch.arange(24.0).reshape(8, 3)
    loader: DataLoader[Any] = DataLoader(Rows(rows), batch_size=4)
    found = batches(loader)
    assert isinstance(found, LazyBatches)
    assert len(found) == 2
    before = Rows.reads
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate([b[0] for b in found]), rows.numpy())
    assert Rows.reads == before + 16
    context_graph, report = optimize(read_graph(TEXT.replace("[2,", "[4,")), "observe-ranges", calibration=loader)
    assert report.remarks[0][2]["batches"] == 2
    assert context_graph.name == "g"
    shuffled = batches(DataLoader(TensorDataset(rows), batch_size=4, shuffle=True))
    assert isinstance(shuffled, list)
    assert isinstance(batches(iter([rows.numpy()])), list)
    assert batches(found) is found


def test_a_folder_is_read_on_every_pass_and_cut(tmp_path: Path) -> None:
    graph = read_graph(TEXT)
    for i, rows in enumerate((2, 6)):
        np.savez(tmp_path / f"{i}.npz", x=np.full((rows, 3), float(i), np.float32))
    found = fit_batches(graph, batches(tmp_path))
    assert isinstance(found, LazyBatches)
    assert [b[0].shape for b in found] == [(2, 3)] * 4
    assert [float(b[0][0, 0]) for b in found] == [0.0, 1.0, 1.0, 1.0]
    assert found[1][0].shape == (2, 3)
    np.savez(tmp_path / "2.npz", x=np.ones((2, 5), np.float32))
    with pytest.raises(InvalidInput, match="'x' is 2x5; the model takes"):
        fit_batches(graph, batches(tmp_path))
    (tmp_path / "3.npy").write_bytes(b"nothing")
    with pytest.raises(InvalidInput, match=r"3\.npy is not a readable NumPy file"):
        batches(tmp_path)
