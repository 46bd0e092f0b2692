"""`medusa-export heads ngrams`: draft n-grams for existing heads."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from medusa_export.bundle.export import require_matching
from medusa_export.head_training.torch_devices import load_on_device
from medusa_export.head_training.training import examples_without
from medusa_export.model.tokenizer import load_tokenizer
from medusa_export.progress import count_stage, note, stage
from medusa_heads.formats import load_heads, native
from medusa_heads.ngrams import draft_ngrams
from medusa_heads.tokens import CheckpointCodec
from medusa_heads.train.examples import split
from medusa_heads.train.hidden import backbone_digest, cached_hidden_states
from medusa_runtime.bundle.files import replacing
from medusa_runtime.drafting.ngrams import NGRAMS_NAME
from medusa_runtime.errors import OptionError


@dataclass(frozen=True)
class NGramOptions:
    """Options of `medusa-export heads ngrams`; the command's help describes each."""

    heads: Path
    model: str
    data: tuple[Path, ...]
    exclude: tuple[Path, ...] = ()
    held_out: float = 0.02
    max_length: int = 2048
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    trust_remote_code: bool = False


def make_ngrams(options: NGramOptions) -> Path:
    """Count n-grams and write them to the heads' directory. Returns the file.

    Raises:
        OptionError: the heads are not in this project's format, or the data is bad or too small.
        CheckpointError: model or heads cannot be loaded, or do not fit each other.
    """
    if not (options.heads / native.WEIGHTS_NAME).is_file():
        raise OptionError(f"{options.heads} is not a directory of heads as `train` writes them; only those can hold n-grams")
    heads = load_heads(options.heads)
    if options.threads:
        torch.set_num_threads(options.threads)
    codec = CheckpointCodec(load_tokenizer(options.model, trust_remote_code=options.trust_remote_code))
    examples, _ = examples_without(options.data, options.exclude, codec, options.max_length)
    training, held_out = split(examples, options.held_out)
    backbone = load_on_device(options.model, options.dtype, options.device, trust_remote_code=options.trust_remote_code)
    require_matching(heads, backbone, options.heads)
    model = backbone.model
    states = None
    with tempfile.TemporaryDirectory(prefix="medusa-export-") as directory, count_stage("hidden states") as tell:
        if held_out:
            total, identity = sum(len(example.response_ids) for example in held_out), backbone_digest(model)
            states = cached_hidden_states(
                model, held_out, Path(directory), identity=identity, tell=lambda done: tell(done, 0, done, total)
            )
        with stage("count and fit"):
            heads = heads.to(model.device, model.dtype)
            ngrams = draft_ngrams(heads, model.get_output_embeddings(), training, states, model.get_input_embeddings())
    if ngrams is None:
        raise OptionError("the answers are too short or too few to count n-grams; use more data")
    note(f"{int((ngrams.cells > 0).sum())} of {len(ngrams.cells)} cells of the table hold an n-gram")
    target = options.heads / NGRAMS_NAME
    with replacing(target) as temporary:
        ngrams.save(temporary)
    return target
