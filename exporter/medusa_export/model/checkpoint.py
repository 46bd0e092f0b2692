"""Loads a Hugging Face model from a directory, a hub id or a GGUF file, and reads the facts that the exporter needs."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from optimum.utils import NormalizedConfigManager, NormalizedTextConfig
from transformers import AutoConfig, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging as transformers_logging

from medusa_export.errors import ExportError
from medusa_export.model.model_class import auto_class, is_multimodal, text_config
from medusa_heads.errors import CheckpointError
from medusa_runtime.bundle.files import read_json
from medusa_runtime.bundle.manifest import ModelFacts, Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_REASON = 300  # most characters quoted from another library's message
ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"  # kinds of attention
SELECTING = "indexed_attention"  # full attention while there are no more tokens than it selects
SELECTED = ("keep_window_size", "index_topk")  # settings of how many tokens are selected; see `medusa_export.trace.selection`


@dataclass
class Backbone:
    """A loaded causal LM, with its source and name."""

    source: str
    model: PreTrainedModel
    dtype: torch.dtype

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        return text_config(self.model.config)

    @property
    def is_multimodal(self) -> bool:
        """Whether the checkpoint has parts besides its text decoder, which are left out."""
        return is_multimodal(self.model.config)

    @cached_property
    def layer_types(self) -> list[str]:
        """The kind of attention of each layer.

        Raises:
            ExportError: the step graph has no mask for a layer's kind of attention.
        """
        config = self.config
        types = getattr(config, "layer_types", None)
        if types is None:
            types = [SLIDING if self.sliding_window else FULL] * config.num_hidden_layers
        types = [FULL if kind == SELECTING else kind for kind in types]
        if unknown := set(types) - {FULL, SLIDING, CHUNKED}:
            raise unsupported(type(self.model).__name__, f"it has layers of kind {', '.join(sorted(unknown))}")
        return types

    @property
    def sliding_window(self) -> int | None:
        """How many tokens back a sliding-window layer attends; None if the model has no such layers."""
        if getattr(self.config, "use_sliding_window", True):
            return getattr(self.config, "sliding_window", None)
        return None

    @property
    def chunk_size(self) -> int | None:
        """The positions of a chunk, if the model has layers that attend only within one."""
        return getattr(self.config, "attention_chunk_size", None)

    @property
    def max_seq_len(self) -> int:
        """The longest sequence that a cache can serve.

        LongRoPE rotates all keys, including cached ones, differently once a sequence exceeds the original training length. A
        cache cannot follow that, so the limit is that length. Attention that selects tokens is exact while it selects all.
        """
        longest = int(self._setting("max_position_embeddings"))
        longest = min([longest, *(value for name in SELECTED if (value := getattr(self.config, name, None)))])
        for rope in _rope_settings(self.config):
            if rope.get("rope_type") == "longrope":
                first = rope.get("original_max_position_embeddings")
                longest = int(first or getattr(self.config, "original_max_position_embeddings", None) or longest)
        return longest

    @property
    def has_tied_embeddings(self) -> bool:
        """Whether the LM head's weight is the embedding."""
        embedding, lm_head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        return bool(embedding.weight is lm_head.weight)

    @property
    def eos_token_ids(self) -> list[int]:
        """The end-of-sequence tokens as the checkpoint names them, which may be outside the vocabulary."""
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        eos = self.config.eos_token_id if eos is None else eos
        return list(eos) if isinstance(eos, list | tuple) else [] if eos is None else [eos]

    def _setting(self, name: str, config: Any = None) -> Any:
        """A setting that every supported architecture has."""
        try:
            return getattr(config or self.config, name)
        except AttributeError as error:
            raise unsupported(type(self.model).__name__, f"its configuration has no {name}") from error

    @cached_property
    def facts(self) -> ModelFacts:
        """Shapes and special tokens, under one set of names for all architectures."""
        config = self.config
        try:
            normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        except KeyError:  # the type uses the usual names
            normalized = NormalizedTextConfig(config)
        heads, hidden = self._setting("num_attention_heads", normalized), self._setting("hidden_size", normalized)
        return ModelFacts(
            name=Path(self.source).name if Path(self.source).exists() else self.source,
            architecture=type(self.model).__name__,
            vocab_size=config.vocab_size,
            hidden_size=hidden,
            num_layers=self._setting("num_layers", normalized),
            num_attention_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            bos_token_id=config.bos_token_id,
            eos_token_ids=self.eos_token_ids,  # without those outside the vocabulary
        )


def load_backbone(
    source: str,
    precision: Precision = "fp32",
    *,
    attention: str = "eager",
    trust_remote_code: bool = False,
    quantization: Any = None,
) -> Backbone:
    """Load a causal LM for inference on the CPU.

    Args:
        source: a directory, a hub id, or a GGUF file (whose weights are dequantised). For a directory with a LoRA adapter,
        its base model is loaded and the adapter merged into it.
        precision: the precision that the weights are cast to.
        attention: a name that Transformers' attention interface knows. If an architecture lacks sdpa, eager is used instead.
        trust_remote_code: run Python code that comes with the checkpoint.
        quantization: Transformers' configuration for loading quantised weights, on the device that it supports.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it is not a causal LM.
        ExportError: the architecture does not support an attention of that name.
    """
    if (Path(source) / ADAPTER_CONFIG).is_file():
        if quantization is not None:
            raise CheckpointError(f"{source} is an adapter and cannot be loaded quantised; merge it into its model first")
        return _with_adapter(source, precision, attention=attention, trust_remote_code=trust_remote_code)
    place, options = _resolve(source)
    if quantization is not None:
        options["quantization_config"] = quantization
    dtype = DTYPES[precision]
    _require_generation_config(Path(place))
    _quiet()
    config = _load_config(source, place, trust_remote_code=trust_remote_code, **options)
    _require_plain_positions(source, text_config(config))
    loader = auto_class(source, config)
    try:
        model, loaded = loader.from_pretrained(
            place,
            dtype=dtype,
            attn_implementation=attention,
            **({"experts_implementation": attention} if attention in ALL_EXPERTS_FUNCTIONS else {}),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed, see `_require_complete`
            **options,
        )
    except Exception as error:  # a damaged checkpoint can make the library raise anything
        if attention == "sdpa" and "scaled_dot_product_attention" in str(error):  # the architecture has only eager attention
            return load_backbone(source, precision, trust_remote_code=trust_remote_code, quantization=quantization)
        if attention not in {"eager", "sdpa"} and attention in str(error):  # the class looked it up in its own table
            raise unsupported(source) from error
        raise CheckpointError(_reason(source, error)) from error
    _require_complete(source, loaded)
    if quantization is None:
        _forget_quantization(model)
    return Backbone(source, model.eval(), dtype)


def _load_config(source: str, place: str, **options: Any) -> Any:
    options.pop("quantization_config", None)
    try:
        return AutoConfig.from_pretrained(place, **options)
    except Exception as error:  # as in `load_backbone`
        raise CheckpointError(_reason(source, error)) from error


def _with_adapter(source: str, precision: Precision, **options: Any) -> Backbone:
    """An adapter's base model, with the adapter merged into it before any cast."""
    from peft import PeftModel  # noqa: PLC0415 - the train extra

    base = load_backbone(_adapter_base(source), "fp32", **options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft calls deprecated functions of Transformers
            model: Any = PeftModel.from_pretrained(base.model, source).merge_and_unload()
    except Exception as error:  # as in `load_backbone`
        raise CheckpointError(_reason(source, error, "adapter")) from error
    return Backbone(source, model.to(DTYPES[precision]).eval(), DTYPES[precision])


def _adapter_base(source: str) -> str:
    place = Path(source) / ADAPTER_CONFIG
    try:
        base = read_json(place)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise CheckpointError(f"{place} is damaged: it does not name its base model; save the adapter again")
    return base


def _require_generation_config(directory: Path) -> None:
    """Transformers takes no notice of a generation_config.json that it cannot read, and decodes without it."""
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is damaged: it must be a JSON object")


def _require_complete(source: str, loaded: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights: Transformers would fill them with random numbers."""
    for kind, names in (("lacks", loaded["missing_keys"]), ("has another shape for", loaded["mismatched_keys"])):
        if names:
            first = min(name if isinstance(name, str) else name[0] for name in names)
            raise CheckpointError(f"{source} {kind} {len(names)} of the model's weights, such as {first}")


def _require_plain_positions(source: str, config: Any) -> None:
    if any(rope.get("rope_type") == "dynamic" for rope in _rope_settings(config)):
        raise ExportError(
            f"{source} has rotary embeddings that depend on the sequence length (rope_type dynamic); this is not supported, "
            "since cached keys would become wrong"
        )


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    """The settings of the rotary embeddings; some models have one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def unsupported(what: str, detail: str = "its attention cannot be replaced") -> ExportError:
    """The error to raise for an architecture that cannot be traced."""
    return ExportError(f"{what} is not supported: {detail} (docs/architectures.md lists what is)")


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer.

    Raises:
        CheckpointError: it has no tokenizer, or none that the runtime can read.
    """
    if (Path(source) / ADAPTER_CONFIG).is_file():
        return load_tokenizer(_adapter_base(source), trust_remote_code=trust_remote_code)
    place, options = _resolve(source)
    options.pop("quantization_config", None)
    _quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # as in `load_backbone`
        raise CheckpointError(_reason(source, error, "tokenizer")) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise CheckpointError(f"the tokenizer of {source} has no fast form, and the runtime needs one; add a tokenizer.json")
    return tokenizer


def _quiet() -> None:
    """Silence the libraries: the important part of their messages is in our one-line errors."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def _resolve(source: str) -> tuple[str, dict[str, Any]]:
    """The name and the options with which Transformers finds a checkpoint."""
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            found = (
                f"give one of its GGUF files: {', '.join(file.name for file in files)}" if files else "it is not a checkpoint"
            )
            raise CheckpointError(f"{source} has no config.json; {found}")
        path = files[0]
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        return str(path.parent), {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    if path.is_file():
        raise CheckpointError(f"{source} is a file but not a GGUF file; give a directory, a hub id or a GGUF file")
    return source, {}


def _reason(source: str, error: BaseException, part: str = "model") -> str:
    text = " ".join(str(error).split()) or type(error).__name__  # some libraries put the reason in their second line
    line = text if len(text) <= MAX_REASON else text[:MAX_REASON] + " …"
    if not Path(source).exists() and isinstance(error, OSError):
        return f"there is no {part} {source!r}: it is not a local directory or GGUF file, and the hub does not have it ({line})"
    return f"the {part} of {source} cannot be loaded: {line}"


def _forget_quantization(model: Any) -> None:
    """Remove the mark of a quantised model: a GGUF file's weights are plain floats once loaded, and it would prevent saving."""
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None
