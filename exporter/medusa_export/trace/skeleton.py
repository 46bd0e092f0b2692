"""Refuses a model before its weights are loaded, by a forward pass of its skeleton: all of its modules, with no values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.initialization import no_init_weights

from medusa_export.errors import ExportError
from medusa_export.model.checkpoint import Backbone
from medusa_export.model.model_class import name_base_model
from medusa_export.trace.attention_node import ATTENTION_NAME
from medusa_export.trace.cache_shapes import cached_tensors, fake_tensors
from medusa_export.trace.experts_node import take_activations_for_unknown
from medusa_export.trace.layers import NoLayersError, decoder_layers
from medusa_export.trace.own_attention import require_known
from medusa_export.trace.quiet import quiet_torch
from medusa_export.trace.step_graph import step_module


def require_traceable(source: str, loader: Any, config: Any) -> None:
    """Refuse a model of which its configuration and code tell that it cannot be traced.

    Code that needs values does not run here. What it does is seen once the weights are loaded.

    Args:
        source: where the model is.
        loader: the class of Transformers that makes the model.
        config: its configuration.

    Raises:
        ExportError: the model has layers whose state cannot branch, a kind of attention that is unknown, or no KV cache.
    """
    backbone = _skeleton(source, loader, config)
    if backbone is None:
        return
    try:
        require_known(backbone.model)
        take_activations_for_unknown(backbone.model)
        cached_tensors(backbone, step_module(backbone), list(decoder_layers(backbone.model)[1]))
    except NoLayersError:  # the model is traced as a whole
        return
    except ExportError as error:
        if error.__cause__ is None:  # found, and not what a library says about code that needs values
            raise
    except Exception:  # noqa: BLE001 - as above
        return


def _skeleton(source: str, loader: Any, config: Any) -> Backbone | None:
    try:
        with quiet_torch(), fake_tensors(), no_init_weights():
            model = loader.from_config(
                copy.deepcopy(config), attn_implementation=ATTENTION_NAME, experts_implementation=ATTENTION_NAME
            )
    except Exception:  # noqa: BLE001 - code that needs values, or that has to be trusted first
        return None
    name_base_model(model)
    return Backbone(source, model.eval(), torch.float32)
