"""Options: what cannot be used is refused in one line that says what, which value and what may be."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from medusa_runtime import CandidateTree, DecodingOptions, DynamicTree, GenerationOptions, OptionError
from medusa_runtime.bundle.manifest import DecodingDefaults, GenerationFacts, SamplingDefaults
from medusa_runtime.options import MAX_SECONDS, MAX_SEED, with_defaults

NAN, INF = math.nan, math.inf
CHAIN = CandidateTree.from_choices([[0, 0]])

# For each option: extremes that pass, and values that do not, each with what the message says may be.
PASS: dict[str, list[Any]] = {
    "max_new_tokens": [None, 0, 1, 1 << 40],
    "min_new_tokens": [0, 1 << 40],
    "temperature": [0, 0.0, 5e-324, 100, 100.0],
    "top_k": [0, 1, 1 << 40],
    "top_p": [5e-324, 0.5, 1, 1.0],
    "min_p": [0, 0.0, 1, 1.0],
    "repetition_penalty": [5e-324, 1, 10.0],
    "presence_penalty": [-2, 0, 2.0],
    "frequency_penalty": [-2.0, 0, 2],
    "logit_bias": [{}, {0: -100}, {5: 100.0, 1 << 40: 0}],
    "suppress_tokens": [(), [5], (0, 1 << 40)],
    "begin_suppress_tokens": [(), [5], (0, 1 << 40)],
    "seed": [None, 0, MAX_SEED],
    "stop_token_ids": [(), [5], (0, 1 << 40)],
    "ignore_eos": [True, False],
    "logprobs": [None, 0, 100],
    "prompt_logprobs": [None, 0, 100],
    "drafts": [True, False],
    "acceptance": ["exact", "typical"],
    "posterior_threshold": [5e-324, 1.0],
    "posterior_alpha": [5e-324, 1.0],
    "medusa": [True, False],
    "tree": [None, CHAIN, DynamicTree(1), DynamicTree(1024)],
    "prompt_lookup": [None, True, False],
    "deadline_seconds": [None, 5e-324, 1, MAX_SECONDS],
    "max_queue_seconds": [None, 0, 0.0, MAX_SECONDS],
    "stop": [(), "a", ["a", "b c\n"], ("\0",)],
    "n": [1, 128],
    "raw": [True, False],
    "chat_template": [None, "tool_use"],
    "tools": [(), [{"type": "function"}], ({}, {"name": "f"})],
    "documents": [(), [{"title": "t", "text": "x"}]],
    "template_options": [{}, {"enable_thinking": False}],
    "add_generation_prompt": [True, False],
    "continue_final_message": [True, False],
    "plain_content": [True, False],
    "max_prompt_tokens": [None, 1, 1 << 40],
    "skip_special_tokens": [True, False],
    "json_schema": [None, {}, {"type": "object"}, {"type": "string", "description": "x"}],
    "regex": [None, "", "a*"],
    "choice": ["a", ["a", "b"]],
    "grammar": [None, 'start: "a"'],
}
WHOLE = [(1.5, "integer"), ("many", "integer"), ([1], "integer"), (NAN, "number|integer"), (INF, "number|integer")]
REAL = [(NAN, "finite"), (INF, "finite"), (-INF, "finite"), ("warm", "number"), ([1.0], "number")]
YES_OR_NO = [("perhaps", "boolean"), (2, "boolean"), ([], "boolean")]
TOKENS = [(5, "list"), (["a"], "integer"), ([1.5], "integer"), ([None], "integer"), ("12", "list")]
DICTIONARIES = [
    (5, "list of dictionaries"),
    ([5], "list of dictionaries"),
    ("a", "list of"),
    ([None], "list"),
]
TEXT = [(5, "string"), (["a"], "string"), (1.0, "string")]
FAIL: dict[str, list[tuple[Any, str]]] = {
    "max_new_tokens": [(-1, "greater than or equal to 0"), *WHOLE],
    "min_new_tokens": [(-1, "greater than or equal to 0"), *WHOLE],
    "temperature": [(-0.001, "greater than or equal to 0"), (100.001, "less than or equal to 100"), *REAL],
    "top_k": [(-1, "greater than or equal to 0"), *WHOLE],
    "top_p": [
        (0, "greater than 0"),
        (0.0, "greater than 0"),
        (-0.5, "greater than 0"),
        (1.001, "less than or equal to 1"),
        *REAL,
    ],
    "min_p": [(-0.001, "greater than or equal to 0"), (1.001, "less than or equal to 1"), *REAL],
    "repetition_penalty": [(0.0, "greater than 0"), (-1, "greater than 0"), (10.001, "less than or equal to 10"), *REAL],
    "presence_penalty": [(-2.001, "greater than or equal to -2"), (2.001, "less than or equal to 2"), *REAL],
    "frequency_penalty": [(-2.001, "greater than or equal to -2"), (2.001, "less than or equal to 2"), *REAL],
    "logit_bias": [
        ({"a": 1}, "integer"),
        ({5: "b"}, "number"),
        ({5: NAN}, "finite"),
        ({5: INF}, "finite"),
        ({5: None}, "number"),
        (5, "such as {42: -5.0}"),
    ],
    "suppress_tokens": TOKENS,
    "begin_suppress_tokens": TOKENS,
    "seed": [(-1, "greater than or equal to 0"), (MAX_SEED + 1, f"less than or equal to {MAX_SEED}"), *WHOLE],
    "stop_token_ids": TOKENS,
    "ignore_eos": YES_OR_NO,
    "logprobs": [(-1, "greater than or equal to 0"), (101, "less than or equal to 100"), *WHOLE],
    "prompt_logprobs": [(-1, "greater than or equal to 0"), (101, "less than or equal to 100"), *WHOLE],
    "drafts": YES_OR_NO,
    "acceptance": [("greedy", "'exact' or 'typical'"), ("", "'exact' or 'typical'")],
    "posterior_threshold": [(0.0, "greater than 0"), (1.001, "less than or equal to 1"), *REAL],
    "posterior_alpha": [(0.0, "greater than 0"), (1.001, "less than or equal to 1"), *REAL],
    "medusa": YES_OR_NO,
    "tree": [(5, "Tree"), ("wide", "Tree"), ([[0]], "Tree"), ({"parents": [-1]}, "Tree"), (CandidateTree, "Tree")],
    "prompt_lookup": [("perhaps", "boolean"), (2, "boolean"), ([], "boolean")],
    "deadline_seconds": [(0, "greater than 0"), (-1.0, "greater than 0"), (2 * MAX_SECONDS, "less than or equal to"), *REAL],
    "max_queue_seconds": [(-0.1, "greater than or equal to 0"), (2 * MAX_SECONDS, "less than or equal to"), *REAL],
    "stop": [(5, ""), ([5], "string"), ({"a": 1}, ""), (b"a", ""), (["a", None], "string")],
    "n": [(0, "greater than or equal to 1"), (129, "less than or equal to 128"), *WHOLE],
    "raw": YES_OR_NO,
    "chat_template": TEXT,
    "tools": DICTIONARIES,
    "documents": DICTIONARIES,
    "template_options": [(5, "dictionary"), ([], "dictionary"), ({1: 2}, "string")],
    "add_generation_prompt": YES_OR_NO,
    "continue_final_message": YES_OR_NO,
    "plain_content": YES_OR_NO,
    "max_prompt_tokens": [(0, "greater than or equal to 1"), *WHOLE],
    "skip_special_tokens": YES_OR_NO,
    "json_schema": [("{}", ""), ([], ""), (True, ""), ({1: 2}, "string")],
    "regex": TEXT,
    "choice": [(5, ""), ([5], "string"), ({"a": 1}, ""), (b"a", ""), (["a", None], "string")],
    "grammar": TEXT,
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{place}-{str(value)[:20]}")
        for name, values in table.items()
        for place, value in enumerate(values)
    ]


def refusal(**fields: Any) -> str:
    """The one line that refuses them."""
    with pytest.raises(OptionError) as told:
        GenerationOptions.of(**fields)
    message = str(told.value)
    assert len(message.splitlines()) == 1
    assert "pydantic" not in message
    return message


def test_the_tables_of_this_file_name_every_option() -> None:
    assert list(PASS) == list(FAIL) == list(GenerationOptions.model_fields)


@pytest.mark.parametrize(("name", "value"), cases(PASS))
def test_what_may_be_passes(name, value) -> None:
    options = GenerationOptions.of(**{name: value})
    expected = (value,) if name in {"stop", "choice"} and isinstance(value, str) else value
    assert getattr(options, name) == (tuple(expected) if isinstance(expected, list) else expected)


@pytest.mark.parametrize(("name", "found"), cases(FAIL))
def test_what_may_not_be_is_refused_with_its_name_its_value_and_what_may_be(name, found) -> None:
    value, allowed = found
    message = refusal(**{name: value})
    assert message.startswith(f"{name} is ")
    one = next(iter(value.items()), None) if isinstance(value, dict) else None
    shown = [
        value,
        *(value if isinstance(value, list | tuple) else []),
        *(one or []),
    ]  # of several, the one that is wrong will do
    assert any(repr(part) in message for part in shown)
    assert "; it must be " in message
    assert any(part in message for part in allowed.split("|"))


@pytest.mark.parametrize("name", list(GenerationOptions.model_fields))
def test_none_is_the_default_of_every_option_and_sets_nothing(name) -> None:
    assert GenerationOptions.of(**{name: None}) == GenerationOptions.of() == GenerationOptions(**{name: None})
    assert GenerationOptions.of(**{name: None}).model_fields_set == set()
    one = GenerationOptions.of(**{name: PASS[name][-1]})
    assert GenerationOptions.of(one, **{name: None}) == GenerationOptions.of()


def test_none_makes_no_option_of_a_name_that_is_none() -> None:
    assert refusal(temprature=None) == "there is no option temprature; did you mean temperature?"


@pytest.mark.parametrize("bias", [100.001, -100.001, 1e9])
def test_a_bias_out_of_range_is_refused_with_its_token(bias) -> None:
    message = refusal(logit_bias={3: 1.0, 7: bias})
    assert message == f"logit_bias is {bias} for token 7; it must be between -100 and 100"


@pytest.mark.parametrize("value", [np.zeros((3, 3)), "a\nb", "a\u2028b"], ids=["array", "lines", "separator"])
def test_the_line_is_one_however_the_value_prints(value) -> None:
    assert refusal(tree=value).startswith("tree is ")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("max_tokens", "max_new_tokens"),
        ("temprature", "temperature"),
        ("top_P", "top_p"),
        ("stops", "stop"),
        ("stop_token_id", "stop_token_ids"),
        ("jsonschema", "json_schema"),
    ],
)
def test_an_unknown_option_is_refused_with_what_may_have_been_meant(name, near) -> None:
    assert refusal(**{name: 1}) == f"there is no option {name}; did you mean {near}?"


def test_an_unknown_option_that_resembles_none_is_refused_without_a_guess() -> None:
    assert refusal(zzzz=1) == "there is no option zzzz"


STRUCTURES: dict[str, Any] = {"json_schema": {"type": "object"}, "regex": "a+", "choice": ["a", "b"], "grammar": 'start: "a"'}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(STRUCTURES, 2)))
def test_two_structures_exclude_each_other(one, other) -> None:
    assert refusal(**{one: STRUCTURES[one], other: STRUCTURES[other]}) == f"{one} and {other} exclude each other"
    assert refusal(**{one: STRUCTURES[one]}, ignore_eos=True).startswith(f"{one} and ignore_eos exclude each other")


@pytest.mark.parametrize(("name", "value"), [("json_schema", {}), ("regex", "")])
def test_a_structure_that_says_little_is_one_all_the_same(name, value) -> None:
    assert GenerationOptions.of(**{name: value}).structure == {name: value}
    assert refusal(**{name: value}, choice="a") == f"{name} and choice exclude each other"


def test_the_structure_is_what_was_asked_for() -> None:
    assert GenerationOptions.of().structure == GenerationOptions.of(choice=None, regex=None).structure == {}
    assert GenerationOptions.of(choice="a").structure == {"choice": ("a",)}
    assert GenerationOptions.of(json_schema={"type": "null"}).structure == {"json_schema": {"type": "null"}}
    assert GenerationOptions.of(grammar='start: "a"').structure == {"grammar": 'start: "a"'}


@pytest.mark.parametrize("value", [[], ()])
def test_no_choice_is_no_structure_and_refused(value) -> None:
    assert refusal(choice=value) == "choice is an empty list; name at least one text, or leave it out"


@pytest.mark.parametrize("name", ["grammar", "chat_template"])
@pytest.mark.parametrize("value", ["", " \n"])
def test_a_grammar_and_a_name_are_not_empty(name, value) -> None:
    assert refusal(**{name: value}) == f"{name} is {value!r}; it cannot be empty"


@pytest.mark.parametrize(
    ("wrapper", "key"),
    [
        ({"name": "city", "schema": {"type": "object"}}, "schema"),
        ({"name": "city", "description": "one", "strict": True, "schema": {}}, "schema"),
        ({"type": "json_schema", "json_schema": {"name": "city", "schema": {}}}, "json_schema"),
        ({"type": "json_schema", "name": "city", "schema": OrderedDict()}, "schema"),
    ],
)
def test_a_wrapped_schema_is_refused(wrapper, key) -> None:
    expected = f"json_schema holds the schema under {key!r}, as in OpenAI's API; pass the inner schema"
    assert refusal(json_schema=wrapper) == expected


def test_a_schema_of_an_object_with_such_names_is_a_schema() -> None:
    schema = {"type": "object", "properties": {"name": {}, "schema": {"type": "object"}}}
    assert GenerationOptions.of(json_schema=schema).json_schema == schema


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_a_structure_has_tokens(name) -> None:
    assert refusal(**{name: STRUCTURES[name]}, max_new_tokens=0) == f"max_new_tokens is 0; with {name} it must be at least 1"


def test_choices_that_are_shorter_than_the_least_number_of_tokens_are_refused_at_once() -> None:
    assert GenerationOptions.of(choice=["a", "äbc"], min_new_tokens=4).min_new_tokens == 4  # four bytes
    assert (
        refusal(choice=["a", "äbc"], min_new_tokens=5) == "min_new_tokens is 5; the longest text of choice has at most 4 tokens"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chat_template", "tool_use"), ("tools", [{}]), ("documents", [{}]), ("template_options", {"a": 1}),
        ("continue_final_message", True),
    ],
)  # fmt: skip
def test_a_raw_prompt_has_nothing_for_a_template(name, value) -> None:
    assert refusal(raw=True, **{name: value}) == f"raw and {name} exclude each other: a raw prompt has no chat template"
    assert GenerationOptions.of(raw=False, **{name: value})


def test_a_message_is_begun_or_continued() -> None:
    both = "continue_final_message and add_generation_prompt exclude each other; leave one of them out"
    assert refusal(continue_final_message=True, add_generation_prompt=True) == both
    assert refusal(continue_final_message=True, add_generation_prompt="yes") == both
    for fields, begins in (
        ({}, True),
        ({"add_generation_prompt": True}, True),
        ({"add_generation_prompt": False}, False),
        ({"continue_final_message": True}, False),
        ({"continue_final_message": True, "add_generation_prompt": None}, False),
        ({"continue_final_message": True, "add_generation_prompt": False}, False),
        ({"continue_final_message": False, "add_generation_prompt": True}, True),
    ):
        assert GenerationOptions.of(**fields).begins_message is begins


@pytest.mark.parametrize("name", ["tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"])
def test_variables_of_the_template_that_are_options_are_given_as_these(name) -> None:
    assert refusal(template_options={"a": 1, name: 2}) == f"template_options holds {name}; give it as the option {name}"


def test_messages_are_the_prompt() -> None:
    assert refusal(template_options={"messages": []}) == "template_options holds messages; give it as the prompt"


@pytest.mark.parametrize("name", ["stop", "choice"])
@pytest.mark.parametrize("value", ["", [""], ["a", ""], ("", "a")], ids=repr)
def test_an_empty_text_is_refused(name, value) -> None:
    assert "cannot be empty" in refusal(**{name: value})


def test_the_least_number_of_tokens_is_at_most_the_largest() -> None:
    assert refusal(min_new_tokens=5, max_new_tokens=4) == "min_new_tokens is 5; it must be at most max_new_tokens, 4"
    assert GenerationOptions.of(min_new_tokens=4, max_new_tokens=4).min_new_tokens == 4
    assert GenerationOptions.of(min_new_tokens=400).min_new_tokens == 400


def test_of_takes_options_and_changes_some() -> None:
    options = GenerationOptions.of(temperature=0.5, stop="a", seed=3)
    merged = GenerationOptions.of(options, temperature=0.9, n=2)
    assert merged == GenerationOptions.of(temperature=0.9, stop="a", seed=3, n=2)
    assert options == GenerationOptions.of(temperature=0.5, stop="a", seed=3)
    assert GenerationOptions.of(options) == options
    assert GenerationOptions.of(None, n=2) == GenerationOptions.of(n=2)
    assert GenerationOptions.of(options, stop=(), seed=None) == GenerationOptions.of(temperature=0.5)


def test_what_is_merged_is_checked_together() -> None:
    with pytest.raises(OptionError, match="min_new_tokens is 5; it must be at most max_new_tokens, 4"):
        GenerationOptions.of(GenerationOptions.of(min_new_tokens=5), max_new_tokens=4)
    with pytest.raises(OptionError, match="regex and choice exclude each other"):
        GenerationOptions.of(GenerationOptions.of(regex="a"), choice="b")
    assert GenerationOptions.of(GenerationOptions.of(regex="a"), regex=None, choice="b").structure == {"choice": ("b",)}


def test_of_takes_options_of_its_own_kind() -> None:
    for other in (DecodingOptions.of(), {"temperature": 1.0}, 64):
        with pytest.raises(OptionError, match="they must be GenerationOptions"):
            GenerationOptions.of(other)
    assert DecodingOptions.of(DecodingOptions.of(seed=1), seed=2).seed == 2


def test_what_is_only_about_text_is_no_option_of_decoding() -> None:
    with pytest.raises(OptionError, match="there is no option regex"):
        DecodingOptions.of(regex="a")
    assert set(GenerationOptions.model_fields) > set(DecodingOptions.model_fields)


def test_the_token_ids_that_options_name_are_told_together() -> None:
    options = DecodingOptions.of(logit_bias={3: 1}, stop_token_ids=[4], suppress_tokens=[5], begin_suppress_tokens=[6, 7])
    assert {name: list(token_ids) for name, token_ids in options.named_tokens.items()} == {
        "logit_bias": [3],
        "stop_token_ids": [4],
        "suppress_tokens": [5],
        "begin_suppress_tokens": [6, 7],
    }


def test_options_do_not_change() -> None:
    options = GenerationOptions.of()
    with pytest.raises(ValidationError, match="frozen"):
        options.temperature = 1.0


def test_what_is_derived_says_what_it_says() -> None:
    assert not GenerationOptions.of().is_sampled
    assert GenerationOptions.of(temperature=5e-324).is_sampled
    assert not GenerationOptions.of(temperature=1, logit_bias={1: 1}, min_new_tokens=3).has_penalties
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", -0.1), ("frequency_penalty", 0.1)):
        assert GenerationOptions.of(**{name: value}).has_penalties


def test_every_option_is_described() -> None:
    assert [name for name, field in GenerationOptions.model_fields.items() if not field.description] == []


# with_defaults

FACTS = GenerationFacts(
    defaults=DecodingDefaults(repetition_penalty=1.3, min_new_tokens=5, suppress_tokens=[3, 4], begin_suppress_tokens=[9]),
    sampling=SamplingDefaults(temperature=0.6, top_k=20, top_p=0.9),
    ignored={"no_repeat_ngram_size": 3},
)
GREEDY_DEFAULTS = {"repetition_penalty": 1.3, "min_new_tokens": 5, "suppress_tokens": (3, 4), "begin_suppress_tokens": (9,)}


def test_a_bundles_defaults_go_to_what_a_request_does_not_set() -> None:
    assert with_defaults(DecodingOptions.of(), FACTS) == DecodingOptions.of(**GREEDY_DEFAULTS)
    asked = GenerationOptions.of(max_new_tokens=30, repetition_penalty=1.0, suppress_tokens=[], stop="a")
    expected = GREEDY_DEFAULTS | {"repetition_penalty": 1.0, "suppress_tokens": ()}
    assert with_defaults(asked, FACTS) == GenerationOptions.of(max_new_tokens=30, stop="a", **expected)
    assert with_defaults(GenerationOptions.of(repetition_penalty=None), FACTS).repetition_penalty == 1.3


def test_defaults_of_sampling_go_to_requests_that_sample() -> None:
    for greedy in (DecodingOptions.of(), DecodingOptions.of(temperature=0)):
        found = with_defaults(greedy, FACTS)
        assert (found.temperature, found.top_k, found.top_p) == (0, 0, 1)
    found = with_defaults(DecodingOptions.of(temperature=1.1, top_p=1), FACTS)
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (1.1, 20, 1, 0)


def test_without_defaults_options_stay_as_they_are() -> None:
    options = DecodingOptions.of(temperature=1.0)
    assert with_defaults(options, None) is options
    assert with_defaults(options, GenerationFacts()) is options


@pytest.mark.parametrize(
    ("fields", "least"),
    [
        ({"max_new_tokens": 3}, 3),
        ({"max_new_tokens": 0}, 0),
        ({"max_new_tokens": 5}, 5),
        ({"choice": ["a"]}, 0),
        ({"regex": "a"}, 0),
    ],
)
def test_a_default_never_makes_a_request_contradict_itself(fields, least) -> None:
    assert with_defaults(GenerationOptions.of(**fields), FACTS).min_new_tokens == least


def test_what_a_request_contradicts_itself_with_is_still_refused() -> None:
    with pytest.raises(OptionError, match="min_new_tokens is 9"):
        with_defaults(GenerationOptions.of(max_new_tokens=3, min_new_tokens=9), FACTS)


def test_defaults_are_applied_once() -> None:
    once = with_defaults(DecodingOptions.of(max_new_tokens=3, temperature=1.0), FACTS)
    assert with_defaults(once, FACTS) is once
