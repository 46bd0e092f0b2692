"""Readers of packed checkpoints give back what an independent few-line dequantisation of each layout gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from medusa_export.model.packed.layouts import method_of, read_packed
from medusa_export.model.packed.tensors import LazyIntegers
from medusa_heads.errors import CheckpointError
from tests.support import packed

SHAPE = (96, 128)
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
CASES: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], packed.Packed]]] = {
    "gptq": (GPTQ, packed.gptq),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, partial(packed.gptq, v2=True)),
    "gptq reordered": (GPTQ | {"desc_act": True}, partial(packed.gptq, reorder=True)),
    "gptq of one group": (GPTQ | {"group_size": -1}, partial(packed.gptq, group=128)),
    "gptq in 2 bits": (GPTQ | {"bits": 2}, partial(packed.gptq, bits=2)),
    "gptq in 3 bits": (GPTQ | {"bits": 3}, partial(packed.gptq, bits=3)),
    "gptq in 8 bits": (GPTQ | {"bits": 8}, partial(packed.gptq, bits=8)),
    "auto-round as gptq": ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, packed.gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, packed.awq),
    "pack-quantized": (COMPRESSED, packed.pack_quantized),
    "pack-quantized in 8 bits": (COMPRESSED, partial(packed.pack_quantized, bits=8)),
    "pack-quantized in 8 bits with zeros": (COMPRESSED, partial(packed.pack_quantized, bits=8, symmetric=False)),
    "pack-quantized with zeros": (COMPRESSED, partial(packed.pack_quantized, symmetric=False)),
    "int-quantized": (COMPRESSED | {"format": "int-quantized"}, packed.int_quantized),
    "float-quantized": (COMPRESSED | {"format": "float-quantized"}, partial(packed.fp8, per_output=True)),
    "nvfp4-pack-quantized": (COMPRESSED, partial(packed.nvfp4, compressed=True)),
    "mxfp4-pack-quantized": (COMPRESSED | {"format": "mxfp4-pack-quantized"}, packed.compressed_mxfp4),
    "fp8 in blocks": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, packed.fp8_blocks),
    "fp8 per tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, packed.fp8),
    "fp8 per output": ({"quant_method": "fbgemm_fp8"}, partial(packed.fp8, per_output=True)),
    "modelopt fp8": ({"producer": {"name": "modelopt"}, "quant_algo": "FP8"}, packed.fp8),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, partial(packed.nvfp4, compressed=False)),
    "bitsandbytes nf4": ({"load_in_4bit": True}, partial(packed.bnb_4_bits, nested=False)),
    "bitsandbytes nf4, nested": ({"quant_method": "bitsandbytes"}, partial(packed.bnb_4_bits, nested=True)),
    "bitsandbytes fp4": ({"load_in_4bit": True}, partial(packed.bnb_4_bits, kind="fp4", nested=False)),
    "bitsandbytes fp4, nested": ({"quant_method": "bitsandbytes"}, partial(packed.bnb_4_bits, kind="fp4", nested=True)),
    "bitsandbytes int8": ({"load_in_8bit": True}, packed.bnb_int8),
    "bitnet": ({"quant_method": "bitnet"}, partial(packed.bitnet, divides=True)),
    "autobitlinear": ({"quant_method": "bitnet", "linear_class": "autobitlinear"}, partial(packed.bitnet, divides=False)),
}


def _weight(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)


def _saved(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("case", CASES)
def test_a_weight_is_given_back(tmp_path: Path, case: str) -> None:
    settings, pack = CASES[case]
    tensors, whole = pack(_weight())
    bias = torch.ones(3)
    _saved(tmp_path, {f"layer.{end}": tensor for end, tensor in tensors.items()} | {"layer.bias": bias})
    found, files = read_packed(tmp_path, settings)
    state = found.state(files)
    assert state.keys() == {"layer.weight", "layer.bias"}, "nothing is lost, and nothing is left that only helps to unpack"
    np.testing.assert_allclose(state["layer.weight"][...].numpy(), whole, rtol=1e-6, atol=1e-9)
    assert np.abs(whole - _weight()).max() < 0.4, "the layout holds the weight"


def test_experts_in_mxfp4_are_turned(tmp_path: Path) -> None:
    blocks, scales, whole = packed.mxfp4(_weight((2, 96, 64)))
    _saved(tmp_path, {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales})
    found, files = read_packed(tmp_path, {"quant_method": "mxfp4"})
    state = found.state(files)
    np.testing.assert_array_equal(state["experts.down_proj"][...].numpy(), whole.transpose(0, 2, 1))


def test_mxfp8_has_exponents_for_scales(tmp_path: Path) -> None:
    values = torch.from_numpy(_weight((8, 64))).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[125, 127]] * 8, dtype=torch.uint8)
    _saved(tmp_path, {"a.weight": values, "a.weight_scale_inv": exponents})
    found, files = read_packed(tmp_path, {"quant_method": "mxfp8", "weight_block_size": [1, 32]})
    expected = values.float() * torch.tensor([0.25, 1.0]).repeat_interleave(32)
    assert torch.equal(found.state(files)["a.weight"][...], expected)


@pytest.mark.parametrize(("case", "block"), [("gptq", 32), ("awq", 32), ("gptq of one group", 128), ("gptq reordered", None)])
def test_codes_are_kept_where_groups_are_runs(tmp_path: Path, case: str, block: int | None) -> None:
    settings, pack = CASES[case]
    tensors, _ = pack(_weight())
    _saved(tmp_path, {f"layer.{end}": tensor for end, tensor in tensors.items()})
    found, _ = read_packed(tmp_path, settings)
    weight = found.integers["layer.weight"].make()
    assert weight.block_size == block
    assert weight.bits == 4
    if block is not None:
        codes, _, zeros = packed.rounded(_weight(), 4, block, symmetric=False)
        np.testing.assert_array_equal(weight.codes.numpy(), codes)
        np.testing.assert_array_equal(weight.zeros.numpy(), zeros)


@pytest.mark.parametrize(
    ("scale", "block"), [((1,), 128), ((), 128), ((96,), 128), ((96, 1), 128), ((96, 4), 32), ((2, 2), 64)]
)
def test_signed_bytes_keep_their_integers(tmp_path: Path, scale: tuple[int, ...], block: int) -> None:
    numbers = np.random.default_rng(0)
    codes = numbers.integers(-128, 128, SHAPE).astype(np.int8)
    scales = numbers.random(scale).astype(np.float32)
    zeros = numbers.integers(-9, 9, scale).astype(np.int8)
    parts = {"weight": codes, "weight_scale": scales, "weight_zero_point": zeros}
    _saved(tmp_path, {f"layer.{end}": torch.tensor(part) for end, part in parts.items()})
    found, files = read_packed(tmp_path, COMPRESSED | {"weight_block_size": [48, 64]})
    weight = found.integers["layer.weight"].make()
    assert (weight.bits, weight.block_size) == (8, block)
    np.testing.assert_array_equal(weight.codes.numpy().astype(int) - 128, codes)

    def spread(part: np.ndarray) -> np.ndarray:
        part = part.reshape(-1, 1) if part.ndim < 2 else part
        return np.repeat(np.repeat(part, 96 // part.shape[0], 0), 128 // part.shape[1], 1)

    expected = (codes - spread(zeros).astype(np.float32)) * spread(scales)
    np.testing.assert_allclose(found.state(files)["layer.weight"][...].numpy(), expected, rtol=1e-6)


def test_signed_bytes_of_other_shapes_are_read_as_floats(tmp_path: Path) -> None:
    codes = torch.arange(-12, 12, dtype=torch.int8).reshape(2, 3, 4)
    scale = torch.tensor([0.5, 0.25, 2.0]).reshape(1, 3, 1)
    _saved(tmp_path, {"layer.weight": codes, "layer.weight_scale": scale})
    found, files = read_packed(tmp_path, COMPRESSED)
    assert not found.integers
    assert torch.equal(found.state(files)["layer.weight"][...], codes * scale)


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 8)])
def test_scales_that_do_not_fit_signed_bytes_are_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    _saved(tmp_path, {"a.weight": torch.zeros(shape, dtype=torch.int8), "a.weight_scale": torch.ones(4, 5)})
    found, files = read_packed(tmp_path, COMPRESSED)
    with pytest.raises(CheckpointError, match=r"a\.weight_scale does not fit a\.weight"):
        found.state(files)["a.weight"][...]


def test_integers_are_read_when_they_are_needed(tmp_path: Path) -> None:
    tensors, _ = packed.gptq(_weight())
    _saved(tmp_path, {f"layer.{end}": tensor for end, tensor in tensors.items() if end != "scales"})
    found, _ = read_packed(tmp_path, GPTQ)
    lazy = found.weights["layer.weight"]
    assert isinstance(lazy, LazyIntegers)
    with pytest.raises(CheckpointError, match=r"lacks the tensor layer\.scales"):
        lazy[...]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "aqlm"}, "quantised with aqlm, which cannot be read; those that can: awq, "),
        ({}, "an unnamed method"),
        (GPTQ | {"checkpoint_format": "marlin"}, "format marlin, which is for one GPU kernel"),
        ({"quant_method": "awq", "version": "gemv"}, "version gemv with 4 bits; only gemm"),
        ({"quant_method": "bitnet", "quantization_mode": "online"}, "give the packed one"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    _saved(tmp_path, {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=message):
        read_packed(tmp_path, settings)


def test_torchao_names_the_kind_of_each_weight(tmp_path: Path) -> None:
    weight = torch.from_numpy(_weight())
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round()
    parts = {"layer._weight_qdata": codes.to(torch.int8), "layer._weight_scale": scale}
    kinds = {"layer.weight": '{"_type": "Int8Tensor", "_data": {}}', "layer.bias": '{"_type": "Tensor"}', "format": "pt"}
    save_file(parts | {"layer.bias": torch.ones(3)}, tmp_path / "model.safetensors", kinds)
    found, files = read_packed(tmp_path, {"quant_method": "torchao"})
    state = found.state(files)
    assert state.keys() == {"layer.weight", "layer.bias"}
    assert torch.equal(state["layer.weight"][...], codes * scale)
    kinds["layer.weight"] = '{"_type": "Int4Tensor"}'
    save_file(parts, tmp_path / "model.safetensors", kinds)
    with pytest.raises(CheckpointError, match=r"layer\.weight is torchao's Int4Tensor, which is packed for GPU kernels"):
        read_packed(tmp_path, {"quant_method": "torchao"})


def test_sparse_weights_are_refused(tmp_path: Path) -> None:
    _saved(tmp_path, {"layer.weight.bitmask": torch.zeros(1), "layer.weight.compressed": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="stores weights sparsely"):
        read_packed(tmp_path, COMPRESSED)


def test_scales_that_do_not_fit_are_named(tmp_path: Path) -> None:
    values = torch.zeros(6, 8).to(torch.float8_e4m3fn)
    _saved(tmp_path, {"a.weight": values, "a.weight_scale": torch.ones(4, 5)})
    found, files = read_packed(tmp_path, {"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=r"a\.weight_scale does not fit a\.weight"):
        found.state(files)["a.weight"][...]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        read_packed(tmp_path, GPTQ)


def test_the_method_is_found_under_its_names() -> None:
    assert method_of({"load_in_4bit": True, "quant_method": "bitsandbytes"}) == "bitsandbytes"
    assert method_of({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}) == "awq"
    assert method_of({"producer": {"name": "modelopt"}, "quant_algo": "FP8"}) == "modelopt"
