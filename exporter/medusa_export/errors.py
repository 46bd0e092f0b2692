"""Errors of export, quantising and validation. The hierarchy is `medusa_runtime.errors`'."""

from __future__ import annotations

from medusa_runtime.errors import MedusaError


class ExportError(MedusaError):
    """A model cannot be traced or written."""


class QualityError(MedusaError):
    """A quantised bundle would be further from the original than was allowed."""

    exit_code = 3


class ValidationMismatchError(MedusaError):
    """A bundle's output differs from the reference by more than is tolerated."""

    exit_code = 3
