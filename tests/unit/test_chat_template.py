"""Chat templates, compared with Transformers wherever it renders them, too."""

from __future__ import annotations

import json
from enum import StrEnum
from types import MappingProxyType

import pytest

from medusa_runtime import BundleError, OptionError
from medusa_runtime.text.codec import TextCodec
from medusa_runtime.text.template import ChatTemplate
from tests.support.models import CHAT_TEMPLATE, tokenizer
from tests.support.text import saved_codec

USER = {"role": "user", "content": "x"}
CONVERSATION = [{"role": "system", "content": " be short "}, {"role": "user", "content": "a {{ fox }} is <b>é ½"}]
PARAMETERS = {"type": "object", "properties": {"b": {}, "a": {}}}
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": PARAMETERS}}]


@pytest.fixture
def made(tmp_path):
    def make(template: str | None = CHAT_TEMPLATE, **others: str) -> TextCodec:
        return saved_codec(tmp_path, template, templates=others)

    return make


def theirs(template: str, messages: list, **options) -> str:
    options = {"add_generation_prompt": True} | options
    return tokenizer().apply_chat_template(messages, chat_template=template, tokenize=False, **options)


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        "{{ bos_token }}{% if tools is not none %}tools{% endif %}{{ messages | tojson }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% continue %}!{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{%- if documents %}\n  docs\n{%- endif %}\n  {{ messages[0]['content'] | trim }}\n",
        "{{ messages | tojson(ensure_ascii=True) }}",
        "{{ messages | tojson(true) }}",
        "{{ messages | tojson(false, 2) }}",
        "{{ messages | tojson(false, none, (',', ':'), true) }}",
        "{{ messages | tojson(indent=4, separators=(', ', '='), sort_keys=true) }}",
        "{% set s = namespace(self=1, n=2) %}{% set s.n = 3 %}{{ s.self }}{{ s.n }}",
        "{{ dict(a=1).a }}{{ dict.fromkeys(['x']) }}",
        "{{ messages[-1].missing }}|{{ missing }}|{{ messages[-1].content[:3] }}",
        "{{ strftime_now('%Y%z') }}{{ strftime_now(format='%d') }}",
        "{% set n = namespace(x=0) %}{% for m in messages if m.role == 'user' %}{% set n.x = 1 %}{% endfor %}{{ n.x }}",
    ],
)
def test_templates_render_as_in_transformers(made, template: str) -> None:
    assert made(template).render(CONVERSATION) == theirs(template, CONVERSATION)


def test_tools_documents_and_options_reach_the_template(made) -> None:
    template = (
        "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools | tojson }}{{ documents[0].text }}"
        "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{{ bos_token }}{{ messages[0].content }}"
    )
    given = {"tools": TOOLS, "documents": [{"title": "t", "text": "d"}]}
    options = {"enable_thinking": False, "bos_token": "<b>"}
    codec = made(template)
    found = codec.render([USER], **given, template_options=options)
    assert found == theirs(template, [USER], **given, **options)
    assert found == json.dumps(TOOLS, ensure_ascii=False) + "d<no><b>x"
    assert codec.encode([USER], **given, template_options=options) == codec.tokenizer.encode(found).ids


def test_the_opening_of_the_answer_can_be_left_out(made) -> None:
    assert made().render([USER], add_generation_prompt=False) == "<|user|>x<|end|>"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tools": TOOLS}, "tools are given, but the chat template default does not use them"),
        ({"documents": [{"text": "x"}]}, "documents are given, but the chat template default does not use them"),
        ({"template_options": {"enable_thinking": False}}, "the chat template default has no option 'enable_thinking'"),
        ({"template_options": {"messages": []}}, "hold messages, which has an argument of its own"),
        ({"template_options": {"tools": []}}, "hold tools, which has an argument of its own"),
        ({"template_options": [1]}, "give them by name"),
        ({"template_options": {"bos_token": object()}}, "the template options holds <object object"),
        ({"tools": "search"}, "tools is 'search'; it must be a list of objects"),
        ({"tools": [len]}, r"tools\[0\] is <built-in function len>; it must be an object"),
        ({"documents": {"text": "x"}}, "documents is .*; it must be a list of objects"),
        ({"template": "tool_use"}, "there is no chat template 'tool_use'; this model has: default"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "exclude each other"),
    ],
)
def test_what_a_template_cannot_use_is_refused_by_name(made, options, reason) -> None:
    with pytest.raises(OptionError, match=reason) as told:
        made().encode([USER], **options)
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"template": "x"},
        {"template_options": {"a": 1}},
        {"tools": TOOLS},
        {"documents": [{}]},
        {"continue_final_message": True},
    ],
)
def test_without_a_template_nothing_can_be_given_to_one(made, options, is_raw) -> None:
    codec = made() if is_raw else made(None)
    with pytest.raises(OptionError, match=f"{next(iter(options))} is given, but"):
        codec.encode("x", raw=is_raw, **options)


# Messages


def test_a_null_is_no_text(made) -> None:
    """It became the word None in the prompt."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": calls, "name": None}]
    template = "{% for m in messages %}<{{ m.content }}|{{ m.name }}>{% endfor %}"
    assert made(template).render(messages) == "<x|><|>" == theirs(template, messages)
    assert made().render(messages) == "<|user|>x<|end|><|assistant|><|end|><|assistant|>"


@pytest.mark.parametrize("name", ["reasoning", "thinking", "reasoning_content"])
def test_reasoning_has_the_name_that_templates_read(made, name) -> None:
    template = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    messages = [{"role": "assistant", "content": "", name: "hm"}]
    assert made(template).render(messages) == "hmhm" == theirs(template, messages)


PARTS = [{"type": "text", "text": "a fox"}, {"type": "text", "text": "and a dog"}]
LISTS = "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ m.content }}", "a fox and a dog"),
        ("{{ m.content | trim }}", "a fox and a dog"),
        ("{{ '>' + m.content }}", ">a fox and a dog"),
        ("{% if m.content is string %}{{ m.content }}{% endif %}", "a fox and a dog"),  # as Qwen 3 does
        ("{{ m.content | tojson }}", '"a fox and a dog"'),
        ("{% for part in m.content %}{{ part.text | trim }};{% endfor %}", "a fox;and a dog;"),
        (LISTS, "[a fox][and a dog]"),
    ],
)
def test_parts_of_text_go_to_the_template_in_the_form_it_reads(made, template, expected) -> None:
    messages = [{"role": "user", "content": tuple(PARTS)}]
    assert made("{% for m in messages %}" + template + "{% endfor %}").render(messages) == expected


def test_each_message_has_the_form_that_the_template_reads_in_its_place(made) -> None:
    template = "{{ messages[0].content | trim }}|{% set m = messages[1] %}" + LISTS
    messages = [{"role": "system", "content": PARTS}, {"role": "user", "content": PARTS}]
    assert made(template).render(messages) == "a fox and a dog|[a fox][and a dog]"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "there are no messages"),
        ((), "there are no messages"),
        (b"x", "the prompt is b'x'; it must be text, a list of messages or a list of token ids"),
        ({"role": "user", "content": "x"}, "it must be text, a list of messages or a list of token ids"),
        (7, "it must be text, a list of messages or a list of token ids"),
        (["x"], r"messages\[0\] is 'x'; a message is an object with role and content"),
        ([{"text": "x"}], r"messages\[0\] is .*; a message is an object with role and content"),
        ([{"role": 3, "content": "x"}], "role and content"),
        ([USER, {"role": "user"}], r"messages\[1\], of role 'user', has no content"),
        ([{"role": "user", "content": None}], r"messages\[0\], of role 'user', has no content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "has no content"),
        ([{"role": "user", "content": []}], "has no content"),
        ([{"role": "user", "content": 3}], r"messages\[0\] has the content 3; it must be text, or a list of text parts"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "it must be text, or a list of text parts"),
        ([{"role": "user", "content": [*PARTS, {"type": "image_url", "image_url": {}}]}], "has a part of type 'image_url'"),
        ([{"role": "user", "content": ["x"]}], "has the part 'x'; a part is an object with type 'text'"),
        ([{"role": "user", "content": [{"text": "x"}]}], "a part is an object with type 'text'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a part is an object with type 'text'"),
        ([USER | {"at": object()}], r"messages\[0\] holds <object .*, of type object; it may hold JSON alone"),
        ([USER | {"at": {3: 4}}], "has the key 3; keys must be text"),
    ],
)
def test_messages_of_another_form_are_refused_by_name(made, messages, reason) -> None:
    with pytest.raises(OptionError, match=reason) as told:
        made().encode(messages)
    assert len(str(told.value).splitlines()) == 1


def test_messages_that_hold_themselves_are_refused(made) -> None:
    message: dict = dict(USER)
    message["self"] = message
    with pytest.raises(OptionError, match="nested too deeply"):
        made().encode([message])


def test_messages_need_a_template_and_are_not_raw(made) -> None:
    with pytest.raises(OptionError, match="no chat template"):
        made(None).encode([USER])
    with pytest.raises(OptionError, match="raw takes text"):
        made().encode([USER], raw=True)


def test_a_template_sees_plain_values(made) -> None:
    class Role(StrEnum):
        USER = "user"

    messages = (MappingProxyType({"role": Role.USER, "content": "x"}),)
    assert made("{{ messages }}").render(messages) == "[{'role': 'user', 'content': 'x'}]"


# Going on with the final message

OPEN = [USER, {"role": "assistant", "content": "The sky is "}]


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
)
@pytest.mark.parametrize("final", ["The sky is ", "The sky is", "", " \n"])
def test_the_final_message_is_left_open_as_in_transformers(made, template, final) -> None:
    messages = [USER, {"role": "assistant", "content": final}]
    expected = theirs(template, messages, continue_final_message=True, add_generation_prompt=False)
    assert made(template).render(messages, continue_final_message=True) == expected


def test_a_message_that_is_written_twice_is_left_open_at_its_last_place(made) -> None:
    codec = made("{{ messages[-1].content }}|{{ messages[-1].content }}|")
    assert codec.render(OPEN, continue_final_message=True) == "The sky is |The sky is "


def test_the_final_part_is_left_open(made) -> None:
    messages = [USER, {"role": "assistant", "content": PARTS}]
    assert made().render(messages, continue_final_message=True).endswith("<|assistant|>a fox and a dog")
    template = "{% for m in messages %}" + LISTS + "{% endfor %}"
    assert made(template).render(messages, continue_final_message=True) == "x[a fox][and a dog"


@pytest.mark.parametrize(
    ("template", "prompt", "reason"),
    [
        ("{{ messages[0].content }}", OPEN, "does not write the final message as it is"),
        ("{{ messages[-1].content | upper | replace('SKY', '') }}", OPEN, "does not write the final message as it is"),
        (CHAT_TEMPLATE, "The sky is", "needs messages"),
        (CHAT_TEMPLATE, [{"role": "assistant", "tool_calls": [{}]}], "has no content to continue"),
    ],
)
def test_a_message_that_cannot_be_continued_is_refused(made, template, prompt, reason) -> None:
    with pytest.raises(OptionError, match=reason):
        made(template).encode(prompt, continue_final_message=True)


# Several templates


def test_a_request_names_its_template(made) -> None:
    codec = made("default", rag="rag {{ documents | tojson }}", tool_use="tools {{ tools | length }}")
    assert codec.render([USER]) == "default"
    assert codec.render([USER], template="default") == "default"
    assert codec.render([USER], template="rag", documents=[{"text": "d"}]) == 'rag [{"text": "d"}]'
    assert codec.render([USER], template="tool_use", tools=TOOLS) == "tools 1"
    assert codec.encode([USER], template="rag") == codec.tokenizer.encode("rag null").ids


def test_tools_choose_the_template_for_tools_as_in_transformers(made) -> None:
    assert made("default", tool_use="tools {{ tools | length }}").render([USER], tools=TOOLS) == "tools 1"


def test_an_only_template_is_the_default_whatever_its_name(made) -> None:
    assert made(None, chat="only").render([USER]) == "only"


def test_several_templates_without_a_default_are_never_passed_by(made) -> None:
    """They were: a text went to the model bare."""
    codec = made(None, rag="rag", tool_use="tools")
    assert codec.has_chat_template
    with pytest.raises(OptionError, match="several chat templates and none called default; name one of: rag, tool_use"):
        codec.encode("x")
    assert codec.render("x", template="rag") == "rag"


def test_templates_are_kept_as_they_are(tmp_path) -> None:
    sources = {"default": "a\n<\uff5cUser\uff5c>", "rag": "b"}
    ChatTemplate(sources, {"bos_token": "<s>"}).save(tmp_path / "chat.json")
    found = ChatTemplate.from_file(tmp_path / "chat.json")
    assert (found.sources, found.special_tokens) == (sources, {"bos_token": "<s>"})
    assert json.loads((tmp_path / "chat.json").read_text("utf-8"))["template"] == sources["default"]  # earlier versions read it


# Templates from elsewhere


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ dict.__class__.__init__ }}{{ dict.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace(_x=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ raise_exception('no system role') }}",
        "{{ undefined_function() }}",
    ],
)
def test_a_template_can_neither_reach_out_nor_change_the_messages(made, template) -> None:
    with pytest.raises(OptionError, match="template refuses"):
        made(template).render([USER])


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% unknown %}", "{{ x | no_filter }}"])
def test_a_template_that_is_no_template_is_refused(made, source) -> None:
    codec = made(rag=source)
    assert codec.render([USER])
    for use in (codec.chat.check, lambda: codec.render([USER], template="rag")):
        with pytest.raises(BundleError, match=r"the chat template rag is not valid Jinja \(line 1: ") as told:
            use()
        assert len(str(told.value).splitlines()) == 1
