"""Records the heads' guesses at each token of greedy answers. Decoding with any tree can be replayed from the record."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from medusa_heads.replay import NOT_VALID, TOP_K
from medusa_runtime.arrays import FloatArray, IntArray
from medusa_runtime.backends.base import Backend, HeadOutput

CHUNK = 256  # prompt tokens per step


@dataclass(frozen=True)
class Record:
    """The recorded answers, one after the other. In row i of an answer, its token i is decided and heads guess from i + 1 on.

    Rows are as in `medusa_heads.replay.replay`.
    """

    ranks: IntArray  # [P, K] rank of the right token; TOP_K if it is not a candidate, NOT_VALID after the end of the answer
    log_probs: FloatArray  # [P, K, M], best first
    starts: IntArray  # [A] first row of each answer

    @property
    def num_answers(self) -> int:
        """The number of answers."""
        return len(self.starts)

    def part(self, answers: Sequence[int]) -> Record:
        """A record of some of the answers, in the given order."""
        ends = [*self.starts[1:].tolist(), len(self.ranks)]
        rows = [np.arange(self.starts[answer], ends[answer]) for answer in answers]
        starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
        index = np.concatenate(rows)
        return Record(self.ranks[index], self.log_probs[index], starts)


def record(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
    batch_size: int,
    tell: Callable[[int], None] = lambda _: None,
) -> Record:
    """Decode greedily without drafts, and record the heads' guesses at every token. This overwrites the cache.

    Args:
        backend: the backend; nothing else may use it meanwhile.
        prompts: token ids, each short enough to leave room for an answer.
        max_new_tokens: longest answer.
        end_ids: tokens that end an answer.
        batch_size: answers decoded at the same time.
        tell: called with the number of answers done.
    """
    ranks: list[IntArray] = []
    log_probs: list[FloatArray] = []
    for start in range(0, len(prompts), batch_size):
        group = prompts[start : start + batch_size]
        for tokens, guesses in _decode(backend, group, max_new_tokens, frozenset(end_ids)):
            ranks.append(ranks_of(tokens, np.stack([ids for ids, _ in guesses])))
            log_probs.append(np.stack([probabilities for _, probabilities in guesses]))
        tell(start + len(group))
    starts = np.cumsum([0, *(len(answer) for answer in ranks[:-1])])
    return Record(np.concatenate(ranks), np.concatenate(log_probs), starts)


def ranks_of(tokens: Sequence[int], head_ids: IntArray) -> IntArray:
    """The ranks of an answer's tokens among the heads' candidates. [n, K]

    Args:
        tokens: the answer's n tokens.
        head_ids: the candidates at each token, best first. [n, K, M]
    """
    count, heads, _ = head_ids.shape
    ranks = np.full((count, heads), NOT_VALID, np.int64)
    for row, head in itertools.product(range(count), range(heads)):
        if row + head + 1 < count:
            found = np.flatnonzero(head_ids[row, head] == tokens[row + head + 1])
            ranks[row, head] = min(int(found[0]), TOP_K) if len(found) else TOP_K
    return ranks


Guesses = list[tuple[IntArray, FloatArray]]  # at each token: ids and log-probabilities, both [K, M]


def _decode(
    backend: Backend, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: frozenset[int]
) -> list[tuple[list[int], Guesses]]:
    """Decode answers as one batch, in adjacent slots. Answers that have ended are decoded on and cut off afterwards."""
    batch = len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts])
    backend.resize(batch, int(lengths.max()) + max_new_tokens)
    answers: list[tuple[list[int], Guesses]] = []
    for slot, prompt in enumerate(prompts):
        first = _read(backend, slot, prompt)
        answers.append(([first], _guesses(backend.propose(np.zeros(1, np.int64), np.array([first])))))
    for _ in range(max_new_tokens - 1):
        if all(end_ids.intersection(tokens) for tokens, _ in answers):
            break
        roots = np.array([tokens[-1:] for tokens, _ in answers])  # [B, 1]
        alone = np.ones((batch, 1, 1), np.bool_)
        output = backend.step(roots, lengths[:, None], alone, lengths, np.zeros((batch, 1), np.int64))
        lengths = lengths + 1
        guesses = _guesses(backend.propose(np.zeros(batch, np.int64), output.greedy_ids[:, 0]))
        for (tokens, noted), token, guess in zip(answers, output.greedy_ids[:, 0].tolist(), guesses, strict=True):
            tokens.append(token)
            noted.append(guess)
    return [_cut(tokens, noted, end_ids) for tokens, noted in answers]


def _read(backend: Backend, slot: int, prompt: Sequence[int]) -> int:
    """Read a prompt into the cache. Returns the token after it."""
    chunk = min(CHUNK, backend.manifest.limits.max_prefill_tokens or CHUNK)
    for start in range(0, len(prompt), chunk):
        ids = np.array([prompt[start : start + chunk]], np.int64)
        width = ids.shape[1]
        mask = np.tri(width, dtype=np.bool_)[None]
        last = np.array([[width - 1]])
        output = backend.step(ids, start + np.arange(width)[None], mask, np.array([start]), last, first_slot=slot)
    return int(output.greedy_ids[0, 0])


def _guesses(output: HeadOutput) -> Guesses:
    return list(zip(output.token_ids, output.log_probs, strict=True))


def _cut(tokens: list[int], noted: Guesses, end_ids: frozenset[int]) -> tuple[list[int], Guesses]:
    end = next((place for place, token in enumerate(tokens) if token in end_ids), len(tokens) - 1) + 1
    return tokens[:end], noted[:end]
