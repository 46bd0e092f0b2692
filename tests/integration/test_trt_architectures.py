"""Real TensorRT-RTX engines, built without a GPU: every precision and kind of weights, and several architectures.

Deserialising an engine needs a GPU's driver, so what an engine takes and gives is read from the network that it was compiled
from, and compared with the manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.bundle.export import export_bundle
from medusa_export.command_options.engine_options import EngineOptions
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.engine import build
from medusa_export.engine.network import Network
from medusa_runtime.bundle.manifest import HEADS, STEP, EngineFacts, GraphFacts
from tests.support.models import save_random_heads, save_tiny_model

pytest.importorskip("tensorrt_rtx")

DTYPES = {"FLOAT": "float", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "BOOL": "bool"}
GetBundle = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def get_bundle(tmp_path_factory: pytest.TempPathFactory) -> GetBundle:
    """Exports a tiny model of an architecture in a precision, once."""
    root = tmp_path_factory.mktemp("architectures")

    def get(architecture: str, precision: str) -> Path:
        model, bundle = root / architecture, root / f"{architecture}-{precision}"
        if not model.exists():
            save_tiny_model(model, architecture, num_hidden_layers=2)
            save_random_heads(model, root / f"{architecture}-heads")
        if not bundle.exists():
            export_bundle(ExportOptions(str(model), root / f"{architecture}-heads", bundle, precision=precision))
        return bundle

    return get


class Watch:
    """Looks at the networks that are compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: dict[str, dict[str, tuple[str, list[int]]]] = {}
        self.aliases: dict[str, str] = {}
        self.weight_dtypes: set[str] = set()
        real = build.write_plan

        def look_and_write(network: Network, *rest: Any) -> Any:
            self._look(network)
            return real(network, *rest)

        monkeypatch.setattr(build, "write_plan", look_and_write)

    def _look(self, parsed: Network) -> None:
        network = parsed.network
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        self.tensors[parsed.name] = {t.name: (DTYPES[t.dtype.name], list(t.shape)) for t in (*inputs, *outputs)}
        for layer in (network.get_layer(index) for index in range(network.num_layers)):
            if layer.type.name == "KV_CACHE_UPDATE":
                self.aliases[layer.get_output(0).name] = layer.get_input(0).name
            if layer.type.name == "DEQUANTIZE":
                self.weight_dtypes.add(layer.get_input(0).dtype.name)


def told(graph: GraphFacts) -> dict[str, tuple[str, list[int]]]:
    return {
        t.name: (t.dtype, [size if isinstance(size, int) else -1 for size in t.shape]) for t in (*graph.inputs, *graph.outputs)
    }


def check_profiles(engine: EngineFacts, tensors: dict[str, dict[str, tuple[str, list[int]]]]) -> None:
    """Every dynamic input has bounds in every profile of its engine, in order, and they agree where it is static."""
    assert list(engine.profiles) == ["prefill", "verify", "heads"]
    for name, profile in engine.profiles.items():
        graph = tensors[HEADS if name == "heads" else STEP]
        inputs = {name: shape for name, (_, shape) in graph.items() if name in profile}
        assert inputs.keys() == profile.keys()
        for tensor, shape in inputs.items():
            bounds = profile[tensor]
            for size, least, best, most in zip(shape, bounds["min"], bounds["opt"], bounds["max"], strict=True):
                assert least <= best <= most
                assert size in (-1, least)
                assert size == -1 or least == most


@pytest.mark.parametrize(
    ("architecture", "precision", "weights"),
    [
        ("llama", "fp16", "as-is"),
        ("llama", "fp16", "int8"),
        ("llama", "fp16", "int4"),
        ("llama", "fp16", "fp8"),
        ("gemma2", "bf16", "as-is"),  # soft-capped attention, sliding windows
        ("gemma2", "bf16", "int4"),
        ("qwen3", "fp32", "as-is"),  # norms on queries and keys
        ("qwen3", "fp32", "fp8"),
        ("gpt_neox", "fp16", "as-is"),  # parallel residual, partial rotary embedding, biases
        ("gpt_neox", "fp16", "int8"),
    ],
)
def test_engines_are_what_their_manifest_says(
    get_bundle: GetBundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    precision: str,
    weights: Any,
) -> None:
    watch = Watch(monkeypatch)
    options = EngineOptions(
        get_bundle(architecture, precision),
        tmp_path / "engine",
        max_seq_len=64,
        max_prefill_tokens=32,
        max_tree_nodes=16,
        max_batch_size=2,
        weights=weights,
        opt_level=0,
    )
    manifest = build.build_engines(options)
    engine = manifest.engine
    assert engine is not None
    assert (manifest.precision, engine.weights) == (precision, weights)
    assert watch.tensors == {name: told(graph) for name, graph in manifest.graphs.items()}
    assert watch.aliases == engine.aliases
    assert set(engine.aliases.values()) == {name for name in watch.tensors[STEP] if name.startswith("past.")}
    check_profiles(engine, watch.tensors)
    expected = {"as-is": set(), "int8": {"INT8"}, "int4": {"INT4", "INT8"}, "fp8": {"FP8"}}
    assert watch.weight_dtypes == expected[weights]
    assert not [path for path in (tmp_path / "engine").iterdir() if path.name.startswith(".")]
