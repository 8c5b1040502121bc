"""MLIR in: :func:`load_mlir`; and out: :func:`to_mlir`; torch-mlir's own lowerings: :func:`lower`."""

from bitwright.frontends.mlir.context import lower
from bitwright.frontends.mlir.load import load_mlir
from bitwright.frontends.mlir.write import to_mlir

__all__ = ["load_mlir", "lower", "to_mlir"]
