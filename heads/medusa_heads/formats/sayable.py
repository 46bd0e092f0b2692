"""Tells whether a flavour can hold heads without changing what they compute."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch

from medusa_heads.config import HeadsConfig
from medusa_heads.errors import CheckpointError
from medusa_heads.modules import MedusaHeads

LmHeads = Literal["own", "backbone", "any"]
PLAIN = {"format_version", "base_model", "num_heads", "num_layers", "hidden_size", "vocab_size", "shared_lm_head"}
WORDS = {
    "reads_root": "read the root token",
    "kind": "are Hydra heads",
    "block_bias": "have blocks without biases",
    "one_block": "apply one block several times",
    "one_lm_head": "have one LM head for all of them",
    "lm_head_bias": "have LM heads with biases",
    "draft_rows": "have LM heads for a draft vocabulary only",
    "logit_scale": "scale their logits",
}
DRAFT_VOCABULARY = "draft_ids"


def require_sayable(heads: MedusaHeads, flavour: str, can: Collection[str], lm_heads: LmHeads = "own") -> None:
    """Check that a flavour can hold heads. A setting that is not known here is one that no flavour can hold.

    Args:
        heads: the heads.
        flavour: the flavour's name.
        can: fields of the heads' configuration that may differ from their defaults, and `DRAFT_VOCABULARY`.
        lm_heads: the LM heads that the flavour has.

    Raises:
        CheckpointError: it cannot hold them.
    """
    config = heads.config
    if heads.draft_ids is not None and DRAFT_VOCABULARY not in can:
        raise CheckpointError(f"{flavour} cannot hold these heads: they choose from a draft vocabulary")
    for name, field in HeadsConfig.model_fields.items():
        if name not in {*PLAIN, *can} and getattr(config, name) != field.default:
            raise CheckpointError(f"{flavour} cannot hold these heads: they {WORDS.get(name, f'have the setting {name}')}")
    if config.shared_lm_head and lm_heads == "own":
        raise CheckpointError(
            f"{flavour} cannot hold these heads: they use the backbone's LM head; give --model, to write it as well"
        )
    if not config.shared_lm_head and lm_heads == "backbone":
        raise CheckpointError(
            f"{flavour} cannot hold these heads: they have LM heads of their own, and it has only the backbone's"
        )


def with_lm_head(heads: MedusaHeads, lm_head: Any, *, one: bool) -> MedusaHeads:
    """Heads that use the backbone's LM head, with copies of it as their own. Others are returned as they are.

    Args:
        heads: the heads.
        lm_head: the backbone's LM head.
        one: one LM head for all heads, rather than one each.
    """
    if not heads.config.shared_lm_head:
        return heads
    weight: Any = lm_head.weight
    bias: Any = getattr(lm_head, "bias", None)
    settings = {
        "shared_lm_head": False, "vocab_size": weight.shape[0], "one_lm_head": one, "lm_head_bias": bias is not None,
    }  # fmt: skip
    config = HeadsConfig.model_validate(heads.config.model_dump() | settings)
    with torch.device("meta"):
        own = MedusaHeads(config, heads.draft_ids)
    state = heads.state_dict()
    parts = {"weight": weight, "bias": bias}
    for name in own.state_dict().keys() - state.keys():
        state[name] = parts[name.split(".")[-1]].detach()
    own.load_state_dict(state, assign=True)
    return own.eval()
