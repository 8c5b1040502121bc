"""What the command line reads and writes: models, .npz files, random inputs; all errors name the file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.errors import InvalidInput, did_you_mean
from bitwright.ir.files import save, whole

if TYPE_CHECKING:
    from bitwright.ir.graph import Graph
    from bitwright.runtime.manifest import TensorSpec
    from bitwright.runtime.program import Program

Array = NDArray[Any]
Arrays = dict[str, Array]
_ROWS = 32


def load_arrays(path: Path) -> Arrays:
    """The arrays of an .npz file (or one .npy), by name; never unpickles. Raises :class:`InvalidInput`."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise InvalidInput(f"{path} is not a readable .npz file: {error}") from error
    if not arrays:
        raise InvalidInput(f"{path} holds no arrays")
    return arrays


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an .npz file, whole or not at all."""
    with whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def save_graph(path: Path, graph: Graph) -> None:
    """Write a graph as its name ends: .onnx, .mlir (torch dialect), .mlirbc; else text, weights in a .safetensors."""
    from bitwright import driver
    from bitwright.ir.text import show

    if path.suffix == ".onnx":
        driver.to_onnx(graph, path)
        return
    if path.suffix in (".mlir", ".mlirbc"):
        from bitwright.frontends.mlir import to_mlir

        to_mlir(graph, path)
        return
    if graph.weights:
        graph.weights.save(path.with_suffix(".safetensors"))
    save(path, show(graph))


def named(arrays: Arrays, names: Sequence[str], where: str) -> Arrays:
    """The arrays for these inputs: by name, or in order when no name is right. Raises :class:`InvalidInput`."""
    if set(names) <= set(arrays):
        return {n: arrays[n] for n in names}
    if not set(names) & set(arrays) and len(names) == len(arrays):
        return dict(zip(names, arrays.values(), strict=True))
    missing = next(n for n in names if n not in arrays)
    raise InvalidInput(
        f"{where} has no array {missing!r}{did_you_mean(missing, arrays)} (it has {', '.join(map(repr, arrays))};"
        f" the model takes {', '.join(map(repr, names))})"
    )


def batches(arrays: Arrays, graph: Graph) -> list[Arrays]:
    """Calibration data cut along the first axis into batches that the graph takes."""
    values = {v.name: v.type for v in graph.inputs}
    first = next(iter(values))
    size = values[first].shape[0] if values[first].shape else 0
    rows = arrays[first].shape[0] if arrays[first].ndim else 0
    step = size if isinstance(size, int) else _ROWS
    if not size or not rows or (isinstance(size, int) and rows == size):
        return [arrays]
    if any(a.ndim == 0 or a.shape[0] != rows for a in arrays.values()):
        return [arrays]
    return [
        {n: a[i : i + step] for n, a in arrays.items()}
        for i in range(0, rows, step)
        if isinstance(size, str) or i + step <= rows
    ]


def first_chunk(arrays: Arrays, program: Program) -> Arrays:
    """As many rows as the program computes at once."""
    rows = program.manifest.chunks[0]
    if not program.manifest.batch:
        return arrays
    return {t.name: arrays[t.name][: rows * t.factor] if t.factor else arrays[t.name] for t in program.inputs}


def random_inputs(specs: Sequence[TensorSpec], batch: int, seed: int = 0) -> list[Array]:
    """Inputs made up for timing: normal floats, ones for integers (a valid index of any table with two rows)."""
    rng = np.random.default_rng(seed)
    out: list[Array] = []
    for spec in specs:
        shape = tuple(d if isinstance(d, int) else batch * spec.factor for d in spec.shape)
        dtype = _numpy(spec.dtype)
        out.append(rng.standard_normal(shape).astype(dtype) if _is_float(spec.dtype) else np.ones(shape, dtype))
    return out


def _numpy(dtype: str) -> Any:
    from bitwright.ir.types import parse_dtype

    return parse_dtype(dtype).numpy


def _is_float(dtype: str) -> bool:
    from bitwright.ir.types import parse_dtype

    return parse_dtype(dtype).is_float


def load_model(path: Path, weights: Path | None = None) -> Graph:
    """A graph from .onnx, .pt2, .mlir or .bw-ir (weights beside it or in ``weights``); raises :class:`InvalidInput`."""
    from bitwright import driver
    from bitwright.ir.ops import Weight

    if path.suffix not in (".onnx", ".pt2", ".mlir", ".mlirbc", ".bw-ir", ".bw"):
        raise InvalidInput(f"{path}: expected a model ending in .onnx, .pt2 (torch.export.save), .mlir or .bw-ir")
    if path.suffix == ".pt2":
        return _load_exported(path)
    if path.suffix != ".bw-ir":
        return driver.to_graph(path)
    graph = driver.load_graph(path, weights)
    missing = sorted({n.op.ref for n in graph.nodes if isinstance(n.op, Weight)} - set(graph.weights))
    if missing:
        raise InvalidInput(
            f"{path} refers to {len(missing)} weights that are not there, first {missing[0]!r}:"
            f" put them into {path.with_suffix('.safetensors').name} beside it, or give --weights FILE"
        )
    return graph


def _load_exported(path: Path) -> Graph:
    from bitwright import driver

    if not path.is_file():
        raise InvalidInput(f"there is no file {path}")
    import torch

    try:
        program = torch.export.load(str(path))
    except Exception as error:
        raise InvalidInput(f"{path} is not a readable torch.export archive: {error}") from error
    return driver.capture(program)


def calibration(path: Path | None, graph: Graph) -> Sequence[Any] | None:
    """Calibration batches from a file or every file of a folder, read when they are asked for."""
    if path is None:
        return None
    names = [v.name for v in graph.inputs]
    files = sorted(p for p in path.iterdir() if p.suffix in (".npz", ".npy")) if path.is_dir() else [path]
    if not files:
        raise InvalidInput(f"{path} holds no .npz or .npy file")
    from bitwright.passes._batches import LazyBatches

    return LazyBatches(files, lambda f: batches(named(load_arrays(f), names, str(f)), graph))


def sizes(pairs: list[str] | None) -> dict[str, int] | None:
    """Symbolic sizes from NAME=NUMBER pairs; raises :class:`InvalidInput`."""
    found = {}
    for pair in pairs or []:
        name, _, value = pair.partition("=")
        if not name or not value.isdigit() or int(value) < 1:
            raise InvalidInput(f"--size takes NAME=NUMBER, not {pair!r}")
        found[name] = int(value)
    return found or None
