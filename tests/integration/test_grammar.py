"""Structured output on a tiny random model: it wants to say anything else, so what comes out valid is the grammar's doing."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_export.bundle.tree_shapes import prior_tree
from medusa_runtime import (
    CandidateTree,
    DecodingEngine,
    DecodingOptions,
    DynamicTree,
    MedusaLM,
    MissingExtraError,
    OptionError,
    RequestError,
)
from medusa_runtime.decoding.proposer import Proposer
from medusa_runtime.text.grammar import MAX_COMPILED, GrammarCompiler
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend, logits_after

PROMPT = "the quick brown fox"
EOS = 1
TREES = {
    "static": prior_tree(3, 10, 16),
    "wide": CandidateTree.from_choices([[rank] for rank in range(10)]),
    "dynamic": DynamicTree(12),
    "root": CandidateTree.root_only(),
}
SAMPLED = {"temperature": 1.0, "seed": 7}
KINDS = {"greedy": {}, "sampled": SAMPLED, "top_p": {"temperature": 1.5, "top_p": 0.7, "seed": 1}}


@pytest.fixture(scope="module")
def lm(make_bundle: Callable[..., Path]) -> MedusaLM:
    return MedusaLM.from_bundle(make_bundle(), costs=None)  # trees of their full size: nothing here depends on time


@pytest.fixture(scope="module")
def compiler(lm: MedusaLM) -> GrammarCompiler:
    model = lm.engine.backend.manifest.model
    return GrammarCompiler(lm.codec, model.vocab_size, model.eos_token_ids)


# Structures, and what says by hand whether a text has them

COLORS = ["red", "green", "light blue"]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "color": {"enum": COLORS},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "at": {"type": ["null", "boolean"]}},
            "required": ["zip", "at"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "color", "tags", "home"],
    "additionalProperties": False,
}
PAIRS = {
    "type": "array",
    "items": {
        "anyOf": [
            {"const": "none"},
            {
                "type": "object",
                "properties": {"left": {"type": "boolean"}, "right": {"enum": [1, 2, 3]}},
                "required": ["right"],
                "additionalProperties": False,
            },
        ]
    },
    "minItems": 2,
    "maxItems": 4,
}


def is_person(text: str) -> bool:
    person = json.loads(text)
    assert list(person) == ["name", "age", "color", "tags", "home"]
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 6
    assert type(person["age"]) is int
    assert 0 <= person["age"] <= 120
    assert person["color"] in COLORS
    assert 1 <= len(person["tags"]) <= 3
    assert all(type(tag) is bool for tag in person["tags"])
    assert list(person["home"]) == ["zip", "at"]
    assert re.fullmatch("[0-9]{5}", person["home"]["zip"])
    assert person["home"]["at"] in (None, True, False)
    return text == json.dumps(person, ensure_ascii=False)  # in one form, with nothing to fill it up


def is_pairs(text: str) -> bool:
    pairs = json.loads(text)
    assert 2 <= len(pairs) <= 4
    for pair in pairs:
        assert pair == "none" or (set(pair) in ({"right"}, {"left", "right"}) and pair["right"] in (1, 2, 3))
        assert pair == "none" or type(pair.get("left", True)) is bool
    return True


EXPRESSIONS = [
    "[a-c]{3,5}x",
    r"(?:\d{3}-)?\d{4}",
    "(yes|no|may be)!",
    "a{2}|b.c",  # the whole expression, not a part of it
    r"/[\w/]{2,6}/\\",
    "[^a-z]{4}",
    "日(本|曜日)",
    "x?",
    "",
]
CHOICES = [
    ["yes", "no"],
    ["a", "ab", "abc"],
    ["light blue", "c-d#&~/"],
    ["(", "a.b", "$^|*+?\\", "[x]"],
    ["日本", "é", "\n\t"],
]
STRUCTURES: list[tuple[dict[str, Any], Callable[[str], Any]]] = [
    ({"json_schema": PERSON}, is_person),
    ({"json_schema": PAIRS}, is_pairs),
    ({"json_schema": {"enum": ["a", 1, None, [2, {}]]}}, lambda text: json.loads(text) in ("a", 1, None, [2, {}])),
    *(({"regex": regex}, lambda text, regex=regex: re.fullmatch(regex, text)) for regex in EXPRESSIONS),
    *(({"choice": choice}, lambda text, choice=choice: text in choice) for choice in CHOICES),
]
NAMES = ["person", "pairs", "enum", *EXPRESSIONS, *("|".join(choice) for choice in CHOICES)]
structures = pytest.mark.parametrize(("structure", "is_valid"), STRUCTURES, ids=NAMES)
kinds = pytest.mark.parametrize("kind", KINDS)


@structures
@kinds
@pytest.mark.parametrize("tree", TREES)
def test_the_answer_has_the_structure_whatever_the_model_wants(lm: MedusaLM, structure, is_valid, kind, tree) -> None:
    found = lm.generate(PROMPT, max_new_tokens=150, tree=TREES[tree], **structure, **KINDS[kind])
    assert is_valid(found.text)
    assert (found.finish_reason, found.token_ids[-1]) == ("stop", EOS)
    assert EOS not in found.token_ids[:-1]


@structures
@kinds
def test_medusa_changes_no_token(lm: MedusaLM, structure, is_valid, kind) -> None:
    plain = lm.generate(PROMPT, max_new_tokens=150, medusa=False, **structure, **KINDS[kind])
    assert is_valid(plain.text)
    assert plain.stats.num_steps == len(plain.token_ids) - 1
    for tree in TREES.values():
        medusa = lm.generate(PROMPT, max_new_tokens=150, tree=tree, **structure, **KINDS[kind])
        assert (medusa.token_ids, medusa.finish_reason) == (plain.token_ids, plain.finish_reason)


def test_different_seeds_say_different_things(lm: MedusaLM) -> None:
    texts = {lm.generate(PROMPT, json_schema=PERSON, temperature=1.0, seed=seed, max_new_tokens=150).text for seed in range(4)}
    assert len(texts) == 4
    assert all(map(is_person, texts))


@pytest.mark.parametrize("seed", range(3))
def test_typical_acceptance_keeps_to_the_structure(lm: MedusaLM, seed) -> None:
    found = lm.generate(PROMPT, json_schema=PERSON, temperature=0.9, acceptance="typical", seed=seed, max_new_tokens=150)
    assert is_person(found.text)
    assert found.finish_reason == "stop"


def test_guided_and_unguided_requests_share_steps_and_do_not_disturb_each_other(lm: MedusaLM) -> None:
    asked = [
        ({"json_schema": PERSON}, is_person),
        ({}, lambda text: True),
        ({"regex": r"\d{30}", **SAMPLED}, lambda text: re.fullmatch(r"\d{30}", text)),
        (SAMPLED, lambda text: True),
        ({"choice": CHOICES[2], **SAMPLED}, lambda text: text in CHOICES[2]),
        ({"json_schema": PAIRS, "tree": DynamicTree(9)}, is_pairs),
        ({"json_schema": PERSON, "medusa": False, **SAMPLED}, is_person),
    ]
    alone = [lm.generate(PROMPT, max_new_tokens=150, **fields) for fields, _ in asked]
    handles = [lm.submit(PROMPT, max_new_tokens=150, **fields) for fields, _ in asked]
    for handle, one, (fields, is_valid) in zip(handles, alone, asked, strict=True):
        found = handle.result(60)
        assert (found.token_ids, found.finish_reason) == (one.token_ids, one.finish_reason)
        assert is_valid(found.text)
        assert found.finish_reason == "stop" or fields in ({}, SAMPLED)


def test_each_of_several_answers_has_a_grammar_of_its_own(lm: MedusaLM) -> None:
    found = lm.generate(PROMPT, json_schema=PERSON, n=5, max_new_tokens=150, **SAMPLED)
    assert all(is_person(choice.text) and choice.finish_reason == "stop" for choice in found.choices)
    assert len({choice.text for choice in found.choices}) == 5
    again = lm.generate(PROMPT, json_schema=PERSON, n=5, max_new_tokens=150, medusa=False, **SAMPLED)
    assert [choice.token_ids for choice in again.choices] == [choice.token_ids for choice in found.choices]


SPELLED = [
    {"choice": ["</s>"]},
    {"choice": ["x<|user|>y"]},
    {"regex": "<s>[ab]</s>"},
    {"json_schema": {"const": "a</s>b"}},
    {"json_schema": {"enum": ["<|user|>", "<|system|>"]}},
]


@pytest.mark.parametrize("structure", SPELLED, ids=lambda structure: str(next(iter(structure.values()))))
@pytest.mark.parametrize("medusa", [True, False])
def test_a_text_that_reads_like_a_special_token_is_text(lm: MedusaLM, structure, medusa) -> None:
    """Forced text must not become the end-of-sequence token that is spelled so: the answer would end inside it."""
    found = lm.generate(PROMPT, max_new_tokens=60, medusa=medusa, **structure)
    if "json_schema" in structure:
        schema = structure["json_schema"]
        assert json.loads(found.text) in schema.get("enum", [schema.get("const")])
    else:
        assert re.fullmatch(structure.get("regex", re.escape(structure.get("choice", [""])[0])), found.text)
    assert found.finish_reason == "stop"


def test_a_streamed_answer_is_the_whole_one(lm: MedusaLM) -> None:
    whole = lm.generate(PROMPT, json_schema=PERSON, max_new_tokens=150)
    chunks = list(lm.stream(PROMPT, json_schema=PERSON, max_new_tokens=150))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].finish_reason == "stop"


def test_an_answer_that_is_cut_says_so(lm: MedusaLM) -> None:
    whole = lm.generate(PROMPT, json_schema=PERSON, max_new_tokens=150)
    for num_tokens in (1, 2, 11, len(whole.token_ids) - 1):
        cut = lm.generate(PROMPT, json_schema=PERSON, max_new_tokens=num_tokens)
        assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:num_tokens], "length")
    exact = lm.generate(PROMPT, json_schema=PERSON, max_new_tokens=len(whole.token_ids))
    assert (exact.token_ids, exact.finish_reason) == (whole.token_ids, "stop")


def test_other_options_apply_within_the_structure(lm: MedusaLM) -> None:
    token = lm.codec.encode("7", raw=True)[0]
    assert lm.generate(PROMPT, regex="[0-9]{5}", logit_bias={token: 100}).text == "77777"
    assert "7" not in lm.generate(PROMPT, regex="[0-9]{20}", logit_bias={token: -100}).text
    found = lm.generate(PROMPT, regex="[0-9]{8}", logprobs=2)
    assert found.logprobs is not None
    assert [one.token_id for one in found.logprobs] == found.token_ids
    assert len(lm.generate(PROMPT, regex="[ab]{1,40}", min_new_tokens=9, max_new_tokens=80).token_ids) > 9


# What cannot be used

MALFORMED: list[dict[str, Any]] = [
    {"regex": "(a"},
    {"regex": "[z-a]"},
    {"regex": "a**+?{"},
    {"regex": "a(?=b)b"},  # well formed, but no grammar looks ahead
    {"regex": r"(a)\1"},
    {"regex": "a\\"},
    {"json_schema": {"type": "strange"}},
    {"json_schema": {"type": "object", "properties": {"a": 5}}},
    {"json_schema": {"type": "string", "pattern": "("}},
    {"json_schema": {"$ref": "#/nowhere"}},
    {"json_schema": {"$ref": "https://example.com/schema.json"}},
    {"json_schema": {"enum": []}},
    {"json_schema": {"type": "integer", "minimum": 5, "maximum": 1}},
    {"json_schema": {"type": "number", "minimum": float("nan")}},
    {"json_schema": {"const": {1, 2}}},
    {"json_schema": {"type": "array", "uniqueItems": True}},  # not followed, so not accepted
    {"json_schema": {"propertys": {"a": {"type": "string"}}}},
]


def refusal(lm: MedusaLM, **fields: Any) -> str:
    """The one line that refuses a request, before any work."""
    before = lm.stats()
    with pytest.raises(OptionError) as told:
        lm.submit(PROMPT, n=2, **fields)
    assert lm.stats() == before
    [line] = str(told.value).splitlines()
    return line


@pytest.mark.parametrize("structure", MALFORMED, ids=lambda structure: str(next(iter(structure.values())))[:40])
def test_a_malformed_structure_is_refused_in_one_line_before_any_work(lm: MedusaLM, structure) -> None:
    assert refusal(lm, **structure).startswith(f"{next(iter(structure))} cannot be used: ")


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        ({"regex": "x(a"}, "unclosed group"),
        ({"regex": "[z-a]"}, "invalid character class range"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed group"),
        ({"json_schema": {"type": "strange"}}, "Invalid type: strange"),
        (
            {"json_schema": {"name": "person", "schema": PERSON}},
            "json_schema holds the schema under 'schema', as in OpenAI's API; pass the inner schema",
        ),
        ({"json_schema": {"propertys": {}}}, "it restricts nothing: propertys are no keywords of JSON Schema"),
    ],
)
def test_the_line_says_what_is_wrong(lm: MedusaLM, structure, reason) -> None:
    assert reason in refusal(lm, **structure)


def test_a_schema_nested_beyond_reason_is_refused(lm: MedusaLM) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(2000):
        schema = {"type": "array", "items": schema}
    assert refusal(lm, json_schema=schema).startswith("json_schema cannot be used: ")


def test_where_the_options_leave_nothing_of_the_structure_the_request_fails_alone(lm: MedusaLM) -> None:
    failing = lm.submit(PROMPT, regex="[ab]{3}", min_new_tokens=9, max_new_tokens=20)
    other = lm.submit(PROMPT, regex="[ab]{3}", max_new_tokens=20)
    with pytest.raises(OptionError, match="leave no token that may come next"):
        failing.result(60)
    assert re.fullmatch("[ab]{3}", other.result(60).text)


def endless_lists() -> dict[str, Any]:
    """A schema that can be used, but has so many readings that its grammar gives up after some tokens."""
    lists = {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}
    return {"$defs": {"a": {"anyOf": [lists, lists | {"maxItems": 4}]}}, "$ref": "#/$defs/a"}


@pytest.mark.parametrize("fields", [{}, {"medusa": False}, SAMPLED], ids=["medusa", "plain", "sampled"])
def test_a_grammar_that_gives_up_ends_its_own_request_alone(lm: MedusaLM, fields) -> None:
    expected = lm.generate(PROMPT, max_new_tokens=200, ignore_eos=True).token_ids
    failing = lm.submit(PROMPT, json_schema=endless_lists(), max_new_tokens=200, **fields)
    other = lm.submit(PROMPT, max_new_tokens=200, ignore_eos=True)
    with pytest.raises(RequestError, match="the structure cannot be followed"):
        failing.result(60)
    assert other.result(60).token_ids == expected


@pytest.mark.parametrize("ends", [[], [-1, 320, 10**6]])
def test_a_model_that_cannot_end_cannot_be_guided(lm: MedusaLM, ends) -> None:
    with pytest.raises(OptionError, match="no end-of-sequence token"):
        GrammarCompiler(lm.codec, 320, ends).compile({"regex": "a"})


def test_an_end_that_the_model_does_not_know_is_left_out(lm: MedusaLM) -> None:
    guide = GrammarCompiler(lm.codec, 320, [10**6, EOS, -1]).compile({"regex": ""})
    assert np.flatnonzero(guide.allowed([])).tolist() == [EOS]


def test_a_tokenizer_may_have_more_tokens_than_the_model(lm: MedusaLM) -> None:
    """As Gemma 3 1B has it: structures were impossible."""
    compiler = GrammarCompiler(lm.codec, 300, [EOS])
    text = "the quick brown fox"
    assert max(lm.codec.encode(text, raw=True)) >= 300
    guide = compiler.compile({"choice": [text]})
    assert guide.allowed([]).shape == (300,)
    forced = guide.forced()
    assert lm.codec.decode(forced) == text
    assert max(forced) < 300
    assert np.flatnonzero(guide.allowed(forced)).tolist() == [EOS]


def test_choices_that_are_too_short_for_the_answer_are_refused_before_any_work(lm: MedusaLM) -> None:
    line = refusal(lm, choice=["yes", "né"], min_new_tokens=4)
    assert line == "min_new_tokens is 4; the longest text of choice has at most 3 tokens"
    assert lm.generate(PROMPT, choice=["yes", "no"], min_new_tokens=1).text in ("yes", "no")


def test_without_the_package_a_structure_is_refused_and_everything_else_works(make_bundle, monkeypatch) -> None:
    lm = MedusaLM.from_bundle(make_bundle())
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError) as told:
        lm.generate(PROMPT, regex="a")
    assert str(told.value) == "llguidance is not installed; install it with: pip install 'medusa-export[structured]'"
    assert len(lm.generate(PROMPT, max_new_tokens=5, ignore_eos=True).token_ids) == 5


# Grammars in llama.cpp's form (GBNF) and Lark's


def written(lm: MedusaLM, compiler: GrammarCompiler, structure: dict[str, Any], pick: int) -> str:
    """The text that a structure allows if of the tokens that may come next always the same one in their order is taken."""
    guide, answer = compiler.compile(structure), list[int]()
    while (token := (allowed := np.flatnonzero(guide.allowed(answer)))[pick % len(allowed)]) != EOS and len(answer) < 40:
        answer.append(int(token))
    return lm.codec.decode(answer)


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "[" item ("," item){1,2} "]"\nitem ::= "yes" | [0-9]{2}',
        'start: "[" item ("," item)~1..2 "]"\nitem: "yes" | /[0-9]{2}/',
        "start: list\nlist: /\\[(yes|[0-9]{2})(,(yes|[0-9]{2})){1,2}\\]/",
    ],
    ids=["gbnf", "lark", "lark with a rule"],
)
@pytest.mark.parametrize("pick", [0, 1, 2, -1])
def test_a_grammar_restricts_the_answer(lm: MedusaLM, compiler: GrammarCompiler, grammar, pick) -> None:
    assert re.fullmatch(r"\[(yes|\d\d)(,(yes|\d\d)){1,2}\]", written(lm, compiler, {"grammar": grammar}, pick))


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("", "No 'root' rule found"),
        ("root ::= item", "Rule 'item' not found"),
        ("root := x", "Expected ::="),
        ("start: item", 'unknown name: "item"'),
        ("start: /(/", "unclosed group"),
        ("start: [", "Expected"),
    ],
)
def test_a_malformed_grammar_is_refused_in_one_line(compiler: GrammarCompiler, grammar, reason) -> None:
    with pytest.raises(OptionError, match=re.escape(reason)) as told:
        compiler.compile({"grammar": grammar})
    assert str(told.value).startswith("grammar cannot be used: ")
    assert len(str(told.value).splitlines()) == 1


# Compiling


@pytest.fixture
def made(monkeypatch) -> dict[str, int]:
    """How often llguidance makes what: its tokenizer takes a second of a real model's first request."""
    counts = {"LLTokenizer": 0, "LLMatcher": 0}

    class Counting:
        grammar_from = staticmethod(llguidance.grammar_from)
        TokenizerWrapper = llguidance.TokenizerWrapper
        LLParserLimits = llguidance.LLParserLimits

        @staticmethod
        def LLTokenizer(*args, **fields):  # noqa: N802
            counts["LLTokenizer"] += 1
            time.sleep(0.05)  # others come meanwhile
            return llguidance.LLTokenizer(*args, **fields)

        class LLMatcher:
            grammar_from_regex = staticmethod(llguidance.LLMatcher.grammar_from_regex)
            grammar_from_json_schema = staticmethod(llguidance.LLMatcher.grammar_from_json_schema)

            def __new__(cls, *args, **fields):
                counts["LLMatcher"] += 1
                return llguidance.LLMatcher(*args, **fields)

    monkeypatch.setattr("medusa_runtime.text.grammar._llguidance", lambda: Counting)
    return counts


def test_requests_that_come_at_once_make_the_compiler_once(lm: MedusaLM, made) -> None:
    compiler = GrammarCompiler(lm.codec, 320, [EOS])
    assert made == {"LLTokenizer": 0, "LLMatcher": 0}
    with ThreadPoolExecutor(8) as pool:
        guides = list(pool.map(lambda number: compiler.compile({"regex": f"a{{{number % 4}}}"}), range(16)))
    assert made["LLTokenizer"] == 2  # the tokenizer itself, and the one that reads text as text
    [a] = lm.codec.encode("a", raw=True)
    for number, guide in enumerate(guides):
        assert bool(guide.allowed([])[EOS]) == (number % 4 == 0)
        assert bool(guide.allowed([a] * (number % 4))[EOS])


def test_an_equal_structure_is_compiled_once(lm: MedusaLM, made) -> None:
    compiler = GrammarCompiler(lm.codec, 320, [EOS])
    first = compiler.compile({"json_schema": PERSON})
    consumed = first.forced()
    first.advance(consumed)
    second = compiler.compile({"json_schema": dict(PERSON)})
    assert made["LLMatcher"] == 1
    assert second.forced() == consumed  # at its beginning, wherever the first is
    compiler.compile({"json_schema": {**PERSON, "properties": dict(reversed(PERSON["properties"].items()))}})
    assert made["LLMatcher"] == 2  # their order is the answer's


def test_structures_that_were_not_used_for_long_are_forgotten(lm: MedusaLM, made) -> None:
    compiler = GrammarCompiler(lm.codec, 320, [EOS])
    for number in range(MAX_COMPILED):
        compiler.compile({"regex": f"a{{{number}}}"})
    compiler.compile({"regex": "a{0}"})  # used again
    compiler.compile({"regex": "b"})
    assert made["LLMatcher"] == MAX_COMPILED + 1
    compiler.compile({"regex": "a{0}"})
    assert made["LLMatcher"] == MAX_COMPILED + 1
    compiler.compile({"regex": "a{1}"})
    assert made["LLMatcher"] == MAX_COMPILED + 2


def test_a_structure_that_cannot_be_used_is_refused_each_time(compiler: GrammarCompiler) -> None:
    for _ in range(2):
        with pytest.raises(OptionError, match="unclosed group"):
            compiler.compile({"regex": "(a"})


# Guides


def test_any_end_of_sequence_token_may_end_the_answer(lm: MedusaLM) -> None:
    guide = GrammarCompiler(lm.codec, 330, [EOS, 5]).compile({"regex": "ab?"})
    [a, b] = lm.codec.encode("a", raw=True) + lm.codec.encode("b", raw=True)
    assert guide.allowed([]).shape == (330,)
    assert set(np.flatnonzero(guide.allowed([]))) == {token for token in range(320) if lm.codec.decode([token]) in ("a", "ab")}
    assert np.flatnonzero(guide.allowed([a])).tolist() == [EOS, 5, b]
    assert np.flatnonzero(guide.allowed([a, b])).tolist() == [EOS, 5]


def test_what_is_forced_may_follow(lm: MedusaLM, compiler: GrammarCompiler) -> None:
    guide = compiler.compile({"choice": ["green fields", "green hills"]})
    forced = guide.forced()
    assert lm.codec.decode(forced) == "green "
    assert guide.lets_pass(forced)
    guide.allowed(forced)  # which leaves it where it is
    assert guide.forced() == forced
    guide.advance(forced)
    assert guide.forced() == []  # f or h
    guide.advance(lm.codec.encode("h", raw=True))
    assert lm.codec.decode(guide.forced()) == "ills"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(picks=st.lists(st.integers(0, 10**6), min_size=1, max_size=25), visits=st.lists(st.integers(0, 25), max_size=12))
def test_a_guide_says_the_same_wherever_it_has_been(compiler: GrammarCompiler, picks, visits) -> None:
    guide, answer = compiler.compile({"json_schema": PERSON}), list[int]()
    for pick in picks:
        allowed = np.flatnonzero(guide.allowed(answer))
        answer.append(int(allowed[pick % len(allowed)]))
        if answer[-1] == EOS:
            break
    for visit in visits:
        before = answer[: min(visit, len(answer) - 1)]
        fresh, copied = compiler.compile({"json_schema": PERSON}), guide.copy()
        fresh.advance(before)
        for token in before:
            copied.advance([token])
        assert (guide.allowed(before) == fresh.allowed([])).all()
        assert (copied.allowed([]) == fresh.allowed([])).all()
        assert copied.forced() == fresh.forced()
        assert copied.lets_pass(answer[len(before) :])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.sampled_from(["", "ab", "ab1", "ab12", "ab12,", "ab12,cd2"]), path=st.text("abcd12,x", max_size=4))
def test_a_path_passes_where_each_of_its_tokens_may_follow(lm: MedusaLM, compiler: GrammarCompiler, text, path) -> None:
    guide, walked = (compiler.compile({"regex": "([a-d]{2}[12]{0,2},?){1,3}"}) for _ in range(2))
    before = lm.codec.encode(text, raw=True)
    tokens = [lm.codec.encode(character, raw=True)[0] for character in path]
    may_follow = True
    for place, token in enumerate(tokens):
        may_follow = may_follow and bool(walked.allowed([*before, *tokens[:place]])[token])
    guide.advance(before)
    assert guide.lets_pass(tokens) == may_follow


# Drafts


@pytest.fixture
def verified(monkeypatch) -> list[tuple[list[int], list[int]]]:
    """What is verified: the answer so far, and a path of drafts below its last token."""
    found: list[tuple[list[int], list[int]]] = []
    draft_of = Proposer._draft

    def draft(self, sequence, *arguments):
        made = draft_of(self, sequence, *arguments)
        found.extend((sequence.token_ids, made.tokens[row][1:].tolist()) for row in made.mask[1:])
        return made

    monkeypatch.setattr(Proposer, "_draft", draft)
    return found


def passes(guide: Any, answer: list[int], path: list[int]) -> bool:
    """Whether a guide at its beginning lets a path pass after an answer."""
    guide = guide.copy()
    guide.advance(answer)
    return guide.lets_pass(path)


@kinds
@pytest.mark.parametrize("tree", ["static", "wide", "dynamic"])
def test_drafts_that_the_grammar_forbids_are_never_verified(lm: MedusaLM, compiler, verified, kind, tree) -> None:
    lm.generate(PROMPT, json_schema=PERSON, max_new_tokens=150, tree=TREES[tree], **KINDS[kind])
    guide = compiler.compile({"json_schema": PERSON})
    assert len(verified) > 20
    assert all(passes(guide, answer, path) for answer, path in verified)
    assert max(len(path) for _, path in verified) > 3  # deeper than the heads: what is forced
    lm.generate(PROMPT, max_new_tokens=30, tree=TREES[tree], **KINDS[kind])
    assert not all(passes(guide, [], path) for _, path in verified)  # drafts of an unguided request would not pass


def test_forced_tokens_are_drafted_and_accepted(lm: MedusaLM) -> None:
    schema = {"type": "object", "properties": {"a long name": {"const": "a long value"}}, "required": ["a long name"]}
    fixed = {"json_schema": schema | {"additionalProperties": False}}
    found = lm.generate(PROMPT, **fixed)
    assert found.text == '{"a long name": "a long value"}'
    assert found.stats.num_steps <= 3 < len(found.token_ids) - 2
    assert found.stats.num_accepted_tokens >= len(found.token_ids) - 5
    assert lm.generate(PROMPT, medusa=False, **fixed).stats.num_steps == len(found.token_ids) - 1
    person = lm.generate(PROMPT, json_schema=PERSON, max_new_tokens=150)
    assert person.stats.num_steps < 0.7 * len(person.token_ids)


def test_forced_tokens_are_no_more_than_the_tree_and_the_answer_have_room_for(lm: MedusaLM, verified) -> None:
    fixed = "a text of which every character is known from the start"
    found = lm.generate(PROMPT, choice=fixed, tree=CandidateTree.from_choices([[0, 0]]), max_new_tokens=200)
    assert found.text == fixed
    assert max(len(path) for _, path in verified) == 2
    verified.clear()
    cut = lm.generate(PROMPT, choice=fixed, tree=DynamicTree(64), max_new_tokens=9)
    assert (cut.token_ids, cut.finish_reason) == (found.token_ids[:9], "length")
    assert all(len(answer) + len(path) <= 9 for answer, path in verified)


class Rising:
    """A guide without a grammar: each token is larger than the one before, up to ten more; token 0 ends."""

    def __init__(self, *, forces: bool = False) -> None:
        self.forces = forces
        self.token_ids: list[int] = []

    def copy(self) -> Rising:
        return Rising(forces=self.forces)

    def advance(self, token_ids: Sequence[int]) -> None:
        self.token_ids += token_ids

    def allowed(self, path: Sequence[int]) -> np.ndarray:
        token_ids = [*self.token_ids, *path]
        last = token_ids[-1] if token_ids else 0
        allowed = np.zeros(VOCAB_SIZE, np.bool_)
        allowed[last + 1 : last + 11] = True
        allowed[0] = last > 30
        if self.forces and token_ids and last % 2 == 0:
            allowed[:] = False
            allowed[min(last + 1, VOCAB_SIZE - 1)] = True
        return allowed

    def lets_pass(self, path: Sequence[int]) -> bool:
        return all(self.allowed(path[:place])[token] for place, token in enumerate(path))

    def forced(self) -> list[int]:
        return [self.token_ids[-1] + 1] if self.forces and self.token_ids and self.token_ids[-1] % 2 == 0 else []


@pytest.mark.parametrize("forces", [False, True])
@pytest.mark.parametrize(
    "tree", [None, CandidateTree.from_choices([[a, b] for a in range(4) for b in range(4)]), DynamicTree(14)]
)
def test_the_engine_follows_any_guide(verified, tree, forces) -> None:
    expected: list[int] = []
    while not expected or expected[-1] != 0:
        logits = np.where(Rising(forces=forces).allowed(expected), logits_after([4, 2, *expected]), -np.inf)
        expected.append(int(logits.argmax()))
    engine = DecodingEngine(FakeBackend("sometimes"), tree)
    options = DecodingOptions.of(max_new_tokens=60, stop_token_ids=[0])
    answer = engine.add([4, 2], options, guide=Rising(forces=forces))
    beside = engine.add([4, 2], options)
    while not engine.is_idle:
        engine.step()
    assert (answer.token_ids, answer.finish_reason) == (expected, "stop")
    guided = [(before, path) for before, path in verified if before == expected[: len(before)]]
    assert all(passes(Rising(forces=forces), before, path) for before, path in guided)
    assert beside.token_ids != answer.token_ids
    if forces:
        assert answer.stats.num_accepted_tokens > 0


def test_a_guide_that_fails_ends_its_own_answer_alone() -> None:
    class Broken(Rising):
        def lets_pass(self, path: Sequence[int]) -> bool:
            raise RuntimeError("the guide is lost")

    engine = DecodingEngine(FakeBackend("always"))
    failing = engine.add([4, 2], DecodingOptions.of(max_new_tokens=20), guide=Broken())
    other = engine.add([9, 9], DecodingOptions.of(max_new_tokens=20))
    while not engine.is_idle:
        engine.step()
    assert failing.finish_reason == "error"
    assert (other.finish_reason, len(other.token_ids)) == ("length", 20)


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_guide_is_one_answers_own(lm: MedusaLM, compiler: GrammarCompiler, is_copied) -> None:
    [a, b] = (lm.codec.encode(text, raw=True)[0] for text in "ab")
    one = compiler.compile({"regex": "a[ab]"})
    one.allowed([a])
    other = one.copy() if is_copied else compiler.compile({"regex": "a[ab]"})
    for _ in range(2):
        assert np.flatnonzero(one.allowed([a, b])).tolist() == [EOS]
        assert np.flatnonzero(other.allowed([a])).tolist() == sorted([a, b])
        assert np.flatnonzero(other.allowed([])).tolist() == np.flatnonzero(one.allowed([])).tolist()
