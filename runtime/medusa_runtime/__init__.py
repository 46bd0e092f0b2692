"""Run a Medusa bundle: LLM decoding of several tokens a step, without PyTorch.

>>> from medusa_runtime import MedusaLM
>>> lm = MedusaLM.from_bundle("build/fp32")
>>> lm.generate("What is the capital of France?", max_new_tokens=32).text
"""

from medusa_runtime.backends import BACKENDS, Backend
from medusa_runtime.engine import DecodingEngine, DecodingStats, SequenceStep
from medusa_runtime.errors import (
    BackendError,
    BundleError,
    CapacityError,
    MedusaError,
    MissingExtraError,
    OptionError,
    StaleStreamError,
    TreeError,
)
from medusa_runtime.lm import GenerationChunk, GenerationResult, MedusaLM
from medusa_runtime.manifest import Manifest
from medusa_runtime.text import Message
from medusa_runtime.tree import CandidateTree, most_likely_tree, prior_tree

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendError",
    "BundleError",
    "CandidateTree",
    "CapacityError",
    "DecodingEngine",
    "DecodingStats",
    "GenerationChunk",
    "GenerationResult",
    "Manifest",
    "MedusaError",
    "MedusaLM",
    "Message",
    "MissingExtraError",
    "OptionError",
    "SequenceStep",
    "StaleStreamError",
    "TreeError",
    "most_likely_tree",
    "prior_tree",
]
