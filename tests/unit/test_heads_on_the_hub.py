"""Heads by a hub id: which files are fetched. The hub is a directory here."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medusa_export.bundle.export import heads_place
from medusa_heads.errors import CheckpointError
from medusa_heads.formats import load_heads, read_heads
from medusa_heads.formats.locating import locate_merged
from medusa_runtime.errors import OptionError
from tests.support.published_heads import publish, random_parts, sequential

NAME = "some/heads"


class Hub:
    """A hub with one repository. What it was asked for lies in a cache, as `snapshot_download` leaves it."""

    def __init__(self, root: Path) -> None:
        self.repository, self.cache = root / "repository", root / "cache"

    def snapshot_download(self, name: str, *, allow_patterns: list[str]) -> str:
        if name != NAME:
            raise FileNotFoundError(f"404 for {name}\nand a second line")
        self.cache.mkdir(exist_ok=True)
        for file in self.repository.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, self.cache)
        return str(self.cache)

    def fetched(self) -> set[str]:
        return {file.name for file in self.cache.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return made


def write_model(directory: Path, *, has_heads: bool) -> None:
    """A model's shard, and beside it a shard of heads if it has them, as Transformers writes them."""
    directory.mkdir()
    shards = {"model-00001-of-00002.safetensors": {"model.norm.weight": torch.ones(4)}}
    if has_heads:
        shards["model-00002-of-00002.safetensors"] = sequential(random_parts(), "medusa_head.")
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
    places = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))


@pytest.mark.parametrize("what", ["medusa-0.1", "medusa-v2", "hydra"])
def test_of_heads_beside_a_model_the_heads_alone_are_fetched(what: str, hub: Hub) -> None:
    given = publish(what, hub.repository)
    (hub.repository / "pytorch_model.bin").write_bytes(b"the model")
    flavour, heads = read_heads(NAME)
    assert flavour == given.flavour
    assert heads.digest() == load_heads(given.path).digest()
    assert "pytorch_model.bin" not in hub.fetched()


def test_heads_in_files_of_other_names_are_fetched_with_all_weights(hub: Hub) -> None:
    given = publish("vllm", hub.repository)
    assert read_heads(NAME)[0] == "vllm"
    assert load_heads(NAME).digest() == load_heads(given.path).digest()


def test_a_merged_checkpoint_is_found_by_its_index(hub: Hub) -> None:
    write_model(hub.repository, has_heads=True)
    assert locate_merged(NAME) == heads_place(NAME, None) == hub.cache
    assert read_heads(NAME)[0] == "medusa-1.0"


def test_the_weights_of_a_model_without_heads_are_not_fetched(hub: Hub) -> None:
    write_model(hub.repository, has_heads=False)
    with pytest.raises(OptionError, match="some/heads has no heads in it; give some with --heads"):
        heads_place(NAME, None)
    assert hub.fetched() == {"config.json", "model.safetensors.index.json"}


def test_a_name_that_the_hub_does_not_know_is_one_line(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"there are no heads at other/heads: .*\(404 for other/heads\)") as caught:
        load_heads("other/heads")
    assert "\n" not in str(caught.value)


def test_a_path_goes_before_the_hub(hub: Hub, tmp_path: Path) -> None:
    publish("medusa-v2", tmp_path / "some" / "heads")
    assert read_heads(NAME)[0] == "medusa-v2"
    assert not hub.cache.exists()
