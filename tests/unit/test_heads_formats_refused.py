"""Published heads that are damaged or contradict themselves, and formats that cannot hold given heads: one line each."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.cli.heads_files import FORMATS
from medusa_heads.config import HeadsConfig
from medusa_heads.errors import CheckpointError
from medusa_heads.formats import NAMES, load_heads, locating, read_heads
from medusa_heads.formats.converting import convert
from medusa_heads.modules import MedusaHeads
from medusa_runtime.errors import OptionError
from tests.support.published_heads import publish

Tensors = dict[str, torch.Tensor]


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_heads(path)
    assert "\n" not in str(caught.value)


def edit(path: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors of a file."""
    is_pickle = path.suffix == ".pt"
    tensors = torch.load(path, weights_only=True) if is_pickle else load_file(path)
    change(tensors)
    torch.save(tensors, path) if is_pickle else save_file(tensors, path)


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("what", "name", "taken", "message"),
    [
        ("medusa-0.1", "medusa_lm_head.pt", "1.0.linear.bias", r"lack 1\.0\.linear\.bias; the file is incomplete"),
        ("medusa-0.1", "medusa_lm_head.pt", "1.0.linear.weight", r"lack 1\.0\.linear\.weight; the file is incomplete"),
        ("medusa-0.1", "medusa_lm_head.pt", "2.1.weight", "do not have one LM head each"),
        ("medusa-0.1 of two layers", "medusa_lm_head.pt", "2.1.linear.weight", r"lack 2\.1\.linear\.weight"),
        ("medusa-v2", "medusa_lm_head.safetensors", "0.0.linear.weight", r"lack 0\.0\.linear\.weight"),
        ("tgi", "medusa_lm_head.safetensors", "0.0.linear.weight", r"lack 0\.0\.linear\.weight"),
        ("mlc", "model.safetensors", "medusa_head.0.1.weight", "do not have one LM head each"),
        ("vllm", "model.safetensors", "lm_heads.1.weight", "have 2 LM heads for 3 heads"),
        ("vllm", "model.safetensors", "blocks.1.layers.0.weight", r"have blocks \[\] in head 1"),
        ("vllm of a truncated vocabulary", "model.safetensors", "token_map", "but no token_map; the file is incomplete"),
        ("hydra", "hydra_lm_head.pt", "hydra_mlp.1.0.res_connection.bias", r"lack hydra_mlp\.1\.0\.res_connection\.bias"),
        ("hydra", "hydra_lm_head.pt", "hydra_lm_head.2.bias", r"lack hydra_lm_head\.2\.bias"),
        ("tensorrt-llm", "rank0.safetensors", "medusa_heads.1.lm_head.weight", r"lack medusa_heads\.1\.lm_head\.weight"),
        (
            "tensorrt-llm of two ranks",
            "rank1.safetensors",
            "medusa_heads.1.lm_head.weight",
            r"of shape \[160, 64\], but it must be",
        ),
    ],
)
def test_a_missing_tensor_is_named(what: str, name: str, taken: str, message: str, tmp_path: Path) -> None:
    given = publish(what, tmp_path / "heads")
    edit(given.path / name, lambda tensors: tensors.pop(taken))
    refused(given.path, message)


@pytest.mark.parametrize(
    ("what", "name", "change", "message"),
    [
        (
            "medusa-0.1",
            "medusa_lm_head.pt",
            {"0.0.linear.bias": (65,)},
            r"0\.0\.linear\.bias of shape \[65\], but it must be \[64\]",
        ),
        ("medusa-v2", "medusa_lm_head.safetensors", {"1.0.linear.weight": (64, 32)}, r"of shape \[64, 32\], but it must be"),
        ("medusa-v2", "medusa_lm_head.safetensors", {"0.0.linear.weight": (64,)}, "it must be a matrix"),
        ("tgi", "medusa_lm_head.safetensors", {"0.1.weight": (320, 0)}, "it must be a matrix"),
        ("tgi", "medusa_lm_head.safetensors", {"1.1.weight": (319, 64)}, r"of shape \[319, 64\], but it must be"),
        ("medusa-v2", "medusa_lm_head.safetensors", {"4.0.linear.weight": (64, 64)}, "lack head 3, but have head 4"),
        ("medusa-0.1", "medusa_lm_head.pt", {"scale": (1,)}, "have scale, which is no part of such heads"),
        (
            "vllm",
            "model.safetensors",
            {"blocks.0.layers.1.weight": (64, 64)},
            r"have blocks \[0\] in head 1, but \[0, 1\] in head 0",
        ),
        (
            "hydra",
            "hydra_lm_head.pt",
            {"hydra_mlp.0.0.linear.weight": (64, 64)},
            r"of shape \[64, 64\], but it must be \[64, 128\]",
        ),
        (
            "hydra",
            "hydra_lm_head.pt",
            {"prefix_embeding_layer.norm.weight": (64,)},
            r"Hydra\+\+ heads \(hydra_head_arch prefix-mlp\)",
        ),
        (
            "tensorrt-llm",
            "rank0.safetensors",
            {"medusa_heads.0.lm_head.weights_scaling_factor": (1,)},
            "weights_scaling_factor, which is no part of such heads; quantised ones must be dequantised",
        ),
    ],
)
def test_other_shapes_and_further_tensors_are_told(
    what: str, name: str, change: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    given = publish(what, tmp_path / "heads")
    edit(given.path / name, lambda tensors: tensors.update({key: torch.zeros(shape) for key, shape in change.items()}))
    refused(given.path, message)


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        ("medusa-v2", {"medusa_num_layers": 2}, r"says 2 layers, but its tensors are of 1; correct the config"),
        ("vllm", {"num_hidden_layers": 2}, "says 2 layers, but its tensors are of 1"),
        ("vllm", {"original_lm_head": True}, "original_lm_head true; with true there must be one"),
        ("vllm of one lm head", {"original_lm_head": False}, "have 1 LM heads for 3 heads"),
        ("vllm", {"medusa_fc_bias": True}, "have medusa_fc_bias in their config, but no biases"),
        ("vllm", {"vocab_size": 400}, "have LM heads of 320 rows, vocab_size 400"),
        ("vllm", {"truncated_vocab_size": 100}, "but no token_map"),
        ("vllm of a truncated vocabulary", {"truncated_vocab_size": 50}, "do not belong together"),
        ("vllm of a truncated vocabulary", {"vocab_size": 200}, "its token ids must be below the vocabulary size 200"),
        ("vllm", {"logit_scale": 0}, "logit_scale: "),
        ("hydra", {"hidden_state_offset": 1}, "read the hidden states of an earlier layer"),
        ("hydra", {"hydra_head_arch": "eagle-attn"}, "hydra_head_arch eagle-attn"),
        ("hydra", {"hydra_num_layers": 2}, "says 2 layers, but its tensors are of 1"),
        ("tensorrt-llm", {"mapping": {"tp_size": 2}}, "says 2 ranks, but its tensors are of 1"),
        ("tensorrt-llm", {"vocab_size": 300}, "says 300 tokens in the vocabulary, but its tensors are of 320"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_told(
    what: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = publish(what, tmp_path / "heads")
    configure(given.path, **changes)
    refused(given.path, message)


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        ("medusa-0.1", {"medusa_num_heads": 2}, "says 2 heads, but its tensors are of 3; the tensors decide"),
        ("medusa-0.1", {"medusa_num_layers": 2}, "says 2 layers, but its tensors are of 1; the tensors decide"),
        ("vllm with biases", {"medusa_fc_bias": False}, "vLLM drops them, here they are used"),
        ("vllm with a map of tokens", {"truncated_vocab_size": 320}, "vLLM would not use it; it is used here"),
        ("hydra", {"grounded_heads": False}, "says grounded_heads False, which its tensors contradict"),
    ],
)
def test_where_the_tensors_are_clear_they_decide_with_a_note(
    what: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = publish(what, tmp_path / "heads")
    before = load_heads(given.path)
    configure(given.path, **changes)
    notes: list[str] = []
    assert load_heads(given.path, notes.append).digest() == before.digest()
    assert len(notes) == 1
    assert message in notes[0]


@pytest.mark.parametrize("what", ["medusa-0.1", "medusa-v2", "hydra", "vllm"])
def test_a_truncated_file_is_damaged(what: str, tmp_path: Path) -> None:
    given = publish(what, tmp_path / "heads")
    [weights] = [file for file in given.path.iterdir() if file.name != "config.json"]
    weights.write_bytes(weights.read_bytes()[:-5000])
    refused(given.path, "is damaged or incomplete: ")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/never"),))


def test_a_pickle_with_code_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "medusa_lm_head.pt").write_bytes(pickle.dumps({"0.0.linear.weight": Evil()}))
    refused(tmp_path, "could run code, so it is not read")
    torch.save({"0.0.linear.weight": Evil()}, tmp_path / "medusa_lm_head.pt")
    refused(tmp_path, "could run code, so it is not read")
    torch.save([torch.zeros(2)], tmp_path / "medusa_lm_head.pt")
    refused(tmp_path, "does not hold tensors by name")


def test_quantised_heads_are_refused(tmp_path: Path) -> None:
    given = publish("tgi", tmp_path / "heads")
    edit(
        given.path / "medusa_lm_head.safetensors",
        lambda tensors: tensors.update({"0.0.linear.weight": tensors["0.0.linear.weight"].to(torch.float8_e4m3fn)}),
    )
    refused(given.path, "as float8_e4m3fn; heads must be plain floats")


def test_a_lost_shard_and_a_lost_rank_are_named(tmp_path: Path) -> None:
    given = publish("tensorrt-llm of two ranks", tmp_path / "ranks")
    (given.path / "rank0.safetensors").unlink()
    refused(given.path, r"lacks rank0\.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"medusa_head.0.0.weight": "a.safetensors"}})
    )
    refused(tmp_path, r"lacks a\.safetensors, which model\.safetensors\.index\.json names")
    for text in ("{}", '{"weight_map": []}', "["):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        refused(tmp_path, "is damaged: it must have a weight_map")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../ranks/rank1.safetensors"}}))
    refused(tmp_path, "which is no file of tensors beside it")


def test_what_is_no_heads_is_told(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    refused(tmp_path, "has no heads in a known format.*medusa-0.1")
    refused(tmp_path / "nothing", "there are no heads at .*heads init MODEL")


def test_a_hub_id_without_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match="there are no heads at some/heads: it is no path, and the hub does not give it"
    ) as caught:
        locating.locate("some/heads")
    assert "\n" not in str(caught.value)


def random_heads(**settings: Any) -> MedusaHeads:
    config = HeadsConfig(base_model="a/model", num_heads=2, hidden_size=8, vocab_size=24, **settings)
    return MedusaHeads(config)


@pytest.mark.parametrize(
    ("settings", "flavour", "message"),
    [
        ({"reads_root": True}, "medusa-v2", "Medusa v2 cannot hold these heads: they read the root token"),
        ({"shared_lm_head": False, "reads_root": True}, "vllm", "vLLM cannot hold these heads: they read the root token"),
        ({}, "vllm", "vLLM cannot hold these heads: they use the backbone's LM head; give --model"),
        ({}, "medusa-0.1", "they use the backbone's LM head; give --model"),
        ({"shared_lm_head": False}, "medusa-v2", "they have LM heads of their own, and it has only the backbone's"),
        ({"shared_lm_head": False, "lm_head_bias": True}, "vllm", "they have LM heads with biases"),
        ({"shared_lm_head": False, "one_lm_head": True}, "mlc", "they have one LM head for all of them"),
        ({"shared_lm_head": False, "block_bias": False}, "tensorrt-llm", "they have blocks without biases"),
        ({"shared_lm_head": False, "logit_scale": 2.0}, "tgi", "they scale their logits"),
        ({"shared_lm_head": False, "lm_head_bias": True, "kind": "hydra"}, "vllm", "they are Hydra heads"),
        ({"shared_lm_head": False}, "hydra", "its LM heads have biases"),
    ],
)
def test_what_a_format_cannot_hold_is_told(settings: dict[str, Any], flavour: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(random_heads(**settings), tmp_path / "out", flavour)
    assert not (tmp_path / "out").exists()


def test_a_draft_vocabulary_goes_to_vllm_only(tmp_path: Path) -> None:
    heads = random_heads(shared_lm_head=False)
    heads.draft_ids = [3, 5, 9]
    with pytest.raises(CheckpointError, match="they choose from a draft vocabulary"):
        convert(heads, tmp_path / "out", "tgi")
    convert(heads, tmp_path / "out", "vllm")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["truncated_vocab_size"] == 3
    assert load_heads(tmp_path / "out").draft_ids == [3, 5, 9]


def test_merged_checkpoints_need_the_model(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"--format medusa-1\.0 is a model with heads in it; give the model's directory with --model"
    ):
        convert(random_heads(shared_lm_head=False), tmp_path / "out", "medusa-1.0")


def test_the_command_knows_all_formats() -> None:
    assert set(FORMATS) == set(NAMES)


def test_biases_are_told_to_vllm(tmp_path: Path) -> None:
    convert(random_heads(shared_lm_head=False), tmp_path / "out", "vllm")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["medusa_fc_bias"] is True
    notes: list[str] = []
    assert read_heads(tmp_path / "out", notes.append)[1].config.block_bias
    assert notes == []
