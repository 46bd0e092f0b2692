"""The two sides of a validation: the bundle on its backend and the model in PyTorch, with models that are made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from medusa_export.check import sides, validation
from medusa_export.check.sides import ReferenceSide
from medusa_heads.errors import CheckpointError
from medusa_runtime.bundle.manifest import GraphFacts
from medusa_runtime.drafting.tree import CandidateTree
from medusa_runtime.errors import BundleError
from tests.support.fake_backend import FakeBackend, fake_manifest, logits_after
from tests.support.known_model import KnownHeads, Side, Unsure


def settling(*passes: float) -> tuple[ReferenceSide, list[list[int]]]:
    """A reference whose passes give these logits, and the tokens of each."""
    backbone = SimpleNamespace(facts=SimpleNamespace(vocab_size=20), max_seq_len=30, source="the model")
    side, asked = ReferenceSide(backbone), []

    def logits(token_ids: list[int]) -> np.ndarray:
        asked.append(token_ids)
        return np.full((1, 3), passes[len(asked) - 1])

    side.logits = logits  # type: ignore[method-assign]
    return side, asked


def test_a_reference_is_used_once_two_passes_agree() -> None:
    for passes in ((1.0, 1.0), (1.0, 2.0, 2.0), (1.0, 2.0, 3.0, 4.0, 5.0, 5.0)):
        side, asked = settling(*passes)
        side.settle()
        assert asked == [[*range(20), *range(10)]] * len(passes)


def test_a_reference_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(CheckpointError, match="different logits for the model at every pass"):
        settling(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)[0].settle()
    with pytest.raises(CheckpointError, match="NaN or infinite logits for the model"):
        settling(float("nan"), float("nan"))[0].settle()


@pytest.mark.parametrize("kind", ["right", "a probability", "another token"])
def test_the_heads_candidates_are_compared(kind: str) -> None:
    class Wrong(Unsure):
        def propose(self, rows, root_ids):
            found = super().propose(rows, root_ids)
            if kind == "a probability":
                found.log_probs[0, 1, 2] -= 0.25
            if kind == "another token":
                found.token_ids[0, 2, 3] = min(set(range(1, 50)) - set(found.token_ids[0, 2].tolist()))
            return found

    backend = Wrong()
    side, heads = Side(backend, "portable"), KnownHeads(backend)
    model = SimpleNamespace(get_output_embeddings=lambda: None, get_input_embeddings=lambda: None)
    torch_side = SimpleNamespace(backbone=SimpleNamespace(model=model), hidden=lambda prompt_ids: None)
    difference = validation._compare_heads([3, 1, 4], side, torch_side, heads)
    assert (difference.what, difference.num_rows) == ("heads", 3)
    if kind == "right":
        assert difference.max_abs < 1e-5
    elif kind == "a probability":
        assert difference.max_abs == pytest.approx(0.25, rel=1e-3)
    else:  # the fourth candidate has 0.3 / 8 / 2, and each of the other 46 tokens an equal part of what the four leave
        assert difference.max_abs == pytest.approx(np.log(0.01875 / ((1 - 0.28125) / 46)), rel=1e-3)


def graphs(*targets: str) -> dict[str, GraphFacts]:
    step = fake_manifest().graphs["step"]
    return {f"step.{target}": step.model_copy(update={"target": target}) for target in targets}


@pytest.mark.parametrize(
    ("targets", "backend", "expected"),
    [
        (("portable",), "ort-cpu", [("portable", 1)]),
        (("portable", "ort-cpu"), "ort-cpu", [("ort-cpu", 2), ("portable", 1)]),
        (("portable", "ort-cpu", "ort-cpu-single"), "ort-cpu", [("ort-cpu-single", 3), ("ort-cpu", 2), ("portable", 1)]),
        (("portable", "ort-cpu-single"), "ort-cpu", [("ort-cpu-single", 2), ("portable", 1)]),
        (("portable", "ort-cpu", "ort-cuda"), "ort-cuda", [("ort-cuda", 2), ("portable", 1)]),
        (("portable", "ort-cpu"), "ort-cuda", [("portable", 1)]),
    ],
)
def test_each_kind_of_graph_that_a_backend_runs_is_compared_the_one_it_uses_first(targets, backend, expected) -> None:
    manifest = fake_manifest().model_copy(update={"graphs": graphs(*targets)})
    found = sides.by_target(manifest, backend)
    assert [(target, len(variant.graphs)) for target, variant in found.items()] == expected


@pytest.mark.parametrize("is_large", [False, True])
def test_the_reference_computes_in_float32_and_a_large_one_keeps_its_layers_as_stored(is_large: bool, monkeypatch) -> None:
    model, cast = torch.nn.Linear(2, 2, dtype=torch.float16), []
    backbone = SimpleNamespace(model=model, dtype=torch.float16)
    monkeypatch.setattr(sides, "load_backbone", lambda *_, **options: cast.append(options) or backbone)
    monkeypatch.setattr(sides, "is_large", lambda _: is_large)
    monkeypatch.setattr(sides, "cast_all_but_layers", lambda *found: cast.append(found))
    monkeypatch.setattr(sides, "cast_layers_while_running", lambda *found: cast.append(found))
    monkeypatch.setattr(ReferenceSide, "settle", lambda _: cast.append("settled"))
    side = ReferenceSide.load("the model", fake_manifest())
    assert side.backbone.dtype == torch.float32
    assert model.weight.dtype == (torch.float16 if is_large else torch.float32)
    found = [{"trust_remote_code": False, "layers_as_stored": True}, *[(model, torch.float32)] * (2 * is_large), "settled"]
    assert cast == found


@pytest.mark.parametrize(("draft_vocab_size", "counts"), [(None, False), (27, True)])
def test_tokens_that_the_heads_do_not_know_have_no_probability(draft_vocab_size: int | None, counts: bool) -> None:
    """If the bundle leaves them out, what PyTorch gives them goes to the others."""
    backend = Unsure(manifest=fake_manifest(num_heads=1))
    backend.manifest.heads.draft_vocab_size = draft_vocab_size
    side, heads = Side(backend, "portable"), KnownHeads(backend)
    side.prompt_logits([3, 1, 4])
    candidates = set(side.proposed().token_ids[0, 0].tolist())
    heads.draft_ids = [*candidates, *sorted(set(range(50)) - candidates)[:23]]  # half of the tokens that are no candidates
    model = SimpleNamespace(get_output_embeddings=lambda: None, get_input_embeddings=lambda: None)
    torch_side = SimpleNamespace(backbone=SimpleNamespace(model=model), hidden=lambda prompt_ids: None)
    difference = validation._compare_heads([3, 1, 4], side, torch_side, heads)
    unknown = (1 - 0.6 * 1.875 / 2) / 2
    assert difference.max_abs == pytest.approx(-np.log(1 - unknown) if counts else 0, abs=1e-5)


class Sums:
    """A model whose state is the sum of the tokens so far, and whose logits are that sum and the last token."""

    def __init__(self) -> None:
        self.base_model = self.states
        self.cached: list[bool] = []

    def states(self, token_ids: torch.Tensor, use_cache: bool) -> tuple[torch.Tensor]:
        assert not use_cache
        return (token_ids.cumsum(-1)[..., None].float(),)

    def __call__(self, token_ids: torch.Tensor, *, use_cache: bool, past_key_values: Cached | None = None) -> SimpleNamespace:
        self.cached.append(use_cache)
        before = 0 if past_key_values is None else past_key_values.sums
        sums = before + token_ids.cumsum(-1)
        cache = Cached(sums[:, -1:]) if use_cache else None
        return SimpleNamespace(logits=torch.stack([sums, token_ids], -1).float(), past_key_values=cache)


class Cached:
    layers: ClassVar[list[object]] = []

    def __init__(self, sums: torch.Tensor) -> None:
        self.sums = sums

    def batch_repeat_interleave(self, count: int) -> None:
        self.sums = self.sums.repeat_interleave(count, 0)


@pytest.mark.parametrize("keeps_states", [False, True])
def test_the_reference_reads_texts_and_paths(keeps_states: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if keeps_states:
        monkeypatch.setattr(sides, "LinearAttentionCacheLayerMixin", SimpleNamespace)
        monkeypatch.setattr(Cached, "layers", [SimpleNamespace(), None])  # one layer of two
        monkeypatch.setattr(Cached, "batch_repeat_interleave", None)
    model = Sums()
    side = ReferenceSide(SimpleNamespace(model=model))
    assert side.logits([3, 1, 4]).tolist() == [[3, 3], [4, 1], [8, 4]]
    assert model.cached == [False]
    assert side.hidden([3, 1, 4]).tolist() == [[8]]
    found = side.path_logits([3, 1], [[5], [2, 6, 7]])
    assert [rows.tolist() for rows in found] == [[[9, 5]], [[6, 2], [12, 6], [19, 7]]]


@pytest.mark.parametrize("num_processors", [0, 1])
def test_the_reference_changes_logits_as_transformers_generate_does(num_processors: int) -> None:
    """Each row after the tokens before it: here, the number of these is added."""
    asked = []

    class Processors(list):
        def __call__(self, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            asked.append(token_ids.tolist())
            return rows + token_ids.shape[1]

    def get_processors(config: object, **options: object) -> Processors:
        assert options["input_ids_seq_length"] == 2
        return Processors(range(num_processors))

    model = SimpleNamespace(
        generation_config=None, _prepare_special_tokens=lambda *_, **__: None, _get_logits_processor=get_processors
    )
    side = ReferenceSide(SimpleNamespace(model=model))
    side.generation = None
    rows = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = side.processed([7, 8], [9, 4, 6], rows)
    if num_processors:
        assert asked == [[[7, 8]], [[7, 8, 9]], [[7, 8, 9, 4]]]
        assert found.tolist() == [[3.0, 4.0], [6.0, 7.0], [9.0, 10.0]]
    else:
        assert found is rows


def test_only_a_bfloat16_bundle_on_a_cpu_is_copied(tmp_path: Path) -> None:
    manifest = fake_manifest()
    with sides.runnable_bundle(tmp_path, manifest) as found:
        assert found == (tmp_path, manifest, [])
    manifest.precision = "bf16"
    with sides.runnable_bundle(tmp_path, manifest, on_gpu=True) as found:
        assert found == (tmp_path, manifest, [])
    with pytest.raises(BundleError, match="cannot be read"), sides.runnable_bundle(tmp_path, manifest):
        pass


def test_the_tree_that_is_compared_holds_the_heads_candidates() -> None:
    side, prompt = Side(FakeBackend(), "portable"), [3, 1, 4, 1]
    tree = CandidateTree.from_choices([[0], [2], [0, 1], [2, 0], [0, 1, 3]])
    tokens, rows = side.tree_logits(prompt, tree)
    side.prompt_logits(prompt)
    proposed = side.proposed().token_ids[0]
    assert tokens.tolist() == [side.root_id, *(proposed[tree.depths[node] - 1, tree.ranks[node]] for node in range(1, 6))]
    for node in range(6):
        path = [*prompt, *tokens[tree.mask[node]]]
        np.testing.assert_array_equal(rows[node], logits_after([int(token) for token in path]))


def test_what_a_copy_in_float32_reads_and_gives_is_told() -> None:
    facts = fake_manifest().graphs["step"]
    stored = facts.model_copy(
        update={
            "inputs": [
                facts.inputs[0].model_copy(update={"dtype": "bfloat16"}),
                facts.inputs[1].model_copy(update={"dtype": "int64"}),
            ],
            "outputs": [facts.outputs[0].model_copy(update={"dtype": "bfloat16"})],
        }
    )
    found = sides._in_float32(stored)
    assert [tensor.dtype for tensor in (*found.inputs, *found.outputs)] == ["float", "int64", "float"]
    assert [tensor.name for tensor in found.inputs] == [tensor.name for tensor in facts.inputs]
