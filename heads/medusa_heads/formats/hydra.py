"""Hydra (zankner/Hydra), head architecture `mlp`: heads that read the tokens before the one that they guess."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medusa_heads.errors import CheckpointError
from medusa_heads.formats.checkpoint_files import Checkpoint
from medusa_heads.formats.named import Naming, Note, Reading, named_tensors
from medusa_heads.formats.sayable import require_sayable
from medusa_heads.formats.writing import save_directory
from medusa_heads.modules import MedusaHeads

NAME, FLAVOUR = "hydra", "Hydra"
NAMING = Naming(FLAVOUR, "hydra_", "mlp.{h}.{l}.linear", "lm_head.{h}", "mlp.{h}.{l}.res_connection")
PREFIX_LAYER = "prefix_embeding_layer."  # so spelt


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has heads in this flavour, or in one of Hydra's others, which `load` refuses."""
    return any(name.startswith(("hydra_mlp.", "hydra_lm_head.", PREFIX_LAYER)) for name in checkpoint.names) or (
        "hydra_head_arch" in checkpoint.config
    )


def load(checkpoint: Checkpoint, note: Note) -> MedusaHeads:
    """Read heads. Those that read no tokens (not grounded) become Medusa heads, which they are.

    Raises:
        CheckpointError: they are damaged, of another architecture, or read another layer's hidden states.
    """
    given, path = checkpoint.config, checkpoint.path
    has_prefix = any(name.startswith(PREFIX_LAYER) for name in checkpoint.names)
    architecture = "prefix-mlp" if has_prefix else given.get("hydra_head_arch", "mlp")
    if architecture != "mlp":
        what = "Hydra++ heads" if architecture == "prefix-mlp" else "Hydra heads"
        raise CheckpointError(f"{path} has {what} (hydra_head_arch {architecture}), which are not supported; mlp is")
    if given.get("hidden_state_offset"):
        raise CheckpointError(
            f"the heads in {path} read the hidden states of an earlier layer (hidden_state_offset "
            f"{given['hidden_state_offset']}), which is not supported; only the last layer's are"
        )
    reading = Reading(checkpoint, NAMING, note)
    if not reading.lm_heads or not reading.blocks:
        raise CheckpointError(
            f"{reading.what} lack hydra_lm_head.0.weight or hydra_mlp.0.0.linear.weight; the file is incomplete"
        )
    reading.told("heads", given.get("hydra_num_heads"), reading.num_heads)
    reading.told("layers", given.get("hydra_num_layers"), reading.num_layers, is_certain=False)
    if given.get("grounded_heads", reading.has_residual) != reading.has_residual:
        note(f"the config of {path} says grounded_heads {given['grounded_heads']}, which its tensors contradict; they decide")
    return reading.heads(reading.config(kind="hydra" if reading.has_residual else "medusa"))


def save(heads: MedusaHeads, path: str | Path, *, force: bool = False) -> None:
    """Write heads to a new directory; see `save_directory` and `require_sayable` for errors."""
    require_sayable(heads, FLAVOUR, {"kind", "one_block", "lm_head_bias"})
    config = heads.config
    if not config.lm_head_bias or not config.num_layers:
        raise CheckpointError(f"{FLAVOUR} cannot hold these heads: its LM heads have biases, and its heads at least one block")
    stored: dict[str, Any] = {
        "base_model_name_or_path": config.base_model,
        "hydra_num_heads": config.num_heads,
        "hydra_num_layers": config.num_layers,
        "hydra_head_arch": "mlp",
        "grounded_heads": config.kind == "hydra",
        "hidden_state_offset": 0,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }
    save_directory(path, "hydra_lm_head.pt", named_tensors(heads, NAMING), stored, force=force)
