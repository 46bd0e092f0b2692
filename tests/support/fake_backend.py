"""A backend whose model is a function of the visible tokens, so that a wrong mask, slot or length shows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from medusa_runtime.backends.base import HeadOutput, StepOutput, require_room
from medusa_runtime.manifest import GraphFacts, HeadFacts, Limits, Manifest, ModelFacts, Provenance
from medusa_runtime.tree import CandidateTree, prior_tree

VOCAB_SIZE = 50
Skill = Literal["never", "always", "sometimes"]


def next_token(context: Sequence[int]) -> int:
    """The model: what follows a context, decided by all of it."""
    digest = hashlib.sha256(bytes(context)).digest()
    return 1 + digest[0] % (VOCAB_SIZE - 1)


def greedy(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What decoding must give."""
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context))
    return context[len(prompt) :]


def fake_manifest(num_heads: int = 3, top_k: int = 4, tree: CandidateTree | None = None, **limits: int) -> Manifest:
    return Manifest(
        kind="onnx",
        model=ModelFacts(
            name="fake", architecture="Fake", vocab_size=VOCAB_SIZE, hidden_size=8, num_layers=1, num_attention_heads=1,
            num_kv_heads=1, head_dim=8, eos_token_ids=[],
        ),
        heads=HeadFacts(num_heads=num_heads, num_layers=1, top_k=top_k, shared_lm_head=True, sha256=""),
        precision="fp32",
        opset=24,
        limits=Limits(**({"max_seq_len": 200} | limits)),
        graphs={name: GraphFacts(file=f"{name}.onnx", target="portable", inputs=[], outputs=[]) for name in ("step", "heads")},
        tree=(tree or prior_tree(num_heads, top_k, 8)).to_json(),
        files={},
        provenance=Provenance(command=[], versions={}, created=""),
    )  # fmt: skip


class FakeBackend:
    """Keeps the token of every slot where a real one keeps keys and values."""

    def __init__(self, skill: Skill = "sometimes", manifest: Manifest | None = None) -> None:
        self.manifest = manifest or fake_manifest()
        self.skill = skill
        self.slots = np.zeros((0, 0), np.int64)  # [B, S]
        self.epoch = 0
        self.contexts: list[list[list[int]]] = []  # of the last step: [B][R] tokens
        self.steps: list[int] = []  # T of each step

    @property
    def capacity(self) -> int:
        return self.slots.shape[1]

    def reset(self, batch_size: int, capacity: int) -> None:
        self.slots = np.full((batch_size, capacity), -1)
        self.epoch += 1

    def reserve(self, batch_size: int, capacity: int) -> None:
        grown = np.full((batch_size, max(capacity, self.capacity)), -1)
        kept = min(batch_size, len(self.slots))
        grown[:kept, : self.capacity] = self.slots[:kept]
        self.slots = grown

    def step(self, input_ids, position_ids, tree_mask, cache_lengths, logit_rows, *, with_logits=False) -> StepOutput:
        batch, tokens = input_ids.shape
        assert tree_mask.shape == (batch, tokens, tokens)
        require_room(cache_lengths, tokens, self.capacity)
        self.steps.append(tokens)
        self.contexts = []
        for sequence in range(batch):
            length = int(cache_lengths[sequence])
            self.slots[sequence, length : length + tokens] = input_ids[sequence]
            rows = []
            for row in logit_rows[sequence]:
                visible = np.flatnonzero(tree_mask[sequence, row])
                assert position_ids[sequence, row] == min(length + len(visible) - 1, self.manifest.limits.max_seq_len - 1)
                rows.append([*self.slots[sequence, :length].tolist(), *input_ids[sequence, visible].tolist()])
            self.contexts.append(rows)
        return StepOutput(np.array([[next_token(bytes_of(row)) for row in rows] for rows in self.contexts]))

    def propose(self, rows) -> HeadOutput:
        heads, width = self.manifest.heads.num_heads, self.manifest.heads.top_k
        ids = np.zeros((len(rows), heads, width), np.int64)
        for sequence, row in enumerate(rows):
            context = bytes_of(self.contexts[sequence][row])
            future = greedy(context, heads + 1)[1:]
            for head, token in enumerate(future):
                ids[sequence, head] = self._candidates(token, context, head, width)
        return HeadOutput(ids, np.zeros(ids.shape, np.float32))

    def commit(self, sequence, start, nodes) -> None:
        self.slots[sequence, start : start + len(nodes)] = self.slots[sequence, start + nodes]

    def _candidates(self, token: int, context: list[int], head: int, width: int) -> list[int]:
        others = [other % VOCAB_SIZE for other in range(token + 1, token + width + 1)]
        if self.skill == "never":
            return others
        rank = 0 if self.skill == "always" else (sum(context) + head) % (width + 2)
        return [*others[:rank], token, *others[rank:]][:width]


def bytes_of(row: list[int]) -> list[int]:
    return [token % 256 for token in row]  # -1, a slot never written, would show as 255
