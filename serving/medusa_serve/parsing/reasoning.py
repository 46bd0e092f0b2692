"""Splits what a model thinks from its answer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from medusa_serve.parsing.json_scanner import SPACE
from medusa_serve.parsing.output import Output
from medusa_serve.parsing.source import Reading, Source

MARKERS: Mapping[str, tuple[str, str]] = MappingProxyType({
    "think": ("<think>", "</think>"),  # DeepSeek-R1, QwQ, Qwen 3, SmolLM3
    "mistral": ("[THINK]", "[/THINK]"),  # Magistral
})  # fmt: skip


def read_reasoning(source: Source, output: Output, markers: tuple[str, str], *, is_open: bool) -> Reading[None]:
    """Read the reasoning at the start of an answer, if there is any. The source is left where the content starts.

    Line breaks at both ends of the reasoning and before the content are left out, as the chat templates do it.

    Args:
        source: the answer.
        output: gets the reasoning.
        markers: what opens and what closes the reasoning.
        is_open: the prompt has opened it already.
    """
    opening, closing = markers
    source.hold()
    yield from source.take_all(SPACE)
    if (yield from source.take(opening)):
        source.release()
    else:
        source.rewind()
        if not is_open:
            return
    yield from source.take_all("\r\n")
    yield from source.until(closing, output.reasoning, "\r\n")
    yield from source.take_all("\r\n")
