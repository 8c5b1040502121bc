"""ONNX in: :func:`load_onnx`; and out: :func:`to_onnx`."""

from bitwright.frontends.onnx.importer import Limits
from bitwright.frontends.onnx.load import load_onnx
from bitwright.frontends.onnx.values import NeedsConstants
from bitwright.frontends.onnx.write import to_onnx

__all__ = ["Limits", "NeedsConstants", "load_onnx", "to_onnx"]
