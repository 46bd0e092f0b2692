"""A tiny random checkpoint of every decoder type that Transformers can make, with each of the type's mechanisms in use.

Sizes go by mechanism: a setting of a known name gets a small value, and a list with an entry for each layer gets one of each
kind. `EXCEPTIONS` has what a type needs beyond that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.models import VOCAB_SIZE, tokenizer

NUM_LAYERS = 4
WINDOW = 8  # shorter than the tests' prompts, so that it shows
MAX_POSITIONS = 256

TYPES = tuple(
    """
    afmoe apertus arcee axk1 axk2 bailing_hybrid bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe ctrl cwm
    dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe
    falcon falcon_h1 flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4
    glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite
    granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text internlm3 iquestcoder jais2 jamba jetmoe
    kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4_text longcat_flash mamba2 mellum mimo_v2_flash minicpm3
    minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder mpt nanochat nemotron
    nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm
    starcoder2 vaultgemma xglm youtu zamba2 zaya
    """.split()  # noqa: SIM905
)

# Small values of settings, for the types that have the setting and not as None. Settings of other names keep their default.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "vocab_size_per_layer_input": VOCAB_SIZE, "unpadded_vocab_size": VOCAB_SIZE,
    "hidden_size": 64, "word_embed_proj_dim": 64, "hidden_size_per_layer_input": 16,
    "intermediate_size": 96, "intermediate_size_mlp": 96, "ffn_dim": 96, "ffn_hidden_size": 96, "dff": 96,
    "moe_intermediate_size": 48, "expert_ffn_hidden_size": 48, "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "dense_intermediate_size": 96, "moe_shared_expert_intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "head_dim": 16, "swa_head_dim": 16, "rotary_dim": 8,
    "max_position_embeddings": MAX_POSITIONS,
    # attention that reads only a part
    "sliding_window": WINDOW, "local_attention": 2 * WINDOW, "window_size": WINDOW, "attention_chunk_size": WINDOW,
    "use_sliding_window": True, "max_window_layers": 2, "index_topk": 128, "index_n_heads": 2, "index_head_dim": 16,
    "index_block_size": 4, "index_topk_blocks": 2,
    # latent attention
    "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "o_lora_rank": 16, "o_groups": 2,
    # experts
    "num_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "zero_expert_num": 2, "first_k_dense_replace": 1, "num_dense_layers": 1, "mlp_only_layers": [0], "moe_layer_start_index": 1,
    "moe_layer_end_index": NUM_LAYERS - 1, "expert_layer_period": 2, "router_hidden_size": 16, "num_nextn_predict_layers": 0,
    # recurrence and convolution
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_ssm": 128, "mamba_chunk_size": 8, "chunk_size": 8,
    "mamba_dt_rank": 8, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_headdim": 16, "n_mamba_heads": 8,
    "ssm_state_size": 16,
    "state_size": 16, "n_groups": 2, "num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_head_dim": 16, "linear_num_heads": 4, "lru_width": 64, "block_size": 8,
    "attention_hidden_size": 64,
    # factors and norms that are off by default
    "logit_scale": 1.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25,
    "logits_scaling": 2.0,
    "qk_layernorm": True, "use_qk_norm": True,
}  # fmt: skip

EXPERTS = {"num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2}
LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")  # an entry a layer

FULL, SLIDING, CONV, LINEAR = "full_attention", "sliding_attention", "conv", "linear_attention"
GROUPS_OF_EXPERTS = {"n_group": 2, "topk_group": 1, "n_routed_experts": 8}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "axk1": GROUPS_OF_EXPERTS,
    "bailing_hybrid": {"num_expert_group": 2, "topk_group": 1, "num_experts": 8, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "prefix_dense_intermediate_size": 96},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"topk_method": "group_limited_greedy", **GROUPS_OF_EXPERTS},
    "deepseek_v3": GROUPS_OF_EXPERTS,
    "deepseek_v32": GROUPS_OF_EXPERTS,
    "deepseek_v4": {
        "num_key_value_heads": 1, "head_dim": 64,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "doge": {"keep_window_size": 128},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "gemma3n_text": {
        "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "gemma4_text": {
        "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2,
        "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
        "use_double_wide_mlp": True, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 48,
    },
    "gemma4_unified_text": {
        "layer_types": [SLIDING, FULL] * 2, "attention_k_eq_v": True,
        "per_layer_config": {1: {"head_dim": 32, "num_key_value_heads": 1}, 3: {"head_dim": 32, "num_key_value_heads": 1}},
    },
    "gpt_bigcode": {"num_key_value_heads": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL] * 2},
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 1},  # 2 * (3 + 1) runs of a layer
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling2_text": {"rel_extent": 16, "d_rel": 8, "n_layers_per_attn_res_block": 2, "log_scaling_n_floor": 16},
    "inkling_text": {"rel_extent": 16, "d_rel": 8, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},  # beside experts in layers 1 and 3
    "jetmoe": {"kv_channels": 16},
    "laguna": {"num_attention_heads_per_layer": [4, 8, 4, 8]},
    "lfm2": {"layer_types": [CONV, FULL] * 2},
    "lfm2_moe": {"layer_types": [CONV, FULL] * 2},
    "llama4_text": {"layer_types": ["chunked_attention"] * 3 + [FULL], "interleave_moe_layer_step": 2, "floor_scale": 128},
    "longcat_flash": {"num_layers": 2},  # of two attentions each
    "mamba2": {"num_heads": 8},
    "mimo_v2_flash": {"head_dim": 24},  # of which a third rotates
    "minicpm3": {"scale_emb": 2, "dim_model_base": 64},
    "minimax_m3_vl_text": {
        "layer_types": [FULL, "minimax_m3_sparse"] * 2, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "olmo": {"clip_qkv": 2.0},
    "olmoe": {"clip_qkv": 2.0},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": {"sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW},
    "zamba2": {
        "num_key_value_heads": 4, "attention_hidden_size": 128, "attention_head_dim": 32, "kv_channels": 16,
        "num_query_groups": 4,
        "num_mem_blocks": 2, "use_mem_rope": True, "use_shared_attention_adapter": True, "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": WINDOW},
}  # fmt: skip


def save_zoo_model(directory: Path, model_type: str, **settings: Any) -> Path:
    """Save a random model of a type, and its tokenizer. The same type and settings give the same weights."""
    model = make_model(model_type, **settings)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def make_model(model_type: str, **settings: Any) -> Any:
    """A random model of a type, with tiny settings."""
    config = CONFIG_MAPPING[model_type](**(tiny_settings(model_type) | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    return model


def randomise(model: torch.nn.Module) -> None:
    """Give a model weights whose logits do not nearly tie, and in which biases, sinks and other vectors matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:  # norms keep their start, of zero or one, which tells how they are meant
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("bias") and buffer.is_floating_point():  # what corrects an expert's score
                buffer.add_(torch.randn_like(buffer) * 0.1)


def tiny_settings(model_type: str) -> dict[str, Any]:
    """The settings of a type's tiny model, under the names of its configuration class."""
    default = CONFIG_MAPPING[model_type]()
    aliases = {theirs: usual for usual, theirs in (default.attribute_map or {}).items()}
    settings: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        usual = aliases.get(name, name)
        if usual in LISTS or name in LISTS:
            settings[name] = one_of_each(value) if value else value
        elif value is not None or usual.startswith("num_experts"):
            size = SIZES.get(usual, SIZES.get(name, EXPERTS.get(name)))
            if size is not None:
                settings[name] = size
    if "kv_lora_rank" in settings:  # each head has its own key, made from the latent
        settings["num_key_value_heads"] = settings["num_attention_heads"]
        settings["head_dim"] = settings["qk_rope_head_dim"]
    layer_types = set(settings.get("layer_types") or ())
    if layer_types == {FULL} and hasattr(default, "sliding_window"):
        settings["layer_types"] = [FULL, FULL, SLIDING, SLIDING]
    if "use_sliding_window" in settings or SLIDING in (settings.get("layer_types") or ()):
        settings["sliding_window"] = WINDOW
    settings |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return settings | EXCEPTIONS.get(model_type, {})


def one_of_each(kinds: list[Any]) -> list[Any]:
    """A list for few layers, with each kind of a longer list: such as a, b, a, b."""
    distinct = list(dict.fromkeys(kinds))
    return [distinct[place % len(distinct)] for place in range(max(NUM_LAYERS, len(distinct)))]
