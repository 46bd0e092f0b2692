"""From a request's text or messages to token ids, as the operator's settings want them read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medusa_runtime import MedusaLM, OptionError
from medusa_serve.parsing import begins_in_reasoning, detect
from medusa_serve.settings import ServerSettings

TAIL = 16  # tokens at the end of a prompt among which the marker of reasoning is looked for


@dataclass(frozen=True)
class Formats:
    """How the model writes calls of tools and its reasoning; None for what it does not write."""

    tools: str | None
    reasoning: str | None

    @classmethod
    def of(cls, lm: MedusaLM, settings: ServerSettings) -> Formats:
        """The operator's choice, and for "auto" what the chat template says."""
        tokenizer, chat = lm.codec.tokenizer, lm.codec.chat
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        tools, reasoning = detect("\n".join(chat.sources.values()), added)
        return cls(_chosen(settings.tool_format, tools), _chosen(settings.reasoning_format, reasoning))


def _chosen(setting: str, detected: str | None) -> str | None:
    return {"auto": detected, "none": None}.get(setting, setting)


def for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of OpenAI's API as chat templates know it: the role system for developer, and arguments of calls as objects."""
    told = dict(message)
    if told.get("role") == "developer":
        told["role"] = "system"
    if isinstance(calls := told.get("tool_calls"), list):
        told["tool_calls"] = [_with_objects(call) for call in calls]
    return told


def _with_objects(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise OptionError(f"a call of {function.get('name')!r:.80} in the messages has arguments that are no JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


@dataclass(frozen=True)
class PromptReader:
    """Encodes prompts. It may take a while for long ones, so use it in a thread.

    Text that is spelled like a special token is plain text, unless the operator's settings say otherwise.
    """

    lm: MedusaLM
    settings: ServerSettings

    @property
    def longest(self) -> int:
        """The most tokens of a prompt."""
        limit = self.lm.manifest.limits.max_seq_len
        return min(limit, self.settings.max_prompt_tokens or limit)

    def text(self, prompt: str) -> list[int]:
        """A text as it is, after the tokenizer's own first tokens."""
        return self.lm.codec.encode(
            prompt, raw=True, plain_content=not self.settings.special_tokens_in_text, max_tokens=self.longest
        )

    def messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """A conversation, by the chat template. Arguments and errors as those of `TextCodec.encode`."""
        return self.lm.codec.encode(
            [for_template(message) for message in messages],
            template=template,
            template_options=template_options or None,
            tools=tools or None,
            documents=documents or None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            plain_content=not self.settings.special_tokens_in_text,
            max_tokens=self.longest,
        )

    def room(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens an answer to a prompt may have."""
        return max(1, self.lm.manifest.limits.max_seq_len - len(prompt_ids))

    def begins_in_reasoning(self, prompt_ids: Sequence[int], reasoning_format: str | None) -> bool:
        """Whether a prompt ends with the marker that opens the model's reasoning."""
        tail = self.lm.codec.decode(list(prompt_ids[-TAIL:]), skip_special_tokens=False)
        return begins_in_reasoning(tail, reasoning_format)
