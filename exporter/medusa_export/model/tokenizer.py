"""Loads a checkpoint's tokenizer: its tokenizer.json as it is, and not what its class in Transformers makes of it.

Several classes replace the file's normaliser or pre-tokenizer by their own when they load it, without a word.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from medusa_export.model.adapters import adapter_base, is_adapter
from medusa_export.model.library_messages import quiet_libraries, reason
from medusa_export.model.sources import file_of, located, opened, read_settings
from medusa_heads.errors import CheckpointError

FILE = "tokenizer.json"
ANY_FILE = (
    FILE, "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "added_tokens.json",
)  # fmt: skip
TOKEN_FILES = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")  # may name tokens that FILE lacks
MODELS = ("*.model", "*.tiktoken")  # SentencePiece's and tiktoken's files
MAX_SHOWN = 40  # characters of a text in a message
HARD_TEXTS = (
    "Hello world",
    " a leading space",
    "two  spaces,   three, and one at the end ",
    "tabs\tand\nlines\r\n\n\n  indented",
    "1234567890 3.14159 1,000,000 2026-11-29",
    "don't I'LL we've O'Brien's",
    "snake_case camelCase kebab-case http://a.b/c?d=e&f",
    "caf\u00e9 cafe\u0301 \u212b \ufb01ne \u00bd \uff21\uff22\uff23",
    "no\u00a0break thin\u2009space zero\u200bwidth soft\u00adhyphen",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1e9\U0001f1ea",
    "def f(x):\n    return {'a': [x ** 2, -1]}  # why?",
    "\u2581 \u0120 \x00\x7f \ufffd",
    "Zurich ZURICH z\u00fcrich \u00df \u1e9e \u0130stanbul",
)  # fmt: skip


def has_tokenizer(source: str) -> bool:
    """Whether a checkpoint comes with a tokenizer. A hub's model and a GGUF file are taken to have one."""
    if is_adapter(source):
        return (Path(source) / FILE).is_file() or has_tokenizer(adapter_base(source))
    place, file = located(source)
    directory = Path(place)
    if file is not None or not directory.is_dir():
        return True
    return any((directory / name).is_file() for name in ANY_FILE) or any(
        True for pattern in MODELS for _ in directory.glob(pattern)
    )


def load_tokenizer(
    source: str, *, trust_remote_code: bool = False, tell: Callable[[str], None] = lambda _: None
) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer.

    If it has a tokenizer.json, that is what encodes and decodes. Tokens that only tokenizer_config.json adds are added to it.

    Args:
        source: see `medusa_export.model.sources.opened`.
        trust_remote_code: run Python code that comes with the checkpoint.
        tell: takes a line if the tokenizer's class gives other ids than its file.

    Raises:
        CheckpointError: it has no tokenizer, or none that the runtime can read.
    """
    source = _place_of(source)
    quiet_libraries()
    with opened(source) as (place, options):
        options.pop("quantization_config", None)
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **options)
        except Exception as error:  # a damaged file can make the library raise anything
            raise CheckpointError(reason(source, error, "tokenizer")) from error
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise CheckpointError(
                f"the tokenizer of {source} has no fast form, and the runtime needs one; add a tokenizer.json"
            )
        file = None if "gguf_file" in options else file_of(place, FILE)
        if file is not None:
            _use_file(tokenizer, file, source, _named(place), tell)
    return tokenizer


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str, target: Path) -> None:
    """Write the form that the runtime reads: the checkpoint's tokenizer.json byte for byte, if it has all tokens."""
    place, gguf = located(_place_of(source))
    file = None if gguf is not None else file_of(place, FILE)
    if file is not None and not _missing(tokenizer.backend_tokenizer, Tokenizer.from_file(str(file)), _named(place)):
        shutil.copyfile(file, target)
    else:
        tokenizer.backend_tokenizer.save(str(target))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, source: str, tell: Callable[[str], None]) -> None:
    """Say which tokens the model has no row for. Text that holds one of them is refused when it is decoded."""
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= vocab_size)
    if beyond:
        index, token = beyond[0]
        tell(
            f"the tokenizer of {source} has {len(beyond)} tokens beyond the model's vocabulary of {vocab_size}, such as "
            f"{token!r} ({index}); a prompt that holds one is refused"
        )


def difference(found: Tokenizer, other: Tokenizer) -> str | None:
    """The first hard text to which two tokenizers give different ids, with what both give; None if there is none."""
    for special in (False, True):
        for text in HARD_TEXTS:
            ours, theirs = (one.encode(text, add_special_tokens=special) for one in (found, other))
            if ours.ids != theirs.ids:
                place = next((i for i, pair in enumerate(zip(ours.ids, theirs.ids, strict=False)) if len({*pair}) > 1), None)
                place = min(len(ours.ids), len(theirs.ids)) if place is None else place
                shown = [one.tokens[place : place + 3] for one in (ours, theirs)]
                return f"for {text[:MAX_SHOWN]!r}: {shown[0]} and {shown[1]} at token {place}"
    return None


def _place_of(source: str) -> str:
    """Where the tokenizer is: an adapter may have one of its own, with tokens that were added for it."""
    return adapter_base(source) if is_adapter(source) and not (Path(source) / FILE).is_file() else source


def _use_file(tokenizer: Any, file: Path, source: str, named: set[str], tell: Callable[[str], None]) -> None:
    try:
        own = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(reason(source, error, "tokenizer")) from error
    own.no_truncation()
    own.no_padding()
    by_class = tokenizer.backend_tokenizer
    if lacking := _missing(by_class, own, named):
        own.add_tokens([token for _, token in lacking])
        if any(own.token_to_id(token.content) != index for index, token in lacking):
            raise CheckpointError(
                f"tokenizer_config.json of {source} adds the token {lacking[0][1].content!r} as {lacking[0][0]}, which is not "
                f"the next id of {FILE}; save the tokenizer again"
            )
        tell(f"{len(lacking)} tokens of tokenizer_config.json are added to {FILE}, such as {lacking[0][1].content!r}")
    if found := difference(own, by_class):
        tell(f"{FILE} and {type(tokenizer).__name__} give different tokens {found}; the file is used")
    tokenizer._tokenizer = own  # noqa: SLF001 - there is no public way to keep a class from rebuilding it


def _missing(whole: Tokenizer, part: Tokenizer, named: set[str]) -> list[tuple[int, Any]]:
    """The added tokens of one tokenizer that another lacks and the checkpoint names: classes add some of their own."""
    known = part.get_vocab(with_added_tokens=True)
    added = whole.get_added_tokens_decoder().items()
    return sorted((index, token) for index, token in added if token.content not in known and token.content in named)


def _named(place: str) -> set[str]:
    """Every text in the checkpoint's small files about tokens."""
    texts: set[str] = set()
    pending: list[Any] = [read_settings(place, name) for name in TOKEN_FILES]
    while pending:
        found = pending.pop()
        if isinstance(found, dict):
            texts.update(found)
            pending += found.values()
        elif isinstance(found, list):
            pending += found
        elif isinstance(found, str):
            texts.add(found)
    return texts
