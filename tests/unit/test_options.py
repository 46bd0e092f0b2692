"""Options: what cannot be used is refused in one line that says what, which value and what may be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from medusa_runtime import CandidateTree, DecodingOptions, DynamicTree, GenerationOptions, OptionError
from medusa_runtime.options import MAX_SEED

NAN, INF = math.nan, math.inf
CHAIN = CandidateTree.from_choices([[0, 0]])

# For each option: extremes that pass, and values that do not, each with what the message says may be.
PASS: dict[str, list[Any]] = {
    "max_new_tokens": [None, 1, 1 << 40],
    "min_new_tokens": [0, 1 << 40],
    "temperature": [0, 0.0, 5e-324, 100, 100.0],
    "top_k": [0, 1, 1 << 40],
    "top_p": [5e-324, 0.5, 1, 1.0],
    "min_p": [0, 0.0, 1, 1.0],
    "repetition_penalty": [5e-324, 1, 10.0],
    "presence_penalty": [-2, 0, 2.0],
    "frequency_penalty": [-2.0, 0, 2],
    "logit_bias": [{}, {0: -100}, {5: 100.0, 1 << 40: 0}],
    "seed": [None, 0, MAX_SEED],
    "stop_token_ids": [(), [5], (0, 1 << 40)],
    "ignore_eos": [True, False],
    "logprobs": [None, 0, 100],
    "acceptance": ["exact", "typical"],
    "posterior_threshold": [5e-324, 1.0],
    "posterior_alpha": [5e-324, 1.0],
    "medusa": [True, False],
    "tree": [None, CHAIN, DynamicTree(1), DynamicTree(1024)],
    "prompt_lookup": [None, True, False],
    "stop": [(), "a", ["a", "b c\n"], ("\0",)],
    "n": [1, 128],
    "raw": [True, False],
    "json_schema": [None, {}, {"type": "object"}],
    "regex": [None, "", "a*"],
    "choice": [(), "a", ["a", "b"]],
}
WHOLE = [(1.5, "integer"), ("many", "integer"), ([1], "integer"), (NAN, "number|integer"), (INF, "number|integer")]
REAL = [(NAN, "finite"), (INF, "finite"), (-INF, "finite"), ("warm", "number"), (None, "number"), ([1.0], "number")]
YES_OR_NO = [("perhaps", "boolean"), (2, "boolean"), (None, "boolean"), ([], "boolean")]
TEXT = [(5, "string"), (["a"], "string"), (1.0, "string")]
FAIL: dict[str, list[tuple[Any, str]]] = {
    "max_new_tokens": [(0, "greater than or equal to 1"), (-1, "greater than or equal to 1"), *WHOLE],
    "min_new_tokens": [(-1, "greater than or equal to 0"), (None, "integer"), *WHOLE],
    "temperature": [(-0.001, "greater than or equal to 0"), (100.001, "less than or equal to 100"), *REAL],
    "top_k": [(-1, "greater than or equal to 0"), (None, "integer"), *WHOLE],
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
        (5, ""),
        (None, ""),
    ],
    "seed": [(-1, "greater than or equal to 0"), (MAX_SEED + 1, f"less than or equal to {MAX_SEED}"), *WHOLE],
    "stop_token_ids": [(5, ""), (["a"], "integer"), ([1.5], "integer"), (None, ""), ("12", "")],
    "ignore_eos": YES_OR_NO,
    "logprobs": [(-1, "greater than or equal to 0"), (101, "less than or equal to 100"), *WHOLE],
    "acceptance": [("greedy", "'exact' or 'typical'"), ("", "'exact' or 'typical'"), (None, "'exact' or 'typical'")],
    "posterior_threshold": [(0.0, "greater than 0"), (1.001, "less than or equal to 1"), *REAL],
    "posterior_alpha": [(0.0, "greater than 0"), (1.001, "less than or equal to 1"), *REAL],
    "medusa": YES_OR_NO,
    "tree": [(5, "Tree"), ("wide", "Tree"), ([[0]], "Tree"), ({"parents": [-1]}, "Tree"), (CandidateTree, "Tree")],
    "prompt_lookup": [("perhaps", "boolean"), (2, "boolean"), ([], "boolean")],
    "stop": [(5, ""), (None, ""), ([5], "string"), ({"a": 1}, ""), (b"a", ""), (["a", None], "string")],
    "n": [(0, "greater than or equal to 1"), (129, "less than or equal to 128"), (None, "integer"), *WHOLE],
    "raw": YES_OR_NO,
    "json_schema": [("{}", ""), ([], ""), (True, ""), ({1: 2}, "string")],
    "regex": TEXT,
    "choice": [(5, ""), (None, ""), ([5], "string"), ({"a": 1}, ""), (b"a", "")],
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


STRUCTURES: dict[str, Any] = {"json_schema": {"type": "object"}, "regex": "a+", "choice": ["a", "b"]}


@pytest.mark.parametrize(("one", "other"), [("json_schema", "regex"), ("json_schema", "choice"), ("regex", "choice")])
def test_two_structures_exclude_each_other(one, other) -> None:
    assert refusal(**{one: STRUCTURES[one], other: STRUCTURES[other]}) == f"{one} and {other} exclude each other"
    assert refusal(**{one: STRUCTURES[one]}, ignore_eos=True).startswith(f"{one} and ignore_eos exclude each other")


@pytest.mark.parametrize(("name", "value"), [("json_schema", {}), ("regex", "")])
def test_a_structure_that_says_little_is_one_all_the_same(name, value) -> None:
    assert GenerationOptions.of(**{name: value}).structure == {name: value}
    assert refusal(**{name: value}, choice="a") == f"{name} and choice exclude each other"


def test_the_structure_is_what_was_asked_for() -> None:
    assert GenerationOptions.of().structure == GenerationOptions.of(choice=(), regex=None).structure == {}
    assert GenerationOptions.of(choice="a").structure == {"choice": ("a",)}
    assert GenerationOptions.of(json_schema={"type": "null"}).structure == {"json_schema": {"type": "null"}}


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
