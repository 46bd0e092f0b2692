"""Adapters made with PEFT: which model they belong to, and whether their weights can be merged into it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel

from medusa_heads.errors import CheckpointError
from medusa_runtime.bundle.files import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight")


def is_adapter(source: str) -> bool:
    """Whether a directory holds an adapter."""
    return (Path(source) / ADAPTER_CONFIG).is_file()


def adapter_base(source: str) -> str:
    """The model that an adapter belongs to.

    Raises:
        CheckpointError: the adapter does not say, or it changes no weights, so that it cannot be merged.
    """
    place = Path(source) / ADAPTER_CONFIG
    try:
        settings = read_json(place)
        base, kind = settings["base_model_name_or_path"], str(settings.get("peft_type") or "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        base, kind = None, ""
    if not isinstance(base, str):
        raise CheckpointError(f"{place} is damaged: it does not name its base model; save the adapter again")
    _require_mergeable(source, kind)
    return base


def merge_adapter(model: PreTrainedModel, source: str) -> Any:
    """The model with an adapter's weights merged into it.

    Raises:
        Exception: any, if the adapter is damaged or does not fit.
    """
    from peft import PeftModel  # noqa: PLC0415 - the train extra

    rows = _embedding_rows(Path(source) / ADAPTER_WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft calls deprecated functions of Transformers
        embedding: Any = model.get_input_embeddings()
        if rows is not None and rows != embedding.weight.shape[0]:  # it was trained with added tokens
            model.resize_token_embeddings(rows, mean_resizing=False)
        return PeftModel.from_pretrained(model, source).merge_and_unload()


def _require_mergeable(source: str, kind: str) -> None:
    """Refuse adapters that add inputs or modules: only changes of weights can be merged."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # noqa: PLC0415 - the train extra

    if not kind:
        return
    tuner = {str(getattr(key, "value", key)): value for key, value in PEFT_TYPE_TO_TUNER_MAPPING.items()}.get(kind)
    if tuner is None:
        raise CheckpointError(f"{source} is an adapter of kind {kind}, which the installed peft does not know; update peft")
    if not hasattr(tuner, "merge_and_unload"):
        raise CheckpointError(
            f"{source} is an adapter of kind {kind}: it adds to the model instead of changing its weights, so it cannot be "
            "merged and exported; adapters such as LoRA can"
        )


def _embedding_rows(path: Path) -> int | None:
    """Rows of the embedding or LM head that an adapter holds in whole; None if it holds neither."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(EMBEDDINGS)]  # noqa: SIM118 - it is no mapping
            return int(file.get_slice(names[0]).get_shape()[0]) if names else None
    except Exception:  # noqa: BLE001 - damaged: loading it will say so
        return None
