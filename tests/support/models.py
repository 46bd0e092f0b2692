"""Tiny random checkpoints: real architectures at toy size, so that every export path runs in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from medusa_heads.config import HeadsConfig
from medusa_heads.formats import save_heads
from medusa_heads.modules import MedusaHeads

VOCAB_SIZE = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def save_tiny_model(directory: Path, model_type: str, **settings: Any) -> Path:
    """Save a random model of a type, and its tokenizer. The same type and settings give the same weights."""
    config = AutoConfig.for_model(model_type, **(_sizes(model_type) | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # the usual initialisation is so narrow that all logits nearly tie
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def put_on_grids(model: Path, but: str = "") -> Path:
    """Give the weights of a tiny model's layers 16 values in each block of 32 inputs, as GGUF's Q4_1 does; all but one."""
    file = model / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if "proj" in name and name != but:
            blocks = weight.reshape(-1, 32)
            low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
            step = (high - low) / 15
            weights[name] = (((blocks - low) / step).round() * step + low).reshape(weight.shape)
    save_file(weights, file, metadata={"format": "pt"})
    return model


def _sizes(model_type: str) -> dict[str, Any]:
    sizes = dict(SIZES)
    if model_type == "gpt2":  # its own names
        return {
            "vocab_size": VOCAB_SIZE, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256,
            "bos_token_id": 0, "eos_token_id": 1,
        }  # fmt: skip
    if model_type == "gpt_neox":
        del sizes["num_key_value_heads"], sizes["head_dim"]
    if model_type in {"stablelm", "phi3", "starcoder2", "falcon"}:
        del sizes["head_dim"]
    if model_type in {"gemma2", "gemma3_text", "cohere2", "mistral"}:
        sizes["sliding_window"] = 8  # shorter than the tests' prompts, so that it shows
    return sizes


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` entries, so that any text can be encoded."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the quick brown fox jumps over the lazy dog while a small model learns to speak"] * 4, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_random_heads(
    model: Path, output: Path, *, num_heads: int = 3, num_layers: int = 2, reads_root: bool = True, **settings: Any
) -> Path:
    """Save random heads (not untrained ones, which all guess alike) that fit a tiny model."""
    config = AutoConfig.from_pretrained(model).get_text_config(decoder=True)
    torch.manual_seed(1)
    heads = MedusaHeads(
        HeadsConfig(
            base_model=str(model),
            num_heads=num_heads,
            num_layers=num_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            reads_root=reads_root,
            **settings,
        )
    )
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(0, 0.1)
    save_heads(heads, output)
    return output
