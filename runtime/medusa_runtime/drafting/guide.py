"""What restricts an answer's tokens, such as a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from medusa_runtime.arrays import BoolArray


class Guide(Protocol):
    """Says which tokens may follow. It stands after the last token of the answer so far; paths start there."""

    def advance(self, token_ids: Sequence[int]) -> None:
        """Move on by tokens that were decided.

        Raises:
            RequestError: they cannot follow.
        """
        ...

    def allowed(self, path: Sequence[int]) -> BoolArray:
        """Which tokens may follow the answer and, after it, a path of tokens. [V]"""
        ...

    def lets_pass(self, path: Sequence[int]) -> bool:
        """Whether all tokens of a path may follow the answer, one after the other."""
        ...

    def forced(self) -> list[int]:
        """The tokens that must follow, as far as there is no choice."""
        ...
