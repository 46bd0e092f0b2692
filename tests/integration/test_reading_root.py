"""Heads that read the root: the embedding that they read, in PyTorch and in the exported graph, and the roots in decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medusa_export.bundle.export import export_bundle
from medusa_export.command_options.export_options import ExportOptions
from medusa_export.model.checkpoint import load_backbone
from medusa_heads.formats import load_heads, save_heads
from medusa_heads.modules import root_states
from medusa_runtime import DecodingEngine, DecodingOptions, Manifest, open_backend
from tests.support.fake_backend import FakeBackend, fake_manifest

Make = Callable[..., Path]
KNOWN = list(range(7, 300, 3))
ROOTS = [10, 11, 7, 301, 10]  # known tokens, others, and one twice
TOKENS = np.arange(20, 25)[None]


def test_a_root_is_read_as_its_row_of_mean_square_one() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float16)
    found = root_states(weight, torch.tensor([1, -1, 0]))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, torch.tensor([[0, 2**0.5], [0, 0], [0.6 * 2**0.5, 0.8 * 2**0.5]], dtype=torch.float16))


def proposals(bundle: Path) -> tuple[np.ndarray, np.ndarray]:
    """The guesses of a bundle's heads after each token of a text, with `ROOTS` as the decided tokens. [T, K, M]"""
    backend, count = open_backend(bundle, Manifest.load(bundle)), TOKENS.shape[1]
    backend.resize(1, count)
    places = np.arange(count)[None]
    backend.step(TOKENS, places, np.tri(count, dtype=bool)[None], np.zeros(1, np.int64), places)
    found = [backend.propose(np.array([row]), np.array([root])) for row, root in enumerate(ROOTS)]
    return np.concatenate([one.token_ids for one in found]), np.concatenate([one.log_probs for one in found])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("known", "whole"), [(None, False), (KNOWN, False), (KNOWN, True)])
def test_exported_heads_read_what_pytorch_reads(
    tied: bool, shared: bool, known: list[int] | None, whole: bool, make_model: Make, make_heads: Make, tmp_path: Path
) -> None:
    model, heads = make_model("llama", tie_word_embeddings=tied), load_heads(make_heads(shared_lm_head=shared))
    heads.draft_ids = known
    save_heads(heads, tmp_path / "heads")
    export_bundle(ExportOptions(str(model), tmp_path / "heads", tmp_path / "bundle", head_top_k=6, full_head_vocabulary=whole))
    assert Manifest.load(tmp_path / "bundle").heads.reads_root
    ids, log_probs = proposals(tmp_path / "bundle")

    backbone: Any = load_backbone(str(model)).model
    with torch.no_grad():
        hidden = backbone.base_model(torch.from_numpy(TOKENS)).last_hidden_state[0]
        logits = heads(hidden, backbone.get_output_embeddings(), torch.tensor(ROOTS))  # [T, K, V]
        others = heads(hidden, backbone.get_output_embeddings(), torch.tensor(ROOTS[1:] + ROOTS[:1]))
    if known is not None and not whole:
        hidden_ids = [token for token in range(logits.shape[-1]) if token not in known]
        logits[..., hidden_ids] = -torch.inf
    best = logits.log_softmax(-1).topk(6)
    np.testing.assert_array_equal(ids, best.indices)
    np.testing.assert_allclose(log_probs, best.values, atol=1e-4)
    assert (logits - others).abs().max() > 0.1  # the root matters


def test_heads_as_the_paper_has_them_have_no_input_for_it(make_model: Make, make_heads: Make, tmp_path: Path) -> None:
    heads = make_heads(reads_root=False)
    export_bundle(ExportOptions(str(make_model()), heads, tmp_path / "bundle"))
    manifest = Manifest.load(tmp_path / "bundle")
    assert not manifest.heads.reads_root
    assert [tensor.name for tensor in manifest.graphs["heads"].inputs] == ["hidden"]
    ids, _ = proposals(tmp_path / "bundle")
    assert ids.shape[0] == len(ROOTS)


def test_heads_that_read_it_refuse_to_go_without(make_heads: Make) -> None:
    with pytest.raises(ValueError, match="these heads read the root"):
        load_heads(make_heads())(torch.zeros(1, 64), torch.nn.Linear(64, 320))


class Noting(FakeBackend):
    """Records each root with the text before it, and the steps that run the heads at once."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__("sometimes", manifest)
        self.texts: list[list[int]] = []
        self.ahead: list[bool] = []

    def step(self, *inputs, propose_ahead=False, **others):
        self.ahead.append(propose_ahead)
        return super().step(*inputs, propose_ahead=propose_ahead, **others)

    def propose(self, rows, root_ids):
        for sequence, (row, root) in enumerate(zip(rows, root_ids, strict=True)):
            self.texts.append([*self.contexts[sequence][row], int(root)])
        return super().propose(rows, root_ids)


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.9, "acceptance": "typical", "seed": 1}]
)
@pytest.mark.parametrize("reads_root", [True, False])
def test_the_root_that_heads_are_told_is_what_was_decided(fields: dict[str, Any], reads_root: bool) -> None:
    manifest = fake_manifest()
    manifest.heads.reads_root = reads_root
    backend = Noting(manifest)
    engine = DecodingEngine(backend, max_batch_size=2)
    prompts = [[3, 1, 4], [1, 5]]
    answers = [engine.add(prompt, DecodingOptions.of(max_new_tokens=30, **fields)) for prompt in prompts]
    while not engine.is_idle:
        engine.step()
    assert len(backend.texts) > 20
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = [*prompt, *answer.token_ids]
        own = [text for text in backend.texts if text[: len(prompt)] == prompt]
        assert len(own) > 8
        for text in own:  # the last may go on behind the answer's limit
            assert text[: len(whole)] == whole[: len(text)]
    # a sampled root is most often another one than the GPU would go on with by itself
    assert any(backend.ahead) == (not fields or not reads_root)
