"""Validation: a bundle against the PyTorch model it was made from."""

from medusa_export.validate.prompts import PROMPTS
from medusa_export.validate.validation import validate, validate_and_record

__all__ = ["PROMPTS", "validate", "validate_and_record"]
