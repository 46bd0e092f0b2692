"""Candidate trees: which continuations are verified in one step, as data.

Node 0 is the *root*: the last decided token, which is not in the cache yet. Every other node is a draft. The node at depth
d with rank r holds the token of rank r of head d; heads are counted from 1 here, as depths are, and ranks from 0.
Parents come before their children.

Source: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads", section 2.1.2.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medusa_runtime.arrays import BoolArray, IntArray
from medusa_runtime.errors import TreeError

MAX_TREE_NODES = 1024


@dataclass(frozen=True)
class CandidateTree:
    """A tree of N nodes, the root included.

    Args:
        parents: the index of each node's parent; -1 for the root, which is node 0.
        ranks: the rank of each node's token among its head's tokens, 0 for the likeliest; the root's is 0.

    Raises:
        TreeError: the parents do not form a tree rooted at node 0 with parents first, or two siblings share a rank.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(type(number) is not int for number in (*self.parents, *self.ranks)):
            raise TreeError("parents and ranks must be whole numbers")
        if not self.parents or self.parents[0] != -1:
            raise TreeError("a tree begins with its root, so the first parent must be -1")
        if len(self.ranks) != len(self.parents):
            raise TreeError(
                f"each node needs one parent and one rank; found {len(self.parents)} parents, {len(self.ranks)} ranks"
            )
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                raise TreeError(f"node {node} has parent {parent}; a parent must be an earlier node")
        if min(self.ranks) < 0:
            raise TreeError(f"ranks count from 0; found {min(self.ranks)}")
        if len(set(zip(self.parents, self.ranks, strict=True))) != len(self.parents):
            raise TreeError("two children of one node have the same rank")

    @classmethod
    def root_only(cls) -> CandidateTree:
        """The tree without drafts: plain autoregressive decoding."""
        return cls((-1,), (0,))

    @classmethod
    def from_parents(cls, parents: Sequence[int], ranks: Sequence[int] | None = None) -> CandidateTree:
        """A tree from parents. Without ranks, the children of a node take the ranks 0, 1, 2 … in their order."""
        if ranks is None:
            seen: dict[int, itertools.count[int]] = {}
            ranks = [next(seen.setdefault(parent, itertools.count())) for parent in parents]
        return cls(tuple(parents), tuple(ranks))

    @classmethod
    def from_choices(cls, choices: Iterable[Sequence[int]]) -> CandidateTree:
        """A tree from paths of ranks, as Medusa trees are published: ``[[0], [1], [0, 0], [0, 1]]``.

        Missing inner nodes are added. Order and repetitions do not matter.
        """
        paths = {tuple(choice[:depth]) for choice in choices for depth in range(1, len(choice) + 1)}
        ordered = [(), *sorted(paths, key=lambda path: (len(path), path))]
        index = {path: node for node, path in enumerate(ordered)}
        return cls(
            tuple(index[path[:-1]] if path else -1 for path in ordered),
            tuple(path[-1] if path else 0 for path in ordered),
        )

    @classmethod
    def from_json(cls, data: Any) -> CandidateTree:
        """A tree from parsed JSON: a list of choices, an object with ``choices``, or one with ``parents`` (and ``ranks``)."""
        choices = data if isinstance(data, list) else data.get("choices") if isinstance(data, dict) else None
        try:
            if choices is not None:
                return cls.from_choices(choices)
            return cls.from_parents(data["parents"], data.get("ranks"))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise TreeError(
                'this JSON is not a tree; a tree is a list of choices such as [[0], [0, 0], [1]], or {"choices": …}, '
                'or {"parents": …, "ranks": …}'
            ) from error

    @classmethod
    def from_file(cls, path: str | Path) -> CandidateTree:
        """Read a tree from a file with one of the forms of `from_json`."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise TreeError(f"cannot read the tree {path}: {error}") from error
        return cls.from_json(data)

    def to_json(self) -> dict[str, list[int]]:
        """Parents and ranks, from which `from_json` makes an equal tree."""
        return {"parents": list(self.parents), "ranks": list(self.ranks)}

    @property
    def num_nodes(self) -> int:
        """How many nodes a step verifies, the root included."""
        return len(self.parents)

    @property
    def depth(self) -> int:
        """How many heads the tree uses."""
        return int(self.depths.max())

    @property
    def top_k(self) -> int:
        """How many candidates per head the tree needs."""
        return max(self.ranks) + 1

    @cached_property
    def depths(self) -> IntArray:
        """The depth of each node, 0 for the root. [N]"""
        depths = np.zeros(self.num_nodes, np.int64)
        for node, parent in enumerate(self.parents[1:], start=1):
            depths[node] = depths[parent] + 1
        return depths

    @cached_property
    def mask(self) -> BoolArray:
        """``mask[i, j]``: node i attends to node j, because j is i or an ancestor of i. [N, N]"""
        mask = np.eye(self.num_nodes, dtype=np.bool_)
        for node, parent in enumerate(self.parents[1:], start=1):
            mask[node] |= mask[parent]
        return mask

    def check_fits(self, num_heads: int, top_k: int) -> None:
        """Raise a `TreeError` if the tree needs more heads, or more candidates per head, than there are."""
        if self.depth > num_heads:
            raise TreeError(f"the tree is {self.depth} deep, the bundle has {num_heads} heads; use a shallower tree")
        if self.top_k > top_k:
            raise TreeError(
                f"the tree uses the best {self.top_k} tokens of a head, the bundle's heads give {top_k}; "
                f"use a narrower tree or export with --head-top-k {self.top_k}"
            )


@dataclass(frozen=True)
class DynamicTree:
    """A tree that is made again for each step, of the nodes that are likeliest by the heads' own probabilities.

    Args:
        num_nodes: nodes of the tree, the root included.

    Raises:
        TreeError: not between 1 and 1,024 nodes.
    """

    num_nodes: int

    def __post_init__(self) -> None:
        if type(self.num_nodes) is not int or not 1 <= self.num_nodes <= MAX_TREE_NODES:
            raise TreeError(f"a dynamic tree has 1 to {MAX_TREE_NODES} nodes; found {self.num_nodes!r}")
