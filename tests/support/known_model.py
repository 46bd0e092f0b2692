"""The two sides of a validation, made up: a backend that goes wrong where a test says so, and what stands for PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch

from medusa_export.check.sides import BundleSide
from medusa_runtime.backends.base import HeadOutput, StepOutput
from medusa_runtime.bundle.manifest import GenerationFacts, Manifest
from tests.support.fake_backend import FakeBackend, logits_after

GREEDY = "greedy: Medusa = plain = PyTorch"
PROMPTS_READ, TREES_READ = "logits of prompts, whole and in chunks", "logits of tree paths"

Change = Callable[[StepOutput, Sequence[Sequence[int]], bool], StepOutput]


class Changed(FakeBackend):
    """A backend that goes wrong where `change` says so: given a step's output, its contexts, and whether it reads a tree."""

    def __init__(self, manifest: Manifest, change: Change | None = None) -> None:
        super().__init__("sometimes", manifest)
        self.change = change

    def step(self, input_ids, position_ids, tree_mask, cache_lengths, *rest, **options) -> StepOutput:
        output = super().step(input_ids, position_ids, tree_mask, cache_lengths, *rest, **options)
        if self.change is None:
            return output
        is_tree = not np.array_equal(tree_mask[0], np.tri(tree_mask.shape[1], dtype=bool))
        return self.change(output, self.contexts[0], is_tree)


class Side(BundleSide):
    """The bundle's side, with a backend that is made up."""

    def __init__(self, backend: FakeBackend, target: str) -> None:
        self.backend, self.target = backend, target
        self._last_row, self._root_id = 0, 0


class Reference:
    """Stands for PyTorch: the model that the backend has."""

    generation: GenerationFacts | None = None

    def __init__(self, manifest: Manifest) -> None:
        self.backbone = SimpleNamespace(facts=manifest.model, model=torch.nn.Linear(1, 1))

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        return np.stack([logits_after(list(token_ids[:stop])) for stop in range(1, len(token_ids) + 1)])

    def path_logits(self, prompt_ids, paths):
        return [self.logits([*prompt_ids, *path])[len(prompt_ids) :] for path in paths]

    def processed(self, prompt_ids, answer_ids, rows):
        return rows


class Unsure(FakeBackend):
    """Its heads' probabilities of a depth add up to less than 1."""

    def propose(self, rows, root_ids) -> HeadOutput:
        found = super().propose(rows, root_ids)
        return HeadOutput(found.token_ids, found.log_probs - np.float32(np.log(2)))


class KnownHeads:
    """Heads whose probabilities are the backend's, as PyTorch would compute them. Some tokens may be unknown to them."""

    draft_ids = None

    def __init__(self, backend: Unsure) -> None:
        self.backend = backend

    def __call__(self, hidden, lm_head, root_ids, embedding, guesses) -> torch.Tensor:
        found = Unsure.propose(self.backend, np.array([len(self.backend.contexts[0]) - 1]), root_ids.numpy())
        ids, chances = torch.from_numpy(found.token_ids), torch.from_numpy(found.log_probs).exp()
        assert guesses.tolist() == found.token_ids[:, :-1, 0].tolist()
        rest = (1 - chances.sum(-1, keepdim=True)) / (50 - ids.shape[-1])
        return rest.repeat(1, 1, 50).scatter(-1, ids, chances).log()
