"""`medusa-export heads evaluate`: accuracy of heads on held-out answers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from medusa_export.bundle.export import require_matching
from medusa_export.head_training.torch_devices import load_on_device
from medusa_export.model.tokenizer import load_tokenizer
from medusa_export.progress import count_stage, note, stage
from medusa_heads.evaluate import evaluate as judge
from medusa_heads.formats import load_heads
from medusa_heads.replay import TOP_K, TREE_NODES, Evaluation
from medusa_heads.tokens import CheckpointCodec
from medusa_heads.train.examples import Example, digest, read_examples, split
from medusa_heads.train.hidden import HiddenStates, backbone_digest, cached_hidden_states
from medusa_runtime.drafting.tree import CandidateTree
from medusa_runtime.errors import OptionError


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `medusa-export heads evaluate`; the command's help describes each."""

    heads: Path
    model: str
    data: tuple[Path, ...]
    held_out: float | None = None
    limit: int | None = None
    trees: tuple[Path, ...] = ()
    nodes: tuple[int, ...] = TREE_NODES
    hidden: Path | None = None
    max_length: int = 2048
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    trust_remote_code: bool = False


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Measure heads and candidate trees on a model's answers.

    Raises:
        OptionError: an option cannot be used, or the data is bad.
        CheckpointError: model or heads cannot be loaded, or do not fit each other.
        TreeError: a tree does not fit the heads.
    """
    heads = load_heads(options.heads, note)
    own_digest = heads.digest()
    trees = [CandidateTree.from_file(path) for path in options.trees]
    for tree in trees:
        tree.check_fits(heads.config.num_heads, TOP_K)
    if options.threads:
        torch.set_num_threads(options.threads)
    codec = CheckpointCodec(load_tokenizer(options.model, trust_remote_code=options.trust_remote_code))
    examples = _examples(options, codec)
    backbone = load_on_device(options.model, options.dtype, options.device, trust_remote_code=options.trust_remote_code)
    require_matching(heads, backbone, options.heads)
    if options.max_length > backbone.max_seq_len:
        raise OptionError(
            f"--max-length is {options.max_length}, but the model takes at most {backbone.max_seq_len} tokens; lower it"
        )
    model = backbone.model
    with _hidden_directory(options) as directory, count_stage("hidden states") as tell:
        states = _states(model, examples, directory, tell)
        with stage("evaluate heads and trees"):
            return judge(
                heads.to(model.device, model.dtype),
                model.get_output_embeddings(),
                states,
                digest=own_digest,
                data=digest(examples),
                trees=trees,
                nodes=options.nodes,
                embedding=model.get_input_embeddings(),
            )


def _examples(options: EvaluateOptions, codec: CheckpointCodec) -> list[Example]:
    examples = read_examples(options.data, codec, max_length=options.max_length)
    if options.held_out is not None:
        examples = split(examples, options.held_out)[1]
    if not examples:
        raise OptionError(f"--held-out {options.held_out} leaves no answers to evaluate on; raise it or use more data")
    return examples[: options.limit]


@contextmanager
def _hidden_directory(options: EvaluateOptions) -> Iterator[Path]:
    if options.hidden is not None:
        yield options.hidden
        return
    with tempfile.TemporaryDirectory(prefix="medusa-export-") as directory:
        yield Path(directory)


def _states(model: PreTrainedModel, examples: list[Example], directory: Path, tell: Callable[..., None]) -> HiddenStates:
    total = sum(len(example.response_ids) for example in examples)
    identity = backbone_digest(model)
    return cached_hidden_states(model, examples, directory, identity=identity, tell=lambda done: tell(done, 0, done, total))
