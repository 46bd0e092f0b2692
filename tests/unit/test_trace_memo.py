"""The tests' memory of traces: it saves the trace, never the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from medusa_export.model.checkpoint import Backbone, load_backbone
from medusa_export.trace import attention_node, step_graph
from tests.support.trace_memo import TraceMemo, facts


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was traced, with a memory of its own."""
    known: TraceMemo = step_graph.export_module
    found: list[str] = []

    def export(what: str, *rest: object) -> object:
        found.append(what)
        return known.export(what, *rest)

    monkeypatch.setattr(step_graph, "export_module", TraceMemo(export))
    return found


def backbone_of(model: Path) -> Backbone:
    attention_node.register()
    return load_backbone(str(model), attention=attention_node.ATTENTION_NAME)


def test_other_weights_are_those_of_the_second_model(make_model: Callable[..., Path], traced: list[str]) -> None:
    graphs = []
    for seed in range(2):
        backbone = backbone_of(make_model())
        with torch.no_grad():
            backbone.model.get_input_embeddings().weight += seed
        graphs.append(step_graph.trace_step(backbone, 24).graph)
    assert len(traced) == 1
    assert graphs[0].initializers.keys() == graphs[1].initializers.keys()
    apart = {
        name
        for name, value in graphs[0].initializers.items()
        if not np.array_equal(value.const_value.numpy(), graphs[1].initializers[name].const_value.numpy())
    }
    assert apart == {"model.model.embed_tokens.weight"}


@pytest.mark.parametrize(
    "settings", [{}, {"rms_norm_eps": 0.25}, {"tie_word_embeddings": False}, {"num_hidden_layers": 1}], ids=str
)
def test_another_configuration_is_another_trace(settings: dict[str, object], make_model: Callable[..., Path]) -> None:
    one, other = (list(facts(step_graph.step_module(backbone_of(model)))) for model in (make_model(), make_model(**settings)))
    assert (one == other) == (not settings)
