"""What layers cache beside keys and values of one size: each mechanism on chunks and trees, beside PyTorch path by path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medusa_export.bundle.export import export_bundle
from medusa_export.check import validate
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.errors import ExportError
from medusa_export.model.checkpoint import Backbone
from medusa_export.trace import attention_node as attention
from medusa_export.trace.cache_shapes import cached_tensors
from medusa_export.trace.layers import decoder_layers
from medusa_export.trace.step_graph import step_module
from medusa_runtime import Manifest
from medusa_runtime.bundle.cache_layout import CacheLayout
from tests.support.eager_step import chain_and_tree, computed, empty_cache
from tests.support.models import save_random_heads
from tests.support.zoo import make_model, save_zoo_model

PROMPTS = ("the lazy dog learns to speak, while the quick model jumps over many words", "a fox")
TEXT, BRANCH = [5 + 7 * place % 200 for place in range(14)], [9, 33, 101, 7]

# heads and width of each tensor, as docs/decisions/0028-what-is-cached.md tells them
CONV = {"0.conv": (1, 64), "1.key": (2, 16), "1.value": (2, 16), "2.conv": (1, 64), "3.key": (2, 16), "3.value": (2, 16)}
SHARED = {"0.key": (2, 16), "0.value": (2, 16), "1.key": (2, 32), "1.value": (2, 32)}  # layers 2 and 3 read those
LATENT = {f"{layer}.{part}": (1, width) for layer in range(4) for part, width in (("key", 32), ("value", 8))}


def backbone_of(model_type: str, **settings: object) -> Backbone:
    attention.register()
    model = make_model(model_type, **settings)
    model.set_attn_implementation(attention.ATTENTION_NAME)
    return Backbone("tiny", model, torch.float32)


@pytest.mark.parametrize(
    ("model_type", "settings", "wanted"),
    [
        ("lfm2", {}, CONV),
        ("gemma4_text", {"enable_moe_block": False}, SHARED),
        ("minicpm3", {}, LATENT),
        ("nemotron_h", {"layer_types": ["linear_attention", "mlp", "full_attention", "mlp"]}, None),
    ],
)
def test_what_a_layer_caches_is_seen(model_type: str, settings: dict[str, object], wanted: dict[str, tuple[int, int]]) -> None:
    backbone = backbone_of(model_type, **settings)
    found = cached_tensors(backbone, step_module(backbone), decoder_layers(backbone.model)[1])
    if wanted is not None:
        assert {tensor.name: (tensor.heads, tensor.width) for layer in found for tensor in layer} == wanted
    else:
        assert [[tensor.part for tensor in layer] for layer in found] == [
            ["conv", "ssm_x", "ssm_b", "ssm_dt"], [], ["key", "value"], [],
        ]  # fmt: skip


@pytest.mark.parametrize(
    "model_type", ["lfm2", "lfm3", "bamba", "falcon_h1", "nemotron_h", "zamba2", "gemma4_unified_text", "minicpm3", "youtu"]
)
def test_chunks_and_trees_are_those_of_pytorch(model_type: str) -> None:
    settings = {"layer_types": ["linear_attention", "mlp", "full_attention", "mlp"]} if model_type == "nemotron_h" else {}
    backbone = backbone_of(model_type, **settings)
    own = make_model(model_type, **settings)  # with its own attention; the weights are the same
    half = len(TEXT) // 2
    with torch.no_grad():
        chain = own(torch.tensor([TEXT]), use_cache=False).logits[0]
        branch = own(torch.tensor([TEXT[:half] + BRANCH]), use_cache=False).logits[0, half:]
    module = step_module(backbone)
    past = empty_cache(backbone, module)
    with computed():
        found = chain_and_tree(module, past, TEXT, BRANCH)
    np.testing.assert_allclose(found, torch.cat([chain, branch]).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        (
            "qwen3_5_text",
            r"2 of its 4 layers keep a recurrent state \(Qwen3_5GatedDeltaNet\), which a tree of drafts cannot branch",
        ),
        ("olmo_hybrid", r"2 of its 4 layers keep a recurrent state \(OlmoHybridGatedDeltaNet\)"),
        ("recurrent_gemma", "linear_attention, whose state a tree cannot branch"),
    ],
)
def test_a_state_that_cannot_branch_is_refused_by_name(model_type: str, reason: str) -> None:
    backbone = backbone_of(model_type)
    with pytest.raises(ExportError, match=reason):
        cached_tensors(backbone, step_module(backbone), decoder_layers(backbone.model)[1])


def test_such_a_state_is_refused_before_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_zoo_model(tmp_path / "model", "olmo_hybrid")
    heads = save_random_heads(model, tmp_path / "heads")
    monkeypatch.setattr("medusa_export.model.checkpoint._load", lambda *_: pytest.fail("weights are loaded"))
    with pytest.raises(ExportError, match="keep a recurrent state"):
        export_bundle(ExportOptions(str(model), heads, tmp_path / "bundle"))


@pytest.mark.parametrize(("model_type", "settings"), [("gemma4_text", {"enable_moe_block": False}), ("minicpm3", {})])
def test_a_bundle_decodes_like_pytorch(model_type: str, settings: dict[str, object], tmp_path: Path) -> None:
    """Others are in test_architectures.py."""
    model, bundle = save_zoo_model(tmp_path / "model", model_type, **settings), tmp_path / "bundle"
    heads = save_random_heads(model, tmp_path / "heads")
    export_bundle(ExportOptions(str(model), heads, bundle))
    report = validate(bundle, str(model), heads=heads, prompts=PROMPTS, max_new_tokens=24)
    assert report.status == "passed", report.verdicts()
    assert all(row.num_rows > 0 for row in [*report.prompt_logits, *report.tree_logits])
    assert len(CacheLayout.of(Manifest.load(bundle).graphs["step"]).groups) > 1
