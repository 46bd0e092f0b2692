"""A checkpoint becomes a quantised bundle in one go: the same weights as in two steps, and the checkpoint's own codes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.bundle.export import export_bundle
from medusa_export.bundle.read_graph import read_graph
from medusa_export.check import compare, sides, validate
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.command_options.quantize_options import QuantizeOptions
from medusa_export.passes.common.linears import MIN_SIZE
from medusa_export.passes.quantize.integer_weights import tables
from medusa_export.quantize import export, quantize_bundle
from medusa_export.quantize.quantized_bundle import quantize_graph, storage_of
from medusa_runtime import Manifest, MedusaLM
from tests.support import packed
from tests.support.models import save_random_heads, save_tiny_model

Make = Callable[..., Path]
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4}
SIZES = {"num_hidden_layers": 2, "intermediate_size": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("direct") / "model", "llama", **SIZES)


@pytest.fixture(scope="module")
def heads(model: Path) -> Path:
    return save_random_heads(model, model.parent / "heads")


def _direct(model: Path, heads: Path, output: Path, scheme: Any) -> Manifest:
    return export(ExportOptions(str(model), heads, output, quantize=scheme))


def test_weights_are_those_of_two_steps(model: Path, heads: Path, tmp_path: Path) -> None:
    export_bundle(ExportOptions(str(model), heads, tmp_path / "float"))
    two = quantize_bundle(QuantizeOptions(tmp_path / "float", tmp_path / "two", "int8-int4"))
    one = _direct(model, heads, tmp_path / "one", "int8-int4")
    for name in ("step", "heads"):  # names of nodes are counted, so the files may differ
        ours, theirs = (read_graph(tmp_path / place / f"{name}.onnx").graph.initializers for place in ("one", "two"))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].const_value.tobytes() == theirs[key].const_value.tobytes() for key in theirs)
    assert one.quantization is not None
    assert two.quantization is not None
    assert one.quantization.source_bundle == two.quantization.source_bundle
    assert one.quantization.quality == two.quantization.quality
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "one", "two"]


@pytest.mark.parametrize("scheme", ["int8", "int8-blocks", "int8-int4"])
def test_without_a_float_bundle_a_large_models_weights_get_the_nearest_codes(
    scheme: Any, model: Path, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export_bundle(ExportOptions(str(model), heads, tmp_path / "float"))
    graphs = {name: read_graph(tmp_path / "float" / f"{name}.onnx") for name in ("step", "heads")}
    gathered = tables(graphs.values())
    monkeypatch.setattr("medusa_export.quantize.direct_export.is_large", lambda _: True)
    manifest = _direct(model, heads, tmp_path / "bundle", scheme)
    assert "weights are rounded to the nearest codes" in capsys.readouterr().err
    assert manifest.quantization is not None
    assert manifest.quantization.source_bundle is None
    for name, graph in graphs.items():
        quantize_graph(graph, storage_of(scheme), gathered)
        found = read_graph(tmp_path / "bundle" / f"{name}.onnx").graph.initializers
        assert found.keys() == graph.graph.initializers.keys()
        assert all(
            found[key].const_value.tobytes() == value.const_value.tobytes() for key, value in graph.graph.initializers.items()
        )


def test_weights_that_are_stored_in_half_precision_are_cast_one_by_one(model: Path, heads: Path, tmp_path: Path) -> None:
    """The bundle is that of a checkpoint whose weights are stored in float32 with the same values."""
    for name, dtype in (("half", torch.float16), ("whole", torch.float32)):
        shutil.copytree(model, tmp_path / name / "model")
        path = tmp_path / name / "model" / "model.safetensors"
        save_file({key: tensor.half().to(dtype) for key, tensor in load_file(path).items()}, path, {"format": "pt"})
        export_bundle(ExportOptions(str(tmp_path / name / "model"), heads, tmp_path / name / "bundle"))
    half, whole = (Manifest.load(tmp_path / name / "bundle") for name in ("half", "whole"))
    assert half.files == whole.files


@pytest.mark.parametrize(
    ("settings", "pack", "block"),
    [
        (GPTQ, partial(packed.gptq, group=32), 32),
        (GPTQ, partial(packed.gptq, group=64), 64),
        ({"quant_method": "awq", "bits": 4}, partial(packed.awq, group=32), 32),
        (GPTQ, partial(packed.gptq, group=16), 16),
        ({"quant_method": "compressed-tensors"}, partial(packed.pack_quantized, group=32), 32),
    ],
)
def test_codes_of_the_checkpoint_are_kept_bit_for_bit(
    settings: dict[str, Any], pack: Callable[[np.ndarray], packed.Packed], block: int, model: Path, heads: Path, tmp_path: Path
) -> None:
    packed.save_packed(model, tmp_path / "packed", settings, pack)
    original = load_file(model / "model.safetensors")
    _direct(tmp_path / "packed", heads, tmp_path / "bundle", "int4")
    graph = read_graph(tmp_path / "bundle" / "step.onnx").graph
    names = [name for name in original if name.endswith("proj.weight") and original[name].numel() >= MIN_SIZE]
    assert len(names) == 10
    for name in names:
        tensors, whole = pack(original[name].numpy())
        del tensors
        node = next(usage.node for usage in graph.initializers[f"model.{name}.uint4"].uses())
        assert node.attributes.get_int("block_size") == block
        codes, scale, zero = (value.const_value.numpy().astype(np.float32) for value in node.inputs)
        found = (codes - np.repeat(zero, block, 1)) * np.repeat(scale, block, 1)
        np.testing.assert_array_equal(found, whole)
        if settings is GPTQ:
            expected, _, zeros = packed.rounded(original[name].numpy(), 4, block, symmetric=False)
            np.testing.assert_array_equal(codes, expected)
            np.testing.assert_array_equal(zero, zeros)
    with MedusaLM.from_bundle(tmp_path / "bundle") as lm:
        assert lm.generate("a fox", max_new_tokens=6).stats.num_generated_tokens > 0


@pytest.mark.parametrize(
    ("settings", "pack", "blocks"),
    [
        (GPTQ | {"bits": 8}, partial(packed.gptq, bits=8, group=64, symmetric=True), {64}),
        ({"quant_method": "compressed-tensors"}, partial(packed.pack_quantized, bits=8, group=32), {32}),
        ({"quant_method": "compressed-tensors"}, packed.int_quantized, {64, 128}),  # inputs that a block can have at most
        ({"load_in_8bit": True}, packed.bnb_int8, {64, 128}),
    ],
)
def test_symmetric_codes_of_8_bits_are_kept_bit_for_bit(
    settings: dict[str, Any], pack: Callable[[np.ndarray], packed.Packed], blocks: set[int], model: Path, heads: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    packed.save_packed(model, tmp_path / "packed", settings, pack)
    original = load_file(model / "model.safetensors")
    _direct(tmp_path / "packed", heads, tmp_path / "bundle", "int8-blocks")
    graph = read_graph(tmp_path / "bundle" / "step.onnx").graph
    names = [name for name in original if name.endswith("proj.weight") and original[name].numel() >= MIN_SIZE]
    assert len(names) == 10
    assert "10 of the checkpoint's 14 integer weights keep their own codes" in capsys.readouterr().err
    found = set()
    for name in names:
        tensors, whole = pack(original[name].numpy())
        node = next(usage.node for usage in graph.initializers[f"model.{name}.uint8"].uses())
        block = node.attributes.get_int("block_size")
        found.add(block)
        codes, scale = (value.const_value.numpy() for value in node.inputs[:2])
        if "weight" in tensors:
            np.testing.assert_array_equal(codes.astype(np.int16) - 128, tensors["weight"].numpy())
        else:
            np.testing.assert_array_equal(codes, packed.rounded(original[name].numpy(), 8, block, symmetric=True)[0])
        np.testing.assert_array_equal((codes.astype(np.float32) - 128) * np.repeat(scale, block, 1), whole)
    assert found == blocks
    with MedusaLM.from_bundle(tmp_path / "bundle") as lm:
        assert lm.generate("a fox", max_new_tokens=6).stats.num_generated_tokens > 0


def test_codes_in_mixed_groups_are_rounded_again_and_that_is_told(
    model: Path, heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed.save_packed(model, tmp_path / "packed", GPTQ | {"desc_act": True}, partial(packed.gptq, reorder=True))
    _direct(tmp_path / "packed", heads, tmp_path / "bundle", "int4")
    assert "the weights of the checkpoint are integers, but none that int4 can keep" in capsys.readouterr().err
    dtypes = {value.dtype for value in read_graph(tmp_path / "bundle" / "step.onnx").graph.initializers.values()}
    assert ir.DataType.UINT4 in dtypes


def test_codes_of_experts_are_rounded_again_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "model", "mixtral", num_local_experts=2, num_experts_per_tok=1, **SIZES)
    heads = save_random_heads(model, tmp_path / "heads")
    tensors: dict[str, torch.Tensor] = load_file(model / "model.safetensors")
    names = [name for name in tensors if ".layers." in name and tensors[name].dim() == 2 and "gate.weight" not in name]
    for name in names:
        parts, _ = packed.gptq(tensors.pop(name).numpy())
        tensors |= {f"{name.removesuffix('weight')}{end}": part for end, part in parts.items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    packed.add_settings(model, GPTQ)
    _direct(model, heads, tmp_path / "bundle", "int4")
    assert len(names) == 2 * (2 * 3 + 4)  # of each layer: three matrices of two experts, and attention's four
    expected = "4 of the checkpoint's 20 integer weights keep their own codes; int4 stores the others in another form"
    assert expected in " ".join(capsys.readouterr().err.split())


def test_a_large_model_is_compared_with_its_layers_cast_one_at_a_time(
    model: Path, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of a model that is cast as a whole, and fewer rows are compared."""
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    export_bundle(ExportOptions(str(tmp_path / "model"), heads, tmp_path / "bundle"))
    whole = validate(tmp_path / "bundle", str(tmp_path / "model"), max_new_tokens=4)
    monkeypatch.setattr(sides, "LARGE_PART", 0.0)
    large = validate(tmp_path / "bundle", str(tmp_path / "model"), max_new_tokens=4)
    assert (whole.status, large.status) == ("passed", "passed"), large.verdicts()
    assert (len(whole.greedy), len(large.greedy)) == (6, 2)
    assert large.greedy == whole.greedy[:2]
    assert "the model is large: 2 of 6 built-in prompts are compared" in large.notes[0]


def test_logits_are_compared_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(0)
    found, reference = numbers.normal(size=(7, 50)), numbers.normal(size=(7, 50))
    whole = compare.logits_difference("a", found, reference)
    monkeypatch.setattr(compare, "BLOCK_ELEMENTS", 100)
    parts = compare.logits_difference("a", found, reference)
    assert parts.model_dump() == pytest.approx(whole.model_dump())
    found[6, 3] = np.nan
    assert not np.isfinite(compare.logits_difference("a", found, reference).max_abs)
