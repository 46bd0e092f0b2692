"""A digest to compare tokenizers by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def vocabulary_digest(vocabulary: Mapping[str, int]) -> str:
    """SHA-256 over a vocabulary. If it is equal for two tokenizers, token ids have the same meaning in both."""
    whole = hashlib.sha256()
    for token, index in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        whole.update(f"{index}\t{token}\n".encode())
    return whole.hexdigest()
