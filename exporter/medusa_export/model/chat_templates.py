"""Reads and checks the chat templates of a checkpoint, for its bundle."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from medusa_export.progress import note
from medusa_heads.errors import CheckpointError
from medusa_runtime.errors import BundleError
from medusa_runtime.text.template import DEFAULT, ChatTemplate


def chat_templates(tokenizer: PreTrainedTokenizerBase, model: str) -> ChatTemplate:
    """All chat templates of a checkpoint. If there are several, a note says which one is the default.

    Raises:
        CheckpointError: a template is not valid Jinja.
    """
    found = tokenizer.chat_template or {}
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    chat = ChatTemplate({DEFAULT: found} if isinstance(found, str) else found, special_tokens)
    try:
        chat.check()
    except BundleError as error:
        raise CheckpointError(f"{model}: {error}") from error
    if len(chat.sources) > 1:
        note(_summary(chat))
    return chat


def _summary(chat: ChatTemplate) -> str:
    names = ", ".join(sorted(chat.sources))
    if chat.default is None:
        return f"chat templates: {names}; none is called default, so each request has to name one"
    return f"chat templates: {names}; {chat.default} is used if a request names none"
