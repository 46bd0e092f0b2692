"""Acceptance in the step graph gives the same as on the host."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_export.passes.tensorrt.accept_greedily import AcceptGreedily
from medusa_runtime.drafting.draft import Draft, DraftBatch
from medusa_runtime.sampling.acceptance import accept_greedy
from tests.support.drafts import hand_made
from tests.support.graphs import outputs, parse

HIDDEN = 3
GRAPH = """
step (int64[B, T] input_ids, bool[B, T, T] tree_mask, int64[B, R] logit_rows, int64[B, R] greedy, float[B, R, 3] states)
  => (int64[B, R] greedy_ids, float[B, R, 3] hidden) {
  greedy_ids = Identity(greedy)
  hidden = Identity(states)
}
"""


@pytest.fixture(scope="module")
def model() -> ir.Model:
    model = parse(GRAPH)
    AcceptGreedily()(model)
    return model


def draft(parents: list[int], tokens: list[int]) -> Draft:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    mask = np.zeros((len(parents), len(parents)), np.bool_)
    for node in range(len(parents)):
        ancestor = node
        while ancestor >= 0:
            mask[node, ancestor] = True
            ancestor = parents[ancestor]
    return hand_made(parents, tokens, depths, mask)


@st.composite
def drafts(make: st.DrawFn) -> Draft:
    """A tree whose siblings hold different tokens out of few, so that paths are right by chance."""
    size = make(st.integers(1, 12))
    parents = [-1] + [make(st.integers(0, node - 1)) for node in range(1, size)]
    counts = [sum(parent == parents[node] for parent in parents[:node]) for node in range(size)]
    return draft(parents, [count % 12 for count in counts])


@settings(max_examples=60, deadline=None)
@given(st.lists(drafts(), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_it_accepts_what_the_host_accepts(model: ir.Model, trees: list[Draft], seed: int) -> None:
    batch = DraftBatch.of(trees)
    rng = np.random.default_rng(seed)
    greedy = rng.integers(0, 3, batch.tokens.shape)
    states = rng.normal(size=(*batch.tokens.shape, HIDDEN)).astype(np.float32)
    width = batch.tokens.shape[1]
    found = outputs(
        model,
        input_ids=batch.tokens,
        tree_mask=batch.mask,
        logit_rows=np.tile(np.arange(width), (len(trees), 1)),
        greedy=greedy,
        states=states,
    )
    deepest = [accepted.nodes[-1] for accepted in accept_greedy(batch, greedy)]
    assert found["accepted_rows"].tolist() == deepest
    assert found["accepted_ids"].tolist() == [greedy[row, node] for row, node in enumerate(deepest)]
    np.testing.assert_array_equal(found["accepted_hidden"], states[np.arange(len(trees)), deepest])


def test_of_a_prompt_it_is_the_row_that_is_evaluated(model: ir.Model) -> None:
    found = outputs(
        model,
        input_ids=np.arange(5)[None],
        tree_mask=np.tri(5, dtype=np.bool_)[None],
        logit_rows=np.array([[4]]),
        greedy=np.array([[9]]),
        states=np.ones((1, 1, HIDDEN), np.float32),
    )
    assert found["accepted_rows"].tolist() == [0]
    assert found["accepted_ids"].tolist() == [9]
    assert found["accepted_hidden"].shape == (1, HIDDEN)
