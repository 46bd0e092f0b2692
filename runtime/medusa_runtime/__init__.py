"""Run a Medusa bundle: LLM decoding of several tokens a step, many requests at once, without PyTorch.

>>> from medusa_runtime import MedusaLM
>>> lm = MedusaLM.from_bundle("build/fp32")
>>> lm.generate("What is the capital of France?", max_new_tokens=32).text

`import medusa_runtime` loads nothing else: each name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; `_ROOMS` has the same names
    from medusa_runtime.backends.base import Backend
    from medusa_runtime.backends.choosing import BACKENDS, Placement, choose_backend, open_backend
    from medusa_runtime.bundle.cpu import Spin
    from medusa_runtime.bundle.manifest import Manifest
    from medusa_runtime.decoding.engine import DecodingEngine
    from medusa_runtime.decoding.sequence import DecodingSequence, FinishReason, SequenceStep, TokenLogprob
    from medusa_runtime.decoding.slots import CacheUse
    from medusa_runtime.decoding.stats import DecodingStats
    from medusa_runtime.decoding.verified import VerifiedDraft
    from medusa_runtime.drafting.costs import LearnedCosts, StepCosts
    from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
    from medusa_runtime.errors import (
        BackendError,
        BundleError,
        CapacityError,
        ClosedError,
        ContextLengthError,
        DeviceLostError,
        MedusaError,
        MissingExtraError,
        OptionError,
        QueueFullError,
        QueueTimeoutError,
        RequestError,
        TreeError,
    )
    from medusa_runtime.lm import MedusaLM
    from medusa_runtime.options import DecodingOptions, GenerationOptions
    from medusa_runtime.service.handle import Handle
    from medusa_runtime.service.results import Choice, GenerationChunk, GenerationResult, Health, ServiceStats
    from medusa_runtime.text.codec import Message, Prompt, TextCodec

_ROOMS = {
    "backends.base": ("Backend",),
    "backends.choosing": ("BACKENDS", "Placement", "choose_backend", "open_backend"),
    "bundle.cpu": ("Spin",),
    "bundle.manifest": ("Manifest",),
    "decoding.engine": ("DecodingEngine",),
    "decoding.sequence": ("DecodingSequence", "FinishReason", "SequenceStep", "TokenLogprob"),
    "decoding.slots": ("CacheUse",),
    "decoding.stats": ("DecodingStats",),
    "decoding.verified": ("VerifiedDraft",),
    "drafting.costs": ("LearnedCosts", "StepCosts"),
    "drafting.tree": ("CandidateTree", "DynamicTree"),
    "errors": (
        "BackendError",
        "BundleError",
        "CapacityError",
        "ClosedError",
        "ContextLengthError",
        "DeviceLostError",
        "MedusaError",
        "MissingExtraError",
        "OptionError",
        "QueueFullError",
        "QueueTimeoutError",
        "RequestError",
        "TreeError",
    ),
    "lm": ("MedusaLM",),
    "options": ("DecodingOptions", "GenerationOptions"),
    "service.handle": ("Handle",),
    "service.results": ("Choice", "GenerationChunk", "GenerationResult", "Health", "ServiceStats"),
    "text.codec": ("Message", "Prompt", "TextCodec"),
}
_PLACES = {name: f"medusa_runtime.{module}" for module, names in _ROOMS.items() for name in names}

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendError",
    "BundleError",
    "CacheUse",
    "CandidateTree",
    "CapacityError",
    "Choice",
    "ClosedError",
    "ContextLengthError",
    "DecodingEngine",
    "DecodingOptions",
    "DecodingSequence",
    "DecodingStats",
    "DeviceLostError",
    "DynamicTree",
    "FinishReason",
    "GenerationChunk",
    "GenerationOptions",
    "GenerationResult",
    "Handle",
    "Health",
    "LearnedCosts",
    "Manifest",
    "MedusaError",
    "MedusaLM",
    "Message",
    "MissingExtraError",
    "OptionError",
    "Placement",
    "Prompt",
    "QueueFullError",
    "QueueTimeoutError",
    "RequestError",
    "SequenceStep",
    "ServiceStats",
    "Spin",
    "StepCosts",
    "TextCodec",
    "TokenLogprob",
    "TreeError",
    "VerifiedDraft",
    "choose_backend",
    "open_backend",
]


def __getattr__(name: str) -> Any:
    """Import what is first asked for (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
