"""Heads as other projects publish them: each flavour gives the logits of its description, and comes back as it went in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medusa_heads.formats import FOREIGN, load_heads, read_heads, save_heads
from tests.support.published_heads import FLAVOURS, hydra_logits, publish, random_parts

WRITERS = {flavour.NAME: flavour for flavour in FOREIGN}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files in a directory."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.iterdir()):
        if file.suffix == ".safetensors":
            found |= load_file(file)
        elif file.suffix == ".pt":
            found |= torch.load(file, weights_only=True)
    return {name: tensor for name, tensor in found.items() if not name.startswith("transformer.")}


@pytest.mark.parametrize("what", FLAVOURS)
def test_logits_are_those_of_the_description(what: str, tmp_path: Path) -> None:
    given = publish(what, tmp_path / "heads")
    notes: list[str] = []
    flavour, heads = read_heads(given.path, notes.append)
    random = np.random.default_rng(5)
    hidden = random.normal(0, 1, (7, 64)).astype(np.float32)
    lm_head, embedding = torch.nn.Linear(64, 320, bias=False), torch.nn.Embedding(320, 64)
    root_ids = list(range(7))
    with torch.no_grad():
        found = heads(torch.from_numpy(hidden), lm_head, torch.tensor(root_ids), embedding)
    if heads.draft_ids is not None:  # most heads still have logits of other tokens, which are not used
        kept = torch.isin(torch.arange(320), torch.tensor(heads.draft_ids))
        found = found.masked_fill(~kept, -torch.inf)
    expected = given.logits(hidden, root_ids, lm_head.weight.detach().numpy(), embedding.weight.detach().numpy())
    assert flavour == given.flavour
    assert notes == []
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("what", FLAVOURS)
def test_every_flavour_comes_back_bit_for_bit(what: str, tmp_path: Path) -> None:
    given = publish(what, tmp_path / "heads")
    flavour, heads = read_heads(given.path)
    save_heads(heads, tmp_path / "ours")
    name, ours = read_heads(tmp_path / "ours")
    assert (name, ours.config, ours.draft_ids, ours.digest()) == (
        "medusa-export",
        heads.config,
        heads.draft_ids,
        heads.digest(),
    )
    WRITERS[flavour].save(ours, tmp_path / "back")
    before, after = tensors_of(given.path), tensors_of(tmp_path / "back")
    assert after.keys() == {name.removeprefix("medusa_heads.") if flavour == "vllm" else name for name in before}
    if "two ranks" in what:  # they come back in one file
        before = {name: read_heads(given.path)[1].state_dict()[ours_of(name)] for name in before}
    for name, tensor in before.items():
        other = after[name.removeprefix("medusa_heads.") if flavour == "vllm" else name]
        assert torch.equal(other, tensor)
        assert other.dtype == tensor.dtype
    again, loaded = read_heads(tmp_path / "back")
    assert (again, loaded.digest()) == (flavour, heads.digest())


def ours_of(name: str) -> str:
    return name.replace("medusa_heads.", "heads.").replace(".medusa_layers.", ".blocks.")


@pytest.mark.parametrize(("what", "one_block"), [("medusa-0.1 of one block twice", True), ("medusa-0.1 of two layers", False)])
def test_one_block_under_two_names_is_known_as_one(what: str, one_block: bool, tmp_path: Path) -> None:
    config = load_heads(publish(what, tmp_path / "heads").path).config
    assert (config.num_layers, config.one_block) == (2, one_block)


def test_rows_that_pad_the_vocabulary_for_the_ranks_are_left_out(tmp_path: Path) -> None:
    given = publish("tensorrt-llm of two ranks", tmp_path / "heads")
    whole = load_heads(given.path)
    config = json.loads((given.path / "config.json").read_text())
    (given.path / "config.json").write_text(json.dumps(config | {"vocab_size": 319}))
    heads = load_heads(given.path)
    assert heads.config.vocab_size == 319
    assert torch.equal(heads.heads[2].lm_head.weight, whole.heads[2].lm_head.weight[:319])


def test_hydra_heads_read_the_tokens_that_they_are_given(tmp_path: Path) -> None:
    heads = load_heads(publish("hydra", tmp_path / "heads").path)
    parts, random = random_parts(1, reads=True), np.random.default_rng(5)
    hidden, embedding = random.normal(0, 1, (7, 64)).astype(np.float32), torch.nn.Embedding(320, 64)
    tokens = torch.from_numpy(random.integers(0, 320, (7, 3)))  # the root and two guesses
    with torch.no_grad():
        found = heads(torch.from_numpy(hidden), None, tokens[:, 0], embedding, tokens[:, 1:])
        expected = hydra_logits(parts, hidden, embedding(tokens).numpy())
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5, rtol=1e-5)
