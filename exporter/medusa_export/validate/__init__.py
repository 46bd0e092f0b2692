"""Validation: compares a bundle with the PyTorch model that it was made from."""

from medusa_export.validate.prompts import PROMPTS
from medusa_export.validate.validation import record, validate

__all__ = ["PROMPTS", "record", "validate"]
