"""The errors a user can meet, under their public name: ``from bitwright.errors import Unsupported``."""

from bitwright.ir.errors import BitwrightError, InvalidInput, Problem, Unsupported, VerifyError

__all__ = ["BitwrightError", "InvalidInput", "Problem", "Unsupported", "VerifyError"]
