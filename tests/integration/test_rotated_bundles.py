"""Bundles whose activations are rotated: what they compute, which models cannot be rotated, and the heads beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_export.bundle.export import export_bundle
from medusa_export.bundle.read_graph import read_graph
from medusa_export.check import validate
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.command_options.quantize_options import QuantizeOptions
from medusa_export.passes.common.terms import noted_terms
from medusa_export.passes.quantize.integer_weights import block_size
from medusa_export.passes.quantize.rotate_stream import STATE_BASIS
from medusa_export.quantize import quantize_bundle, rotation
from medusa_export.quantize import quantized_bundle as quantizing
from medusa_export.quantize.rotation import NotRotatedError, rotate
from medusa_runtime import Manifest, MedusaLM
from medusa_runtime.bundle.manifest import HEADS, STEP
from medusa_runtime.errors import OptionError
from tests.support.models import save_random_heads

Make = Callable[..., Path]
PROMPTS = ("the lazy dog learns to speak while the quick model jumps", "a fox")
TEXTS = [list(range(5, 45)), [9, 200, 31]]
ROTATED: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},  # biases after the projections
    "qwen3": {},  # norms of queries and keys
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "gemma": {},  # scaled embeddings, gains around 1
    "mistral": {},  # sliding windows
}
LEFT: dict[str, str] = {
    "gpt2": "the embeddings of the tokens are not rows of one table",
    "stablelm": "LayerNormalization subtracts the mean of the channels",
    "gemma2": "a norm after a block writes the stream, channel by channel",
    "olmo2": "a norm after a block writes the stream, channel by channel",
}


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "QUALITY_PROMPTS", PROMPTS)
    monkeypatch.setattr(quantizing, "CALIBRATION_PROMPTS", PROMPTS)


@pytest.fixture(scope="module")
def exported(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Exports a model, once. Its heads read the root and share the LM head."""
    made: dict[str, Path] = {}

    def export(model_type: str) -> Path:
        if model_type not in made:
            root = tmp_path_factory.mktemp(model_type)
            model = make_model(model_type, **ROTATED.get(model_type, {}))
            export_bundle(ExportOptions(str(model), save_random_heads(model, root / "heads"), root / "bundle"))
            made[model_type] = root / "bundle"
        return made[model_type]

    return export


@pytest.mark.parametrize("model_type", ROTATED)
def test_in_float_a_rotated_model_is_the_same(model_type: str, exported: Make, tmp_path: Path) -> None:
    bundle = exported(model_type)
    graphs = {name: read_graph(bundle / f"{name}.onnx") for name in (STEP, HEADS)}
    found = rotate(graphs, bundle, Manifest.load(bundle), TEXTS, tmp_path)
    assert found.facts.difference < 1e-4
    assert found.facts.values
    assert found.graphs[STEP].graph.initializers[STATE_BASIS].shape == [64, 64]
    assert STATE_BASIS not in graphs[STEP].graph.initializers  # the original is as it was
    assert found.errors
    assert all(0 < error < 1e-2 for error in found.errors.values())


@pytest.mark.parametrize("model_type", LEFT)
def test_what_does_not_commute_with_a_rotation_is_told(model_type: str, exported: Make, tmp_path: Path) -> None:
    bundle = exported(model_type)
    graphs = {name: read_graph(bundle / f"{name}.onnx") for name in (STEP, HEADS)}
    with pytest.raises(NotRotatedError, match=LEFT[model_type]):
        rotate(graphs, bundle, Manifest.load(bundle), TEXTS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_rotated_is_quantised_as_before_and_that_is_told(
    exported: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = quantize_bundle(QuantizeOptions(exported("gemma2"), tmp_path / "new", activation_bits=8))
    assert manifest.quantization is not None
    assert manifest.quantization.rotation is None
    assert manifest.quantization.not_rotated == LEFT["gemma2"]
    assert manifest.quantization.smoothing == 0.5
    assert f"the activations are not rotated: {LEFT['gemma2']}" in capsys.readouterr().err
    with pytest.raises(OptionError, match="cannot be rotated"):
        quantize_bundle(QuantizeOptions(exported("gemma2"), tmp_path / "other", rotate=True))
    assert not (tmp_path / "other").exists()


def test_a_rotation_that_changes_the_results_is_not_used(
    exported: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(step: Any) -> Any:
        name = next(name for name in step.graph.initializers if name.endswith("down_proj.weight"))
        weight = step.graph.initializers[name]
        array = weight.const_value.numpy() * 1.2
        weight.const_value = rotation.ir.tensor(array, name=name)
        return original(step)

    original = rotation.RotateValues()
    monkeypatch.setattr(rotation, "RotateValues", lambda: spoil)
    bundle = exported("llama")
    graphs = {name: read_graph(bundle / f"{name}.onnx") for name in (STEP, HEADS)}
    with pytest.raises(NotRotatedError, match="the rotated graph differs by"):
        rotate(graphs, bundle, Manifest.load(bundle), TEXTS, tmp_path)


@pytest.mark.parametrize(
    ("model_type", "scheme", "bits", "most"),
    [
        ("llama", "int8", 16, 0.01),
        ("granite", "int8", 8, 0.01),
        ("gemma", "int8", 8, 0.01),
        ("llama", "int8-blocks", None, 0.01),
        ("llama", "int4", None, 0.1),
    ],
)
def test_a_rotated_bundle_passes_its_validation(
    model_type: str, scheme: Any, bits: Any, most: float, exported: Make, make_model: Make, tmp_path: Path
) -> None:
    options = QuantizeOptions(exported(model_type), tmp_path / "new", scheme, activation_bits=bits, rotate=True)
    manifest = quantize_bundle(options)
    assert manifest.quantization is not None
    assert manifest.quantization.rotation is not None
    assert (manifest.quantization.products_with_16_bits is None) == (bits != 8)
    assert manifest.quantization.quality["mean_kl"] < most
    if scheme == "int8-blocks":  # wide blocks, also where several graphs read a weight
        assert {"step.ort-cpu.onnx", "step.ort-cpu-single.onnx", "heads.ort-cpu.onnx"} <= manifest.files.keys()
        for file in [file for file in manifest.files if file.endswith(".onnx") and file.startswith(("step.ort", "heads.ort"))]:
            products = [node for node in read_graph(tmp_path / "new" / file).graph if node.op_type == "MatMulNBits"]
            assert products, file
            sizes = {node.attributes.get_int("K"): node.attributes.get_int("block_size") for node in products}
            assert sizes == {width: block_size("int8-wide-blocks", width) for width in sizes}, file
            assert max(sizes.values()) > 32, file
    reference = str(make_model(model_type, **ROTATED[model_type]))
    report = validate(tmp_path / "new", reference, prompts=PROMPTS, max_new_tokens=24)
    assert report.status == "passed", report.verdicts()


def test_medusa_decoding_on_a_rotated_bundle_is_plain_decoding(exported: Make, tmp_path: Path) -> None:
    quantize_bundle(QuantizeOptions(exported("llama"), tmp_path / "new", activation_bits=16, rotate=True))
    with MedusaLM.from_bundle(tmp_path / "new") as lm:
        for prompt in PROMPTS:
            medusa, plain = (lm.generate(prompt, max_new_tokens=32, ignore_eos=True, medusa=medusa) for medusa in (True, False))
            assert medusa.token_ids == plain.token_ids
            assert medusa.stats.tokens_per_step > 0


def test_heads_see_the_states_and_the_rows_that_they_were_trained_with(exported: Make, tmp_path: Path) -> None:
    """The heads of a rotated bundle propose what those of the original do."""
    quantize_bundle(QuantizeOptions(exported("llama"), tmp_path / "new", activation_bits=16, rotate=True))
    tokens = np.array([TEXTS[0]])
    count = tokens.shape[1]
    found = []
    for bundle in (exported("llama"), tmp_path / "new"):
        with MedusaLM.from_bundle(bundle) as lm:
            backend = lm.engine.backend
            backend.resize(1, count)
            rows = np.arange(count)[None]
            backend.step(tokens, rows, np.tri(count, dtype=bool)[None], np.array([0]), rows)
            proposals = [backend.propose(np.array([row]), np.array([7])) for row in range(count)]
            found.append(np.stack([proposal.token_ids[0, :, 0] for proposal in proposals]))  # [T, K]
    assert (found[0] == found[1]).mean() > 0.9
    assert len(np.unique(found[0])) > 5  # so that they could differ


def test_the_choice_of_terms_is_kept_in_the_portable_graph(exported: Make, tmp_path: Path) -> None:
    manifest = quantize_bundle(QuantizeOptions(exported("llama"), tmp_path / "new", activation_bits=8))
    facts = manifest.quantization
    assert facts is not None
    noted = [terms for node in read_graph(tmp_path / "new" / "step.onnx").graph if (terms := noted_terms(node)) is not None]
    assert len(noted) == facts.num_products
    assert noted.count(2) == facts.products_with_16_bits
    own = [node.op_type for node in read_graph(tmp_path / "new" / "step.ort-cpu.onnx").graph]
    assert (
        own.count("MatMulIntegerToFloat")
        > own.count("DequantizeLinear")
        == len({node.inputs[0] for node in read_graph(tmp_path / "new" / "step.onnx").graph if noted_terms(node) == 2})
    )
