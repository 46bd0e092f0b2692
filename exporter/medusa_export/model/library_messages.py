"""Silences Transformers and its companions, and puts what they say about a checkpoint into one line."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers.utils import logging as transformers_logging

MAX_REASON = 300  # most characters quoted from another library's message


def quiet_libraries() -> None:
    """Silence the libraries: the important part of their messages is in our one-line errors."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def reason(source: str, error: BaseException, part: str = "model") -> str:
    """What a library says about a checkpoint that it cannot load, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__  # some libraries put the reason in their second line
    line = text if len(text) <= MAX_REASON else text[:MAX_REASON] + " …"
    if not Path(source).exists() and isinstance(error, OSError):
        return f"there is no {part} {source!r}: it is not a local directory or GGUF file, and the hub does not have it ({line})"
    return f"the {part} of {source} cannot be loaded: {line}"
