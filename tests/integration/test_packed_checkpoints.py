"""Packed checkpoints load with the weights that they stand for, stream into the model, and are refused by name otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.model.checkpoint import load_backbone
from medusa_heads.errors import CheckpointError
from tests.support import packed
from tests.support.models import save_tiny_model

Make = Callable[..., Path]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
CASES: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], packed.Packed]]] = {
    "gptq": (GPTQ, packed.gptq),
    "awq": ({"quant_method": "awq", "bits": 4}, packed.awq),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, packed.pack_quantized),
    "int-quantized": ({"quant_method": "compressed-tensors"}, packed.int_quantized),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, packed.fp8_blocks),
    "bitsandbytes": ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, partial(packed.bnb_4_bits, nested=True)),
    "bitnet": ({"quant_method": "bitnet"}, partial(packed.bitnet, divides=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_packed_model_is_loaded(case: str, make_model: Make, tmp_path: Path) -> None:
    settings, pack = CASES[case]
    whole = packed.save_packed(make_model(), tmp_path / "packed", settings, pack)
    backbone = load_backbone(str(tmp_path / "packed"))
    state = backbone.model.state_dict()
    assert state.keys() == whole.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(state[name], weight, rtol=1e-6, atol=1e-9)
    assert not hasattr(backbone.model.config, "quantization_config")
    are_integers = case in {"gptq", "awq", "compressed-tensors", "int-quantized"}
    expected = {name for name in whole if are_integers and name.endswith("proj.weight")}
    assert backbone.integers.keys() == expected
    assert backbone.eos_token_ids == [1]


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    settings = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 64}
    model = save_tiny_model(tmp_path / "model", "gpt_oss", **settings)
    tensors = load_file(model / "model.safetensors")
    whole = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales, meant = packed.mxfp4(tensors.pop(name).numpy().transpose(0, 2, 1))
        tensors |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
        whole[name] = torch.from_numpy(meant.transpose(0, 2, 1).copy())
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    packed.add_settings(model, {"quant_method": "mxfp4"})
    state = load_backbone(str(model)).model.state_dict()
    for name, weight in whole.items():
        assert torch.equal(state[name], weight), name


def test_settings_of_older_tools_are_found(make_model: Make, tmp_path: Path) -> None:
    whole = packed.save_packed(make_model(), tmp_path / "packed", {}, packed.gptq)
    (tmp_path / "packed" / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    state = load_backbone(str(tmp_path / "packed")).model.state_dict()
    torch.testing.assert_close(state["lm_head.weight"], whole["lm_head.weight"])
    torch.testing.assert_close(
        state["model.layers.1.mlp.up_proj.weight"], whole["model.layers.1.mlp.up_proj.weight"], rtol=1e-6, atol=1e-9
    )


def test_experts_are_merged_as_from_plain_files(tmp_path: Path) -> None:
    settings = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = save_tiny_model(tmp_path / "model", "mixtral", **settings)
    plain = load_backbone(str(model)).model.state_dict()
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        parts, meant = packed.fp8(tensors.pop(name).numpy())
        tensors |= {f"{name.removesuffix('weight')}{end}": part for end, part in parts.items()}
        np.testing.assert_allclose(meant, meant)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    packed.add_settings(model, {"quant_method": "fp8", "activation_scheme": "static"})
    state = load_backbone(str(model)).model.state_dict()
    assert state.keys() == plain.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(state[name], weight, rtol=0.07, atol=2e-3)


def test_a_missing_part_of_a_weight_is_named(make_model: Make, tmp_path: Path) -> None:
    packed.save_packed(make_model(), tmp_path / "packed", GPTQ, packed.gptq)
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.self_attn.q_proj.scales"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.0\.self_attn\.q_proj\.scales"):
        load_backbone(str(tmp_path / "packed"))


@pytest.mark.parametrize("method", ["aqlm", "quanto", "hqq", "vptq", "something new"])
def test_a_method_that_cannot_be_read_is_named(method: str, make_model: Make, tmp_path: Path) -> None:
    shutil.copytree(make_model(), tmp_path / "packed")
    packed.add_settings(tmp_path / "packed", {"quant_method": method, "quantize_config": {}})
    with pytest.raises(CheckpointError, match=f"quantised with {method}, which cannot be read; those that can: awq, ") as error:
        load_backbone(str(tmp_path / "packed"))
    assert "\n" not in str(error.value)


def test_sharded_files_are_read(make_model: Make, tmp_path: Path) -> None:
    whole = packed.save_packed(make_model(), tmp_path / "packed", GPTQ, packed.gptq)
    single = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(single)
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, single.with_name(file), {"format": "pt"})
    single.unlink()
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    single.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    state = load_backbone(str(tmp_path / "packed")).model.state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(state[name], weight, rtol=1e-6, atol=1e-9)
