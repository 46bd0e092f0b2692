"""The bytes that single tokens stand for. One token may hold a part of a character, which has no text of its own."""

from __future__ import annotations

from tokenizers import Tokenizer

from medusa_runtime.text.byte_fallback import BYTE


def byte_letters() -> dict[int, str]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, and other bytes for the characters from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}


class TokenBytes:
    """Spells tokens of a tokenizer in bytes. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: token.content.encode() for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        settings = b"" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()
        is_byte_level = b'"ByteLevel"' in settings
        self._bytes = {letter: byte for byte, letter in byte_letters().items()} if is_byte_level else None
        anchor = tokenizer.encode("a", add_special_tokens=False).ids
        self._anchor = list(anchor[-1:])  # a token before the token asked for: some decoders treat the first one differently

    def of(self, token_id: int) -> bytes:
        """The token's bytes, those of a special token's name included; none for an id that the tokenizer does not know."""
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._bytes is not None:
            return b"".join(bytes([self._bytes[char]]) if char in self._bytes else char.encode() for char in token)
        if found := BYTE.fullmatch(token):
            return bytes([int(found[1], 16)])
        before, both = (str(self._tokenizer.decode(ids)) for ids in (self._anchor, [*self._anchor, token_id]))
        return both[len(before) :].encode()
