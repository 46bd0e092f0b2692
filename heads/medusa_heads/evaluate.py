"""Measures the accuracy of heads on held-out answers, and the tokens per step of candidate trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from medusa_heads.modules import MedusaHeads
from medusa_heads.replay import (
    NOT_VALID,
    TOP_K,
    TREE_NODES,
    Evaluation,
    IntArray,
    SourceResult,
    TreeResult,
    accuracies,
    best_tree,
    expected_tokens,
    replay,
)
from medusa_heads.train.hidden import HiddenStates
from medusa_runtime.arrays import BoolArray
from medusa_runtime.drafting.tree import CandidateTree

ROWS = 128  # rows whose logits are in memory at a time
SOURCE_NODES = 16  # size of the tree by which sources are compared


@torch.no_grad()
def target_ranks(
    heads: MedusaHeads, lm_head: nn.Module, states: HiddenStates, rows: IntArray | None = None, embedding: Any = None
) -> IntArray:
    """The rank (from 0) of the right token in each head's guesses, at each row. TOP_K stands for all further ranks. [n, K]

    Heads with a draft vocabulary guess only its tokens, as exported heads do. For other tokens, the rank is TOP_K.

    Args:
        heads: the heads, in the precision of the LM head.
        lm_head: the backbone's LM head.
        states: hidden states of the held-out answers.
        rows: the rows to use, or None for all.
        embedding: the backbone's input embedding, for Hydra heads. They read the likeliest guesses, as exported heads do.
    """
    index = np.arange(len(states.next_ids)) if rows is None else rows
    parameter = next(lm_head.parameters())
    ranks = np.full((len(index), heads.config.num_heads), NOT_VALID, np.int64)
    drafted = None
    if heads.draft_ids is not None:
        drafted = torch.zeros(heads.vocab_size, dtype=torch.bool, device=parameter.device)  # [V]
        drafted[heads.draft_ids] = True
    for start in range(0, len(index), ROWS):
        part = index[start : start + ROWS]
        targets = torch.from_numpy(states.targets(part, heads.config.num_heads)).to(parameter.device)  # [n, K]
        hidden = torch.from_numpy(np.asarray(states.rows[part])).to(parameter.device, parameter.dtype)  # [n, C]
        root_ids = torch.from_numpy(states.next_ids[part]).to(parameter.device)
        for k, logits in enumerate(heads(hidden, lm_head, root_ids, embedding).unbind(1)):  # [n, V]
            target = targets[:, k : k + 1].clamp(min=0)
            right = logits.gather(1, target)
            after = torch.arange(logits.shape[1], device=logits.device) > target  # of equal logits, the lower id ranks first
            worse = (logits < right) | ((logits == right) & after)  # [n, V], false for NaN
            if drafted is not None:
                worse |= ~drafted
            rank = logits.shape[1] - 1 - worse.sum(1)
            if drafted is not None:
                rank = rank.masked_fill(~drafted[target[:, 0]], TOP_K)
            rank = rank.clamp(max=TOP_K).masked_fill(targets[:, k] < 0, NOT_VALID)
            ranks[start : start + ROWS, k] = rank.cpu().numpy()
    return ranks


def evaluate(
    heads: MedusaHeads,
    lm_head: nn.Module,
    states: HiddenStates,
    *,
    digest: str,
    data: str,
    trees: Sequence[CandidateTree] = (),
    nodes: Sequence[int] = TREE_NODES,
    embedding: Any = None,
) -> Evaluation:
    """Measure the accuracy per head and rank, and the tokens per step of given trees and of the best trees of some sizes.

    Args:
        heads: the heads.
        lm_head: the backbone's LM head.
        digest: digest of the heads as they are stored, possibly in another precision.
        states: hidden states of held-out answers. The best trees are found on every second answer and measured on the others.
        data: digest of the answers.
        trees: the given trees.
        nodes: sizes of the trees to search.
        embedding: the backbone's input embedding, for Hydra heads.
    """
    ranks = target_ranks(heads, lm_head, states, embedding=embedding)
    accuracy = accuracies(ranks)
    answer = np.searchsorted(states.starts, np.arange(len(ranks)), side="right") - 1  # [P]
    searched, judged = (answer % 2 == 0), (answer % 2 == 1)
    if not judged.any():
        searched = judged = np.ones(len(ranks), np.bool_)
    offsets = np.cumsum(judged) - judged  # index of a measured row among the measured ones
    starts = offsets[states.starts[judged[states.starts]]]

    def result(tree: CandidateTree) -> TreeResult:
        measured, expected = replay(ranks[judged], starts, tree), expected_tokens(accuracy, tree)
        return TreeResult(nodes=tree.num_nodes, tokens_per_step=measured, expected=expected, tree=tree.to_json())

    searched_trees = [result(best_tree(ranks[searched], count)) for count in nodes]
    return Evaluation(
        heads=digest,
        base_model=heads.config.base_model,
        data=data,
        answers=len(states.starts),
        tokens=len(states.next_ids),
        accuracy=accuracy.tolist(),
        trees=[*map(result, trees), *searched_trees],
        sources=_by_source(ranks, states, judged[states.starts], heads.draft_ids, searched_trees),
    )


def _by_source(
    ranks: IntArray, states: HiddenStates, judged: BoolArray, draft_ids: Sequence[int] | None, trees: Sequence[TreeResult]
) -> list[SourceResult]:
    """Results by source, if there are several, with the searched tree whose size is nearest to `SOURCE_NODES`.

    judged: which answers are judged; the tree was searched on the others. [E]
    """
    if len(set(states.sources)) < 2 or not trees:
        return []
    tree = CandidateTree.from_json(min(trees, key=lambda found: abs(found.nodes - SOURCE_NODES)).tree)
    is_known = np.ones(len(ranks), np.bool_) if draft_ids is None else np.isin(states.next_ids, draft_ids)
    results = []
    for source in sorted({source for source, counts in zip(states.sources, judged, strict=True) if counts}):
        chosen = judged & np.array([found == source for found in states.sources])  # [E]
        rows = np.repeat(chosen, states.lengths)  # [P]
        starts = np.cumsum(states.lengths[chosen]) - states.lengths[chosen]
        results.append(
            SourceResult(
                source=source,
                answers=int(chosen.sum()),
                tokens=int(rows.sum()),
                not_guessed=round(float(1 - is_known[rows].mean()), 4),
                nodes=tree.num_nodes,
                tokens_per_step=round(replay(ranks[rows], starts, tree), 4),
            )
        )
    return results
