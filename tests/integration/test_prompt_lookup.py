"""Prompt lookup on a real bundle of a tiny model: it changes the steps and no answer, whatever the answer has to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from medusa_export.cli import main
from medusa_runtime import CandidateTree, DynamicTree, MedusaLM

PROMPTS = ["the quick brown fox jumps over the lazy dog and the quick brown fox runs", "a small model", "fox fox fox"]
SCHEMA = {"type": "array", "items": {"enum": ["one", "two", "three"]}, "minItems": 4, "maxItems": 8}
KINDS = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "seed": 5},
    "low": {"temperature": 0.2, "seed": 5},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.1},
    "structure": {"json_schema": SCHEMA, "ignore_eos": False},
    "static tree": {"tree": CandidateTree.from_choices([[0], [1], [0, 0], [0, 0, 0]])},
    "dynamic tree": {"tree": DynamicTree(24)},
}


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle()


@pytest.fixture(scope="module")
def lm(bundle: Path) -> MedusaLM:
    return MedusaLM.from_bundle(bundle, costs=None, prompt_lookup=True)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same_with_and_without(lm: MedusaLM, kind: str) -> None:
    options = {"max_new_tokens": 60, "ignore_eos": True} | KINDS[kind]
    without = lm.generate_batch(PROMPTS, **options, prompt_lookup=False)
    for fields in ({"prompt_lookup": True}, {"prompt_lookup": True, "medusa": False}, {}):
        answers = lm.generate_batch(PROMPTS, **(options | fields))
        assert [one.token_ids for one in answers] == [one.token_ids for one in without]
        if fields and kind in {"greedy", "low", "dynamic tree"}:
            assert sum(one.stats.num_looked_up_tokens for one in answers) > 0


def test_it_saves_steps_on_answers_that_repeat(lm: MedusaLM) -> None:
    options = {"max_new_tokens": 120, "ignore_eos": True, "logit_bias": dict.fromkeys(range(60, 70), 8.0)}
    without, both = (lm.generate(PROMPTS[0], **options, prompt_lookup=wanted) for wanted in (False, True))
    assert both.token_ids == without.token_ids
    assert both.stats.num_steps < 0.8 * without.stats.num_steps


def test_the_command_line_has_it(bundle: Path) -> None:
    words = ["generate", str(bundle), "-p", PROMPTS[0], "--max-new-tokens", "40", "--ignore-eos", "--json"]
    words += ["--logit-bias", "60=9", "--logit-bias", "61=9"]  # so that it repeats itself
    without, both = (json.loads(CliRunner().invoke(main, [*words, *flag]).stdout) for flag in ([], ["--prompt-lookup"]))
    assert both["token_ids"] == without["token_ids"]
    assert without["stats"]["num_looked_up_tokens"] == 0 < both["stats"]["num_looked_up_tokens"]
