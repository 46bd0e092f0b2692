"""Errors of making heads. The hierarchy is `medusa_runtime.errors`'."""

from __future__ import annotations

from medusa_runtime.errors import MedusaError


class CheckpointError(MedusaError):
    """A model or heads checkpoint is missing, damaged, or does not fit the other."""


class EndpointError(MedusaError):
    """An endpoint that answers prompts cannot be reached, or refuses one."""
