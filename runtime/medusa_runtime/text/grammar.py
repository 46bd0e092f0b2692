"""Structured output: what may come next according to a JSON schema, a regular expression or a list of choices.

The grammars are llguidance's; it is imported here alone, and only when a request asks for a structure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from medusa_runtime.errors import MissingExtraError, OptionError, RequestError, first_line
from medusa_runtime.text.codec import TextCodec

try:
    import llguidance
except ImportError as error:
    raise MissingExtraError("llguidance", "structured") from error

# As json.dumps writes it. Free white space would let a model that is unsure write nothing else.
JSON_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarCompiler:
    """Makes guides for a tokenizer.

    Args:
        codec: the bundle's.
        vocab_size: tokens that the model tells apart; those beyond the tokenizer's own are never allowed.
        eos_token_ids: the tokens that end an answer.
    """

    def __init__(self, codec: TextCodec, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        if not eos_token_ids:
            raise OptionError("this model has no end-of-sequence token, so that no structure could end")
        self._vocab_size = vocab_size
        try:
            base = llguidance.LLTokenizer(codec.tokenizer.to_str(), n_vocab=vocab_size, eos_token=list(eos_token_ids))
        except ValueError as error:
            raise OptionError(f"this model's tokenizer cannot be guided: {first_line(error)}") from error
        words = llguidance.TokenizerWrapper(_Words(base, codec, eos_token_ids[0]))
        self._tokenizer = llguidance.LLTokenizer(words, n_vocab=vocab_size, eos_token=list(eos_token_ids))

    def compile(self, structure: dict[str, Any]) -> GrammarGuide:
        """A guide for one answer.

        Args:
            structure: as `GenerationOptions.structure`.

        Raises:
            OptionError: the schema or the expression is malformed, or asks for what cannot be guided.
        """
        [(name, value)] = structure.items()
        try:
            grammar = _grammar(name, value)
        except (ValueError, TypeError, RecursionError) as error:
            raise OptionError(f"{name} cannot be used: {first_line(error)}") from error
        if problem := llguidance.LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise OptionError(f"{name} cannot be used: {' '.join(problem.split())}")
        return GrammarGuide(llguidance.LLMatcher(self._tokenizer, grammar, log_level=0), self._vocab_size)


class GrammarGuide:
    """The state of one answer's grammar; see `drafting.guide.Guide`. It stands after the answer's last decided token."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def copy(self) -> GrammarGuide:
        """Another answer's state, at the same place."""
        return GrammarGuide(self._matcher.deep_copy(), self._vocab_size)

    def advance(self, token_ids: Sequence[int]) -> None:
        """See `Guide.advance`."""
        self._matcher.consume_tokens(list(token_ids))
        self._check()

    def allowed(self, path: Sequence[int]) -> npt.NDArray[np.bool_]:
        """See `Guide.allowed`. [V]"""
        self.advance(path)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        self._matcher.rollback(len(path))
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def lets_pass(self, path: Sequence[int]) -> bool:
        """See `Guide.lets_pass`."""
        return bool(self._matcher.validate_tokens(list(path)) == len(path))

    def forced(self) -> list[int]:
        """See `Guide.forced`."""
        return list(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the structure cannot be followed: {first_line(ValueError(self._matcher.get_error()))}")


def _grammar(name: str, value: Any) -> str:
    match name:
        case "json_schema":
            return str(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(dict(value)), overrides=JSON_FORM))
        case "regex":
            if (len(value) - len(value.rstrip("\\"))) % 2:  # llguidance would leave it out
                raise ValueError("it ends with a backslash that escapes nothing")
            return str(llguidance.LLMatcher.grammar_from_regex(value))
        case _:
            return str(llguidance.LLMatcher.grammar_from_regex("|".join(re.escape(text) for text in value)))


class _Words:
    """A tokenizer for llguidance that reads text as text, even where it is spelled like a special token."""

    def __init__(self, base: llguidance.LLTokenizer, codec: TextCodec, eos_token_id: int) -> None:
        self.eos_token_id, self.bos_token_id = eos_token_id, None
        self.tokens = [base.decode_bytes([token]) for token in range(base.vocab_size)]
        self.special_token_ids = [token for token in range(base.vocab_size) if base.is_special_token(token)]
        self._plain = Tokenizer.from_str(codec.tokenizer.to_str())
        self._plain.encode_special_tokens = True

    def __call__(self, text: str | bytes) -> list[int]:
        return list(self._plain.encode(text.decode() if isinstance(text, bytes) else text, add_special_tokens=False).ids)
