"""Every decoder type of Transformers decodes like PyTorch, or is refused in one line before any work.

Of every type, the module that is traced is run in PyTorch and compared with the model itself. One type of each mechanism is
exported and goes through everything that docs/architectures.md has a column for. scripts/architectures.py does that with all
types, in half an hour on two cores; what is found here must be what the page says.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from medusa_export.errors import ExportError
from medusa_export.model.checkpoint import load_backbone
from medusa_export.trace import attention_node
from medusa_export.trace.skeleton import require_traceable
from tests.support.architectures import check_type
from tests.support.architectures_page import agrees, reason, rows_of
from tests.support.eager_step import compare
from tests.support.zoo import TYPES, save_zoo_model

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
AT_LEAST = 85  # types that pass
HAS_TENSORRT = importlib.util.find_spec("tensorrt_rtx") is not None

STATE = "recurrent state|state outside of the cache|whose state a tree cannot branch"
KIND = "layers of kind"
VALUES = "what it computes next depends on values"
REFUSED: dict[str, str] = {  # type -> what the line says; all others pass
    "bailing_hybrid": STATE,
    "deepseek_v4": KIND,
    "inkling2_text": KIND,
    "inkling_text": KIND,
    "jamba": STATE,
    "kimi_linear": STATE,
    "longcat_flash": VALUES,
    "mamba2": STATE,
    "minimax": STATE,
    "minimax_m3_vl_text": KIND,
    "mpt": "a bias by position",
    "olmo_hybrid": STATE,
    "openai-gpt": "no KV cache",
    "qwen3_5_moe_text": STATE,
    "qwen3_5_text": STATE,
    "qwen3_next": STATE,
    "recurrent_gemma": STATE,
    "rwkv": "no KV cache",
    "zaya": KIND,
}
ONE_OF_A_MECHANISM = {
    "bloom": "ALiBi, attention code of its own",
    "cohere2": "interleaved rotation, parallel blocks",
    "deepseek_v3": "latent cache, groups of experts",
    "deepseek_v32": "a selection of tokens",
    "doge": "a mask that is made from the cache",
    "gemma2": "soft caps, two kinds of layers",
    "gemma3_text": "two rotations, norms on queries and keys",
    "gemma4_text": "sizes by layer, keys shared by layers, inputs by layer",
    "gpt2": "learned positions, LayerNorm, biases",
    "gpt_neox": "partial rotation, parallel blocks, biases",
    "gpt_oss": "sinks, experts with biases",
    "hrm_text": "layers that run several times",
    "dbrx": "experts in loops of their own",
    "jetmoe": "queries by experts",
    "bamba": "a state that is computed from cached entries",
    "lfm2": "short convolutions",
    "llama": "grouped heads, rotary positions",
    "llama4_text": "chunked attention, complex rotation",
    "mixtral": "experts",
    "opt": "a head that calls the decoder itself",
}

OTHER_SETTINGS: list[tuple[str, dict[str, Any]]] = [  # of checkpoints that people have, and that the types' tiny models lack
    ("falcon", {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "alibi": False}),
    ("falcon", {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                   "original_max_position_embeddings": 64}}),
    ("deepseek_v3", {"q_lora_rank": None}),
    ("cohere", {"use_qk_norm": True}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}),
    ("mixtral", {"sliding_window": 6}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("granitemoehybrid", {"position_embedding_type": "rope"}),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    ("lfm2", {"conv_bias": True, "conv_L_cache": 4}),
]  # fmt: skip

TRACED = [*((name, dict[str, Any]()) for name in TYPES if name not in REFUSED), *OTHER_SETTINGS]


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


@pytest.mark.parametrize(("model_type", "settings"), TRACED, ids=["-".join([name, *more]) for name, more in TRACED])
def test_what_is_traced_computes_what_the_model_does(model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    attention_node.register()
    model = str(save_zoo_model(tmp_path, model_type, **settings))
    traced = load_backbone(model, attention=attention_node.ATTENTION_NAME, before_loading=require_traceable)
    found, wanted = compare(traced, load_backbone(model))
    assert np.ptp(wanted) > 1
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refusal_is_one_line_and_comes_before_work(model_type: str, tmp_path: Path, page: str) -> None:
    row = check_type(model_type, tmp_path)
    assert row.outcome == "refused", row.reason
    assert re.search(REFUSED[model_type], row.reason), row.reason
    assert "\n" not in row.reason
    assert row.work == "none"
    assert agrees(rows_of(page)[model_type], row.to_json()), f"the page does not say {reason(row.to_json())}"


@pytest.mark.parametrize("model_type", ONE_OF_A_MECHANISM)
def test_one_type_of_each_mechanism_goes_through_everything(model_type: str, tmp_path: Path, page: str) -> None:
    row = check_type(model_type, tmp_path, engines=HAS_TENSORRT)
    assert row.outcome == "passes", row.reason
    assert agrees(rows_of(page)[model_type], row.to_json())


def test_the_page_has_every_type_and_enough_pass(page: str) -> None:
    assert rows_of(page).keys() == {*TYPES}
    assert rows_of(page[page.index("## Types that are refused") :]).keys() == REFUSED.keys()
    assert len(TYPES) - len(REFUSED) >= AT_LEAST
    assert f"**{len(TYPES) - len(REFUSED)} of {len(TYPES)} pass**" in page


def test_every_type_is_one_of_transformers() -> None:
    assert len({*TYPES}) == 125
    assert {*TYPES} <= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


def test_a_model_is_refused_by_its_configuration_alone(tmp_path: Path) -> None:
    attention_node.register()
    model = save_zoo_model(tmp_path, "qwen3_next")
    (model / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ExportError, match="2 of its 4 layers keep a recurrent state"):
        load_backbone(str(model), attention=attention_node.ATTENTION_NAME, before_loading=require_traceable)
