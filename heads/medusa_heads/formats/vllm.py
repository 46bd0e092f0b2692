"""vLLM's `MedusaModel`, which can have a truncated vocabulary, and one LM head for all heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medusa_heads.errors import CheckpointError
from medusa_heads.formats.checkpoint_files import Checkpoint
from medusa_heads.formats.named import Naming, Note, Reading, named_tensors, positive
from medusa_heads.formats.native import require_draft_vocabulary
from medusa_heads.formats.sayable import DRAFT_VOCABULARY, require_sayable
from medusa_heads.formats.writing import save_directory
from medusa_heads.modules import MedusaHeads

NAME, FLAVOUR, PREFIX, TOKEN_MAP = "vllm", "vLLM", "medusa_heads.", "token_map"
BLOCK, LM_HEAD = "blocks.{h}.layers.{l}", "lm_heads.{h}"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has heads in this flavour."""
    reading = _reading(checkpoint, lambda _: None)
    return bool(reading.blocks or reading.lm_heads)


def load(checkpoint: Checkpoint, note: Note) -> MedusaHeads:
    """Read heads.

    vLLM drops biases if the config does not have `medusa_fc_bias`; here they are used, and a note says so.

    Raises:
        CheckpointError: they are damaged, or config and tensors contradict each other.
    """
    reading, given = _reading(checkpoint, note), checkpoint.config
    _require_counts(reading, given)
    one = bool(given.get("original_lm_head"))
    if len({head for head, _, _ in reading.lm_heads}) != (1 if one else reading.num_heads):
        raise CheckpointError(
            f"{reading.what} have {len(reading.lm_heads)} LM heads for {reading.num_heads} heads, and their config has "
            f"original_lm_head {str(one).lower()}; with true there must be one, otherwise one a head"
        )
    draft_ids, vocab_size = _draft_vocabulary(reading, given)
    draft_rows = draft_ids is not None and reading.lm_head_rows != vocab_size
    scale = given.get("logit_scale", 1.0)
    config = reading.config(one_lm_head=one, vocab_size=vocab_size, draft_rows=draft_rows, logit_scale=scale)
    if config.block_bias and not given.get("medusa_fc_bias") and config.num_layers:
        note(f"{reading.what} have biases, but no medusa_fc_bias in their config: vLLM drops them, here they are used")
    if config.lm_head_bias:
        note(f"{reading.what} have LM heads with biases, which vLLM drops; here they are used")
    return reading.heads(config, draft_ids, beside=[reading.naming.prefix + TOKEN_MAP])


def save(heads: MedusaHeads, path: str | Path, *, force: bool = False) -> None:
    """Write heads to a new directory; see `save_directory` and `require_sayable` for errors."""
    config = heads.config
    require_sayable(heads, FLAVOUR, {"block_bias", "one_block", "one_lm_head", "draft_rows", "logit_scale", DRAFT_VOCABULARY})
    assert config.vocab_size is not None  # they have LM heads
    tensors = named_tensors(heads, Naming(FLAVOUR, "", BLOCK, LM_HEAD))
    stored: dict[str, Any] = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "base_model_name_or_path": config.base_model,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "truncated_vocab_size": config.vocab_size if heads.draft_ids is None else len(heads.draft_ids),
        "num_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "medusa_fc_bias": config.block_bias,
    }
    stored |= {"original_lm_head": True} if config.one_lm_head else {}
    stored |= {"logit_scale": config.logit_scale} if config.logit_scale != 1 else {}
    if heads.draft_ids is not None:
        tensors[TOKEN_MAP] = torch.tensor(heads.draft_ids)
    save_directory(path, "model.safetensors", tensors, stored, force=force)


def _reading(checkpoint: Checkpoint, note: Note) -> Reading:
    prefix = PREFIX if any(name.startswith(PREFIX) for name in checkpoint.names) else ""
    return Reading(checkpoint, Naming(FLAVOUR, prefix, BLOCK, LM_HEAD), note)


def _require_counts(reading: Reading, given: dict[str, Any]) -> None:
    """Check the counts. vLLM takes them from any name in the config that has `num` and `heads` or `layers` in it."""
    heads = next((given[name] for name in given if "num" in name and "heads" in name), None)
    layers = next((given[name] for name in given if "num" in name and "heads" not in name and "layers" in name), None)
    reading.told("heads", heads, reading.num_heads)
    reading.told("layers", layers, reading.num_layers, is_certain=False)
    if not reading.lm_heads:
        raise CheckpointError(f"{reading.what} lack {reading.naming.lm_head_name(0, 0)}.weight; the file is incomplete")
    if given.get("medusa_fc_bias") and reading.blocks and not any(part == "bias" for _, _, part in reading.blocks):
        raise CheckpointError(f"{reading.what} have medusa_fc_bias in their config, but no biases; correct the config")


def _draft_vocabulary(reading: Reading, given: dict[str, Any]) -> tuple[list[int] | None, int]:
    """The truncated vocabulary, if there is one, and V."""
    rows, name = reading.lm_head_rows, reading.naming.prefix + TOKEN_MAP
    assert rows is not None  # checked before
    vocab_size = positive(given.get("vocab_size")) or rows
    truncated = positive(given.get("truncated_vocab_size"))
    if name not in reading.checkpoint.names:
        if rows != vocab_size or (truncated or vocab_size) != vocab_size:
            raise CheckpointError(
                f"{reading.what} have LM heads of {rows} rows, vocab_size {vocab_size} and truncated_vocab_size {truncated}, "
                f"but no {TOKEN_MAP}; the file is incomplete"
            )
        return None, vocab_size
    token_ids = reading.checkpoint.integers(name)
    try:
        require_draft_vocabulary(token_ids, vocab_size)
    except ValueError as error:
        raise CheckpointError(f"{reading.what} have a {name} that cannot be used: {error}") from error
    if rows not in {vocab_size, len(token_ids)} or (truncated is not None and truncated not in {vocab_size, len(token_ids)}):
        raise CheckpointError(
            f"{reading.what} have LM heads of {rows} rows and a {name} of {len(token_ids)} tokens, but their config says "
            f"vocab_size {vocab_size} and truncated_vocab_size {truncated}; they do not belong together"
        )
    if truncated in {None, vocab_size} and len(token_ids) < vocab_size:
        reading.note(f"{reading.what} have a {name}, but no truncated_vocab_size: vLLM would not use it; it is used here")
    return token_ids, vocab_size
