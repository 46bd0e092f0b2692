"""Heads as other projects publish them: each flavour gives the logits of its description, and comes back as it went in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medusa_heads.formats import FOREIGN, read_heads, save_heads
from tests.support.published_heads import FLAVOURS, publish

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
