"""A tiny model as a GGUF file, in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

from tests.support.models import CHAT_TEMPLATE, SIZES, VOCAB_SIZE

LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(model: Path, target: Path) -> Path:
    """Write a tiny Llama's weights as Qwen 2's, whose order of rotations GGUF files keep; its biases are nothing."""
    weights = {name: tensor.numpy() for name, tensor in load_file(model / "model.safetensors").items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB_SIZE)
    _add_tokenizer(writer, json.loads((model / "tokenizer.json").read_text()))
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(SIZES["num_hidden_layers"]):
        names |= {f"blk.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for theirs, ours in LAYER.items()}
    for ours, theirs in names.items():
        weight = weights[f"{theirs}.weight"]
        writer.add_tensor(f"{ours}.weight", weight)
        if ours.endswith(("attn_q", "attn_k", "attn_v")):
            writer.add_tensor(f"{ours}.bias", np.zeros(len(weight), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict) -> None:
    tokens = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    kinds = [gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL for index in range(VOCAB_SIZE)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([(tokens | special)[index] for index in range(VOCAB_SIZE)])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(SIZES["bos_token_id"])
    writer.add_eos_token_id(SIZES["eos_token_id"])
    writer.add_chat_template(CHAT_TEMPLATE)
