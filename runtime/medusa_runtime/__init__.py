"""Run a Medusa bundle: LLM decoding of several tokens a step, many requests at once, without PyTorch.

>>> from medusa_runtime import MedusaLM
>>> lm = MedusaLM.from_bundle("build/fp32")
>>> lm.generate("What is the capital of France?", max_new_tokens=32).text
"""

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
