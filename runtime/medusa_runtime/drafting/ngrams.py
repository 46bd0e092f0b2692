"""Draft n-grams: which tokens follow which in the model's own answers. They correct the heads' guesses.

A head guesses the token some places ahead without knowing which candidates stand before it. In the answers that the heads
were trained on, a token is likelier or less likely after a pair of tokens than on its own. That ratio corrects the guess.

Source: absolute discounting, which n-grams are smoothed with, is Ney, Essen and Kneser, "On structuring probabilistic
dependences in stochastic language modelling", 1994. That a tree of independent guesses gains from such a ratio, and the
log-linear form with one set of weights a depth, is ours (docs/decisions/0019-draft-ngrams.md).
"""

from __future__ import annotations

import dataclasses
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from medusa_runtime.arrays import FloatArray, IntArray
from medusa_runtime.bundle.manifest import Manifest
from medusa_runtime.errors import BundleError, first_line

NGRAMS_NAME = "draft_ngrams.npz"
MAX_CELLS, MAX_DEPTHS = 1 << 24, 64  # the most that is read: 32 MiB of cells; `medusa-export` writes at most a sixteenth
RATIO_STEP = 0.1  # nats; stored logarithms are whole multiples of it
NUM_WEIGHTS = 5
NO_TOKEN = -1  # as the last of an n-gram, it stands for all tokens that make no known n-gram with the tokens before
HashArray = npt.NDArray[np.uint64]
LAST, BITS_TOLD, MASK_TOLD = np.uint64(1 << 63), np.uint64(8), np.uint64(255)
GAMMA, FACTOR = np.uint64(0x9E3779B97F4A7C15), np.uint64(0x94D049BB133111EB)


class Guesses(NamedTuple):
    """A root and the tokens that heads guess below it, ordered by depth. Parents come before their children."""

    tokens: IntArray  # [A], the root first
    parents: IntArray  # [A], the root's is -1
    depths: IntArray  # [A]
    log_probs: FloatArray  # [A] of a node's acceptance if its parent is accepted; the root's is 0


class Root(NamedTuple):
    """A decided token, what the heads guess after it, and how large a tree of that may be."""

    last_ids: tuple[int, int]  # the last two decided tokens; the second is the root
    head_ids: IntArray  # [K, M] the heads' candidates, best first
    head_log_probs: FloatArray  # [K, M]
    num_nodes: int  # the most nodes of a draft
    max_depth: int  # of the deepest node


@dataclass(frozen=True, eq=False)
class NGrams:
    """Pairs and triples of tokens, and how much likelier the last token of each is after the others.

    A hash table without chaining: the upper bits of an n-gram's code index a cell, the lower eight are a tag. A collision
    with an equal tag, or an n-gram that found its cell taken, costs a draft, never a token.
    """

    cells: npt.NDArray[np.uint16]  # [2**n] a tag in the upper byte, a signed logarithm in units of `RATIO_STEP` in the lower
    weights: FloatArray  # [D, 5] per depth: weights of the head's log-probability, the two ratios, all other tokens, and 1

    def __post_init__(self) -> None:
        """Raise a ValueError if the arrays have another type or shape."""
        size = len(self.cells)
        if self.cells.dtype != np.uint16 or self.cells.ndim != 1 or size < 2 or size & (size - 1):
            raise ValueError("the cells are not 16 bits each, or their number is not a power of two")
        if self.weights.dtype != np.float32 or self.weights.ndim != 2 or self.weights.shape[1] != NUM_WEIGHTS:
            raise ValueError(f"the weights are not {NUM_WEIGHTS} numbers a depth")
        if not len(self.weights) or not np.isfinite(self.weights).all():
            raise ValueError("weights are missing or not finite")

    @classmethod
    def load(cls, path: str | Path) -> NGrams:
        """Read a file that `save` wrote. An array is unpacked only if its header has the right type and shape.

        Raises:
            BundleError: the file is missing, damaged, or holds something else.
        """
        try:
            with zipfile.ZipFile(path) as file:
                cells = _unpacked(file, "cells", np.uint16, (MAX_CELLS,))
                return cls(cells, _unpacked(file, "weights", np.float32, (MAX_DEPTHS, NUM_WEIGHTS)))
        except Exception as error:  # zipfile, zlib and NumPy raise errors of many classes
            raise BundleError(
                f"{path} holds no draft n-grams ({first_line(error)}); make them again: medusa-export heads ngrams"
            ) from error

    @classmethod
    def of_bundle(cls, bundle: str | Path, manifest: Manifest) -> NGrams | None:
        """The n-grams of a bundle; None if it has none.

        Raises:
            BundleError: their file is damaged.
        """
        return cls.load(Path(bundle) / NGRAMS_NAME) if NGRAMS_NAME in manifest.files else None

    def save(self, path: str | Path) -> None:
        """Write a file."""
        with Path(path).open("wb") as file:
            np.savez_compressed(file, cells=self.cells, weights=self.weights)

    def with_weights(self, weights: FloatArray) -> NGrams:
        """The same n-grams with other weights. weights: [D, 5]."""
        return dataclasses.replace(self, weights=np.asarray(weights, np.float32))

    def ratios(self, contexts: IntArray, token_ids: IntArray) -> FloatArray:
        """How much likelier tokens are after one and after two other tokens, as logarithms in nats.

        Args:
            contexts: the two tokens before. [F, 2]
            token_ids: [M], or [F, M] if each context has tokens of its own.

        Returns:
            log p(c | b) - log p(c) and log p(c | a, b) - log p(c | b). [2, F, M]
        """
        return self._ratios(_Contexts.of(contexts), _with_none(token_ids))

    def log_probs(self, contexts: IntArray, token_ids: IntArray, head_log_probs: FloatArray, depth: int) -> FloatArray:
        """Log-probabilities of a head's candidates after each of some paths. With all other tokens, probabilities sum to 1.

        Args:
            contexts: the last two tokens of each path. [F, 2]
            token_ids: the head's candidates. [M]
            head_log_probs: the candidates' log-probabilities by the head. [M]
            depth: of the candidates, from 1.

        Returns:
            [F, M]
        """
        rest = rest_log_prob(head_log_probs)[..., None]
        return self._log_probs(_Contexts.of(contexts), _with_none(token_ids), head_log_probs, rest, depth)

    def grow(self, roots: Sequence[Root]) -> list[Guesses]:
        """The nodes that may follow each root: all that can be among the likeliest `num_nodes`, and some more. The root is one.

        All trees grow together, level by level, since a call of NumPy takes as long for one of them as for eight.

        Args:
            roots: their heads' candidates have the same shape.
        """
        if not roots:
            return []
        head_ids = np.array([root.head_ids for root in roots])  # [B, K, M]
        head_log_probs = np.array([root.head_log_probs for root in roots])
        hashes, rests = _with_none(head_ids), rest_log_prob(head_log_probs)[..., None]  # [B, K, M + 1] [B, K, 1]
        before_ids = head_ids.astype(np.uint64)  # [B, K, M], as the tokens before others
        before_hashes = _mixed(before_ids)
        trees = [_Growth(root) for root in roots]
        for depth in range(1, max(root.max_depth for root in roots) + 1):
            numbers = [number for number, tree in enumerate(trees) if tree.grows(depth)]
            if not numbers:
                break
            of: tuple[int | IntArray, int]  # places of the candidates of the nodes that get children
            if len(numbers) == 1:
                of, contexts = (numbers[0], depth - 1), trees[numbers[0]].contexts
            else:
                of = (np.repeat(numbers, [len(trees[number].above) for number in numbers]), depth - 1)
                contexts = _Contexts(
                    *(np.concatenate(part) for part in zip(*(trees[one].contexts for one in numbers), strict=True))
                )
            chances = self._log_probs(contexts, hashes[of], head_log_probs[of], rests[of], depth)  # [F, M]
            start = 0
            for number in numbers:
                stop = start + len(trees[number].above)
                place = (number, depth - 1)
                trees[number].add(chances[start:stop], head_ids[place], before_ids[place], before_hashes[place], depth)
                start = stop
        return [tree.guesses() for tree in trees]

    def _ratios(self, contexts: _Contexts, hashes: HashArray) -> FloatArray:
        """See `ratios`. hashes: of the tokens, from `_with_none`."""
        codes = _codes(contexts, hashes, len(self.cells))  # [2, F, M + 1]
        cells = self.cells[codes >> BITS_TOLD]
        values = cells.astype(np.uint8).view(np.int8) * np.float32(RATIO_STEP)
        is_known = cells >> np.uint16(8) == codes & MASK_TOLD
        values *= is_known
        found: FloatArray = np.where(is_known[..., :-1], values[..., :-1], values[..., -1:])
        return found

    def _log_probs(
        self, contexts: _Contexts, hashes: HashArray, head_log_probs: FloatArray, rest: FloatArray, depth: int
    ) -> FloatArray:
        """See `log_probs`, for candidates that are the same for all paths, or each path's own.

        Args:
            contexts: the last two tokens of each path.
            hashes: of the candidates, from `_with_none`. [M + 1] or [F, M + 1]
            head_log_probs: the candidates' log-probabilities by the head. [M] or [F, M]
            rest: from `rest_log_prob`. [1] or [F, 1]
            depth: of the candidates, from 1.
        """
        of_head, of_pair, of_triple, of_rest, bias = self.weights[min(depth, len(self.weights)) - 1].tolist()
        pairs, triples = self._ratios(contexts, hashes)
        logits = of_head * head_log_probs + of_pair * pairs + of_triple * triples  # [F, M]
        others = of_rest * rest + bias
        most = np.maximum(logits.max(1, keepdims=True), others)
        logits -= most
        logits -= np.log(np.exp(logits).sum(1, keepdims=True) + np.exp(others - most))
        found: FloatArray = np.minimum(logits, 0)
        return found


class _Contexts(NamedTuple):
    """The two tokens before the last of F n-grams."""

    ids: HashArray  # [F] the second of the two
    hashes: HashArray  # [F] of it
    earlier: HashArray  # [F] the first of the two

    @classmethod
    def of(cls, contexts: IntArray) -> Self:
        """Prepare pairs of tokens. [F, 2]"""
        earlier, ids = contexts.astype(np.uint64).T
        return cls(ids, _mixed(ids), earlier)


class _Growth:
    """One tree while it grows."""

    def __init__(self, root: Root) -> None:
        self.contexts = _Contexts.of(np.array([root.last_ids]))  # [F] the last two tokens on the path of each node below
        self.above = np.zeros(1, np.float32)  # [F] log-probabilities of the nodes that get children
        self._places = np.zeros(1, np.int64)  # [F] their numbers in the tree
        self._max_depth, self._room = root.max_depth, root.num_nodes - 1
        self._levels = [Guesses(np.array(root.last_ids[1:]), np.array([-1]), self._places, self.above)]
        self._num_nodes = 1
        self._seen, self._worst = self.above[:0], np.float32(-np.inf)  # of the likeliest so far, and of the last that has room

    def grows(self, depth: int) -> bool:
        """Whether it may have nodes of this depth."""
        return depth <= self._max_depth and self._room > 0 and len(self.above) > 0

    def add(self, chances: FloatArray, ids: IntArray, context_ids: HashArray, context_hashes: HashArray, depth: int) -> None:
        """Add the children that can be among the likeliest.

        Args:
            chances: the children's log-probabilities. [F, M]
            ids: their tokens. [M]
            context_ids: the same, as tokens before others. [M]
            context_hashes: hashes of these. [M]
            depth: their depth.
        """
        scores = (self.above[:, None] + chances).ravel()
        chosen = np.flatnonzero(scores > self._worst)
        if not len(chosen):
            self.above = scores[chosen]
            return
        if len(chosen) > self._room:
            chosen = np.sort(chosen[np.argpartition(scores[chosen], -self._room)[-self._room :]])
        parents, ranks = np.divmod(chosen, len(ids))
        scores = scores[chosen]
        self._levels.append(Guesses(ids[ranks], self._places[parents], np.full(len(chosen), depth), chances.ravel()[chosen]))
        first, self._num_nodes = self._num_nodes, self._num_nodes + len(chosen)
        if depth == self._max_depth:
            return
        seen = np.concatenate([self._seen, scores])
        if len(seen) >= self._room:
            seen = np.partition(seen, -self._room)[-self._room :]
            self._worst = seen[0]
        self._seen = seen
        above = np.flatnonzero(scores > self._worst)  # no child is likelier than its parent, so the others need none
        parents, ranks = parents[above], ranks[above]
        self.contexts = _Contexts(context_ids[ranks], context_hashes[ranks], self.contexts.ids[parents])
        self.above, self._places = scores[above], first + above

    def guesses(self) -> Guesses:
        """The whole tree."""
        return Guesses(*(np.concatenate(column) for column in zip(*self._levels, strict=True)))


def _unpacked(file: zipfile.ZipFile, name: str, dtype: type[np.generic], most: tuple[int, ...]) -> npt.NDArray[Any]:
    """An array of an npz file. It is refused if it has another type, or is larger than `most` along an axis.

    A packed file may unpack to a thousand times its size. So the header is read first, and then no more bytes than it says.
    """
    with file.open(f"{name}.npy") as packed:
        if np.lib.format.read_magic(packed) != (1, 0):  # later versions have headers of up to 4 GiB
            raise ValueError(f"{name} has a header of another version")
        shape, is_fortran, found = np.lib.format.read_array_header_1_0(packed)
        if found != dtype:
            raise ValueError(f"{name} holds {found}, not {np.dtype(dtype)}")
        if len(shape) != len(most) or any(not 0 <= size <= limit for size, limit in zip(shape, most, strict=True)):
            raise ValueError(f"{name} has the shape {list(shape)}, the most is {list(most)}")
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if len(data := packed.read(size + 1)) != size:
            raise ValueError(f"{name} has more or fewer bytes than its header says")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")


def rest_log_prob(head_log_probs: FloatArray) -> FloatArray:
    """The log-probability of all tokens that are not among a head's candidates. [..., M] -> [...]"""
    rest: FloatArray = np.log(np.maximum(1 - np.exp(head_log_probs).sum(-1), np.float32(1e-4)))
    return rest


def ngram_codes(contexts: IntArray, token_ids: IntArray, num_cells: int) -> HashArray:
    """Codes of the pairs and triples that tokens make with the tokens before them: a cell's number, then a tag of eight bits.

    Args:
        contexts: the two tokens before. [F, 2]
        token_ids: the last tokens. [M] or [F, M]
        num_cells: a power of two.

    Returns:
        [2, F, M]
    """
    return _codes(_Contexts.of(contexts), _hashes(token_ids), num_cells)


def _codes(contexts: _Contexts, hashes: HashArray, num_cells: int) -> HashArray:
    """As `ngram_codes`, of hashes of the last tokens. [M] or [F, M] -> [2, F, M]"""
    both = np.array([contexts.hashes, _mixed(contexts.hashes + contexts.earlier)])[:, :, None] ^ hashes
    both *= FACTOR
    both >>= np.uint64(64 - 8 - (num_cells.bit_length() - 1))
    return both


def _hashes(token_ids: IntArray) -> HashArray:
    """Hashes of tokens as the last of an n-gram. As earlier ones, the same tokens have other hashes."""
    return _mixed(token_ids.astype(np.uint64) ^ LAST)


def _with_none(token_ids: IntArray) -> HashArray:
    """Hashes of tokens, with that of `NO_TOKEN` after them. [..., M] -> [..., M + 1]"""
    return _hashes(np.concatenate([token_ids, np.full_like(token_ids[..., :1], NO_TOKEN)], axis=-1))


def _mixed(numbers: HashArray) -> HashArray:
    """Bits that look random (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    mixed = (numbers + GAMMA) * FACTOR
    mixed = (mixed ^ (mixed >> np.uint64(27))) * FACTOR
    return mixed ^ (mixed >> np.uint64(31))
