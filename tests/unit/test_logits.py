"""`shaped_logits` gives the model's own logits, for architectures that scale or cap them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from medusa_heads.logits import shaped_logits


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("cohere2", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("llama", {}),
    ],
)
def test_equals_the_models_own(make_model: Callable[..., Path], model_type: str, settings: dict[str, float]) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(model_type, **settings), attn_implementation="eager").eval()
    tokens = torch.tensor([[5, 9, 30, 31]])
    with torch.no_grad():
        own = model(tokens).logits
        plain = model.get_output_embeddings()(model.base_model(tokens).last_hidden_state)
    torch.testing.assert_close(shaped_logits(plain, model.config), own)
    assert torch.allclose(plain, own) == (not settings)  # so that there was something to do
