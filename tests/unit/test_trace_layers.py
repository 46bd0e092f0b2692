"""Which modules of a model are its decoder's layers, and what copies of a traced layer must not share."""

from __future__ import annotations

import sys

import onnx_ir as ir
import pytest
import torch

from medusa_export.errors import ExportError
from medusa_export.model.checkpoint import Backbone
from medusa_export.trace.cache_shapes import unchanged
from medusa_export.trace.layers import NoLayersError, decoder_layers, text_decoder
from medusa_export.trace.ordered_sets import OrderedSet, ordered_sets
from medusa_export.trace.selection import selecting_all
from medusa_export.trace.stamp import known_sizes
from medusa_export.trace.step_graph import step_module
from medusa_export.trace.torch_to_onnx import tensor_of
from tests.support.multimodal import make_multimodal_model
from tests.support.zoo import NUM_LAYERS, make_model


@pytest.mark.parametrize("model_type", ["mistral3", "qwen2_5_vl", "idefics3"])
def test_a_multimodal_models_layers_are_those_of_its_text_decoder(model_type: str) -> None:
    model = make_multimodal_model(model_type)
    alike = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module) == NUM_LAYERS
    ]
    assert len(alike) > 1  # the image tower is as deep
    name, layers = decoder_layers(model)
    assert layers is model.get_submodule(name) is model.get_decoder().layers


def test_of_several_lists_as_long_the_layers_are_the_largest() -> None:
    model = make_model("llama")
    gates = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(NUM_LAYERS))
    model.model._modules = {"gates": gates, **model.model._modules}
    assert decoder_layers(model)[0] == "model.layers"


def test_the_layers_are_found_whatever_the_configuration_counts() -> None:
    model = make_model("longcat_flash")  # counts two for each layer, which attends twice
    name, layers = decoder_layers(model)
    assert (name, len(layers), model.config.num_hidden_layers) == ("model.layers", 2, 4)


def test_a_model_without_a_list_of_layers_says_so() -> None:
    model = make_model("llama")
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(NoLayersError, match="no list of layers"):
        decoder_layers(model)


@pytest.mark.parametrize(("model_type", "decoder"), [("opt", "model.decoder"), ("modernbert-decoder", "model")])
def test_the_decoder_is_what_runs_the_layers(model_type: str, decoder: str) -> None:
    model = make_model(model_type)
    assert text_decoder(model) is model.get_submodule(decoder)


def test_sizes_that_depend_on_data_are_not_those_of_another_layer() -> None:
    shape = known_sizes(ir.Shape(["batch", "2*num_tokens", "u0", "batch*u1", 64]), {"batch", "num_tokens"})
    assert shape == ir.Shape(["batch", "2*num_tokens", None, None, 64])
    assert known_sizes(None, set()) is None


def test_a_buffer_that_no_state_dict_has_is_found() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.register_buffer("scale", torch.full((2,), 3.0), persistent=False)
    assert "model.layers.1.mlp.scale" not in model.state_dict()
    assert tensor_of(model, "model.layers.1.mlp.scale") is model.model.layers[1].mlp.scale
    assert tensor_of(model, "lm_head.weight") is model.lm_head.weight


def test_a_selection_is_only_undone_while_tracing() -> None:
    model = make_model("doge")
    attention = model.model.layers[0].self_attn
    with pytest.raises(KeyError), selecting_all(model):
        assert attention.keep_window_size > 1 << 40
        raise KeyError
    assert attention.keep_window_size == 128


def test_a_forward_pass_on_tensors_without_values_leaves_none_in_the_model() -> None:
    model = make_model("phi3")
    rotary = model.model.rotary_emb
    before = rotary.inv_freq
    with unchanged(model):
        rotary.register_buffer("inv_freq", torch.zeros(1), persistent=False)
        rotary.register_buffer("long_inv_freq", torch.zeros(1), persistent=False)
        rotary.seen = torch.zeros(1)
    assert rotary.inv_freq is before
    assert not hasattr(rotary, "long_inv_freq")
    assert not hasattr(rotary, "seen")


def test_sets_come_in_order_while_a_model_is_traced() -> None:
    """Gemma 3 makes a set of its layers' kinds in each pass; Gemma 4 keeps one."""
    kinds = {"sliding_attention", "full_attention", "a", "b", "c"}
    for model_type in ("gemma3_text", "gemma4_text"):
        model = make_model(model_type)
        code = sys.modules[type(model).__module__]
        held = getattr(model.model, "unique_layer_types", None)
        with ordered_sets(model):
            assert list(code.set(kinds)) == sorted(kinds)
            assert isinstance(code.set(kinds), set)
            if held is not None:
                assert list(model.model.unique_layer_types) == sorted(held)
                assert isinstance(model.model.unique_layer_types, OrderedSet)
        assert "set" not in vars(code)
        assert getattr(model.model, "unique_layer_types", None) is held
    assert held is not None


@pytest.mark.parametrize(
    ("model_type", "setting", "kind"),
    [("exaone4", "sliding_window", "sliding_attention"), ("llama4_text", "attention_chunk_size", "chunked_attention")],
)
def test_a_window_without_a_size_is_told(model_type: str, setting: str, kind: str) -> None:
    model = make_model(model_type)
    setattr(model.config, setting, None)
    with pytest.raises(ExportError, match=f"it has layers of kind {kind}, but its configuration has no {setting} "):
        step_module(Backbone("tiny", model, torch.float32))
