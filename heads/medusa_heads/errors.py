"""Errors of making heads. The base class is in `medusa_runtime.errors`."""

from __future__ import annotations

from medusa_runtime.errors import MedusaError


class CheckpointError(MedusaError):
    """A checkpoint of a model or of heads is missing or damaged, or the two do not belong together."""


class EndpointError(MedusaError):
    """An endpoint that answers prompts cannot be reached, or it refuses a prompt."""
