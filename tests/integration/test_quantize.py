"""Graphs for ONNX Runtime's CPU provider, and quantised bundles, of tiny models: their results and their manifests."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from medusa_export.bundle.export import export_bundle
from medusa_export.bundle.tree_shapes import paths, pruned
from medusa_export.check import validate
from medusa_export.cli import main
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.command_options.quantize_options import QuantizeOptions
from medusa_export.quantize import quantize_bundle
from medusa_export.quantize import quantized_bundle as quantizing
from medusa_runtime import CandidateTree, Manifest, MedusaLM
from medusa_runtime.backends.base import StepOutput
from medusa_runtime.backends.ort_cpu import OrtCpuBackend
from medusa_runtime.bundle.manifest import HEADS, ORT_CPU, ORT_CPU_SINGLE, PORTABLE, STEP, WEIGHTS_NAME, file_facts
from medusa_runtime.drafting.ngrams import NGRAMS_NAME, NUM_WEIGHTS, NGrams
from medusa_runtime.errors import BackendError
from medusa_runtime.text.codec import TextCodec
from tests.support.cli import fails
from tests.support.engines import stand_in_engine
from tests.support.logs import recorded
from tests.support.models import VOCAB_SIZE, save_random_heads

Make = Callable[..., Path]
KNOWN = list(range(5, 305, 2))  # of the tokens, what llama's heads know
PROMPTS = ("the lazy dog learns to speak while the quick model jumps", "a fox")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},  # two query heads a key head
    "qwen2": {},  # biases after the projections
    "gemma2": {},  # capped scores, sliding windows, norms on both sides
    "gpt2": {},  # LayerNorm, biases, a key head for each query head
}


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "QUALITY_PROMPTS", PROMPTS)
    monkeypatch.setattr(quantizing, "CALIBRATION_PROMPTS", PROMPTS)


@pytest.fixture(scope="module")
def exported(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Exports one of the models, once. Its heads are next to the bundle."""
    made: dict[str, Path] = {}

    def export(model_type: str = "llama") -> Path:
        if model_type not in made:
            root = tmp_path_factory.mktemp(model_type)
            model = make_model(model_type, **MODELS[model_type])
            heads = save_random_heads(model, root / "heads")
            if model_type == "llama":
                (heads / "draft_vocabulary.json").write_text(json.dumps(KNOWN))
            export_bundle(ExportOptions(str(model), heads, root / "bundle"))
            made[model_type] = root / "bundle"
        return made[model_type]

    return export


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def opened(bundle: Path, target: str, **changes: Any) -> OrtCpuBackend:
    """The backend with its own graphs, or with the portable ones."""
    manifest = Manifest.load(bundle)
    if target == PORTABLE:
        manifest.graphs = {name: graph for name, graph in manifest.graphs.items() if graph.target == PORTABLE}
    return OrtCpuBackend(bundle, manifest.model_copy(update=changes))


# --- the graphs for the CPU provider


@pytest.mark.parametrize("bits", [8, 16])
def test_activations_of_heads_have_one_term_whatever_the_steps_have(exported: Make, tmp_path: Path, bits: int) -> None:
    done = run("quantize", exported(), "-o", tmp_path / "int8", "--activation-bits", bits, "--no-rotate")
    assert done.exit_code == 0, done.output
    kinds = [node.op_type for node in onnx.load(tmp_path / "int8/heads.ort-cpu.onnx", load_external_data=False).graph.node]
    assert "MatMulIntegerToFloat" in kinds
    assert "DequantizeLinear" not in kinds  # of a first term, whose rest is the second
    if bits == 16:
        step = onnx.load(tmp_path / "int8/step.ort-cpu.onnx", load_external_data=False).graph
        assert "weights_of_terms" in {tensor.name for tensor in step.initializer}


def test_all_graphs_run_where_products_of_integers_would_saturate(
    exported: Make, make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on x86 without VNNI: ONNX Runtime then stores weights as uint8."""
    monkeypatch.setattr("medusa_runtime.backends.ort_sessions.has_exact_products", lambda: False)
    quantize_bundle(QuantizeOptions(exported(), tmp_path / "int8", "int8"))
    report = validate(tmp_path / "int8", str(make_model("llama", **MODELS["llama"])), prompts=PROMPTS[:1], max_new_tokens=8)
    assert report.status == "passed", report.errors
    assert PORTABLE in report.targets


def answers(backend: OrtCpuBackend, capacity: int, spoil: bool = False) -> list[np.ndarray]:
    """Outputs for three sequences of different lengths: prompts (one in chunks), a batch of trees, heads, a smaller batch."""
    rng = np.random.default_rng(0)
    tree = pruned(CandidateTree.from_json(backend.manifest.tree), 6)
    count, lengths = tree.num_nodes, np.array([13, 5, 9])
    backend.resize(1, capacity)  # so that prompts are read with the graph for one sequence, whatever went before
    backend.resize(3, capacity)
    found: list[np.ndarray] = []

    def step(slot: int, start: np.ndarray, mask: np.ndarray, depths: np.ndarray) -> None:
        if spoil:  # entries that no sequence of this step reaches
            used = int(start.max()) + mask.shape[1]
            for array in backend._cache.arrays:
                array[:, slot : slot + len(start), :, used:] = np.nan
        tokens = rng.integers(0, VOCAB_SIZE, mask.shape[:2])
        rows = np.arange(mask.shape[1])[None].repeat(len(start), 0)
        inputs = (tokens, start[:, None] + depths, mask, start, rows)
        while not (output := backend.step(*inputs, first_slot=slot, with_logits=True)).is_warm:
            time.sleep(0.01)  # until the graph for several sequences is open
        assert output.logits is not None
        found.extend([output.logits.copy(), output.greedy_ids])
        if spoil:
            for array in backend._cache.arrays:
                array[np.isnan(array)] = 0

    for slot, length in enumerate(lengths):
        for start, stop in ((0, 7), (7, length)) if slot == 0 else ((0, length),):
            tokens = int(stop - start)
            step(slot, np.array([start]), np.tri(tokens, dtype=bool)[None], np.arange(tokens)[None])
    chain = np.tri(count, dtype=bool)
    masks, depths = np.stack([tree.mask, chain, tree.mask]), np.stack([tree.depths, np.arange(count), tree.depths])
    step(0, lengths, masks, depths)
    proposed = backend.propose(np.array([0, 1, 2]), np.array([9, 300, 9]))
    found += [proposed.token_ids, proposed.log_probs]
    path = np.array(max(paths(tree), key=len))
    backend.commit(2, int(lengths[2]), path)
    lengths[2] += len(path)
    step(1, lengths[1:], masks[1:], depths[1:])
    return found


@pytest.mark.parametrize("model_type", MODELS)
def test_both_kinds_of_graph_give_the_same(model_type: str, exported: Make, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = exported(model_type)
    capfd.readouterr()
    portable = answers(opened(bundle, PORTABLE), 64)
    own = answers(opened(bundle, ORT_CPU), 64)
    for one, other in zip(own, portable, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert capfd.readouterr().err == ""  # ONNX Runtime warns where shapes are not what a graph says, or the cache is copied


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_capacity_that_is_not_used_makes_no_difference(model_type: str, exported: Make) -> None:
    backend = opened(exported(model_type), ORT_CPU)
    before = answers(backend, 64)
    for one, other in zip(answers(backend, 512), before, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(answers(backend, 512, spoil=True), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("model_type", MODELS)
def test_every_layer_is_rewritten_for_the_cpu(model_type: str, exported: Make) -> None:
    kinds = [node.op_type for node in ir.load(exported(model_type) / "step.ort-cpu.onnx").graph]
    assert "Attention" not in kinds  # over the whole capacity, with a copy of the keys for each query head
    of_one = [node.op_type for node in ir.load(exported(model_type) / "step.ort-cpu-single.onnx").graph]
    assert of_one.count("GroupQueryAttention") == 4
    assert {"Attention", "TensorScatter"}.isdisjoint(of_one)
    if model_type in ("llama", "qwen2"):
        assert "RotaryEmbedding" not in of_one  # the operator rotates
        assert of_one.count("Split") == 4  # of gate and up
    if model_type in ("llama", "qwen2"):
        merged = {"SkipSimplifiedLayerNormalization": 8, "QuickGelu": 4, "RMSNormalization": 1, "Split": 8}  # of 4 layers
        assert {kind: kinds.count(kind) for kind in merged} == merged


def test_the_backend_runs_the_graphs_made_for_it(exported: Make, tmp_path: Path) -> None:
    bundle = shutil.copytree(exported(), tmp_path / "bundle")
    manifest = Manifest.load(bundle)
    manifest.require_intact(bundle)
    assert {name: facts.file for name, facts in manifest.graphs.items()} == {
        "step": "step.onnx",
        "step.ort-cpu": "step.ort-cpu.onnx",
        "step.ort-cpu-single": "step.ort-cpu-single.onnx",
        "heads": "heads.onnx",
        "heads.ort-cpu": "heads.ort-cpu.onnx",
        "step.ort-webgpu": "step.ort-webgpu.onnx",
        "heads.ort-webgpu": "heads.ort-webgpu.onnx",
        "cache.ort-webgpu": "cache.ort-webgpu.onnx",
    }
    for name in (STEP, HEADS):
        assert manifest.graphs[name].inputs == manifest.graphs[f"{name}.{ORT_CPU}"].inputs
        assert manifest.graphs[name].outputs == manifest.graphs[f"{name}.{ORT_CPU}"].outputs
        (bundle / f"{name}.onnx").write_bytes(b"")
    backend = opened(bundle, ORT_CPU)
    (bundle / "step.ort-cpu.onnx").write_bytes(b"")  # which is not open until several sequences are decoded
    backend.resize(1, 8)
    one_step(backend, 1)
    with recorded() as records:
        answers(backend, 64)  # one sequence after the other
    assert "step.ort-cpu.onnx" in records[0].getMessage()
    (bundle / "step.ort-cpu-single.onnx").write_bytes(b"")
    with pytest.raises(BackendError, match=r"step\.ort-cpu-single\.onnx"):
        opened(bundle, ORT_CPU)


def one_step(backend: OrtCpuBackend, batch: int) -> StepOutput:
    tokens = np.arange(2)[None].repeat(batch, 0)
    return backend.step(tokens, tokens, np.tri(2, dtype=bool)[None].repeat(batch, 0), np.zeros(batch, int), tokens)


def test_the_graph_for_one_sequence_runs_until_there_are_several(exported: Make) -> None:
    backend = opened(exported(), ORT_CPU)
    backend.resize(4, 64)
    first, second = one_step(backend, 1), one_step(backend, 1)
    assert (first.is_warm, second.is_warm, backend._steps.runs_several) == (True, True, False)
    while not (output := one_step(backend, 2)).is_warm:  # opening is no part of what a step costs
        assert output.greedy_ids[0].tolist() == first.greedy_ids[0].tolist()
        time.sleep(0.01)
    for batch in (3, 1, 2):  # there is no going back and forth
        output = one_step(backend, batch)
        assert (output.is_warm, backend._steps.runs_several) == (True, True)
        assert output.greedy_ids.tolist() == first.greedy_ids.tolist() * batch
    backend.resize(1, 64)
    assert not backend._steps.runs_several


def test_a_bundle_without_a_graph_for_one_sequence_runs_as_before(exported: Make) -> None:
    manifest = Manifest.load(exported())
    del manifest.graphs["step.ort-cpu-single"]
    backend = OrtCpuBackend(exported(), manifest)
    backend.resize(2, 64)
    assert [one_step(backend, batch).is_warm for batch in (1, 2)] == [True, True]
    assert backend._steps.runs_several


def test_both_kinds_of_graph_share_the_weights(exported: Make) -> None:
    bundle = exported()
    ranges = {}
    for name in (STEP, HEADS):
        for file in (f"{name}.onnx", f"{name}.ort-cpu.onnx", *(["step.ort-cpu-single.onnx"] if name == STEP else [])):
            tensors = onnx.load(bundle / file, load_external_data=False).graph.initializer
            stored = [{entry.key: entry.value for entry in tensor.external_data} for tensor in tensors if tensor.external_data]
            assert {facts["location"] for facts in stored} == {WEIGHTS_NAME}
            ranges[file] = {facts["offset"] for facts in stored}
            assert sum(tensor.ByteSize() for tensor in tensors) < 40_000  # with nothing large inside the graph
        assert ranges[f"{name}.ort-cpu.onnx"] <= ranges[f"{name}.onnx"]
    assert ranges["step.ort-cpu-single.onnx"] == ranges["step.ort-cpu.onnx"]


# --- quantised bundles


@pytest.fixture(scope="module")
def quantized(exported: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Quantises an exported model, once per scheme."""
    made: dict[tuple[str, str, int | None], Path] = {}

    def quantize(model_type: str = "llama", scheme: Any = "int8", bits: Any = None) -> Path:
        key = (model_type, scheme, bits)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "bundle"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(quantizing, "QUALITY_PROMPTS", PROMPTS)
                patch.setattr(quantizing, "CALIBRATION_PROMPTS", PROMPTS)
                quantize_bundle(QuantizeOptions(exported(model_type), made[key], scheme, bits))
        return made[key]

    return quantize


WAYS = [
    ("llama", "int8", None), ("llama", "int8", 8), ("qwen2", "int8", 8), ("llama", "int8-blocks", None),
    ("llama", "int4", None), ("llama", "int8-int4", None), ("qwen2", "int8", None), ("qwen2", "int8-int4", None),
    ("gemma2", "int8", 8), ("gemma2", "int4", None), ("gpt2", "int8", 16), ("gpt2", "int8-blocks", None),
]  # fmt: skip


ROTATED = {("llama", 8), ("qwen2", 8)}  # gemma2 has a norm after each block


@pytest.mark.parametrize(("model_type", "scheme", "bits"), WAYS)
def test_a_quantised_bundle_passes_its_validation(
    model_type: str, scheme: str, bits: int | None, quantized: Make, make_model: Make
) -> None:
    """So greedy decoding with and without Medusa gives the same tokens, except for nearly equal logits."""
    reference = str(make_model(model_type, **MODELS[model_type]))
    report = validate(quantized(model_type, scheme, bits), reference, prompts=PROMPTS, max_new_tokens=24)
    assert report.status == "passed", report.verdicts()
    assert report.targets == [ORT_CPU_SINGLE, ORT_CPU, PORTABLE]
    assert {row.target for row in report.from_reference} == set(report.targets)
    if scheme == "int8" and bits != 8:  # where no activation can move by a step of 8 bits
        own = [*report.prompt_logits, *report.tree_logits]
        assert all(row.max_kl < 1e-5 for row in own), max(row.max_kl for row in own)
    assert len(report.greedy) == len(PROMPTS)


@pytest.mark.parametrize(("model_type", "scheme", "bits"), WAYS)
def test_the_manifest_tells_how_it_was_quantised_and_what_that_cost(
    model_type: str, scheme: str, bits: int | None, quantized: Make, exported: Make
) -> None:
    manifest, source = Manifest.load(quantized(model_type, scheme, bits)), Manifest.load(exported(model_type))
    manifest.require_intact(quantized(model_type, scheme, bits))
    facts = manifest.quantization
    assert facts is not None
    assert (facts.scheme, facts.activation_bits, facts.max_kl) == (scheme, bits or (16 if scheme == "int8" else 8), None)
    assert facts.smoothing == (0.5 if (model_type, bits) == ("gemma2", 8) else 0)
    assert (facts.rotation is not None) == ((model_type, bits) in ROTATED)
    assert (facts.not_rotated is not None) == (facts.smoothing > 0)
    assert facts.source_bundle == source.content_digest()
    assert 0 < facts.quality["mean_kl"] < (0.3 if "int4" in scheme else 0.01)
    assert facts.quality["mean_kl"] <= facts.quality["max_kl"]
    change = facts.quality["perplexity"] / facts.quality["perplexity_before"] - 1
    assert abs(change) < (0.5 if "int4" in scheme else 0.05)
    assert 0.4 < facts.quality["same_greedy"] <= 1
    assert facts.quality["tokens_per_step"] >= 1
    assert manifest.validation.status == "not run"
    assert (manifest.model, manifest.heads, manifest.limits, manifest.tree) == (
        source.model, source.heads, source.limits, source.tree,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "of_attention", "of_mlps", "in_blocks"),
    [("int8", 8, 8, False), ("int8-blocks", 8, 8, True), ("int4", 4, 4, True), ("int8-int4", 8, 4, True)],
)
def test_a_scheme_says_which_weights_have_how_many_bits(
    scheme: str, of_attention: int, of_mlps: int, in_blocks: bool, quantized: Make, exported: Make
) -> None:
    bundle = quantized("llama", scheme)
    bits = {}
    for file in ("step.onnx", "heads.onnx"):
        onnx.checker.check_model(str(bundle / file), full_check=True)
        model = ir.load(bundle / file)
        assert {node.domain for node in model.graph} == {""}  # standard operators alone
        assert set(model.opset_imports) == {""}
        for name, value in model.graph.initializers.items():
            if (end := name.rpartition(".")[2]) in ("int8", "uint8", "uint4"):
                assert value.dtype is not None
                assert value.dtype.name.lower() == end
                bits[name.removesuffix(f".{end}")] = value.dtype.bitwidth
            assert value.shape is not None
            if name.endswith(".scale"):
                assert len(value.shape) == (2 if in_blocks else 1)
    layers = {name: count for name, count in bits.items() if ".layers." in name}
    assert {count for name, count in layers.items() if "self_attn" in name} == {of_attention}
    assert {count for name, count in layers.items() if "mlp" in name} == {of_mlps}
    assert len(layers) == 4 * 5  # a key or value projection of 64 x 32 is too small
    assert {count for name, count in bits.items() if name not in layers} == {8}
    assert sum(name.startswith("heads.") for name in bits) == 3 * 2
    before, after = ((place / WEIGHTS_NAME).stat().st_size for place in (exported(), bundle))
    assert after < before * 0.45  # tensors of a tiny model take up a page each


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int8", None), ("int8-blocks", None), ("int4", None)])
def test_sequences_of_a_batch_do_not_change_each_other(scheme: str, bits: int | None, quantized: Make) -> None:
    backend = opened(quantized("llama", scheme, bits), ORT_CPU)
    codec = TextCodec(quantized("llama", scheme, bits))
    prompts = [codec.encode(text) for text in (*PROMPTS, "many words at once learn to speak")]

    def logits_of(batch: list[list[int]]) -> list[np.ndarray]:
        longest = max(map(len, batch))
        backend.resize(len(batch), longest)
        tokens = np.array([[*prompt, *[0] * (longest - len(prompt))] for prompt in batch])
        rows = np.arange(longest)[None].repeat(len(batch), 0)
        mask = np.tri(longest, dtype=bool)[None].repeat(len(batch), 0)
        output = backend.step(tokens, rows, mask, np.zeros(len(batch), np.int64), rows, with_logits=True)
        assert output.logits is not None
        return [logits[: len(prompt)].copy() for prompt, logits in zip(batch, output.logits, strict=True)]

    for alone, together in zip([logits_of([prompt])[0] for prompt in prompts], logits_of(prompts), strict=True):
        np.testing.assert_allclose(together, alone, atol=0.02)


def test_the_original_and_its_text_are_what_quality_is_measured_on(exported: Make, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog")
    (tmp_path / "prompts.txt").write_text("a fox\n")
    words = ("quantize", exported(), "--quality-text", tmp_path / "text.txt", "--quality-prompts", tmp_path / "prompts.txt")
    result = run(*words, "-o", tmp_path / "new")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'new'}\n"
    facts = Manifest.load(tmp_path / "new").quantization
    assert facts is not None
    text = (tmp_path / "text.txt").read_text()
    assert facts.quality["num_tokens"] == len(TextCodec(exported()).encode(text, raw=True))


def test_draft_n_grams_go_along(exported: Make, tmp_path: Path) -> None:
    bundle = shutil.copytree(exported(), tmp_path / "bundle")
    NGrams(np.zeros(16, np.uint16), np.ones((3, NUM_WEIGHTS), np.float32)).save(bundle / NGRAMS_NAME)
    manifest = Manifest.load(bundle)
    manifest.files[NGRAMS_NAME] = file_facts(bundle / NGRAMS_NAME)
    manifest.save(bundle)
    assert quantize_bundle(QuantizeOptions(bundle, tmp_path / "new")).files[NGRAMS_NAME] == manifest.files[NGRAMS_NAME]
    Manifest.load(tmp_path / "new").require_intact(tmp_path / "new")


def test_smoothing_saves_a_model_with_outliers(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_model("llama"), model)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[5] *= 60
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, 5] /= 60
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    export_bundle(ExportOptions(str(model), save_random_heads(model, tmp_path / "heads"), tmp_path / "bundle"))
    found = {}
    for strength in (0.0, 0.5):
        monkeypatch.setattr(quantizing, "SMOOTHING", strength)
        facts = quantize_bundle(
            QuantizeOptions(tmp_path / "bundle", tmp_path / f"{strength}", activation_bits=8, rotate=False)
        ).quantization
        assert facts is not None
        assert facts.smoothing == strength
        found[strength] = facts.quality["mean_kl"]
    assert found[0.5] < found[0.0] * 0.7


# --- the commands


def test_export_and_quantisation_are_one_command_or_two(
    exported: Make, quantized: Make, make_model: Make, tmp_path: Path
) -> None:
    model = make_model("llama", **MODELS["llama"])
    words = ("onnx", model, "--heads", exported().parent / "heads", "-o", tmp_path / "new", "--quantize", "int8")
    result = run(*words, "--max-kl", 0.1)
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    one, two = Manifest.load(tmp_path / "new"), Manifest.load(quantized())
    assert one.files.keys() == two.files.keys()
    assert one.files["weights.bin"].size == two.files["weights.bin"].size
    assert one.quantization is not None
    assert two.quantization is not None
    assert (one.quantization.scheme, one.quantization.max_kl) == (two.quantization.scheme, 0.1)
    assert one.quantization.quality["mean_kl"] == pytest.approx(two.quantization.quality["mean_kl"], rel=0.5)
    assert one.validation.status == "passed"
    assert json.loads((tmp_path / "new" / "validation.json").read_text())["allowed_kl"] == pytest.approx(3 * 0.1)


def test_quantising_compares_with_pytorch_on_request(exported: Make, make_model: Make, tmp_path: Path) -> None:
    model = make_model("llama", **MODELS["llama"])
    words = ("--scheme", "int8-int4", "--reference", model)
    result = run("quantize", exported(), "-o", tmp_path / "new", *words)
    assert result.exit_code == 0, result.stderr
    assert "int8-int4 bundle against" in result.stderr
    assert Manifest.load(tmp_path / "new").validation.status == "passed"
    lm = MedusaLM.from_bundle(tmp_path / "new")
    assert lm.generate("a fox", max_new_tokens=8).stats.num_generated_tokens > 0


def test_a_result_beyond_the_limit_is_refused_and_leaves_nothing(exported: Make, make_model: Make, tmp_path: Path) -> None:
    result = run("quantize", exported(), "-o", tmp_path / "new", "--max-kl", 0)
    fails(result, 3, "nats, more than --max-kl 0.0; nothing was written")
    assert list(tmp_path.iterdir()) == []
    words = ("onnx", make_model("llama", **MODELS["llama"]), "--heads", exported().parent / "heads", "-o", tmp_path / "new")
    fails(run(*words, "--quantize", "int4", "--max-kl", 0), 3, "nats, more than --max-kl 0.0; nothing was written")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_result_leaves_what_it_was_to_replace(exported: Make, quantized: Make, tmp_path: Path) -> None:
    shutil.copytree(quantized(), tmp_path / "old")
    before = Manifest.load(tmp_path / "old")
    fails(run("quantize", exported(), "-o", tmp_path / "old", "--force", "--max-kl", 0), 3, "nothing was written")
    assert Manifest.load(tmp_path / "old") == before
    before.require_intact(tmp_path / "old")
    result = run("quantize", exported(), "-o", tmp_path / "old", "--force", "--scheme", "int4", "--json")
    assert result.exit_code == 0, result.stderr
    after = Manifest.load(tmp_path / "old")
    assert after.quantization is not None
    assert after.quantization.scheme == "int4"
    assert json.loads(result.stdout)["quantization"]["quality"] == after.quantization.quality
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_an_interrupted_quantisation_leaves_nothing(exported: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantizing, "compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_bundle(QuantizeOptions(exported(), tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (("quantize", "/nowhere", "-o", "{new}"), 1, "/nowhere is not a bundle"),
        (("quantize", "{quantized}", "-o", "{new}"), 1, "is already quantised (int8); quantize the bundle that it was"),
        (("quantize", "{half}", "-o", "{new}"), 1, "is in fp16; quantize a bundle that was exported with --dtype fp32"),
        (("quantize", "{engines}", "-o", "{new}"), 1, "is a tensorrt bundle; quantize the ONNX bundle that it was built from"),
        (("quantize", "{damaged}", "-o", "{new}"), 1, "does not match its manifest: weights.bin"),
        (("quantize", "{bundle}", "-o", "{quantized}"), 2, "exists; choose another output, or replace it with --force"),
        (("quantize", "{bundle}", "-o", "{bundle}", "--force"), 2, "so it cannot be replaced"),
        (("quantize", "{bundle}", "-o", "{new}", "--scheme", "int2"), 2, "Invalid value for '--scheme'"),
        (("quantize", "{bundle}", "-o", "{new}", "--activation-bits", "4"), 2, "Invalid value for '--activation-bits'"),
        (("quantize", "{bundle}", "-o", "{new}", "--max-kl", "-1"), 2, "Invalid value for '--max-kl'"),
        (("quantize", "{bundle}", "-o", "{new}", "--scheme", "int4", "--activation-bits", "8"), 2,
         "--activation-bits only applies to --scheme int8"),
        (("quantize", "{bundle}", "-o", "{new}", "--calibration-prompts", "/nowhere", "--activation-bits", "8"), 2, "/nowhere"),
        (("quantize", "{bundle}", "-o", "{new}", "--quality-prompts", "/nowhere"), 2, "/nowhere"),
        (("quantize", "{bundle}", "-o", "{new}", "--quality-text", "/nowhere"), 2, "cannot read the text /nowhere"),
        (("quantize", "{gpt2}", "-o", "{new}", "--activation-bits", "8"), 2, "cannot be smoothed"),
        (("onnx", "{model}", "--heads", "{heads}", "-o", "{new}", "--quantize", "int8", "--dtype", "fp16"), 2,
         "--dtype is fp16, but --quantize needs fp32"),
        (("onnx", "{model}", "--heads", "{heads}", "-o", "{new}", "--quantize", "int3"), 2, "Invalid value for '--quantize'"),
        (("onnx", "{model}", "--heads", "{heads}", "-o", "{new}", "--max-kl", "1"), 2,
         "--max-kl, --activation-bits and --rotate need --quantize"),
        (("onnx", "{model}", "--heads", "{heads}", "-o", "{new}", "--activation-bits", "8"), 2,
         "--max-kl, --activation-bits and --rotate need --quantize"),
        (("onnx", "{model}", "--heads", "{heads}", "-o", "{new}", "--quantize", "int4", "--activation-bits", "8"),
         2, "--activation-bits only applies to --quantize int8, not int4"),
        (("onnx", "{model}", "--heads", "{heads}", "-o", "{bundle}", "--quantize", "int8"), 2, "exists; choose another output"),
        (("onnx", "{model}", "--heads", "/nowhere", "-o", "{new}", "--quantize", "int8"), 1, "there are no heads at /nowhere"),
        (("trt", "{quantized}", "-o", "{new}"), 1, "is quantised (int8); build from the float bundle that it was made from"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_leaves_nothing(
    words: tuple[str, ...],
    exit_code: int,
    message: str,
    exported: Make,
    quantized: Make,
    make_model: Make,
    tmp_path: Path,
) -> None:
    places: dict[str, Path] = {"bundle": exported(), "heads": exported().parent / "heads", "new": tmp_path / "new"}
    lazily: dict[str, Callable[[], Path]] = {
        "quantized": quantized,
        "half": lambda: changed(exported(), tmp_path / "half"),
        "gpt2": lambda: exported("gpt2"),
        "model": lambda: make_model("llama", **MODELS["llama"]),
        "engines": lambda: stand_in_engine(exported(), tmp_path / "engines"),
        "damaged": lambda: changed(exported(), tmp_path / "damaged"),
        "prompts": lambda: tmp_path / "prompts.txt",
    }
    places |= {name: make() for name, make in lazily.items() if any(f"{{{name}}}" in word for word in words)}
    (tmp_path / "prompts.txt").write_text("a fox\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    fails(run(*(word.format(**places) for word in words)), exit_code, message)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def changed(bundle: Path, place: Path) -> Path:
    """A copy of a bundle whose manifest says fp16, or whose weights are truncated."""
    shutil.copytree(bundle, place)
    if place.name == "damaged":
        (place / WEIGHTS_NAME).write_bytes(b"")
    else:
        Manifest.load(place).model_copy(update={"precision": "fp16"}).save(place)
    return place


@pytest.mark.parametrize("scheme", ["int8", "int8-blocks"])
def test_rows_that_heads_gather_are_those_of_the_product(scheme, make_model: Make, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=False)
    export_bundle(ExportOptions(str(model), save_random_heads(model, tmp_path / "heads"), tmp_path / "bundle"))
    quantize_bundle(QuantizeOptions(tmp_path / "bundle", tmp_path / "small", scheme=scheme))
    places = {}
    for name in (STEP, HEADS):
        for tensor in onnx.load(tmp_path / "small" / f"{name}.onnx", load_external_data=False).graph.initializer:
            if "lm_head.weight" in tensor.name and tensor.dims[0] * tensor.dims[-1] == VOCAB_SIZE * 64:
                places[name] = {entry.key: entry.value for entry in tensor.external_data}["offset"]
    assert places[STEP] == places[HEADS]


@pytest.mark.parametrize("scheme", ["int8", "int8-blocks", "int4"])
def test_an_embedding_that_nothing_else_reads_has_8_bits(scheme, make_model: Make, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=False)
    export_bundle(ExportOptions(str(model), save_random_heads(model, tmp_path / "heads"), tmp_path / "bundle"))
    manifest = quantize_bundle(QuantizeOptions(tmp_path / "bundle", tmp_path / "small", scheme=scheme))
    graph = onnx.load(tmp_path / "small" / "step.onnx", load_external_data=False).graph
    kinds = {tensor.data_type for tensor in graph.initializer if math.prod(tensor.dims) == VOCAB_SIZE * 64}
    assert kinds == {onnx.TensorProto.INT8 if scheme == "int8" else onnx.TensorProto.UINT8}
    assert manifest.quantization is not None
    assert manifest.quantization.quality["mean_kl"] < (0.1 if scheme == "int4" else 0.01)
