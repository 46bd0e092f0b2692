"""API keys: read from a file, and compared in a time that tells nothing about them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from medusa_runtime import OptionError
from medusa_serve.errors import ApiError

MIN_LENGTH = 16  # characters; a shorter key can be guessed


class Keys:
    """The keys that open the API. Only their digests are kept.

    Args:
        keys: the keys; none of them if everybody may use the API.
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def from_file(cls, path: Path) -> Keys:
        """Read a file with a key on each line. Empty lines, and lines that begin with #, are left out.

        Raises:
            OptionError: it cannot be read, holds no key, or one that is too short.
        """
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            told = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise OptionError(f"cannot read the API keys {path}: {told}") from error
        keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
        if not keys:
            raise OptionError(f"{path} holds no API key; write one on each line")
        for number, key in enumerate(keys, start=1):
            if len(key) < MIN_LENGTH or not key.isascii() or " " in key:
                raise OptionError(f"{path}: key {number} must have at least {MIN_LENGTH} ASCII characters and no space")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, header: str | None) -> None:
        """Refuse a request without one of the keys.

        Args:
            header: the request's header Authorization.

        Raises:
            ApiError: the header is missing, or holds no key of the server's.
        """
        if not self._digests:
            return
        scheme, _, key = (header or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode(errors="surrogateescape")).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, whichever fits
        if scheme.lower() != "bearer" or not any(found):
            told = "the API key is wrong" if header else "there is no API key"
            raise ApiError(
                401,
                f"{told}; send one in the header: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
