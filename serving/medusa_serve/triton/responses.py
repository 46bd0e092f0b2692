"""The output tensors of a response, as NumPy arrays by name."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime import Choice, GenerationChunk, GenerationResult, TokenLogprob
from medusa_serve.answers import FINISH
from medusa_serve.spelling import Speller

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """What a response tells of one answer."""

    index: int
    text: str
    token_ids: list[int]
    num_accepted: int
    finish_reason: str
    logprobs: Sequence[TokenLogprob] | None

    @classmethod
    def of_chunk(cls, chunk: GenerationChunk) -> Part:
        """The part that one step added. Its reason is None as text before the end, as in vLLM's backend."""
        reason = "None" if chunk.finish_reason is None else FINISH[chunk.finish_reason]
        return cls(chunk.index, chunk.text, chunk.token_ids, chunk.num_accepted, reason, chunk.logprobs)

    @classmethod
    def of_choice(cls, index: int, choice: Choice, echoed: str) -> Part:
        """A whole answer, with the text that stands before it."""
        accepted = choice.stats.num_accepted_tokens
        return cls(index, echoed + choice.text, choice.token_ids, accepted, FINISH[choice.finish_reason], choice.logprobs)


def make_tensors(
    parts: Sequence[Part], outputs: frozenset[str], speller: Speller, num_prompt_tokens: int, last: GenerationResult | None
) -> Tensors:
    """The tensors of a response.

    Args:
        parts: one for each answer that it is about.
        outputs: names of the tensors to make beside text_output and index.
        speller: spells tokens in log-probabilities.
        num_prompt_tokens: tokens of the prompt.
        last: the whole result if this is the last response.
    """
    scores = [part.logprobs or [] for part in parts]
    tensors: Tensors = {
        "text_output": _texts([part.text for part in parts]),
        "index": np.array([part.index for part in parts], np.int32),
    }
    if "finish_reason" in outputs:
        tensors["finish_reason"] = _texts([part.finish_reason for part in parts])
    if "cumulative_logprob" in outputs:
        tensors["cumulative_logprob"] = np.array([math.fsum(one.logprob for one in of) for of in scores], np.float32)
    if "logprobs" in outputs:
        tensors["logprobs"] = _texts([json.dumps(speller.prompt_logprobs(of)[1:]) for of in scores])
    if "num_input_tokens" in outputs:
        tensors["num_input_tokens"] = np.array([num_prompt_tokens], np.uint32)
    if "num_output_tokens" in outputs:
        tensors["num_output_tokens"] = np.array([len(part.token_ids) for part in parts], np.uint32)
    if "token_ids" in outputs:
        tensors["token_ids"] = np.array([token for part in parts for token in part.token_ids], np.int32)
    if "num_accepted" in outputs:
        tensors["num_accepted"] = np.array([part.num_accepted for part in parts], np.uint32)
    if "statistics" in outputs and last is not None:
        tensors["statistics"] = _texts([json.dumps(dataclasses.asdict(choice.stats)) for choice in last.choices])
    return tensors


def _texts(texts: list[str]) -> NDArray[np.object_]:
    return np.array([text.encode() for text in texts], np.object_)
