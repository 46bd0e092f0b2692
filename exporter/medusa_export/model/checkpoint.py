"""Loads a Hugging Face model from a directory, a hub id or a GGUF file, and reads the facts that the exporter needs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from optimum.utils import NormalizedConfigManager, NormalizedTextConfig
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from medusa_export.errors import ExportError
from medusa_export.model.adapters import adapter_base, is_adapter, merge_adapter
from medusa_export.model.library_messages import quiet_libraries, reason
from medusa_export.model.loaded_weights import check_unused, require_complete, require_finite, resized_rows
from medusa_export.model.model_class import auto_class, is_multimodal, name_base_model, text_config
from medusa_export.model.packed.loading import SETTINGS_FILES, load_packed, settings_of
from medusa_export.model.packed.tensors import LazyIntegers
from medusa_export.model.sources import CONFIG, local_directory, opened, read_settings
from medusa_export.model.stored_dtype import stored_dtype
from medusa_export.progress import note
from medusa_heads.errors import CheckpointError
from medusa_runtime.bundle.files import read_json
from medusa_runtime.bundle.manifest import ModelFacts, Precision
from medusa_runtime.errors import MedusaError

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GENERATION_CONFIG = "generation_config.json"
BeforeLoading = Callable[[str, Any, Any], None]  # of source, class and configuration
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"  # kinds of attention
WITHOUT_ATTENTION = frozenset({"conv", "linear_attention", "mamba", "mlp", "moe"})  # kinds of layers that read no mask
CHUNK_SIZE = "attention_chunk_size"  # the setting with the positions of a chunk
ALIBI = "build_alibi_tensor"  # a function in the file of a model whose scores have a bias by position
WITHOUT_END = 1 << 15  # tokens: the limit of models that have none
HYBRID = "hybrid"  # full attention beside another part that reads no mask
OWN_KINDS = {"global": FULL, "local": SLIDING}  # as GPT-Neo calls them
SELECTING = "indexed_attention"  # full attention while there are no more tokens than it selects
SELECTED = ("keep_window_size", "index_topk")  # settings of how many tokens are selected; see `medusa_export.trace.selection`


@dataclass
class Backbone:
    """A loaded causal LM, with its source and name."""

    source: str
    model: PreTrainedModel
    dtype: torch.dtype
    integers: Mapping[str, LazyIntegers] = field(default_factory=dict)  # weights that the checkpoint stores as integers

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
            ExportError: the step graph has no mask for a layer's kind of attention, or the mask's size is missing.
        """
        config = self.config
        types = getattr(config, "layer_types", None)
        if types is None and (own := getattr(config, "attention_layers", None)) is not None:
            types = [OWN_KINDS.get(kind, kind) for kind in own]
        if types is None:
            types = [SLIDING if self.sliding_window else FULL] * config.num_hidden_layers
        types = [FULL if kind == SELECTING else kind for kind in types]
        if unknown := set(types) - {FULL, SLIDING, CHUNKED, HYBRID} - WITHOUT_ATTENTION:
            raise unsupported(type(self.model).__name__, f"it has layers of kind {', '.join(sorted(unknown))}")
        for kind, size, name in ((SLIDING, self.sliding_window, "sliding_window"), (CHUNKED, self.chunk_size, CHUNK_SIZE)):
            if kind in types and not size:
                raise unsupported(
                    type(self.model).__name__, f"it has layers of kind {kind}, but its configuration has no {name}"
                )
        return types

    @property
    def sliding_window(self) -> int | None:
        """How many tokens back a sliding-window layer attends; None if the model has no such layers."""
        if getattr(self.config, "use_sliding_window", True):
            return getattr(self.config, "sliding_window", None) or getattr(self.config, "window_size", None)
        return None

    @property
    def chunk_size(self) -> int | None:
        """The positions of a chunk, if the model has layers that attend only within one."""
        return getattr(self.config, CHUNK_SIZE, None)

    @property
    def max_seq_len(self) -> int:
        """The longest sequence that a cache can serve.

        LongRoPE rotates all keys, including cached ones, differently once a sequence exceeds the original training length. A
        cache cannot follow that, so the limit is that length. Attention that selects tokens is exact while it selects all.
        Scores that are scaled by the logarithm of the position (Llama 4) are scaled by one up to `floor_scale`. A model with
        ALiBi has no limit, if its configuration names none.
        """
        longest = getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "seq_length", None)
        if longest is None and not hasattr(sys.modules[type(self.model).__module__], ALIBI):
            self._setting("max_position_embeddings")  # raises
        longest = int(longest or WITHOUT_END)
        if getattr(self.config, "attn_temperature_tuning", False) and getattr(self.config, "floor_scale", None):
            longest = min(longest, int(self.config.floor_scale) - 1)
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
        """Shapes and special tokens, under one set of names for all architectures.

        What differs by layer is that of the first one, for people to read; the graphs' inputs say what each layer caches.
        """
        config = self.config.per_layer_config[0]
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
    layers_as_stored: bool = False,
    before_loading: BeforeLoading | None = None,
) -> Backbone:
    """Load a causal LM for inference on the CPU.

    Args:
        source: a directory, a hub id, or a GGUF file (see `medusa_export.model.sources.opened`). Packed weights are unpacked.
            For a directory with a LoRA adapter, its base model is loaded and the adapter merged into it.
        precision: the precision that the weights are cast to.
        attention: a name that Transformers' attention interface knows. If an architecture lacks sdpa, eager is used instead.
        trust_remote_code: run Python code that comes with the checkpoint.
        quantization: Transformers' configuration for loading quantised weights, on the device that it supports.
        layers_as_stored: with fp32, leave weights in the half precision that the files hold them in, mapped from the files. The
            caller casts them: see `medusa_export.trace.stored_layers`.
        before_loading: called with the source, the class that loads the weights, and the configuration. It may raise.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it is not a causal LM.
        ExportError: the architecture does not support an attention of that name.
    """
    if is_adapter(source):
        if quantization is not None:
            raise CheckpointError(f"{source} is an adapter and cannot be loaded quantised; merge it into its model first")
        options = {"attention": attention, "trust_remote_code": trust_remote_code, "before_loading": before_loading}
        return _with_adapter(source, precision, **options)
    dtype = DTYPES[precision]
    quiet_libraries()
    with opened(source) as (place, options):
        _require_generation_config(Path(place))
        config = _load_config(source, place, options | {"trust_remote_code": trust_remote_code})
        loader = _loader(source, config, before_loading)
        if quantization is not None:
            options["quantization_config"] = quantization
        stored = stored_dtype(Path(place)) if layers_as_stored and precision == "fp32" and not options else None
        options |= {"dtype": stored or dtype, "attn_implementation": attention, "trust_remote_code": trust_remote_code}
        if attention in ALL_EXPERTS_FUNCTIONS:
            options["experts_implementation"] = attention
        try:
            model, loaded, integers = _load(source, place, loader, options)
        except MedusaError:
            raise
        except Exception as error:  # a damaged checkpoint can make the library raise anything
            if attention == "sdpa" and "scaled_dot_product_attention" in str(error):  # the class has only eager attention
                return load_backbone(source, precision, trust_remote_code=trust_remote_code, quantization=quantization)
            if attention not in {"eager", "sdpa"} and attention in str(error):  # a class with attention code of its own
                return load_backbone(source, precision, trust_remote_code=trust_remote_code, quantization=quantization)
            raise CheckpointError(reason(source, error)) from error
    name_base_model(model)
    require_complete(source, loaded)
    check_unused(source, loaded["unexpected_keys"], text_config(model.config))
    if quantization is None:
        require_finite(source, model, as_stored=stored is not None)
        _forget_quantization(model)
    return Backbone(source, model.eval(), dtype, integers)


def _loader(source: str, config: Any, before_loading: BeforeLoading | None) -> Any:
    """The class that loads the weights. Whatever the configuration tells against the model is raised here."""
    _require_plain_positions(source, text_config(config))
    loader = auto_class(source, config)
    if before_loading is not None:
        before_loading(source, loader, config)
    return loader


def _load(
    source: str, place: str, loader: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any], Mapping[str, LazyIntegers]]:
    """The model, what Transformers says about its loading, and the weights that are stored as integers."""
    model, loaded, integers = _load_once(place, loader, options)
    said = text_config(model.config).vocab_size
    if (rows := resized_rows(loaded, said)) is not None:
        note(f"the embedding of {source} has {rows} rows, config.json says {said}; all are used")
        config = _load_config(source, place, options)
        text_config(config).vocab_size = rows
        model, loaded, integers = _load_once(place, loader, options | {"config": config})
    return model, loaded, integers


def _load_once(place: str, loader: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any], Mapping[str, LazyIntegers]]:
    options = options | {"ignore_mismatched_sizes": True}  # so that they are listed, see `require_complete`
    if "quantization_config" not in options:
        files = {name: read_settings(place, name) for name in SETTINGS_FILES}
        if settings := settings_of(read_settings(place, CONFIG), files):
            unpacked = load_packed(local_directory(place), settings, **options)
            if unpacked.note:
                note(unpacked.note)
            return unpacked.model, unpacked.loaded, unpacked.integers
    model, loaded = loader.from_pretrained(place, output_loading_info=True, **options)
    return model, loaded, {}


def _load_config(source: str, place: str, options: dict[str, Any]) -> Any:
    if "config" in options:
        return options["config"]
    known = {name: options[name] for name in ("gguf_file", "trust_remote_code") if name in options}
    try:
        return AutoConfig.from_pretrained(place, **known)
    except Exception as error:  # as in `load_backbone`
        raise CheckpointError(reason(source, error)) from error


def _with_adapter(source: str, precision: Precision, **options: Any) -> Backbone:
    """An adapter's base model, with the adapter merged into it before any cast."""
    base = load_backbone(adapter_base(source), "fp32", **options)
    try:
        model = merge_adapter(base.model, source)
    except Exception as error:  # as in `load_backbone`
        raise CheckpointError(reason(source, error, "adapter")) from error
    return Backbone(source, model.to(DTYPES[precision]).eval(), DTYPES[precision])


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


def _forget_quantization(model: Any) -> None:
    """Remove the mark of a quantised model: a GGUF file's weights are plain floats once loaded, and it would prevent saving."""
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None
