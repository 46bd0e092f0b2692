"""Guesses from a model's chat template how the model writes tool calls and reasoning."""

from __future__ import annotations

from collections.abc import Iterable

from medusa_serve.parsing.reasoning import MARKERS

# Templates that have <tool_call> and yet another form inside it: Qwen3-Coder's and GLM-4.5's.
_OTHER_FORMS = ("<function=", "<arg_key>")


def detect(template_source: str, special_tokens: Iterable[str]) -> tuple[str | None, str | None]:
    """The formats of a model's tool calls and reasoning.

    A model is taken to write a form only if its template writes it: a vocabulary has tokens for more than a model has learnt.

    Args:
        template_source: the text of the chat template.
        special_tokens: the texts of the special tokens, and of other tokens that were added to the vocabulary.

    Returns:
        The tool format and the reasoning format for `MessageParser`; None for one that is missing or unknown.
    """
    tokens = frozenset(special_tokens)
    return _tool_format(template_source, tokens), _reasoning_format(template_source, tokens)


def begins_in_reasoning(prompt: str, reasoning_format: str | None) -> bool:
    """Whether a prompt, as the chat template made it, ends with the marker that opens the reasoning."""
    return reasoning_format is not None and prompt.rstrip().endswith(MARKERS[reasoning_format][0])


def _tool_format(template: str, tokens: frozenset[str]) -> str | None:
    if "<tool_call>" in template:
        return None if any(form in template for form in _OTHER_FORMS) else "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    tag = "<|python_tag|>"
    # Llama 3.2's template has no tag, though its vocabulary does; it does write the calls themselves.
    if "tools" in template and (tag in template or (tag in tokens and '"parameters": ' in template)):
        return "llama3"
    return None


def _reasoning_format(template: str, tokens: frozenset[str]) -> str | None:
    for name, (opening, closing) in MARKERS.items():
        if closing in template or {opening, closing} <= tokens:
            return name
    return None
