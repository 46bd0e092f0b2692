"""Validation: compares a bundle with the PyTorch model that it was made from."""

from medusa_export.check.builtin_prompts import PROMPTS
from medusa_export.check.validation import record, validate

__all__ = ["PROMPTS", "record", "validate"]
