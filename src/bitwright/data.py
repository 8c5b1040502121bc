"""Calibration data in whatever form the user has it, as batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.ir.errors import InvalidInput


def batches(calibration: Any) -> Sequence[Any]:
    """Calibration data as a sequence of batches: an iterable of inputs, a ``.npz``/``.npy`` file or folder of them, or
    a torch DataLoader. An entry is an array (one input), a tuple in input order, or a mapping by input name.

    Folders and loaders that do not shuffle are read batch by batch, on every pass over them; anything else is held.
    """
    if calibration is None:
        return []
    if isinstance(calibration, str | Path):
        return _from_files(Path(calibration))
    if isinstance(calibration, np.ndarray) or hasattr(calibration, "detach"):
        return [(_array(calibration),)]
    if isinstance(calibration, Mapping):
        return [{k: _array(v) for k, v in calibration.items()}]
    if not isinstance(calibration, Iterable):
        raise InvalidInput(f"calibration is an iterable of inputs or a file, not {type(calibration).__name__}")
    from bitwright.passes._batches import LazyBatches

    if isinstance(calibration, LazyBatches):
        return calibration
    if _repeats(calibration):
        loader: Any = calibration
        return LazyBatches(loader, lambda b: [_batch(b)], [1] * len(loader))
    return [_batch(b) for b in calibration]


def _repeats(calibration: Any) -> bool:
    """True for a torch DataLoader that gives the same batches every time."""
    import sys

    data = sys.modules.get("torch.utils.data")
    if data is None or not isinstance(calibration, data.DataLoader):
        return False
    fixed = isinstance(getattr(calibration, "sampler", None), data.SequentialSampler)
    return fixed and type(calibration.batch_sampler) is data.BatchSampler


def _array(value: Any) -> np.ndarray[Any, Any]:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def _batch(b: Any) -> Any:
    if isinstance(b, Mapping):
        return {k: _array(v) for k, v in b.items()}
    return tuple(_array(v) for v in b) if isinstance(b, tuple | list) else (_array(b),)


def _from_files(path: Path) -> Sequence[Any]:
    if not path.exists():
        raise InvalidInput(f"there is no calibration file or folder {path}")
    files = sorted(p for p in path.iterdir() if p.suffix in (".npz", ".npy")) if path.is_dir() else [path]
    if not files:
        raise InvalidInput(f"{path} holds no .npz or .npy file")
    from bitwright.passes._batches import LazyBatches

    return LazyBatches(files, _from_file)


def _from_file(file: Path) -> list[Any]:
    try:
        data = np.load(file, allow_pickle=False)
        return [{k: data[k] for k in data.files} if hasattr(data, "files") else (data,)]
    except (OSError, ValueError) as e:
        raise InvalidInput(f"{file} is not a readable NumPy file: {e}") from e
