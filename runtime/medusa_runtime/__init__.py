"""Run a Medusa bundle: LLM decoding of several tokens a step, many requests at once, without PyTorch.

>>> from medusa_runtime import MedusaLM
>>> lm = MedusaLM.from_bundle("build/fp32")
>>> lm.generate("What is the capital of France?", max_new_tokens=32).text
"""

from medusa_runtime.backends import BACKENDS, Backend, Placement, choose_backend, open_backend
from medusa_runtime.budget import LearnedCosts, StepCosts
from medusa_runtime.engine import DecodingEngine
from medusa_runtime.errors import (
    BackendError,
    BundleError,
    CapacityError,
    ClosedError,
    MedusaError,
    MissingExtraError,
    OptionError,
    QueueFullError,
    RequestError,
    TreeError,
)
from medusa_runtime.lm import MedusaLM
from medusa_runtime.manifest import Manifest
from medusa_runtime.options import DecodingOptions, GenerationOptions
from medusa_runtime.results import Choice, GenerationChunk, GenerationResult, ServiceStats
from medusa_runtime.sequence import FinishReason, Sequence, SequenceStep, TokenLogprob
from medusa_runtime.service import Handle
from medusa_runtime.stats import DecodingStats
from medusa_runtime.text import Message, Prompt
from medusa_runtime.tree import CandidateTree, DynamicTree, most_likely_tree, prior_tree

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendError",
    "BundleError",
    "CandidateTree",
    "CapacityError",
    "Choice",
    "ClosedError",
    "DecodingEngine",
    "DecodingOptions",
    "DecodingStats",
    "DynamicTree",
    "FinishReason",
    "GenerationChunk",
    "GenerationOptions",
    "GenerationResult",
    "Handle",
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
    "RequestError",
    "Sequence",
    "SequenceStep",
    "ServiceStats",
    "StepCosts",
    "TokenLogprob",
    "TreeError",
    "choose_backend",
    "most_likely_tree",
    "open_backend",
    "prior_tree",
]
