"""The config of a merged checkpoint, a model with Medusa heads in it, whose model type Transformers does not know."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from medusa_heads.errors import CheckpointError

PREFIX = "Medusa"  # of the classes that Medusa's own code saves, such as MedusaLlamaForCausalLM
COUNTS = ("medusa_num_heads", "medusa")


def merged_config(source: str) -> PreTrainedConfig | None:
    """The config to load a merged checkpoint's backbone with; None if Transformers knows its model type, or it is not merged.

    The backbone's type is that of the class which the checkpoint's class extends.

    Raises:
        CheckpointError: the backbone's type cannot be found out.
    """
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError):  # whoever loads the checkpoint reports it
        return None
    model_type, names = settings.get("model_type"), settings.get("architectures") or ()
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list | tuple) else []
    is_medusa = any(name.startswith(PREFIX) for name in names) or not settings.keys().isdisjoint(COUNTS)
    if model_type in CONFIG_MAPPING or "auto_map" in settings or not is_medusa:
        return None
    wanted = {name.removeprefix(PREFIX) for name in names}
    known = [kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name in wanted]
    if not known:
        raise CheckpointError(
            f"{source} has model_type {model_type} in its config.json, which Transformers does not know; "
            "set it to the type of the model that the heads were merged with, such as llama"
        )
    return _of_type(known[0], settings)


def _of_type(kind: str, settings: dict[str, Any]) -> PreTrainedConfig:
    given = {name: value for name, value in settings.items() if name not in {"model_type", "architectures"}}
    config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(given)
    return config
