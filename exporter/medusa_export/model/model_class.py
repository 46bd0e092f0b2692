"""Which class of Transformers reads a checkpoint: that of a causal language model, or of a multimodal model around one."""

from __future__ import annotations

from typing import Any

from optimum.exporters.tasks import TasksManager
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)

from medusa_export.errors import ExportError
from medusa_heads.errors import CheckpointError


def auto_class(source: str, config: Any) -> Any:
    """The class whose `from_pretrained` loads a checkpoint as a model that continues text.

    Raises:
        CheckpointError: Transformers has no such class for this type of model.
        ExportError: the model reads its prompt with an encoder.
    """
    text = text_config(config)
    if config.is_encoder_decoder or text.is_encoder_decoder:
        raise ExportError(
            f"{source} is not supported: {config.model_type} is an encoder-decoder model, and only decoders can be exported"
        )
    causal = TasksManager.get_model_class_for_task("text-generation")
    if causal.__name__ in (getattr(config, "auto_map", None) or {}) or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return causal
    if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForMultimodalLM
    raise CheckpointError(
        f"{source} is a {config.model_type} model, which cannot continue a text; give a causal language model, "
        "or a multimodal model that has one"
    )


def text_config(config: Any) -> Any:
    """The settings of the text decoder: the configuration itself, or a part of a multimodal model's."""
    return config.get_text_config(decoder=True)


def is_multimodal(config: Any) -> bool:
    """Whether the model has parts besides its text decoder, such as one that reads images."""
    return text_config(config) is not config


def name_base_model(model: PreTrainedModel) -> None:
    """Let `base_model` be what is below the LM head, if the class does not name it (Llama 4 names a part that it lacks)."""
    if model.base_model is model:
        for name, part in model.named_children():
            if isinstance(part, PreTrainedModel):
                model.base_model_prefix = name
