"""The two sides of a validation: the bundle on its backend, and the model in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from medusa_export.bundle.read_graph import read_graph
from medusa_export.bundle.weights_file import write_weights
from medusa_export.model.checkpoint import Backbone, load_backbone
from medusa_export.model.generation_settings import generation_facts, greedy_config
from medusa_export.passes.portable.upcast import Upcast
from medusa_export.trace.stored_layers import cast_all_but_layers, cast_layers_while_running
from medusa_heads.errors import CheckpointError
from medusa_runtime.arrays import IntArray
from medusa_runtime.backends.base import Backend, HeadOutput
from medusa_runtime.backends.choosing import Placement, open_backend
from medusa_runtime.bundle.cpu import Spin, memory_limit
from medusa_runtime.bundle.manifest import (
    ORT_CPU,
    ORT_CPU_SINGLE,
    ORT_WEBGPU,
    PORTABLE,
    STEP,
    GenerationFacts,
    GraphFacts,
    Manifest,
)
from medusa_runtime.drafting.tree import CandidateTree
from medusa_runtime.errors import BundleError, first_line

Rows = npt.NDArray[np.floating]
SETTLE_TOKENS, SETTLE_ROUNDS = 32, 5
LARGE_PART = 0.4  # of the memory
BF16_NOTE = "ONNX Runtime has no bfloat16 kernels for the CPU, so the graph ran in float32 with the bundle's bfloat16 weights"


def is_large(model: torch.nn.Module) -> bool:
    """Whether a model in float32 would take a good part of the memory. Its layers are then cast one at a time."""
    memory = memory_limit()
    return memory is not None and 4 * num_weights(model) > LARGE_PART * memory


def num_weights(model: torch.nn.Module) -> int:
    """The number of a model's weights."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def runnable_bundle(bundle: Path, manifest: Manifest, *, on_gpu: bool = False) -> Iterator[tuple[Path, Manifest, list[str]]]:
    """The bundle itself, or a temporary float32 copy if the CPU has no kernels for the bundle's precision."""
    if manifest.precision != "bf16" or on_gpu:
        yield bundle, manifest, []
        return
    with TemporaryDirectory(prefix="medusa-export-") as scratch:
        try:
            models = {facts.file: read_graph(bundle / facts.file) for facts in manifest.graphs.values()}
            for model in models.values():
                Upcast()(model)
            write_weights(models.values(), Path(scratch))
        except Exception as error:  # damaged files can make the readers raise anything
            raise BundleError(f"the graphs of {bundle} cannot be read: {first_line(error)}") from error
        for file, model in models.items():
            ir.save(model, Path(scratch) / file)
        graphs = {name: _in_float32(facts) for name, facts in manifest.graphs.items()}
        yield Path(scratch), manifest.model_copy(update={"precision": "fp32", "graphs": graphs}), [BF16_NOTE]


def _in_float32(facts: GraphFacts) -> GraphFacts:
    """What a graph reads and gives after `Upcast`."""
    tensors = {
        part: [
            tensor.model_copy(update={"dtype": "float"}) if tensor.dtype == "bfloat16" else tensor
            for tensor in getattr(facts, part)
        ]
        for part in ("inputs", "outputs")
    }
    return facts.model_copy(update=tensors)


def by_target(manifest: Manifest, backend: str) -> dict[str, Manifest]:
    """A manifest for each kind of graph that the backend can run. The first is the one that it uses for a single sequence.

    Engine bundles have only one kind: their engines.
    """
    if manifest.engine is not None:
        return {manifest.graphs[STEP].target: manifest}
    if backend == ORT_WEBGPU:  # it runs no graph but its own
        return {ORT_WEBGPU: manifest}
    own = [backend, ORT_CPU_SINGLE] if backend == ORT_CPU else [backend]
    known, variants = {PORTABLE}, {}
    for target in (PORTABLE, *own):  # each manifest also has the targets before it, as fallbacks
        known.add(target)
        graphs = {name: facts for name, facts in manifest.graphs.items() if facts.target in known}
        if any(facts.target == target for facts in graphs.values()):
            variants[target] = manifest.model_copy(update={"graphs": graphs})
    return dict(reversed(variants.items()))


class Reference(Protocol):
    """The source of logits that a bundle's logits are compared with."""

    def logits(self, token_ids: Sequence[int]) -> Rows:
        """Logits after every token. [T, V]"""
        ...

    def path_logits(self, prompt_ids: Sequence[int], paths: Sequence[Sequence[int]]) -> list[Rows]:
        """Logits after every token of each continuation of a prompt. For a path of A tokens: [A, V]"""
        ...


class BundleSide:
    """The bundle's logits and answers, computed with its graphs for one target."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        placement: Placement,
        target: str = PORTABLE,
        *,
        num_threads: int = 0,
        spin: Spin = "auto",
        cuda_graphs: bool | None = None,
        allow_engine_code: bool = False,
    ) -> None:
        self.backend: Backend = open_backend(
            bundle,
            manifest,
            placement.backend,
            device=placement.device,
            num_threads=num_threads,
            spin=spin,
            cuda_graphs=cuda_graphs,
            allow_engine_code=allow_engine_code,
        )
        self.target = target
        self._last_row, self._root_id = 0, 0  # both of the last step

    def prompt_logits(self, prompt_ids: Sequence[int], chunk: int | None = None) -> Rows:
        """Logits after every token of a prompt, read at once or in chunks of `chunk` tokens. [T, V]

        Engines evaluate at most as many rows per step as the largest tree has nodes, so chunks are no longer than that.
        """
        self.backend.resize(1, len(prompt_ids))
        limit = self.backend.manifest.limits.max_tree_nodes or len(prompt_ids)
        chunk = min(chunk or len(prompt_ids), limit)
        pieces = []
        for start in range(0, len(prompt_ids), chunk):
            tokens = np.array([prompt_ids[start : start + chunk]], np.int64)
            count = tokens.shape[1]
            output = self.backend.step(
                tokens,
                np.arange(start, start + count)[None],
                np.tri(count, dtype=np.bool_)[None],
                np.array([start]),
                np.arange(count)[None],
                with_logits=True,
            )
            assert output.logits is not None
            pieces.append(output.logits[0].copy())  # the next step overwrites them
            self._last_row, self._root_id = count - 1, int(output.greedy_ids[0, -1])
        return np.concatenate(pieces)

    @property
    def root_id(self) -> int:
        """The most likely token after the last prompt."""
        return self._root_id

    def proposed(self) -> HeadOutput:
        """The heads' candidates after the root token."""
        return self.backend.propose(np.array([self._last_row]), np.array([self._root_id]))

    def logits(self, token_ids: Sequence[int]) -> Rows:
        """See `Reference.logits`."""
        return self.prompt_logits(token_ids)

    def path_logits(self, prompt_ids: Sequence[int], paths: Sequence[Sequence[int]]) -> list[Rows]:
        """See `Reference.path_logits`."""
        return [self.prompt_logits([*prompt_ids, *path])[len(prompt_ids) :] for path in paths]

    def tree_logits(self, prompt_ids: Sequence[int], tree: CandidateTree) -> tuple[IntArray, Rows]:
        """The tokens of a tree of the heads' candidates after a prompt, and the logits after each token. [N], [N, V]"""
        root = self.prompt_logits(prompt_ids)[-1].argmax()[None]
        cached = len(prompt_ids)
        proposed = self.proposed()
        tokens = np.concatenate([root, proposed.token_ids[0, tree.depths[1:] - 1, list(tree.ranks[1:])]])  # [N]
        self.backend.resize(1, cached + tree.num_nodes, [cached])
        output = self.backend.step(
            tokens[None],
            cached + tree.depths[None],
            tree.mask[None],
            np.array([cached]),
            np.arange(tree.num_nodes)[None],
            with_logits=True,
        )
        assert output.logits is not None
        return tokens, output.logits[0].copy()


@dataclass
class ReferenceSide:
    """The model in PyTorch in float32, with the weights rounded as the bundle stores them."""

    backbone: Backbone

    @cached_property
    def generation(self) -> GenerationFacts | None:
        """What the checkpoint's generation settings ask for."""
        return generation_facts(self.backbone)

    @classmethod
    def load(cls, source: str, manifest: Manifest, *, trust_remote_code: bool = False) -> ReferenceSide:
        """Load the checkpoint that the bundle was made from."""
        backbone = load_backbone(source, manifest.precision, trust_remote_code=trust_remote_code, layers_as_stored=True)
        backbone.dtype = torch.float32
        if is_large(backbone.model):
            cast_all_but_layers(backbone.model, torch.float32)
            cast_layers_while_running(backbone.model, torch.float32)
        else:
            backbone.model.float()
        reference = cls(backbone)
        reference.settle()
        return reference

    def settle(self) -> None:
        """Run PyTorch until two passes give the same logits.

        The first forward pass in a process is sometimes off by up to 0.01 in a logit; all later ones are equal
        (docs/decisions/0006-validation-by-one-forward-pass.md).

        Raises:
            CheckpointError: no two passes agree, or logits are no finite numbers.
        """
        token_ids = [token % self.backbone.facts.vocab_size for token in range(min(SETTLE_TOKENS, self.backbone.max_seq_len))]
        before = self.logits(token_ids).copy()
        for _ in range(SETTLE_ROUNDS):
            after = self.logits(token_ids).copy()
            if not np.isfinite(after).all():
                raise CheckpointError(
                    f"PyTorch gives NaN or infinite logits for {self.backbone.source}, so it cannot be a reference: "
                    "its weights are finite, but what it computes with them does not fit float32"
                )
            if np.array_equal(before, after):
                return
            before = after
        raise CheckpointError(
            f"PyTorch gives different logits for {self.backbone.source} at every pass, so it cannot be a reference"
        )

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> Rows:
        """Logits after every token. [T, V]"""
        rows: Rows = self.backbone.model(torch.tensor([list(token_ids)]), use_cache=False).logits[0].numpy()
        return rows

    @torch.no_grad()
    def processed(self, prompt_ids: Sequence[int], answer_ids: Sequence[int], rows: Rows) -> Rows:
        """Logits after the logits processors of Transformers' `generate`, which then takes the largest. [A, V]

        The processors are those of the checkpoint's generation_config.json, without the settings that the runtime does not
        follow; see `medusa_export.model.generation_settings`.

        Args:
            prompt_ids: a prompt.
            answer_ids: its greedy answer, of A tokens.
            rows: the model's own logits for each token of the answer. [A, V]
        """
        model: Any = self.backbone.model
        config = greedy_config(self.backbone, self.generation)
        # `generate` itself calls these two methods. No public one returns its processors.
        model._prepare_special_tokens(  # noqa: SLF001
            config, kwargs_has_attention_mask=True, device="cpu"
        )
        prompt = torch.tensor([list(prompt_ids)])
        processors = model._get_logits_processor(  # noqa: SLF001
            config,
            input_ids_seq_length=len(prompt_ids),
            encoder_input_ids=prompt,
            device="cpu",
            model_kwargs={"attention_mask": torch.ones_like(prompt)},
        )
        if not processors:
            return rows
        token_ids = torch.tensor([[*prompt_ids, *answer_ids]])
        return np.concatenate(
            [
                processors(token_ids[:, : len(prompt_ids) + place], torch.tensor(row[None], dtype=torch.float32)).numpy()
                for place, row in enumerate(rows)
            ]
        )

    @torch.no_grad()
    def path_logits(self, prompt_ids: Sequence[int], paths: Sequence[Sequence[int]]) -> list[Rows]:
        """Logits after every token of each continuation of a prompt. For a path of A tokens: [A, V]

        The prompt runs once. The paths run as one batch on its cache; shorter paths are padded at their end. If the model keeps
        states, which no batch can share, each path runs with its prompt.
        """
        model, longest = self.backbone.model, max(map(len, paths))
        cache = model(torch.tensor([list(prompt_ids)]), use_cache=True).past_key_values
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
            return [self.logits([*prompt_ids, *path])[len(prompt_ids) :] for path in paths]
        cache.batch_repeat_interleave(len(paths))
        padded = torch.tensor([[*path, *[0] * (longest - len(path))] for path in paths])
        logits = model(padded, past_key_values=cache, use_cache=True).logits.numpy()
        return [rows[: len(path)] for rows, path in zip(logits, paths, strict=True)]

    @torch.no_grad()
    def hidden(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The last hidden state after the last token. [1, C]"""
        state: torch.Tensor = self.backbone.model.base_model(torch.tensor([list(token_ids)]), use_cache=False)[0]
        return state[:, -1]
