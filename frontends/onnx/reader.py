"""Bytes to checked protobuf: the model, its tensors (memory-mapped where they are external), its dtypes."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper

from bitwright.ir.errors import InvalidInput, Problem, Unsupported
from bitwright.ir.types import (
    BF16,
    BOOL,
    F16,
    F32,
    F64,
    S8,
    S16,
    S32,
    S64,
    U8,
    U16,
    U32,
    U64,
    DType,
    TensorType,
    integer,
)
from bitwright.ir.weights import Array, Handle

DTYPES: dict[int, DType] = {
    TensorProto.FLOAT: F32, TensorProto.FLOAT16: F16, TensorProto.BFLOAT16: BF16, TensorProto.DOUBLE: F64,
    TensorProto.INT8: S8, TensorProto.INT16: S16, TensorProto.INT32: S32, TensorProto.INT64: S64,
    TensorProto.UINT8: U8, TensorProto.UINT16: U16, TensorProto.UINT32: U32, TensorProto.UINT64: U64,
    TensorProto.BOOL: BOOL, TensorProto.INT4: integer(4), TensorProto.UINT4: integer(4, False),
    TensorProto.INT2: integer(2), TensorProto.UINT2: integer(2, False),
}  # fmt: skip
ELEMENTS = {v: k for k, v in DTYPES.items()}
LARGEST_ELEMENTS = 1 << 36
LARGEST_RANK = 16


def dtype_of_element(element: int, place: str, operator: str = "tensor") -> DType:
    """The number format of an ONNX element type; raises :class:`Unsupported` for strings, float8, complex."""
    if element in DTYPES:
        return DTYPES[element]
    if element not in TensorProto.DataType.values():
        raise InvalidInput(f"{place}: {element} is not an ONNX element type")
    name = TensorProto.DataType.Name(element).lower()
    raise Unsupported(Problem(operator, place, f"elements of type {name} have no number format here"))


def read_model(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> tuple[onnx.ModelProto, Path | None]:
    """The model and the folder its external data lies in; raises :class:`InvalidInput`."""
    if isinstance(source, onnx.ModelProto):
        return _plausible(source, "the model"), None
    folder, name = None, "the model"
    if isinstance(source, bytes):
        data = source
    else:
        path = Path(source)
        folder, name = path.parent, str(path)
        try:
            data = path.read_bytes()
        except OSError as e:
            raise InvalidInput(f"cannot read {path}: {e.strerror or e}") from e
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as e:
        raise InvalidInput(f"{name} is not an ONNX file: {e}") from e
    return _plausible(model, name), folder


def _plausible(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    if not model.HasField("graph") or not model.ir_version:
        raise InvalidInput(f"{name} is not an ONNX model: it holds no graph or no IR version")
    if not model.opset_import:
        raise InvalidInput(f"{name} names no operator set")
    return model


def _external(t: TensorProto, folder: Path | None, want: int) -> Array:
    """Map the bytes of an external tensor; nothing outside the model's folder is opened."""
    entries = {e.key: e.value for e in t.external_data}
    location = entries.get("location", "")
    where = f"tensor {t.name!r}: external data {location!r}"
    if folder is None:
        raise InvalidInput(f"{where} cannot be found: load the model by its path")
    pure = PurePosixPath(location)
    if not location or "\\" in location or "\0" in location or pure.is_absolute() or ".." in pure.parts:
        raise InvalidInput(f"{where} must be a relative path inside the model's folder")
    root = folder.resolve()
    path = (root / location).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        raise InvalidInput(f"{where} is not a file inside the model's folder")
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or want)
    except ValueError as e:
        raise InvalidInput(f"{where}: offset and length must be whole numbers") from e
    if offset < 0 or length != want or offset + length > path.stat().st_size:
        raise InvalidInput(f"{where}: {want} bytes at {offset} do not lie in the file ({path.stat().st_size} bytes)")
    if want == 0:
        return np.zeros(0, np.uint8)
    with path.open("rb") as f:
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, np.uint8, want, offset)


def tensor_type(t: TensorProto, place: str) -> TensorType:
    """Type of a tensor proto; raises :class:`InvalidInput` for impossible dims."""
    if any(d < 0 for d in t.dims) or len(t.dims) > LARGEST_RANK or math.prod(t.dims) > LARGEST_ELEMENTS:
        raise InvalidInput(f"{place}: shape {list(t.dims)} is impossible")
    return TensorType(dtype_of_element(t.data_type, place), tuple(t.dims))


def tensor_handle(t: TensorProto, folder: Path | None, place: str) -> tuple[Handle, TensorType]:
    """A lazily read constant and its type. The size of its data is checked now, its bytes are read later."""
    kind = tensor_type(t, place)
    bits = 8 * kind.dtype.numpy.itemsize if kind.dtype.bits >= 8 or kind.dtype == BOOL else kind.dtype.bits
    want = -(-kind.size * bits // 8)
    if t.data_location == TensorProto.EXTERNAL:
        raw = _external(t, folder, want)
        return Handle(lambda: _unpack(raw, kind)), kind
    if t.HasField("raw_data"):
        if len(t.raw_data) != want:
            raise InvalidInput(f"{place}: {len(t.raw_data)} bytes of data for {kind}, which needs {want}")
        return Handle(lambda: _unpack(np.frombuffer(t.raw_data, np.uint8), kind)), kind
    return Handle(_typed(t, kind, place)), kind


def _unpack(raw: Array, kind: TensorType) -> Array:
    bits = kind.dtype.bits
    if bits >= 8 or kind.dtype == BOOL:
        data: Array = raw.view(kind.dtype.numpy)
        return data.reshape(kind.static_shape)
    return _nibbles(raw, kind)


def _nibbles(raw: Array, kind: TensorType) -> Array:
    """Two- and four-bit integers packed low bits first, one value a byte."""
    bits, size = kind.dtype.bits, kind.size
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = ((raw[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[:size].astype(np.int16)
    if kind.dtype.kind == "int":
        values = np.where(values >= 1 << (bits - 1), values - (1 << bits), values)
    return values.astype(kind.dtype.numpy).reshape(kind.static_shape)


def _typed(t: TensorProto, kind: TensorType, place: str) -> Array:
    """Values from the typed fields (float_data, int32_data, ...)."""
    try:
        array: Any = numpy_helper.to_array(t)
    except (ValueError, TypeError, OverflowError) as e:
        raise InvalidInput(f"{place}: its values do not fit {kind}: {e}") from e
    if array.shape != kind.shape:
        raise InvalidInput(f"{place}: its values do not fit {kind}")
    return np.asarray(array).astype(kind.dtype.numpy, copy=False)


def array_handle(array: Any, place: str) -> tuple[Handle, TensorType]:
    """A NumPy array (ml_dtypes int4 and bfloat16 included) as a constant."""
    a = np.asarray(array)
    names = {"int4": integer(4), "uint4": integer(4, False), "int2": integer(2), "uint2": integer(2, False)}
    if a.dtype.name in names:
        dtype = names[a.dtype.name]
        return Handle(a.astype(dtype.numpy)), TensorType(dtype, a.shape)
    from bitwright.ir.types import dtype_of

    try:
        return Handle(a), TensorType(dtype_of(a.dtype), a.shape)
    except InvalidInput as e:
        raise Unsupported(Problem("constant", place, str(e))) from e
