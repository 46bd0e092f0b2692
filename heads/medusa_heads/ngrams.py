"""Counts draft n-grams in the model's answers, and fits their weights. See `medusa_runtime.drafting.ngrams`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from medusa_heads.modules import MedusaHeads
from medusa_heads.train.examples import Example
from medusa_heads.train.hidden import HiddenStates
from medusa_runtime.arrays import FloatArray, IntArray
from medusa_runtime.drafting.ngrams import NO_TOKEN, RATIO_STEP, NGrams, ngram_codes, rest_log_prob
from medusa_runtime.errors import OptionError

MIN_CELLS, MAX_CELLS = 1 << 16, 1 << 20  # cells of the table, two bytes each
CELLS_PER_NGRAM = 2
TOP_K = 32  # candidates that each head returns if n-grams choose among them
DISCOUNT = 0.75  # subtracted from each count, in favour of unseen n-grams
ROWS = 128  # rows whose logits are in memory at a time
PRIOR_ROWS = 1000  # weight of the default weights, as a number of rows
MAX_ROWS = 10_000  # most held-out rows that weights are fitted on
# Fitted for the heads of SmolLM2-135M (docs/decisions/0019-draft-ngrams.md), one row per depth
WEIGHTS = np.array(
    [[0.8, 0.4, 0.35, 0.8, 0.85], [0.75, 0.55, 0.5, 0.8, 0.9], [0.75, 0.6, 0.6, 0.8, 0.85], [0.75, 0.65, 0.65, 0.85, 0.8]],
    np.float32,
)
Counts = npt.NDArray[np.float64]


def count(examples: Sequence[Example], vocab_size: int, *, max_cells: int = MAX_CELLS) -> NGrams:
    """Count pairs and triples of tokens in answers.

    Args:
        examples: the answers with their prompts.
        vocab_size: the model's vocabulary size.
        max_cells: most cells of the table, a power of two. Of n-grams that share a cell, the most frequent is kept.

    Raises:
        OptionError: no answer has three tokens in a row.
    """
    texts = [(*example.prompt_ids[-2:], *example.response_ids) for example in examples]
    tokens = np.fromiter((token for text in texts for token in text), np.int64)
    text = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    pairs, triples = (_counted(tokens, text, length, vocab_size) for length in (2, 3))
    if not len(triples.counts):
        raise OptionError("the answers are too short to count n-grams; use more data")
    singles = np.bincount(tokens, minlength=vocab_size) + 0.1
    return _table(_smoothed(singles / singles.sum(), pairs, triples), max_cells)


def draft_ngrams(
    heads: MedusaHeads, lm_head: nn.Module, training: Sequence[Example], held_states: HiddenStates | None, embedding: Any = None
) -> NGrams | None:
    """N-grams of the answers that heads were trained on, with weights fitted on held-out answers.

    Args:
        heads: the heads, in the precision of the LM head.
        lm_head: the backbone's LM head.
        training: the answers that the heads were trained on.
        held_states: hidden states of the held-out answers, or None if there are none.
        embedding: the backbone's input embedding, for Hydra heads.

    Returns:
        The n-grams, or None if no answer has three tokens.
    """
    try:
        ngrams = count(training, heads.vocab_size)
    except OptionError:
        return None
    if held_states is None:
        return ngrams
    parameter = next(lm_head.parameters())
    rows = torch.from_numpy(np.array(held_states.rows[:MAX_ROWS])).to(parameter.device, parameter.dtype)
    root_ids = torch.from_numpy(held_states.next_ids[:MAX_ROWS]).to(parameter.device)
    return ngrams.with_weights(fit(ngrams, held_states, *head_candidates(heads, lm_head, rows, root_ids, embedding=embedding)))


def head_candidates(
    heads: MedusaHeads,
    lm_head: nn.Module,
    rows: torch.Tensor,
    root_ids: torch.Tensor,
    top_k: int = TOP_K,
    embedding: Any = None,
) -> tuple[IntArray, FloatArray]:
    """The candidates that exported heads would return: ids and log-probabilities, best first.

    Takes hidden states [n, C] and the tokens decided there [n]. Returns two arrays [n, K, M].
    """
    known = None if heads.draft_ids is None else torch.tensor(heads.draft_ids, device=rows.device)
    ids, log_probs = [], []
    with torch.no_grad():
        for part, roots in zip(rows.split(ROWS), root_ids.split(ROWS), strict=True):
            logits = heads(part, lm_head, roots, embedding)  # [n, K, V]
            if known is not None:
                logits = logits[..., known]
            best, places = logits.float().log_softmax(-1).topk(min(top_k, logits.shape[-1]))
            ids.append((places if known is None else known[places]).cpu().numpy())
            log_probs.append(best.cpu().numpy())
    return np.concatenate(ids), np.concatenate(log_probs)


def fit(ngrams: NGrams, states: HiddenStates, head_ids: IntArray, head_log_probs: FloatArray) -> FloatArray:
    """The weights of n-grams and heads with which the held-out answers are most likely, for each depth. [K, 5]

    Args:
        ngrams: n-grams counted in other answers.
        states: hidden states of the held-out answers.
        head_ids: the heads' candidates at all rows of the states, or at the first n. [n, K, M]
        head_log_probs: the candidates' log-probabilities. [n, K, M]
    """
    rows, num_heads = np.arange(len(head_ids)), head_ids.shape[1]
    targets = states.targets(rows, num_heads)  # [P, K]
    begins = np.repeat(states.starts, states.lengths)[: len(rows)]
    weights = []
    for depth in range(1, num_heads + 1):
        valid = rows[(targets[:, depth - 1] >= 0) & (rows + depth - 2 >= begins)]
        contexts = states.next_ids[valid[:, None] + [depth - 2, depth - 1]]  # [n, 2]
        ids, log_probs = head_ids[valid, depth - 1], head_log_probs[valid, depth - 1]  # [n, M]
        features = np.stack([log_probs, *ngrams.ratios(contexts, ids)], axis=-1)  # [n, M, 3]
        is_target = ids == targets[valid, depth - 1, None]
        place = np.where(is_target.any(1), is_target.argmax(1), ids.shape[1])
        weights.append(_likeliest(features, rest_log_prob(log_probs), place, WEIGHTS[min(depth, len(WEIGHTS)) - 1]))
    return np.stack(weights)


def _likeliest(features: FloatArray, rest: FloatArray, place: IntArray, prior: FloatArray) -> FloatArray:
    """Maximum-likelihood weights of a softmax over the candidates and "any other token". With few rows, the prior wins. [5]

    Args:
        features: [n, M, 3]
        rest: the log-probability of all other tokens. [n]
        place: index of the right candidate; M for any other token. [n]
        prior: [5]
    """
    x, others, right = torch.from_numpy(features), torch.from_numpy(rest), torch.from_numpy(place)
    centre = torch.from_numpy(prior)
    weights = centre.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = torch.cat([x @ weights[:3], (weights[3] * others + weights[4])[:, None]], dim=1)
        likelihood = nn.functional.cross_entropy(logits, right, reduction="sum")
        total = (likelihood + PRIOR_ROWS * (weights - centre).square().sum()) / (len(right) + PRIOR_ROWS)
        total.backward()
        return total

    optimizer.step(loss)
    found: FloatArray = weights.detach().numpy()
    return found


@dataclass(frozen=True)
class _Counted:
    """The n-grams of one length, with their counts."""

    tokens: IntArray  # [G, n]
    counts: Counts  # [G]
    of_context: Counts  # [G] total count of the n-grams with the same context
    context: IntArray  # [G] number of its context: the tokens before the last

    def smoothed(self, shorter: Counts) -> tuple[Counts, Counts]:
        """Smoothed probabilities of the last token given its context, and the probability left for unseen tokens. [G], [G]

        Args:
            shorter: probabilities of the n-grams without their first token. [G]
        """
        own = (self.counts - DISCOUNT) / self.of_context
        left: Counts = 1 - np.bincount(self.context, own).astype(np.float64)[self.context]
        return own + left * shorter, left


def _counted(tokens: IntArray, text: IntArray, length: int, vocab_size: int) -> _Counted:
    """The n-grams of a length that lie within one text, sorted by their tokens."""
    end = len(tokens) - length + 1
    inside = np.flatnonzero(text[: max(end, 0)] == text[length - 1 :])
    code = np.zeros(len(inside), np.int64)  # below 2**63 for vocabularies of up to two million tokens
    for place in range(length):
        code = code * vocab_size + tokens[inside + place]
    codes, counts = np.unique(code, return_counts=True)
    context = np.unique(codes // vocab_size, return_inverse=True)[1]
    of_context = np.bincount(context, counts)[context].astype(np.float64)
    columns = [codes // vocab_size**place % vocab_size for place in reversed(range(length))]
    return _Counted(np.stack(columns, axis=1), counts.astype(np.float64), of_context, context)


@dataclass(frozen=True)
class _Ratios:
    """The entries of a table for n-grams of one length."""

    tokens: IntArray  # [G, n]
    ratios: Counts  # [G]
    weights: Counts  # [G] how often the entry is looked up


def _smoothed(singles: Counts, pairs: _Counted, triples: _Counted) -> list[_Ratios]:
    """For each n-gram, the ratio of its smoothed probability to that of the n-gram without its first token."""
    size = len(singles)
    chances, left = pairs.smoothed(singles[pairs.tokens[:, 1]])
    shorter = chances[np.searchsorted(pairs.tokens @ [size, 1], triples.tokens[:, 1:] @ [size, 1])]
    longer_chances, longer_left = triples.smoothed(shorter)
    return [
        *_with_others(pairs, chances / singles[pairs.tokens[:, 1]], left),
        *_with_others(triples, longer_chances / shorter, longer_left),
    ]


def _with_others(ngrams: _Counted, ratios: Counts, left: Counts) -> list[_Ratios]:
    """The n-grams' ratios, and for each context the ratio of all other tokens."""
    first = np.unique(ngrams.context, return_index=True)[1]
    others = ngrams.tokens[first]
    others[:, -1] = NO_TOKEN
    return [_Ratios(ngrams.tokens, ratios, ngrams.counts), _Ratios(others, left[first], ngrams.of_context[first])]


def _table(parts: list[_Ratios], max_cells: int) -> NGrams:
    """Fill the cells of a table, the most frequent n-grams first."""
    num_ngrams = sum(len(part.ratios) for part in parts)
    num_cells = min(max_cells, max(MIN_CELLS, 1 << (CELLS_PER_NGRAM * num_ngrams).bit_length()))
    codes = np.concatenate([_codes(part.tokens, num_cells) for part in parts])
    logs = np.round(np.log(np.concatenate([part.ratios for part in parts])) / RATIO_STEP)
    order = np.argsort(-np.concatenate([part.weights for part in parts]), kind="stable")
    places, first = np.unique(codes[order] >> np.uint64(8), return_index=True)
    chosen = order[first]
    cells = np.zeros(num_cells, np.uint16)
    values = np.clip(logs[chosen], -127, 127).astype(np.int8).view(np.uint8)
    cells[places] = (codes[chosen] & np.uint64(255)).astype(np.uint16) << np.uint16(8) | values
    return NGrams(cells, WEIGHTS)


def _codes(tokens: IntArray, num_cells: int) -> npt.NDArray[np.uint64]:
    """[G, n] -> [G]"""
    contexts = tokens[:, [-3, -2]] if tokens.shape[1] == 3 else tokens[:, [0, 0]]
    return ngram_codes(contexts, tokens[:, -1:], num_cells)[tokens.shape[1] - 2, :, 0]
