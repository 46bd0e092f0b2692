"""The entries of each new token's ancestors, beside a walk along its path."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from medusa_export.trace.ancestors import Ancestors

COUNT = 4


def ancestors_of(parents: list[int], length: int) -> Ancestors:
    """New tokens behind `length` cached ones; each has a parent among those before it, or -1 for the last cached token."""
    size = len(parents)
    mask, depths = torch.eye(size, dtype=torch.bool), torch.zeros(size, dtype=torch.long)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
            depths[node] = depths[parent] + 1
    return Ancestors((length + depths)[None], mask[None], torch.tensor([length]))


def walk(parents: list[int], length: int, node: int) -> list[int | None]:
    """The entries of a token, its parent, its parent's parent …; None before the sequence begins."""
    found: list[int | None] = []
    entry: int | None = length + node
    for _ in range(COUNT):
        found.append(entry)
        if entry is not None and entry >= length:
            parent = parents[entry - length]
            entry = length + parent if parent >= 0 else length - 1
        elif entry is not None:
            entry -= 1
        entry = None if entry is None or entry < 0 else entry
    return found[::-1]


@given(st.lists(st.integers(-1, 8), min_size=1, max_size=9), st.integers(0, 6))
def test_ancestors_are_those_of_a_walk_along_the_path(drawn: list[int], length: int) -> None:
    parents = [min(parent, node - 1) for node, parent in enumerate(drawn)]
    entries, found = ancestors_of(parents, length).entries(COUNT)
    for node in range(len(parents)):
        exists = found[0, node].tolist()
        told = [entry if there else None for entry, there in zip(entries[0, node].tolist(), exists, strict=True)]
        assert told == walk(parents, length, node)


def test_entries_that_do_not_exist_can_be_read() -> None:
    entries, found = ancestors_of([-1, 0], 0).entries(COUNT)
    assert entries.min() == 0
    assert found[0].tolist() == [[False, False, False, True], [False, False, True, True]]


def test_visible_entries_are_the_cached_ones_and_those_on_the_path() -> None:
    visible = ancestors_of([-1, 0, 0], 2).visible(6)
    assert visible[0, 0].tolist() == [
        [True, True, True, False, False, False],
        [True, True, True, True, False, False],
        [True, True, True, False, True, False],
    ]
