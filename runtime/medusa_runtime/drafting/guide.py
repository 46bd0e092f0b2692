"""The protocol of restrictions on an answer's tokens, such as a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from medusa_runtime.arrays import BoolArray


class Guide(Protocol):
    """Says which tokens may follow the answer so far. A path of tokens begins after the answer's last token."""

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take in tokens that were decided.

        Raises:
            RequestError: the restriction does not allow them.
        """
        ...

    def allowed(self, path: Sequence[int]) -> BoolArray:
        """Which tokens may follow the answer and, after it, a path of tokens. [V]"""
        ...

    def lets_pass(self, path: Sequence[int]) -> bool:
        """Whether all tokens of a path may follow the answer, one after the other."""
        ...

    def forced(self) -> list[int]:
        """The tokens that must follow; none as soon as several are allowed."""
        ...
