"""Heads that are a sequence of blocks and an LM head: the naming of Medusa's own code, which several projects took over."""

from __future__ import annotations

from typing import Any

from medusa_heads.formats.checkpoint_files import Checkpoint
from medusa_heads.formats.named import Naming, Note, Reading
from medusa_heads.modules import MedusaHeads

BLOCK, LM_HEAD = "{h}.{l}.linear", "{h}.{l}"


def is_sequential(checkpoint: Checkpoint, prefix: str = "") -> bool:
    """Whether a checkpoint has tensors of such heads under a prefix."""
    return bool(found(checkpoint, prefix).blocks or found(checkpoint, prefix).lm_heads)


def has_lm_heads(checkpoint: Checkpoint, prefix: str = "") -> bool:
    """Whether such heads have LM heads of their own."""
    return bool(found(checkpoint, prefix).lm_heads)


def found(checkpoint: Checkpoint, prefix: str, flavour: str = "", note: Note = lambda _: None) -> Reading:
    """Such heads of a checkpoint, as their names show them."""
    return Reading(checkpoint, Naming(flavour, prefix, BLOCK, LM_HEAD), note)


def load_sequential(
    checkpoint: Checkpoint, prefix: str, flavour: str, note: Note, told: dict[str, Any] | None = None
) -> MedusaHeads:
    """Read such heads.

    Args:
        checkpoint: the tensors.
        prefix: what their names start with.
        flavour: the flavour's name.
        note: takes a line about a contradiction.
        told: `num_heads` and `num_layers` as the config says; by default what Medusa's own configs say.

    Raises:
        CheckpointError: they are damaged, or their number of layers is not certain.
    """
    reading = found(checkpoint, prefix, flavour, note)
    if told is None:
        told = {name: checkpoint.config.get(f"medusa_{name}") for name in ("num_heads", "num_layers")}
    reading.told("heads", told.get("num_heads"), reading.num_heads)
    reading.told("layers", told.get("num_layers"), reading.num_layers, is_certain=bool(reading.lm_heads))
    return reading.heads(reading.config())


def medusa_config(heads: MedusaHeads, **more: Any) -> dict[str, Any]:
    """The config that Medusa's own code writes, with the sizes that are known."""
    config = heads.config
    sizes = {"hidden_size": config.hidden_size} | ({} if config.vocab_size is None else {"vocab_size": config.vocab_size})
    return {
        "base_model_name_or_path": config.base_model,
        "medusa_num_heads": config.num_heads,
        "medusa_num_layers": config.num_layers,
        **sizes,
        **more,
    }
