"""Single-operator ONNX models with data, for comparison with onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]
MS = "com.microsoft"


@dataclass(frozen=True)
class Case:
    """One node. ``constants`` are the positions of operands that become initializers."""

    name: str
    op: str
    operands: tuple[Array | np.generic | None, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    constants: tuple[int, ...] = ()
    outputs: int = 1
    opset: int = 21
    domain: str = ""
    rtol: float = 1e-4
    atol: float = 1e-5

    @property
    def inputs(self) -> dict[str, Array]:
        """The graph inputs by name."""
        return {
            f"x{i}": np.asarray(a) for i, a in enumerate(self.operands) if a is not None and i not in self.constants
        }

    def model(self, symbolic: bool = False) -> onnx.ModelProto:
        """The model; ``symbolic`` calls the first axis of x0 ``b``, and those of its size."""
        names = ["" if a is None else f"x{i}" for i, a in enumerate(self.operands)]
        outs = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.op, names, outs, name=self.name, domain=self.domain, **self.attributes)
        batch = next((a.shape[0] for a in self.inputs.values() if a.ndim), 0) if symbolic else 0
        infos = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), _shape(a, batch))
            for n, a in self.inputs.items()
        ]
        weights = [numpy_helper.from_array(a, f"x{i}") for i, a in enumerate(self.operands) if i in self.constants]  # type: ignore[arg-type]
        graph = helper.make_graph([node], "case", infos, [onnx.ValueInfoProto(name=o) for o in outs], weights)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(MS, 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _shape(a: Array, batch: int) -> list[int | str]:
    return ["b", *a.shape[1:]] if a.ndim > 1 and a.shape[0] == batch else list(a.shape)


RNG = np.random.default_rng(0)


def f(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Array:
    return np.asarray(RNG.standard_normal(shape) * scale + shift, np.float32)


def i(*values: int) -> Array:
    return np.array(values, np.int64)


def whole(*shape: int, low: int = -50, high: int = 50, dtype: type = np.int64) -> Array:
    return np.asarray(RNG.integers(low, high, shape), dtype)


def unit(*shape: int) -> Array:
    return np.asarray(RNG.uniform(0.05, 0.95, shape), np.float32)


_ON_REALS = """Abs Atan Ceil Cos Erf Exp Floor HardSigmoid HardSwish Identity Neg Relu Round Sigmoid Sign Sin Softplus
Softsign Tan Tanh Elu Selu Celu LeakyRelu ThresholdedRelu Shrink Gelu Mish IsNaN Sinh Cosh Asinh"""


def pointwise() -> Iterator[Case]:
    """Element-wise operators."""
    for op in _ON_REALS.split():
        yield Case(op, op, (f(3, 4, scale=2),))
    for op in "Log Sqrt Reciprocal Acos Asin Atanh".split():
        yield Case(op, op, (unit(3, 4),))
    yield Case("Acosh", "Acosh", (unit(3, 4) + 1,))
    for op in "Add Sub Mul Div Max Min Pow Mean Sum".split():
        yield Case(op, op, (unit(3, 4), unit(4)))
    for op in "Equal Greater GreaterOrEqual Less LessOrEqual".split():
        yield Case(op, op, (whole(3, 4, low=0, high=3), whole(4, low=0, high=3)))
    for op in "And Or Xor".split():
        yield Case(op, op, (f(3, 4) > 0, f(4) > 0))
    yield Case("Not", "Not", (f(3, 4) > 0,))
    yield Case("Mod", "Mod", (whole(3, 4), whole(3, 4, low=1, high=9)))
    yield Case("Mod.fmod", "Mod", (f(3, 4), unit(3, 4)), {"fmod": 1})
    yield Case("Div.int", "Div", (whole(3, 4), whole(3, 4, low=1, high=9)))
    yield Case("Pow.int", "Pow", (whole(3, 4, low=-3, high=4), i(2)))
    yield Case("Pow.mixed", "Pow", (unit(3, 4), i(3)))
    yield Case("PRelu", "PRelu", (f(2, 3, 4), f(3, 1)))
    yield Case("Clip", "Clip", (f(3, 4), np.float32(-0.5), np.float32(0.5)), constants=(1, 2))
    yield Case("Clip.runtime", "Clip", (f(3, 4), np.array(-0.5, np.float32), np.array(0.5, np.float32)))
    yield Case("Where", "Where", (f(3, 4) > 0, f(4), f(3, 1)))
    yield Case("Cast", "Cast", (f(3, 4, scale=9),), {"to": onnx.TensorProto.INT32})
    yield Case("Cast.bool", "Cast", (whole(3, 4, low=0, high=2),), {"to": onnx.TensorProto.BOOL})
    yield Case(
        "BitShift",
        "BitShift",
        (whole(4, low=0, high=99, dtype=np.uint8), whole(4, low=0, high=5, dtype=np.uint8)),
        {"direction": "RIGHT"},
    )
    yield Case("Gelu.tanh", "Gelu", (f(3, 4),), {"approximate": "tanh"})
    yield Case("FastGelu", "FastGelu", (f(3, 4), f(4)), domain=MS, rtol=1e-3, atol=1e-3)
    yield Case("BiasGelu", "BiasGelu", (f(3, 4), f(4)), domain=MS)
    yield Case("IsInf", "IsInf", (np.array([[1, np.inf, -np.inf]], np.float32),), {"detect_negative": 0})


def contractions() -> Iterator[Case]:
    """MatMul, Gemm, Conv and their kin."""
    yield Case("MatMul", "MatMul", (f(2, 3, 4), f(2, 4, 5)))
    yield Case("MatMul.weight", "MatMul", (f(2, 3, 4), f(4, 5)), constants=(1,))
    yield Case("MatMul.vector", "MatMul", (f(4), f(4, 5)))
    yield Case("MatMul.vectors", "MatMul", (f(4), f(4)))
    yield Case("MatMul.broadcast", "MatMul", (f(3, 1, 3, 4), f(2, 4, 5)))
    yield Case("Gemm", "Gemm", (f(3, 4), f(5, 4), f(5)), {"transB": 1}, (1, 2))
    yield Case("Gemm.scaled", "Gemm", (f(4, 3), f(4, 5), f(3, 1)), {"transA": 1, "alpha": 0.5, "beta": 2.0})
    yield Case("Conv", "Conv", (f(2, 3, 8, 8), f(4, 3, 3, 3), f(4)), {"pads": [1, 0, 1, 2], "strides": [2, 1]}, (1, 2))
    yield Case("Conv.groups", "Conv", (f(2, 4, 8, 8), f(4, 1, 3, 3)), {"group": 4, "dilations": [2, 2]}, (1,))
    yield Case("Conv.same", "Conv", (f(2, 3, 7, 7), f(4, 3, 4, 4)), {"auto_pad": "SAME_UPPER", "strides": [2, 2]})
    yield Case("Conv.1d", "Conv", (f(2, 3, 9), f(4, 3, 3)))
    yield Case("Conv.3d", "Conv", (f(1, 2, 5, 5, 5), f(3, 2, 2, 2, 2)))
    yield Case(
        "ConvTranspose",
        "ConvTranspose",
        (f(2, 3, 5, 5), f(3, 4, 3, 3), f(4)),
        {"strides": [2, 2], "pads": [1, 1, 0, 1], "output_padding": [1, 0]},
    )
    yield Case("ConvTranspose.groups", "ConvTranspose", (f(2, 4, 5), f(4, 2, 3)), {"group": 2, "dilations": [2]})
    yield Case("Einsum.bmm", "Einsum", (f(2, 3, 4), f(2, 4, 5)), {"equation": "bij,bjk->bik"})
    yield Case("Einsum.heads", "Einsum", (f(2, 3, 4, 5), f(2, 6, 4, 5)), {"equation": "blhd,bshd->bhls"})
    yield Case("Einsum.sum", "Einsum", (f(3, 4),), {"equation": "ij->j"})
    yield Case("Einsum.outer", "Einsum", (f(3), f(4)), {"equation": "i,j"})
    yield Case(
        "FusedMatMul", "FusedMatMul", (f(2, 4, 3), f(2, 5, 4)), {"transA": 1, "transB": 1, "alpha": 0.5}, domain=MS
    )


def normal() -> Iterator[Case]:
    """Norms, softmax, reductions, pooling."""
    stats = (f(3), f(3), f(3), unit(3))
    yield Case("BatchNormalization", "BatchNormalization", (f(2, 3, 4, 4), *stats), constants=(1, 2, 3, 4))
    yield Case("InstanceNormalization", "InstanceNormalization", (f(2, 3, 4, 4), f(3), f(3)))
    yield Case("GroupNormalization", "GroupNormalization", (f(2, 4, 5), f(4), f(4)), {"num_groups": 2})
    yield Case("LayerNormalization", "LayerNormalization", (f(2, 3, 8), f(8), f(8)), {"epsilon": 1e-3})
    yield Case("LayerNormalization.2", "LayerNormalization", (f(2, 3, 8), f(3, 8)), {"axis": 1})
    yield Case(
        "SkipLayerNormalization",
        "SkipLayerNormalization",
        (f(2, 3, 8), f(2, 3, 8), f(8), f(8), f(8)),
        {"epsilon": 1e-5},
        domain=MS,
    )
    yield Case("LRN", "LRN", (f(2, 6, 4, 4),), {"size": 3, "alpha": 0.1})
    yield Case("LpNormalization", "LpNormalization", (f(2, 5),), {"p": 1})
    yield Case("Softmax", "Softmax", (f(2, 3, 4),), {"axis": 1})
    yield Case("Softmax.11", "Softmax", (f(2, 3, 4),), {"axis": 1}, opset=11)
    yield Case("LogSoftmax", "LogSoftmax", (f(2, 3, 4),))
    yield Case("Hardmax", "Hardmax", (f(2, 3, 4),))
    for op in "Sum Mean Max Min Prod L1 L2 LogSumExp SumSquare".split():
        yield Case(f"Reduce{op}", f"Reduce{op}", (f(2, 3, 4), i(1)), {"keepdims": 0}, (1,))
    yield Case("ReduceLogSum", "ReduceLogSum", (unit(2, 3, 4), i(0, -1)), constants=(1,))
    yield Case("ReduceSum.all", "ReduceSum", (f(2, 3, 4),))
    yield Case("ReduceMax.int", "ReduceMax", (whole(2, 3, 4), i(1)), constants=(1,))
    yield Case("ArgMax", "ArgMax", (f(2, 3, 4),), {"axis": -1, "keepdims": 0})
    yield Case("ArgMin.last", "ArgMin", (whole(2, 9, low=0, high=2),), {"axis": 1, "select_last_index": 1})
    yield Case(
        "MaxPool", "MaxPool", (f(2, 3, 9, 9),), {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}
    )
    yield Case("MaxPool.ceil", "MaxPool", (f(2, 3, 9, 9),), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1})
    yield Case("MaxPool.indices", "MaxPool", (f(2, 3, 6, 6),), {"kernel_shape": [2, 2], "strides": [2, 2]}, outputs=2)
    yield Case("AveragePool", "AveragePool", (f(2, 3, 9, 9),), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]})
    yield Case(
        "AveragePool.counted",
        "AveragePool",
        (f(2, 3, 9),),
        {"kernel_shape": [3], "pads": [1, 1], "count_include_pad": 1, "strides": [2]},
    )
    yield Case("AveragePool.dilated", "AveragePool", (f(2, 3, 9, 9),), {"kernel_shape": [2, 2], "dilations": [2, 2]})
    yield Case("LpPool", "LpPool", (f(2, 3, 8, 8),), {"kernel_shape": [2, 2], "p": 3})
    for op in "GlobalAveragePool GlobalMaxPool".split():
        yield Case(op, op, (f(2, 3, 5, 5),))


def shapes() -> Iterator[Case]:
    """Operators that move elements."""
    yield Case("Reshape", "Reshape", (f(2, 3, 4), i(0, -1)), constants=(1,))
    yield Case("Transpose", "Transpose", (f(2, 3, 4),), {"perm": [2, 0, 1]})
    yield Case("Flatten", "Flatten", (f(2, 3, 4),))
    yield Case("Squeeze", "Squeeze", (f(2, 1, 4), i(1)), constants=(1,))
    yield Case("Unsqueeze", "Unsqueeze", (f(2, 3), i(1, -1)), constants=(1,))
    yield Case("Expand", "Expand", (f(2, 1, 4), i(3, 1)), constants=(1,))
    yield Case("Concat", "Concat", (f(2, 3), f(2, 1), f(2, 2)), {"axis": -1})
    yield Case("Split", "Split", (f(2, 7),), {"axis": 1, "num_outputs": 3}, outputs=3)
    yield Case("Split.sizes", "Split", (f(2, 7), i(3, 4)), {"axis": 1}, (1,), outputs=2)
    yield Case("Slice", "Slice", (f(2, 9, 4), i(1, -3), i(99, -1), i(1, 2), i(2, 1)), constants=(1, 2, 3, 4))
    yield Case("Slice.back", "Slice", (f(2, 9), i(-2), i(-9), i(1), i(-3)), constants=(1, 2, 3, 4))
    yield Case("Pad", "Pad", (f(2, 3, 4), i(0, 1, 0, 0, 0, 2), np.float32(0.5)), constants=(1, 2))
    yield Case("Pad.reflect", "Pad", (f(2, 3, 5), i(0, 0, 2, 0, 0, 3)), {"mode": "reflect"}, (1,))
    yield Case("Pad.edge", "Pad", (f(2, 3), i(0, 2, 0, 1)), {"mode": "edge"}, (1,))
    yield Case("Pad.crop", "Pad", (f(2, 6), i(0, -1, 0, -2)), constants=(1,))
    yield Case("Tile", "Tile", (f(2, 3), i(2, 3)), constants=(1,))
    yield Case("DepthToSpace", "DepthToSpace", (f(2, 8, 3, 3),), {"blocksize": 2, "mode": "CRD"})
    yield Case("SpaceToDepth", "SpaceToDepth", (f(2, 2, 4, 6),), {"blocksize": 2})
    yield Case("Trilu", "Trilu", (f(2, 4, 5), np.array(1)), {"upper": 0}, (1,))
    yield Case("EyeLike", "EyeLike", (f(3, 5),), {"k": 1})
    yield Case("Range", "Range", (np.array(2), np.array(11), np.array(3)), constants=(0, 1, 2))
    yield Case("Shape", "Shape", (f(3, 5),), {"start": 1})


def indices() -> Iterator[Case]:
    """Gathers, scatters, sorting, resizing, recurrence."""
    yield Case("Gather", "Gather", (f(5, 4), whole(2, 3, low=-5, high=5)))
    yield Case("Gather.scalar", "Gather", (f(5, 4), np.array(-2)), {"axis": 1}, (1,))
    yield Case("GatherElements", "GatherElements", (f(3, 4), whole(3, 2, low=0, high=4)), {"axis": 1})
    yield Case("GatherND", "GatherND", (f(3, 4, 5), whole(3, 2, 1, low=0, high=4)), {"batch_dims": 1})
    yield Case(
        "ScatterElements",
        "ScatterElements",
        (f(3, 4), whole(3, 2, low=0, high=4), f(3, 2)),
        {"axis": 1, "reduction": "add"},
    )
    yield Case("ScatterND", "ScatterND", (f(4, 5), i(1, 3).reshape(2, 1), f(2, 5)))
    yield Case("TopK", "TopK", (f(3, 9), i(4)), {"axis": 1}, (1,), outputs=2)
    yield Case("TopK.smallest", "TopK", (f(3, 9), i(2)), {"axis": 0, "largest": 0}, (1,), outputs=2)
    yield Case(
        "OneHot",
        "OneHot",
        (whole(2, 3, low=-4, high=4), np.array(4), np.array([1.0, 3.0], np.float32)),
        {"axis": 1},
        (1, 2),
    )
    yield Case("CumSum", "CumSum", (f(3, 5), np.array(1)), {"exclusive": 1, "reverse": 1}, (1,))
    yield Case("ReverseSequence", "ReverseSequence", (f(4, 3, 2), i(4, 2, 1)), {"time_axis": 0, "batch_axis": 1})
    none = np.zeros(0, np.float32)
    for mode, coordinates, scale in (
        ("nearest", "asymmetric", 2.0), ("linear", "half_pixel", 1.5), ("linear", "align_corners", 2.0),
        ("cubic", "half_pixel", 2.0), ("nearest", "half_pixel", 0.5), ("linear", "pytorch_half_pixel", 0.6),
    ):  # fmt: skip
        yield Case(
            f"Resize.{mode}.{coordinates}.{scale}", "Resize",
            (f(1, 2, 6, 6), none, np.array([1, 1, scale, scale], np.float32)),
            {"mode": mode, "coordinate_transformation_mode": coordinates, "nearest_mode": "floor"}, (1, 2),
        )  # fmt: skip
    yield Case(
        "Resize.antialias",
        "Resize",
        (f(1, 1, 8, 8), none, None, i(1, 1, 3, 4)),
        {"mode": "linear", "antialias": 1},
        (1, 3),
    )
    for mode in ("linear", "nearest", "cubic"):
        for padding in ("zeros", "border", "reflection"):
            how = {"mode": mode, "padding_mode": padding}
            yield Case(
                f"GridSample.{mode}.{padding}",
                "GridSample",
                (f(2, 2, 5, 6), f(2, 3, 4, 2)),
                how,
                rtol=1e-3,
                atol=1e-4,
            )
    for direction, sets in (("forward", 1), ("bidirectional", 2)):
        attributes: dict[str, Any] = {"hidden_size": 5, "direction": direction}
        yield Case(
            f"LSTM.{direction}",
            "LSTM",
            (f(6, 2, 3), f(sets, 20, 3), f(sets, 20, 5), f(sets, 40)),
            attributes,
            (1, 2, 3),
            3,
        )
        yield Case(
            f"GRU.{direction}",
            "GRU",
            (f(6, 2, 3), f(sets, 15, 3), f(sets, 15, 5), f(sets, 30)),
            attributes,
            (1, 2, 3),
            2,
        )
        lengths = np.array([6, 3], np.int32)
        yield Case(
            f"RNN.{direction}",
            "RNN",
            (f(6, 2, 3), f(sets, 5, 3), f(sets, 5, 5), f(sets, 10), lengths),
            attributes,
            (1, 2, 3),
            2,
        )
    yield Case(
        "GRU.linear",
        "GRU",
        (f(6, 2, 3), f(1, 15, 3), f(1, 15, 5), f(1, 30)),
        {"hidden_size": 5, "linear_before_reset": 1},
        (1, 2, 3),
        2,
    )


def quantized() -> Iterator[Case]:
    """Quantization: QDQ, QOperators, integer contractions."""
    u8, s8 = np.uint8, np.int8
    scale, zero = np.float32(0.05), np.uint8(120)
    yield Case("QuantizeLinear", "QuantizeLinear", (f(3, 4), scale, zero), constants=(1, 2))
    yield Case("QuantizeLinear.axis", "QuantizeLinear", (f(3, 4), unit(4), np.zeros(4, s8)), {"axis": 1}, (1, 2))
    yield Case(
        "DequantizeLinear", "DequantizeLinear", (whole(3, 4, low=0, high=255, dtype=u8), scale, zero), constants=(1, 2)
    )
    yield Case("DequantizeLinear.axis", "DequantizeLinear", (whole(3, 4, dtype=s8), unit(3)), {"axis": 0}, (1,))
    yield Case(
        "DequantizeLinear.block",
        "DequantizeLinear",
        (whole(6, 4, dtype=s8), unit(3, 4)),
        {"axis": 0, "block_size": 2},
        (1,),
    )
    yield Case("DynamicQuantizeLinear", "DynamicQuantizeLinear", (f(3, 4),), outputs=3)
    a, b = whole(3, 8, low=0, high=255, dtype=u8), whole(8, 5, dtype=s8)
    yield Case("MatMulInteger", "MatMulInteger", (a, b, np.uint8(7), np.int8(0)), constants=(1, 2, 3))
    x, w = whole(1, 3, 6, 6, low=0, high=255, dtype=u8), whole(4, 3, 3, 3, low=0, high=255, dtype=u8)
    yield Case("ConvInteger", "ConvInteger", (x, w, np.uint8(100), np.uint8(128)), {"pads": [1, 1, 1, 1]}, (1, 2, 3))
    q = (np.float32(0.02), np.uint8(128))
    yield Case(
        "QLinearMatMul",
        "QLinearMatMul",
        (a, *q, whole(8, 5, low=0, high=255, dtype=u8), *q, np.float32(0.1), np.uint8(90)),
        constants=(1, 2, 3, 4, 5, 6, 7),
    )
    yield Case(
        "QLinearConv",
        "QLinearConv",
        (x, *q, w, *q, np.float32(0.3), np.uint8(90), whole(4, dtype=np.int32)),
        constants=tuple(range(1, 9)),
    )
    for op in ("QLinearAdd", "QLinearMul"):
        yield Case(
            op,
            op,
            (a, *q, whole(3, 8, low=0, high=255, dtype=u8), *q, np.float32(0.05), np.uint8(100)),
            constants=(1, 2, 4, 5, 6, 7),
            domain=MS,
        )
    yield Case(
        "QLinearSigmoid", "QLinearSigmoid", (a, *q, np.float32(1 / 256), np.uint8(0)), constants=(1, 2, 3, 4), domain=MS
    )
    pool = whole(1, 3, 6, 6, low=0, high=255, dtype=u8)
    yield Case(
        "QLinearGlobalAveragePool",
        "QLinearGlobalAveragePool",
        (pool, *q, *q),
        {"channels_last": 0},
        (1, 2, 3, 4),
        domain=MS,
    )
    packed = whole(6, 2, 16, low=0, high=255, dtype=u8)
    yield Case(
        "MatMulNBits",
        "MatMulNBits",
        (f(3, 64), packed, unit(12)),
        {"K": 64, "N": 6, "bits": 4, "block_size": 32},
        (1, 2),
        domain=MS,
        rtol=1e-3,
        atol=1e-3,
    )


CASES = [c for family in (pointwise, contractions, normal, shapes, indices, quantized) for c in family()]
