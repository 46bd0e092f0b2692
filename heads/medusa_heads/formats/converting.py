"""Converts heads from one flavour to another, without changing a bit of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from medusa_heads.errors import CheckpointError
from medusa_heads.formats import FOREIGN, MERGED, native
from medusa_heads.formats.sayable import with_lm_head
from medusa_heads.modules import MedusaHeads
from medusa_runtime.errors import OptionError

OWN_NAME = "medusa-export"


def require_convertible(flavour: str, model: Path | None) -> None:
    """Check what a flavour needs besides heads.

    Raises:
        OptionError: a merged checkpoint needs a model's directory.
    """
    if flavour in {known.NAME for known in MERGED} and (model is None or not model.is_dir()):
        raise OptionError(f"--format {flavour} is a model with heads in it; give the model's directory with --model")


def convert(
    heads: MedusaHeads,
    output: Path,
    flavour: str,
    *,
    model: Path | None = None,
    lm_head: Callable[[], Any] | None = None,
    force: bool = False,
) -> None:
    """Write heads in a flavour.

    Args:
        heads: the heads.
        output: a new directory.
        flavour: one of `formats.NAMES`.
        model: the directory of the model, for merged checkpoints.
        lm_head: loads the model's LM head, for flavours whose heads have their own if these heads have none.
        force: replace an earlier output.

    Raises:
        CheckpointError: the flavour cannot hold these heads.
        OptionError: the output exists, or the model is missing.
    """
    require_convertible(flavour, model)
    if flavour == OWN_NAME:
        native.save(heads, output, force=force)
        return
    known = next(known for known in FOREIGN if flavour == known.NAME)
    if heads.config.shared_lm_head and lm_head is not None and flavour not in {"medusa-v2", "tgi"}:
        heads = with_lm_head(heads, lm_head(), one=flavour == "vllm")
    if known in MERGED:
        known.save(heads, output, model, force=force)
    else:
        known.save(heads, output, force=force)


def lm_heads_of(heads: MedusaHeads) -> str:
    """Where the heads' LM heads come from, in words."""
    config = heads.config
    if config.shared_lm_head:
        return "the backbone's"
    rows = f", {len(heads.draft_ids or ())} of {config.vocab_size} tokens" if config.draft_rows else ""
    return ("their own, one for all" if config.one_lm_head else "their own, one each") + rows


def require_same_size(heads: MedusaHeads, path: Path, lm_head: Any, model: str) -> None:
    """Raise a `CheckpointError` if a model's LM head does not fit heads."""
    rows, width = lm_head.weight.shape
    if width != heads.config.hidden_size or heads.config.vocab_size not in {None, rows}:
        raise CheckpointError(
            f"the heads in {path} are for hidden_size {heads.config.hidden_size} and vocab_size {heads.config.vocab_size}, "
            f"but {model} has {width} and {rows}; give the model that they were made for"
        )
