"""ONNX in: :func:`load_onnx`."""

from bitwright.frontends.onnx.importer import Limits
from bitwright.frontends.onnx.load import load_onnx
from bitwright.frontends.onnx.values import NeedsConstants

__all__ = ["Limits", "NeedsConstants", "load_onnx"]
