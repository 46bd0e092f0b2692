"""TensorRT-LLM's checkpoints (up to 1.3): heads beside the backbone's tensors, each tensor split by rank along its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medusa_heads.errors import CheckpointError
from medusa_heads.formats.checkpoint_files import Checkpoint
from medusa_heads.formats.named import Naming, Note, Reading, named_tensors, positive
from medusa_heads.formats.sayable import require_sayable
from medusa_heads.formats.writing import save_directory
from medusa_heads.modules import MedusaHeads

NAME, FLAVOUR = "tensorrt-llm", "TensorRT-LLM"
NAMING = Naming(FLAVOUR, "medusa_heads.", "{h}.medusa_layers.{l}.linear", "{h}.lm_head")
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has heads in this flavour."""
    reading = Reading(checkpoint, NAMING, lambda _: None)
    return bool(reading.blocks or reading.lm_heads)


def load(checkpoint: Checkpoint, note: Note) -> MedusaHeads:
    """Read heads, and join what is split by rank.

    Raises:
        CheckpointError: they are damaged, quantised, or config and tensors contradict each other.
    """
    reading, given = Reading(checkpoint, NAMING, note), checkpoint.config
    if not reading.lm_heads:
        raise CheckpointError(f"{reading.what} lack {NAMING.lm_head_name(0, 0)}.weight; the file is incomplete")
    reading.told("heads", given.get("num_medusa_heads"), reading.num_heads)
    reading.told("layers", given.get("num_medusa_layers"), reading.num_layers, is_certain=False)
    section = given.get("mapping")
    mapping = section if isinstance(section, dict) else {}
    reading.told("ranks", mapping.get("tp_size", mapping.get("world_size")), _num_ranks(reading), is_certain=False)
    return _without_padding(reading.heads(reading.config()), reading, positive(given.get("vocab_size")))


def _num_ranks(reading: Reading) -> int:
    """Ranks that the heads' tensors are split over."""
    name = f"{NAMING.lm_head_name(0, 0)}.weight"
    return reading.checkpoint.num_parts(name) if name in reading.checkpoint.names else 1


def _without_padding(heads: MedusaHeads, reading: Reading, vocab_size: int | None) -> MedusaHeads:
    """LM heads without the rows that make the vocabulary divisible by the number of ranks."""
    rows, ranks = heads.config.vocab_size, _num_ranks(reading)
    if vocab_size is None or vocab_size == rows:
        return heads
    if rows != -(-vocab_size // ranks) * ranks:
        reading.told("tokens in the vocabulary", vocab_size, rows or 0, is_certain=False)
    state = {name: tensor[:vocab_size] if ".lm_head." in name else tensor for name, tensor in heads.state_dict().items()}
    with torch.device("meta"):
        cut = MedusaHeads(heads.config.model_copy(update={"vocab_size": vocab_size}))
    cut.load_state_dict(state, assign=True)
    return cut.eval()


def save(heads: MedusaHeads, path: str | Path, *, force: bool = False) -> None:
    """Write the heads' part of a checkpoint of one rank: TensorRT-LLM's own conversion makes the backbone's part.

    See `save_directory` and `require_sayable` for errors.
    """
    require_sayable(heads, FLAVOUR, {"one_block"})
    config = heads.config
    stored: dict[str, Any] = {
        "architecture": "MedusaForCausalLM",
        "dtype": DTYPES.get(next(heads.parameters()).dtype, "float32"),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_medusa_heads": config.num_heads,
        "num_medusa_layers": config.num_layers,
        "max_draft_len": 63,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "base_model_name_or_path": config.base_model,
    }
    save_directory(path, "rank0.safetensors", named_tensors(heads, NAMING), stored, force=force)
