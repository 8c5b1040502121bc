"""The peers of the demo: the same model in torch and onnxruntime, in float and quantized as its own tools advise."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

Feed = dict[str, np.ndarray[Any, Any]]
Call = Callable[..., np.ndarray[Any, Any]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters and quantizers talk a lot."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def export(module: torch.nn.Module, examples: tuple[torch.Tensor, ...], names: Sequence[str], path: Path) -> Path:
    """Write the model as ONNX with a free batch size."""
    axes = {name: {0: "b"} for name in (*names, "result")}
    with quiet(), torch.no_grad():
        torch.onnx.export(
            module, examples, str(path), input_names=list(names), output_names=["result"], dynamic_axes=axes,
            opset_version=17, dynamo=False,
        )  # fmt: skip
    return path


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequence[Feed]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self.feeds, None)


def quantize(model: Path, calibration: Sequence[Feed], path: Path) -> Path:
    """onnxruntime's static quantization, its advice for CNNs: QDQ, unsigned activations, signed weights per channel."""
    ready = path.with_suffix(".ready.onnx")
    with quiet():
        quant_pre_process(str(model), str(ready))
        quantize_static(
            str(ready), str(path), _Reader(calibration), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    ready.unlink()
    return path


def quantize_transformer(model: Path, path: Path) -> Path:
    """onnxruntime's dynamic quantization, its advice for transformers.

    On MiniLM, signed weights per channel are faster and closer to float than unsigned ones, and than static QDQ.
    """
    ready = path.with_suffix(".ready.onnx")
    with quiet():
        quant_pre_process(str(model), str(ready))
        quantize_dynamic(str(ready), str(path), per_channel=True, weight_type=QuantType.QInt8)
    ready.unlink()
    return path


def session(model: Path) -> Call:
    """onnxruntime on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    running = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in running.get_inputs()]
    return lambda *values: running.run(None, dict(zip(names, values, strict=True)))[0]


def eager(module: torch.nn.Module) -> Call:
    """The module itself; the caller sets torch's number of threads."""

    def call(*values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            result: torch.Tensor = module(*(torch.from_numpy(v) for v in values))
        return result.numpy()

    return call
