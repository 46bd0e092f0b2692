"""Refuses, before any weights are loaded, a model whose layers keep states that no tree can branch."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from medusa_export.errors import ExportError
from medusa_export.model.checkpoint import Backbone
from medusa_export.trace.attention_node import ATTENTION_NAME
from medusa_export.trace.cache_shapes import RecurrentLayersError, cached_tensors, fake_tensors
from medusa_export.trace.layers import NoLayersError, decoder_layers
from medusa_export.trace.quiet import quiet_torch
from medusa_export.trace.step_module import StepModule


def refuse_states(source: str, config: Any, loader: Any, *, trust_remote_code: bool = False) -> None:
    """Run a model without weights, if its cache would have states, and see whether they can be told as entries.

    Whatever else is wrong with the model is left to be found when it is loaded.

    Args:
        source: the checkpoint, as the user named it.
        config: its configuration.
        loader: Transformers' class that makes the model.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        RecurrentLayersError: layers keep a recurrent state.
    """
    if not _may_keep_states(config):
        return
    mode = fake_tensors()
    options = {"experts_implementation": ATTENTION_NAME} if ATTENTION_NAME in ALL_EXPERTS_FUNCTIONS else {}
    try:
        with quiet_torch(), mode:
            model = loader.from_config(
                config, attn_implementation=ATTENTION_NAME, trust_remote_code=trust_remote_code, **options
            ).eval()
        backbone = Backbone(source, model, torch.float32)
        module = StepModule(model, backbone.layer_types, backbone.sliding_window).eval()
        cached_tensors(backbone, module, list(decoder_layers(model)[1]), mode)
    except RecurrentLayersError:
        raise
    except (ExportError, NoLayersError):
        return
    except Exception:  # noqa: BLE001 - a model's code can raise anything without weights
        return


def _may_keep_states(config: Any) -> bool:
    """Whether Transformers' own cache for this configuration has states besides keys and values."""
    try:
        layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    except Exception:  # noqa: BLE001 - configurations of remote code may lack anything
        return False
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
