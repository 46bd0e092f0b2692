"""Attention methods of models' own: what they compute is found by looking at their results."""

from __future__ import annotations

import pytest
import torch

from medusa_export.errors import ExportError
from medusa_export.model.checkpoint import FULL, SLIDING
from medusa_export.trace.own_attention import attention_methods, require_known
from medusa_export.trace.real_rotary import complex_rotary
from tests.support.zoo import make_model


@pytest.mark.parametrize("model_type", ["gptj", "codegen", "gpt_neox_japanese"])
def test_a_method_that_attends_is_found_with_its_scale(model_type: str) -> None:
    model = make_model(model_type)
    width = model.config.hidden_size // model.config.num_attention_heads
    found = attention_methods(model)
    assert len(found) == model.config.num_hidden_layers
    assert {method.kind for method in found.values()} == {FULL}
    assert all(method.scale == pytest.approx(width**-0.5, rel=1e-4) for method in found.values())


def test_windows_in_a_method_are_found() -> None:
    model = make_model("gpt_neo")
    kinds = {"global": FULL, "local": SLIDING}
    assert [method.kind for method in attention_methods(model).values()] == [
        kinds[each] for each in model.config.attention_layers
    ]


def test_a_method_that_computes_something_else_is_refused() -> None:
    model = make_model("gptj")
    for module in model.modules():
        if hasattr(module, "_attn"):
            module._attn = lambda query, key, value, attention_mask=None: (
                torch.relu(query @ key.transpose(2, 3)) @ value,
                None,
            )
    with pytest.raises(ExportError, match="something else"):
        attention_methods(model)


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [("openai-gpt", {}, "no KV cache"), ("mpt", {}, "bias by position"), ("falcon", {"alibi": True}, "added twice")],
)
def test_attention_that_cannot_be_traced_is_refused_by_name(model_type: str, settings: dict[str, bool], reason: str) -> None:
    model = make_model(model_type, **settings)
    with pytest.raises(ExportError, match=f"{type(model).__name__} .*{reason}"):
        require_known(model)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("gemma3_text", {"use_bidirectional_attention": True}), ("gemma4_text", {"use_bidirectional_attention": "all"}),
     ("llama", {"is_causal": False})],
)  # fmt: skip
def test_models_that_read_later_tokens_are_refused(model_type: str, settings: dict[str, object]) -> None:
    with pytest.raises(ExportError, match="its tokens attend to later ones too, so it cannot continue a text"):
        require_known(make_model(model_type, **settings))


@pytest.mark.parametrize(("model_type", "axis"), [("llama4_text", 2), ("deepseek_v2", 1), ("llama", None)])
def test_complex_rotary_embeddings_are_found(model_type: str, axis: int | None) -> None:
    assert complex_rotary(make_model(model_type)) == axis
