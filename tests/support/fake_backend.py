"""A backend whose model is a function of the visible tokens, so that a wrong mask, slot or length shows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from medusa_export.bundle.tree_shapes import prior_tree
from medusa_runtime.backends.base import HeadOutput, StepOutput, require_room, require_slots
from medusa_runtime.bundle.manifest import GraphFacts, HeadFacts, Limits, Manifest, ModelFacts, Provenance, TensorFacts
from medusa_runtime.drafting.tree import CandidateTree

VOCAB_SIZE = 50
Skill = Literal["never", "always", "sometimes"]


def next_token(context: Sequence[int]) -> int:
    """The model: what follows a context, decided by all of it."""
    digest = hashlib.sha256(bytes(context)).digest()
    return 1 + digest[0] % (VOCAB_SIZE - 1)


def repeating_token(context: Sequence[int]) -> int:
    """Another model, to be patched in for `next_token`: the last two tokens decide, so that it comes to repeat itself."""
    digest = hashlib.sha256(bytes(context[-2:])).digest()
    return 1 + digest[0] % (VOCAB_SIZE - 1)


def greedy(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What decoding must give."""
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context))
    return context[len(prompt) :]


def fake_step() -> GraphFacts:
    """A step graph with the smallest cache."""
    past, present = (
        [TensorFacts(name=f"{when}.0.{part}", dtype="float", shape=["batch", 1, "capacity", 8]) for part in ("key", "value")]
        for when in ("past", "present")
    )
    return GraphFacts(file="step.onnx", target="portable", inputs=past, outputs=present)


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
        graphs={"step": fake_step(), "heads": GraphFacts(file="heads.onnx", target="portable", inputs=[], outputs=[])},
        tree=(tree or prior_tree(num_heads, top_k, 8)).to_json(),
        files={},
        provenance=Provenance(command=[], versions={}, created=""),
    )  # fmt: skip


def logits_after(context: Sequence[int]) -> np.ndarray:
    """What the model thinks of each token; `next_token` is its favourite."""
    digest = hashlib.sha256(bytes(context)).digest()
    logits = np.random.default_rng(list(digest)).normal(0, 1.5, VOCAB_SIZE)
    logits[next_token(context)] = logits.max() + 0.5
    return logits.astype(np.float32)


class FakeBackend:
    """Keeps the token of every entry where a real one keeps keys and values."""

    def __init__(self, skill: Skill = "sometimes", manifest: Manifest | None = None) -> None:
        self.manifest = manifest or fake_manifest()
        self.skill = skill
        self.entries = np.zeros((0, 0), np.int64)  # [slots, S]; -1 where nothing was written
        self.contexts: list[list[list[int]]] = []  # of the last step: [B][R] tokens
        self.steps: list[tuple[int, int]] = []  # B and T of each step
        self.fails: Callable[[FakeBackend], None] | None = None  # called before each step

    @property
    def num_slots(self) -> int:
        return len(self.entries)

    @property
    def capacity(self) -> int:
        return self.entries.shape[1]

    def resize(self, num_slots: int, capacity: int, lengths: Sequence[int] = ()) -> None:
        resized = np.full((num_slots, capacity), -1)
        for slot, length in enumerate(lengths):
            resized[slot, :length] = self.entries[slot, :length]
        self.entries = resized

    def step(
        self,
        input_ids,
        position_ids,
        tree_mask,
        cache_lengths,
        logit_rows,
        *,
        first_slot=0,
        with_logits=False,
        propose_ahead=False,
    ) -> StepOutput:
        batch, tokens = input_ids.shape
        assert tree_mask.shape == (batch, tokens, tokens)
        require_slots(first_slot, batch, self.num_slots)
        require_room(cache_lengths, tokens, self.capacity)
        self.steps.append((batch, tokens))
        if self.fails is not None:
            self.fails(self)
        self.contexts = []
        for sequence in range(batch):
            length, slot = int(cache_lengths[sequence]), first_slot + sequence
            self.entries[slot, length : length + tokens] = input_ids[sequence]
            rows = []
            for row in logit_rows[sequence]:
                visible = np.flatnonzero(tree_mask[sequence, row])
                limit = self.manifest.limits.max_seq_len - 1
                is_padding = row > 0 and len(visible) == 1 and position_ids[sequence, row] == min(length, limit)
                assert is_padding or position_ids[sequence, row] == min(length + len(visible) - 1, limit)
                rows.append([*self.entries[slot, :length].tolist(), *input_ids[sequence, visible].tolist()])
            self.contexts.append(rows)
        greedy_ids = np.array([[next_token(bytes_of(row)) for row in rows] for rows in self.contexts])
        logits = np.array([[logits_after(bytes_of(row)) for row in rows] for rows in self.contexts]) if with_logits else None
        return StepOutput(greedy_ids, logits)

    def propose(self, rows, root_ids) -> HeadOutput:
        heads, width = self.manifest.heads.num_heads, self.manifest.heads.top_k
        ids = np.zeros((len(rows), heads, width), np.int64)
        for sequence, (row, root_id) in enumerate(zip(rows, root_ids, strict=True)):
            context = bytes_of(self.contexts[sequence][row])
            future = greedy([*context, root_id], heads)
            for head, token in enumerate(future):
                ids[sequence, head] = self._candidates(token, context, head, width)
        chances = 0.6 * 0.5 ** np.arange(width) * np.linspace(1, 0.5, heads)[:, None]  # [K, M]
        return HeadOutput(ids, np.log(np.repeat(chances[None], len(rows), axis=0)).astype(np.float32))

    def commit(self, slot, start, nodes) -> None:
        self.entries[slot, start : start + len(nodes)] = self.entries[slot, start + nodes]

    def copy(self, source, target, length) -> None:
        self.entries[target, :length] = self.entries[source, :length]

    def swap(self, a, b, length) -> None:
        self.entries[[a, b], :length] = self.entries[[b, a], :length]

    def clear(self, slot, start, stop) -> None:
        self.entries[slot, start:stop] = -1

    def save(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _candidates(self, token: int, context: list[int], head: int, width: int) -> list[int]:
        others = [other % VOCAB_SIZE for other in range(token + 1, token + width + 1)]
        if self.skill == "never":
            return others
        rank = 0 if self.skill == "always" else (sum(context) + head) % (width + 2)
        return [*others[:rank], token, *others[rank:]][:width]


def bytes_of(row: list[int]) -> list[int]:
    return [token % 256 for token in row]  # -1, an entry never written, would show as 255
