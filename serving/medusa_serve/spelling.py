"""Tokens as the API spells them: in log-probabilities, and in the drafts of the steps."""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping, Sequence
from typing import Any

from medusa_runtime import GenerationChunk, TextCodec, TokenLogprob, VerifiedDraft

LOWEST = -9999.0  # what OpenAI writes for a probability of zero, which JSON has no number for


class Speller:
    """Spells the tokens of a codec."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec

    def text(self, token_id: int) -> str:
        """One token's text. A part of a character becomes a replacement character."""
        return self._codec.token_bytes(token_id).decode("utf-8", "replace")

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """The texts of tokens that follow one another: a character belongs to the token that completes it."""
        return TokenTexts(self._codec).push(token_ids, is_last=True)

    def chat_logprobs(self, logprobs: Sequence[TokenLogprob], count: int) -> dict[str, Any]:
        """`logprobs` of a chat's choice.

        Args:
            logprobs: of the choice's tokens.
            count: how many likely tokens are told for each of them.
        """
        content = [
            self._entry(one.token_id, one.logprob)
            | {"top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in one.top[:count]]}
            for one in logprobs
        ]
        return {"content": content, "refusal": None}

    def completion_logprobs(
        self, logprobs: Sequence[TokenLogprob | None], token_ids: Sequence[int], offset: int
    ) -> dict[str, Any]:
        """`logprobs` of a completion's choice.

        Args:
            logprobs: of its tokens; None for the first token of a prompt, which nothing comes before.
            token_ids: its tokens.
            offset: characters before the first of them.
        """
        texts, offsets = self.texts(token_ids), []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": [self.text(token_id) for token_id in token_ids],
            "token_logprobs": [None if one is None else _number(one.logprob) for one in logprobs],
            "top_logprobs": [None if one is None else self._by_text(one) for one in logprobs],
            "text_offset": offsets,
        }

    def prompt_logprobs(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
        """The field `prompt_logprobs`, as vLLM has it: likely tokens and the own one, by id; none for the first token."""
        return [None, *map(self._by_id, logprobs)]

    def _by_text(self, one: TokenLogprob) -> dict[str, float]:
        return {self.text(token_id): _number(value) for token_id, value in one.top}

    def _by_id(self, one: TokenLogprob) -> dict[str, Any]:
        told = {
            str(token_id): {"logprob": _number(value), "rank": rank, "decoded_token": self.text(token_id)}
            for rank, (token_id, value) in enumerate(one.top, start=1)
        }
        own = {"logprob": _number(one.logprob), "rank": None, "decoded_token": self.text(one.token_id)}
        return {str(one.token_id): own} | told

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelled = self._codec.token_bytes(token_id)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": _number(logprob), "bytes": list(spelled)}


class TokenTexts:
    """The texts of one answer's tokens as they come. Together they are the answer's text, special tokens included."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int], *, is_last: bool = False) -> list[str]:
        """The texts that tokens complete."""
        texts = [self._decoder.decode(self._codec.token_bytes(token_id)) for token_id in token_ids]
        if is_last and texts:
            texts[-1] += self._decoder.decode(b"", final=True)
        return texts


def told_step(index: int, chunk: GenerationChunk, texts: Sequence[str], speller: Speller) -> dict[str, Any]:
    """`medusa` of a chunk: which tokens a step gave out, where each came from, and the draft that it verified.

    Args:
        index: of the answer.
        chunk: the step's.
        texts: of the chunk's tokens.
        speller: spells the tokens of the draft.
    """
    draft, tokens = chunk.draft, []
    accepted = [] if draft is None else draft.accepted[1 : 1 + len(chunk.token_ids)]
    for place, (token_id, text) in enumerate(zip(chunk.token_ids, texts, strict=True)):
        told: dict[str, Any] = {"id": token_id, "text": text, "source": "model", "depth": 0}
        if draft is not None and place < len(accepted):
            told |= {"source": draft.sources[accepted[place]], "depth": draft.depths[accepted[place]]}
        tokens.append(told)
    nodes = None if draft is None else {"nodes": _nodes(draft, speller), "accepted": draft.accepted}
    return {"index": index, "tokens": tokens, "draft": nodes}


def _nodes(draft: VerifiedDraft, speller: Speller) -> list[Mapping[str, Any]]:
    columns = (draft.token_ids, draft.parents, draft.depths, draft.probabilities, draft.sources)
    return [
        {
            "id": token_id,
            "text": speller.text(token_id),
            "parent": parent,
            "depth": depth,
            "probability": round(probability, 6),
            "source": source,
        }
        for token_id, parent, depth, probability, source in zip(*columns, strict=True)
    ]


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST
