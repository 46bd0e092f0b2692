"""Arrays that all rooms share: their types, and the one that holds a sequence's token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int32]


class TokenBuffer:
    """The token ids of one sequence: its prompt, then its answer as far as it is decided. There is no other copy of them.

    Args:
        prompt_ids: what the sequence begins with.
        max_new_tokens: how many tokens can be appended.
    """

    def __init__(self, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        self.num_prompt_tokens = len(prompt_ids)
        self._room = np.empty(len(prompt_ids) + max_new_tokens, np.int32)
        self._room[: len(prompt_ids)] = prompt_ids
        self._length = len(prompt_ids)

    def __len__(self) -> int:
        return self._length

    @property
    def ids(self) -> IdArray:
        """All ids, as a view. [prompt + answer]"""
        return self._room[: self._length]

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's ids."""
        ids: list[int] = self._room[: self.num_prompt_tokens].tolist()
        return ids

    @property
    def answer_ids(self) -> list[int]:
        """The answer's ids so far."""
        ids: list[int] = self._room[self.num_prompt_tokens : self._length].tolist()
        return ids

    @property
    def num_answer_tokens(self) -> int:
        """How long the answer is so far."""
        return self._length - self.num_prompt_tokens

    def append(self, token_ids: Sequence[int]) -> None:
        """Add tokens to the answer."""
        self._room[self._length : self._length + len(token_ids)] = token_ids
        self._length += len(token_ids)

    def drop_last(self, count: int) -> None:
        """Take the answer's last tokens back."""
        assert 0 <= count <= self.num_answer_tokens
        self._length -= count

    def num_common(self, other: TokenBuffer) -> int:
        """How many ids the two begin with in common."""
        count = min(len(self), len(other))
        differing = np.flatnonzero(self._room[:count] != other._room[:count])
        return int(differing[0]) if len(differing) else count
