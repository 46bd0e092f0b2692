"""Formats are guessed from chat templates as models have them."""

from __future__ import annotations

import pytest

from medusa_serve.parsing import begins_in_reasoning, detect

QWEN3 = """{%- if tools %}<tools>...</tools>
For each function call, return a json object within <tool_call></tool_call> XML tags{%- endif %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}"""
QWEN25 = QWEN3.replace("</think>", "")
QWEN3_CODER = "{%- if tools %}<tool_call>\\n<function=example>\\n<parameter=x>{%- endif %}"
LLAMA31 = """{%- if tools is not none %}{{- '{"name": function name, "parameters": dictionary}' }}{%- endif %}
{{- "<|python_tag|>" + tool_call.name + ".call(" }}{{- '"parameters": ' }}"""
LLAMA32 = LLAMA31.replace("<|python_tag|>", "")
LLAMA31_BASE = "{% for message in messages %}<|start_header_id|>{{ message.role }}{% endfor %}"
MISTRAL = """{%- for tool in tools %}{% endfor %}{{- "[TOOL_CALLS] [" }}{{- '"id": "' + tool_call.id }}"""
MAGISTRAL = '{{- "[TOOL_CALLS]" + name + "[ARGS]" }}{{ "[THINK]" + thinking + "[/THINK]" }}'
R1_DISTILL = "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
LLAMA_TOKENS = ["<|begin_of_text|>", "<|eot_id|>", "<|python_tag|>"]


@pytest.mark.parametrize(
    ("template", "tokens", "formats"),
    [
        (QWEN3, ["<|im_end|>", "<tool_call>"], ("hermes", "think")),
        (QWEN25, ["<|im_end|>"], ("hermes", None)),
        (QWEN25, LLAMA_TOKENS, ("hermes", None)),  # Hermes 3 has Llama's vocabulary
        (QWEN3_CODER, ["<tool_call>"], (None, None)),
        (LLAMA31, [], ("llama3", None)),
        (LLAMA32, LLAMA_TOKENS, ("llama3", None)),
        (LLAMA32, [], (None, None)),
        (LLAMA31_BASE, LLAMA_TOKENS, (None, None)),
        (MISTRAL, ["[INST]", "[TOOL_CALLS]"], ("mistral", None)),
        (MAGISTRAL, [], ("mistral", "mistral")),
        (R1_DISTILL, ["<think>", "</think>"], (None, "think")),
        ("{{ messages }}", ["<think>", "</think>"], (None, "think")),
        ("{{ messages }}", ["<think>"], (None, None)),
        ("", [], (None, None)),
    ],
)
def test_formats_are_guessed(template: str, tokens: list[str], formats: tuple[str | None, str | None]) -> None:
    assert detect(template, iter(tokens)) == formats


@pytest.mark.parametrize(
    ("prompt", "reasoning_format", "expected"),
    [
        ("<|assistant|>\n<think>\n", "think", True),
        ("<|assistant|>\n<think>\n\n</think>\n\n", "think", False),
        ("<|assistant|>\n", "think", False),
        ("<|assistant|>\n<think>\n", "mistral", False),
        ("[INST]x[/INST][THINK]", "mistral", True),
        ("<|assistant|>\n<think>\n", None, False),
    ],
)
def test_a_prompt_may_open_the_reasoning(prompt: str, reasoning_format: str | None, expected: bool) -> None:
    assert begins_in_reasoning(prompt, reasoning_format) is expected
