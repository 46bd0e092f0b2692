"""The masks of a step: what each kind of layer sees of the cache and of the tree."""

from __future__ import annotations

import pytest
import torch

from medusa_export.model.checkpoint import CHUNKED, FULL, SLIDING
from medusa_export.trace.step_masks import StepMasks

# Five tokens are cached, three are new: a root at position 5 and two children of it at position 6. Slot 8 is not in use.
POSITIONS = torch.tensor([[5, 6, 6]])
TREE = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
LENGTHS, CAPACITY = torch.tensor([5]), 9
KEY_POSITIONS = [0, 1, 2, 3, 4, 5, 6, 6]
SEEN = [[True] * 5 + row + [False] for row in TREE[0].tolist()]


def masks(kinds: list[str]) -> object:
    return StepMasks(kinds, sliding_window=3, chunk_size=4)(POSITIONS, TREE, LENGTHS, CAPACITY)[0]


def visible(kind: str) -> list[list[bool]]:
    def sees(query: int, key: int) -> bool:
        return {FULL: True, SLIDING: query - key < 3, CHUNKED: query // 4 == key // 4}[kind]

    rows = zip(SEEN, POSITIONS[0].tolist(), strict=True)
    return [[seen and sees(query, key) for seen, key in zip(row, [*KEY_POSITIONS, 0], strict=True)] for row, query in rows]


@pytest.mark.parametrize("kind", [FULL, SLIDING, CHUNKED])
def test_layers_of_one_kind_have_one_mask(kind: str) -> None:
    mask = masks([kind, kind])
    assert isinstance(mask, torch.Tensor)
    assert mask.shape == (1, 1, 3, CAPACITY)
    assert mask[0, 0].tolist() == visible(kind)


def test_layers_of_several_kinds_have_a_mask_each() -> None:
    found = masks([CHUNKED, SLIDING, FULL, CHUNKED])
    assert isinstance(found, dict)
    assert {kind: mask[0, 0].tolist() for kind, mask in found.items()} == {
        kind: visible(kind) for kind in (FULL, SLIDING, CHUNKED)
    }


def test_keys_have_the_positions_of_their_tokens() -> None:
    _, positions = StepMasks([FULL], None, None)(POSITIONS, TREE, LENGTHS, CAPACITY)
    assert positions[0, :8].tolist() == KEY_POSITIONS
