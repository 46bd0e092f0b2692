"""Byte tokens such as <0xF0>, by which the tokenizers of Llama 2 and its kin spell characters that have no token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from tokenizers import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def has_byte_fallback(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's decoder joins byte tokens to characters."""
    return tokenizer.decoder is not None and b'"ByteFallback"' in tokenizer.decoder.__getstate__()


def decoded(tokenizer: Tokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text of token ids, with one replacement character for each incomplete character.

    The decoder of `tokenizers` loses all characters of a run of byte tokens if one of them is incomplete, and writes one
    replacement character for each byte. Other decoders, Python and browsers do it as this function does.
    """
    added = tokenizer.get_added_tokens_decoder().values() if skip_special_tokens else []
    special = {token.content for token in added if token.special}
    found = (tokenizer.id_to_token(token) for token in token_ids)
    tokens = [token for token in found if token is not None and token not in special]
    runs = groupby(tokens, key=lambda token: BYTE.fullmatch(token) is not None)
    mended = [token for is_bytes, run in runs for token in (_mended(list(run)) if is_bytes else run)]
    return str(tokenizer.decoder.decode(mended))


def _mended(tokens: list[str]) -> Iterator[str]:
    """Byte tokens with each incomplete character replaced."""
    data = bytes(int(token[3:5], 16) for token in tokens)
    start = 0
    while start < len(data):
        try:
            data[start:].decode()
        except UnicodeDecodeError as error:
            yield from tokens[start : start + error.start]
            yield UNKNOWN
            start += error.end
        else:
            yield from tokens[start:]
            return
