"""The logits of the model that was traced, for a comparison with the bundle that was made from it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch

from medusa_export.model.checkpoint import Backbone
from medusa_export.trace.stored_layers import cast_layers_while_running


class TorchLogits:
    """A traced model with its own attention again. Layers whose weights are stored in half precision are cast as they run.

    Args:
        backbone: the model.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._model = backbone.model
        self._model.set_attn_implementation("eager")
        with suppress(AttributeError, ValueError):  # most models have no experts
            self._model.set_experts_implementation("eager")
        cast_layers_while_running(self._model, backbone.dtype)

    @torch.no_grad()
    def rows(self, text: Sequence[int], start: int, stop: int) -> npt.NDArray[np.floating]:
        """Logits after the tokens `start` … `stop` - 1 of a text. [stop - start, V]"""
        ids = torch.tensor([list(text[:stop])])
        logits = self._model(ids, use_cache=False, logits_to_keep=stop - start).logits[0]
        found: npt.NDArray[np.floating] = logits.float().numpy()
        return found
