"""Errors of export, quantisation, validation and tuning. The base class is in `medusa_runtime.errors`."""

from __future__ import annotations

from medusa_runtime.errors import MedusaError


class ExportError(MedusaError):
    """A model cannot be traced or written."""


class QualityError(MedusaError):
    """A quantised bundle differs from the original by more than the user allowed."""

    exit_code = 3


class ValidationMismatchError(MedusaError):
    """A bundle's output differs from the reference by more than the tolerance."""

    exit_code = 3


class PredictionError(MedusaError):
    """A bundle decoded slower or faster than its tuning predicted."""

    exit_code = 3
