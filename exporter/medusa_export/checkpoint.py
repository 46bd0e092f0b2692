"""Checkpoints: a Hugging Face model from a directory, a hub id or a GGUF file, and the facts the exporter needs of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from optimum.exporters.tasks import TasksManager
from optimum.utils import NormalizedConfigManager, NormalizedTextConfig
from safetensors import SafetensorError
from transformers import AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from medusa_runtime.errors import CheckpointError, ExportError
from medusa_runtime.manifest import ModelFacts, Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TESTED_ARCHITECTURES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite", "gpt2",
    "gpt_neox", "starcoder2", "stablelm", "cohere2",
)  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass
class Backbone:
    """A loaded causal LM, and what it is called."""

    source: str
    model: PreTrainedModel
    dtype: torch.dtype

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        return self.model.config.get_text_config()

    @cached_property
    def layer_types(self) -> list[str]:
        """The kind of attention of each layer.

        Raises:
            ExportError: a layer's kind is none that the step graph has a mask for.
        """
        config = self.config
        types = getattr(config, "layer_types", None)
        if types is None:
            types = [SLIDING if self.sliding_window else FULL] * config.num_hidden_layers
        if unknown := set(types) - {FULL, SLIDING}:
            raise ExportError(f"{self.source} has layers of kind {sorted(unknown)}; supported are {FULL} and {SLIDING}")
        return list(types)

    @property
    def sliding_window(self) -> int | None:
        """How many tokens back a sliding layer sees, where the model has such layers."""
        if getattr(self.config, "use_sliding_window", True):
            return getattr(self.config, "sliding_window", None)
        return None

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence the model was made for."""
        return int(self.config.max_position_embeddings)

    @property
    def has_tied_embeddings(self) -> bool:
        """Whether the LM head is the embedding table."""
        embedding, lm_head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        return bool(embedding.weight is lm_head.weight)

    @cached_property
    def facts(self) -> ModelFacts:
        """Shapes and special tokens, under one set of names for all architectures."""
        config = self.config
        try:
            normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        except KeyError:  # not one whose names differ from the usual
            normalized = NormalizedTextConfig(config)
        heads, hidden = normalized.num_attention_heads, normalized.hidden_size
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        eos = config.eos_token_id if eos is None else eos
        return ModelFacts(
            name=self.source,
            architecture=type(self.model).__name__,
            vocab_size=config.vocab_size,
            hidden_size=hidden,
            num_layers=normalized.num_layers,
            num_attention_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            bos_token_id=config.bos_token_id,
            eos_token_ids=eos if isinstance(eos, list) else [] if eos is None else [eos],
        )


def load_backbone(
    source: str, precision: Precision = "fp32", *, attention: str = "eager", trust_remote_code: bool = False
) -> Backbone:
    """Load a causal LM for inference on the CPU.

    Args:
        source: a directory, a hub id, or a GGUF file (whose weights are dequantised).
        precision: what the weights are cast to.
        attention: a name that Transformers' attention interface knows.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it is not a causal LM.
        ExportError: the architecture knows no attention of that name.
    """
    place, options = _resolve(source)
    dtype = DTYPES[precision]
    transformers_logging.disable_progress_bar()
    try:
        model = TasksManager.get_model_class_for_task("text-generation").from_pretrained(
            place, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError, ImportError) as error:
        if attention in str(error):  # the class looked the implementation up in a table of its own
            raise unsupported(source) from error
        raise CheckpointError(_reason(source, error)) from error
    _forget_quantization(model)
    return Backbone(source, model.eval(), dtype)


def unsupported(what: str) -> ExportError:
    """The error for an architecture whose attention cannot be replaced."""
    return ExportError(
        f"{what} does not attend through Transformers' attention interface, so its cache cannot be exported; "
        f"architectures known to work: {', '.join(TESTED_ARCHITECTURES)}"
    )


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer.

    Raises:
        CheckpointError: it has none, or none that the runtime can read.
    """
    place, options = _resolve(source)
    options.pop("quantization_config", None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(_reason(source, error, "tokenizer")) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise CheckpointError(f"the tokenizer of {source} has no fast form (tokenizer.json), which the runtime needs")
    return tokenizer


def _resolve(source: str) -> tuple[str, dict[str, Any]]:
    """Where Transformers finds a checkpoint, and what it must be told."""
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise CheckpointError(f"{source} is no checkpoint: it has neither a config.json nor a single GGUF file")
        path = files[0]
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        return str(path.parent), {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    return source, {}


def _reason(source: str, error: BaseException, part: str = "model") -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not Path(source).exists() and isinstance(error, OSError):
        return f"there is no {part} {source!r}: not a local directory or GGUF file, and the hub gave none ({line})"
    return f"the {part} of {source} cannot be loaded: {line}"


def _forget_quantization(model: Any) -> None:
    """The weights of a GGUF file are plain floats once loaded; what says otherwise would keep them from being saved."""
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None
