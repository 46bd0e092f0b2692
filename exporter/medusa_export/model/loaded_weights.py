"""Checks a model's weights after loading: none is missing, contradictory or not a number, and unused ones are named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from medusa_export.progress import note
from medusa_heads.errors import CheckpointError
from medusa_heads.formats.merged import PREFIXES as HEADS_PREFIXES

LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def require_complete(source: str, loaded: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights: Transformers would fill them with random numbers.

    Raises:
        CheckpointError: a weight is missing, or has another shape.
    """
    for kind, names in (("lacks", loaded["missing_keys"]), ("has another shape for", loaded["mismatched_keys"])):
        if names:
            first = min(name if isinstance(name, str) else name[0] for name in names)
            raise CheckpointError(f"{source} {kind} {len(names)} of the model's weights, such as {first}")


def check_unused(source: str, unused: Iterable[str], config: Any) -> None:
    """Name the weights that the model does not use. Those of Medusa heads in a merged checkpoint are expected.

    Raises:
        CheckpointError: they are those of layers beyond the number that the configuration names.
    """
    names = sorted(name for name in unused if not name.startswith(HEADS_PREFIXES))
    layers = config.num_hidden_layers
    known = layers + int(getattr(config, "num_nextn_predict_layers", None) or 0)  # layers that only predict further tokens
    beyond = [name for name in names if (found := LAYER.search(f".{name}")) and int(found[1]) >= known]
    if beyond and not any(word in beyond[0] for word in ("vision", "visual", "audio", "encoder")):
        last = max(int(found[1]) for name in beyond if (found := LAYER.search(f".{name}")))
        raise CheckpointError(
            f"{source} holds weights of {last + 1} layers, such as {beyond[0]}, but its config.json says "
            f"num_hidden_layers {layers}; correct one of them"
        )
    if names:
        note(f"{source} has {len(names)} weights that the model does not use, such as {names[0]}")


def resized_rows(loaded: dict[str, Any], vocab_size: int) -> int | None:
    """Rows of a checkpoint's embedding, if these are all that does not fit its configuration; else None.

    Embeddings are padded or extended after config.json was written.
    """
    rows = set()
    for name, found, wanted in (entry for entry in loaded["mismatched_keys"] if not isinstance(entry, str)):
        del name
        if len(found) != len(wanted) or wanted[0] != vocab_size or tuple(found[1:]) != tuple(wanted[1:]):
            return None
        rows.add(int(found[0]))
    return rows.pop() if len(rows) == 1 else None


def require_finite(source: str, model: torch.nn.Module, *, as_stored: bool = False) -> None:
    """Refuse weights that are no numbers: every result would be none either.

    Args:
        source: the checkpoint.
        model: it, loaded.
        as_stored: its weights were not cast.

    Raises:
        CheckpointError: a weight is NaN or infinite; the first is named.
    """
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.numel() == 0:
            continue
        low, high = (float(bound) for bound in torch.aminmax(weight.detach()))
        if low != low or high != high:  # noqa: PLR0124 - NaN
            raise CheckpointError(f"{source} is damaged: {name} holds NaN; download it again")
        if low == -torch.inf or high == torch.inf:
            if weight.dtype == torch.float16 and not as_stored:
                raise CheckpointError(
                    f"{name} of {source} does not fit fp16, whose largest number is 65504; export it with --dtype fp32 or bf16"
                )
            raise CheckpointError(f"{source} is damaged: {name} holds infinite numbers; download it again")
