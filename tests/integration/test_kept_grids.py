"""Models whose weights lie on grids of 4 bits, as those of GGUF files: `int4` keeps them, with and without a float bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from medusa_export.bundle.export import export_bundle
from medusa_export.bundle.read_graph import read_graph
from medusa_export.check import validate
from medusa_export.cli import main
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.command_options.quantize_options import QuantizeOptions
from medusa_export.quantize import export, quantize_bundle
from medusa_runtime import Manifest
from medusa_runtime.bundle.manifest import Scheme
from tests.support.models import put_on_grids, save_random_heads, save_tiny_model

COARSE = "model.layers.1.mlp.down_proj.weight"  # has no grid
SIZES = {"num_hidden_layers": 2, "intermediate_size": 128, "num_key_value_heads": 4}
NUM_WEIGHTS = 2 * 7


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose weights have 16 values in each block of 32 inputs, all but those of one layer; and heads for it."""
    root = tmp_path_factory.mktemp("grids")
    model = put_on_grids(save_tiny_model(root / "model", "llama", **SIZES), but=COARSE)
    return model, save_random_heads(model, root / "heads")


@pytest.fixture(scope="module")
def bundle(models: tuple[Path, Path]) -> Path:
    model, heads = models
    export_bundle(ExportOptions(str(model), heads, model.parent / "float"))
    return model.parent / "float"


@pytest.fixture(scope="module")
def quantised(bundle: Path) -> Path:
    quantize_bundle(QuantizeOptions(bundle, bundle.parent / "int4", "int4"))
    return bundle.parent / "int4"


def test_weights_on_grids_are_kept_and_the_others_have_8_bits(models: tuple[Path, Path], quantised: Path) -> None:
    quantization = Manifest.load(quantised).quantization
    assert quantization is not None
    assert quantization.kept_grids == NUM_WEIGHTS - 1
    assert quantization.quality["mean_kl"] < 0.002
    graph = read_graph(quantised / "step.onnx").graph
    weights = load_file(models[0] / "model.safetensors")
    kept = 0
    for name, weight in weights.items():
        if "proj" not in name:
            continue
        bits = "uint8" if name == COARSE else "uint4"
        codes, scales = (graph.initializers[f"model.{name}.{part}"].const_value.numpy() for part in (bits, "scale"))
        zeros = graph.initializers[f"model.{name}.zero"].const_value.numpy() if bits == "uint4" else np.full(scales.shape, 128)
        places = codes.astype("f").reshape(*scales.shape, -1) - zeros.astype("f")[..., None]
        values = (places * scales[..., None]).reshape(len(weight), -1)
        own, sums = values[:, : weight.shape[1]], values[:, weight.shape[1] :]
        if bits == "uint4":
            assert values.shape[1] % 128 == 0
            assert not sums[:, weight.shape[1] // 32 :].any()
            own = own + np.repeat(sums[:, : weight.shape[1] // 32], 32, axis=1)
            kept += 1
            assert np.abs(own - weight.numpy()).max() < 0.05 * scales.max()
        else:
            assert not sums.size
            assert (
                np.abs(own - weight.numpy()).max() < 1.5 * scales.max()
            )  # second moments move some weights further than to the nearest code
    assert kept == quantization.kept_grids


def test_every_graph_gives_what_pytorch_gives(models: tuple[Path, Path], quantised: Path) -> None:
    report = validate(quantised, str(models[0]))
    assert report.status == "passed", report.failed_checks
    assert {"ort-cpu-single", "ort-cpu", "portable"} <= set(report.targets)
    text = CliRunner().invoke(main, ["inspect", str(quantised)]).output
    assert f"{NUM_WEIGHTS - 1} weights keep the 4-bit values that they had" in " ".join(text.split())


@pytest.mark.parametrize("scheme", ["int8", "int8-blocks"])
def test_eight_bits_say_that_four_would_lose_nothing(
    scheme: Scheme, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize_bundle(QuantizeOptions(bundle, tmp_path / "eight", scheme))
    assert "--scheme int4 would keep their values" in capsys.readouterr().err


def test_a_rotated_model_has_no_grids(bundle: Path, tmp_path: Path) -> None:
    quantize_bundle(QuantizeOptions(bundle, tmp_path / "rotated", "int4", rotate=True))
    quantization = Manifest.load(tmp_path / "rotated").quantization
    assert quantization is not None
    assert quantization.kept_grids is None


def test_without_a_float_bundle_grids_are_kept_too(
    models: tuple[Path, Path], quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa_export.quantize.direct_export.is_large", lambda _: True)
    model, heads = models
    manifest = export(ExportOptions(str(model), heads, tmp_path / "direct", quantize="int4"))
    assert manifest.quantization is not None
    assert manifest.quantization.kept_grids == NUM_WEIGHTS - 1
    ours, theirs = (read_graph(place / "step.onnx").graph.initializers for place in (tmp_path / "direct", quantised))
    assert ours.keys() == theirs.keys()
    for name in ours:
        if ".uint4" in name:
            assert ours[name].const_value.tobytes() == theirs[name].const_value.tobytes(), name


def test_the_graph_for_webgpu_reads_sums_too(quantised: Path) -> None:
    nodes = onnx.load(quantised / "step.ort-webgpu.onnx", load_external_data=False).graph.node
    widths = {next(a.i for a in node.attribute if a.name == "K") for node in nodes if node.op_type == "MatMulNBits"}
    assert {128, 256} <= widths  # 64 and 128 inputs and their sums, in whole runs of 128


def test_after_an_export_in_4_bits_the_next_command_is_no_rounding(models: tuple[Path, Path], tmp_path: Path) -> None:
    model, heads = models
    words = ["onnx", str(model), "--heads", str(heads), "-o", str(tmp_path / "out"), "--quantize", "int4", "--no-validate"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert f"or medusa-export tune {tmp_path / 'out'}" in done.output
    assert "-o SMALLER" not in done.output
