"""Tokenising text without stopping the other threads of the process."""

from __future__ import annotations

from tokenizers import Encoding, Tokenizer

LONG = 1 << 12  # characters; a shorter text takes a few milliseconds


def encoded(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> Encoding:
    """Tokenise a text. Of the result, only `ids` and `special_tokens_mask` may be used.

    `Tokenizer.encode` keeps Python's lock until it is done, so event loops and the thread that decodes would wait for it: a
    quarter of a second for 300 KB. The methods for batches release the lock. They start threads of the library, after which
    it prints a warning in each child of a fork, so only long texts go that way.

    Args:
        tokenizer: the tokenizer.
        text: the whole text.
        add_special_tokens: put the tokenizer's own first and last tokens around it.
    """
    if len(text) < LONG:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    [found] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return found
