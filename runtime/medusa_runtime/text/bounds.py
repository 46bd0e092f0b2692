"""How many tokens a text has at least, without tokenising it: megabytes take seconds, and most of them fit no model."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, models

from medusa_runtime.text.byte_fallback import BYTE
from medusa_runtime.text.token_bytes import byte_letters

UNHEARD_OF = "\U000f1234"  # a private-use character, which no vocabulary has


class LengthBound:
    """Bounds a text's tokens by its bytes.

    A token stands for at most as many bytes as the longest token has, if the tokenizer drops and merges nothing on the way:
    there is no bound with normalisers that may shorten a text (but NFC, which is applied here), with splits that drop what they
    split at, and with models that have an unknown token. Bytes for which a byte-level tokenizer has no token do not count, nor
    does white space if there are tokens that swallow it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        normalizers = list(_parts(tokenizer.normalizer, "normalizers"))
        splits = list(_parts(tokenizer.pre_tokenizer, "pretokenizers"))
        is_byte_level = any(part["type"] == "ByteLevel" for part in [*normalizers, *splits])
        self._is_composed = any(part["type"] == "NFC" for part in normalizers)
        self._swallows_space = any(token.lstrip or token.rstrip for token in added)
        self._longest: int | None = None  # bytes; None if there is no bound
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        letters = byte_letters() if is_byte_level else {}  # tokens are spelled in them, one a byte
        self._without_token = bytes(byte for byte, letter in letters.items() if letter not in vocabulary)
        spells = isinstance(tokenizer.model, models.BPE) if is_byte_level else _falls_back_to_bytes(tokenizer)
        if spells and all(map(_keeps_length, normalizers)) and all(map(_drops_nothing, splits)):
            spelled = [text for token in added for text in (token.content, unicodedata.normalize("NFC", token.content))]
            lengths = map(len, vocabulary) if is_byte_level else (len(token.encode()) for token in vocabulary)
            self._longest = max([*lengths, *(len(text.encode()) for text in spelled)])

    def least_tokens(self, text: str) -> int:
        """A number of tokens that the text reaches or exceeds; 0 if nothing can be said."""
        if self._longest is None:
            return 0
        if self._is_composed:
            text = unicodedata.normalize("NFC", text)
        if self._swallows_space:
            text = "".join(text.split())
        return -(-len(text.encode().translate(None, self._without_token)) // self._longest)


def _parts(component: Any, name: str) -> Iterator[dict[str, Any]]:
    """The settings of a tokenizer's component, or those of each of its parts."""
    if component is not None:
        yield from _flat(json.loads(component.__getstate__()), name)


def _flat(settings: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    if settings["type"] == "Sequence":
        for part in settings[name]:
            yield from _flat(part, name)
    else:
        yield settings


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    match normalizer:
        case {"type": "NFC" | "Prepend" | "ByteLevel"}:
            return True
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
            return len(content.encode()) >= len(pattern.encode())
    return False


def _drops_nothing(pre_tokenizer: dict[str, Any]) -> bool:
    match pre_tokenizer:
        case {"type": "ByteLevel" | "Metaspace" | "Digits" | "UnicodeScripts"}:
            return True
        case {"type": "Split" | "Punctuation", "behavior": behavior}:
            return bool(behavior != "Removed")
    return False


def _falls_back_to_bytes(tokenizer: Tokenizer) -> bool:
    """Whether the model spells a character that it does not know by the tokens of its bytes."""
    spelled = tokenizer.model.tokenize(UNHEARD_OF)
    return len(spelled) == len(UNHEARD_OF.encode()) and all(BYTE.fullmatch(token.value) for token in spelled)
