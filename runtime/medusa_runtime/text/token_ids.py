"""The codec of a bundle whose model came without a tokenizer: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from medusa_runtime.bundle.manifest import Manifest
from medusa_runtime.errors import OptionError
from medusa_runtime.text.codec import TextCodec

NO_TEXT = "this bundle has no tokenizer, so it takes and gives token ids alone"


def open_codec(bundle: str | Path, manifest: Manifest) -> TextCodec:
    """The codec of a bundle: its tokenizer and chat templates, or one that refuses text.

    Raises:
        BundleError: the tokenizer or the file of the chat templates is missing or damaged.
    """
    return TextCodec(bundle) if manifest.has_text else TokenIdsOnly()


class TokenIdsOnly(TextCodec):
    """Refuses text in one line. Answers have no text, only token ids."""

    def __init__(self) -> None:
        from medusa_runtime.text.template import ChatTemplate  # noqa: PLC0415 - as in the base

        # not the base's: there is no file to read
        self.chat = ChatTemplate({}, {})

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]  # the base has an attribute
        """There is none.

        Raises:
            OptionError: always.
        """
        raise OptionError(f"{NO_TEXT}; leave out what needs text, such as a grammar")

    def encode(self, prompt: Any, **_: Any) -> NoReturn:
        """Refuse text.

        Raises:
            OptionError: always.
        """
        del prompt
        raise OptionError(f"{NO_TEXT}; give the prompt as token ids")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """No text."""
        del token_ids, skip_special_tokens
        return ""

    def token_bytes(self, token_id: int) -> bytes:
        """No bytes."""
        del token_id
        return b""

    def special_token_id(self, text: str) -> int | None:
        """Refuse a stop text: there is no text that could contain it.

        Raises:
            OptionError: always.
        """
        raise OptionError(f"{NO_TEXT}; give stop_token_ids instead of the stop text {text!r}")

    def render(self, messages: Any, **chosen: Any) -> NoReturn:
        """Refuse messages.

        Raises:
            OptionError: always.
        """
        del messages, chosen
        raise OptionError(f"{NO_TEXT}; it has no chat template")
