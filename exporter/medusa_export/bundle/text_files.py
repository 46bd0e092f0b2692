"""A bundle's text files: its tokenizer and chat templates, or neither for a model of token ids alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from transformers import PreTrainedTokenizerBase

from medusa_export.model.chat_templates import chat_templates
from medusa_export.model.checkpoint import Backbone
from medusa_export.model.tokenizer import check_vocabulary, has_tokenizer, load_tokenizer, write_tokenizer
from medusa_export.progress import note
from medusa_runtime.bundle.manifest import FileFacts, file_facts
from medusa_runtime.text.codec import CHAT_NAME, TOKENIZER_NAME
from medusa_runtime.text.template import ChatTemplate


@dataclass(frozen=True)
class TextFiles:
    """A checkpoint's tokenizer and chat templates, in the form that the runtime reads."""

    source: str
    tokenizer: PreTrainedTokenizerBase | None
    chat: ChatTemplate | None

    @classmethod
    def load(cls, source: str, *, trust_remote_code: bool = False) -> Self:
        """Read a checkpoint's tokenizer and templates. A note says if it has none.

        Raises:
            CheckpointError: the tokenizer or a template is damaged, or cannot be read without Transformers.
        """
        if not has_tokenizer(source):
            note(f"{source} has no tokenizer: the bundle takes and gives token ids alone")
            return cls(source, None, None)
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, tell=note)
        return cls(source, tokenizer, chat_templates(tokenizer, source))

    def check(self, backbone: Backbone) -> None:
        """Say if the tokenizer has tokens that the model does not know."""
        if self.tokenizer is not None:
            check_vocabulary(self.tokenizer, backbone.facts.vocab_size, self.source, note)

    def write(self, directory: Path) -> dict[str, FileFacts]:
        """Write the files, and return their entries for the manifest."""
        if self.tokenizer is None or self.chat is None:
            return {}
        write_tokenizer(self.tokenizer, self.source, directory / TOKENIZER_NAME)
        self.chat.save(directory / CHAT_NAME)
        return {name: file_facts(directory / name) for name in (TOKENIZER_NAME, CHAT_NAME)}
