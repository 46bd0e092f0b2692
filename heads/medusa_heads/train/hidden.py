"""The frozen backbone's last hidden states. They are computed once and stored, so that training need not run the backbone.

An answer r[0..R) has R rows. Row n is the hidden state at the position before r[n]: the backbone predicts r[n] from it, and
head k (from 0) must guess r[n + k + 1].
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from medusa_heads.train.examples import Example, digest
from medusa_runtime.bundle.files import write_whole
from medusa_runtime.errors import MedusaError

FACTS_NAME, ROWS_NAME, DONE_NAME = "hidden.json", "hidden.npy", "done.npy"
FORWARD_TOKENS = 4096  # tokens in one forward pass, including padding


class HiddenStates:
    """The rows of many answers, one after the other.

    Attributes:
        rows: the hidden states, in float16, on disk. [P, C]
        next_ids: the next token at each row, that is, the answers one after the other. [P]
        ends: for each row, the end of its answer's rows. [P]
        starts: the first row of each answer. [E]
        lengths: the number of rows of each answer. [E]
        sources: the source of each answer's prompt. [E]
    """

    def __init__(self, rows: npt.NDArray[np.float16], examples: Sequence[Example]) -> None:
        self.lengths = lengths = np.array([len(example.response_ids) for example in examples])
        self.rows = rows
        self.next_ids = np.fromiter((t for e in examples for t in e.response_ids), np.int64, lengths.sum())
        self.ends = np.repeat(np.cumsum(lengths), lengths)
        self.starts = np.cumsum(lengths) - lengths
        self.sources = [example.source for example in examples]

    def targets(self, index: npt.NDArray[np.int64], num_heads: int) -> npt.NDArray[np.int64]:
        """The target of each head at some rows, -1 after the end of the answer. [N] -> [N, K]"""
        wanted = index[:, None] + 1 + np.arange(num_heads)  # [N, K]
        inside = wanted < self.ends[index][:, None]
        return np.where(inside, self.next_ids[np.where(inside, wanted, 0)], -1)


def backbone_digest(model: PreTrainedModel) -> str:
    """SHA-256 over the names and values of all saved parameters and buffers."""
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def cached_hidden_states(
    model: PreTrainedModel,
    examples: Sequence[Example],
    directory: Path,
    *,
    identity: str,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    tell: Callable[[int], None] = lambda _: None,
) -> HiddenStates:
    """The hidden states of examples. Those that the directory already has are reused, the others are computed.

    Args:
        model: the backbone, in inference mode.
        examples: the examples.
        directory: the directory of the states; an interrupted run continues. Rows of other examples or models are replaced.
        identity: the backbone's digest.
        rank: number of this process among the `world` processes that share the work and the directory.
        world: number of processes.
        barrier: waits for all processes.
        tell: called with the number of answer tokens done by all processes.

    Raises:
        MedusaError: a hidden state is not finite in float16.
    """
    shape = (sum(len(example.response_ids) for example in examples), model.config.get_text_config().hidden_size)
    if rank == 0:
        _prepare(directory, {"backbone": identity, "dtype": str(model.dtype), "data": digest(examples)}, shape, len(examples))
    barrier()
    rows = np.lib.format.open_memmap(directory / ROWS_NAME, "r+")
    done = np.lib.format.open_memmap(directory / DONE_NAME, "r+")
    states = HiddenStates(rows, examples)
    lengths = states.lengths
    tell(int(lengths[done].sum()))
    missing = sorted(
        (place for place in range(rank, len(examples), world) if not done[place]), key=lambda p: examples[p].num_tokens
    )
    while missing:
        size = max(1, FORWARD_TOKENS // examples[missing[-1]].num_tokens)
        group, missing = missing[-size:], missing[:-size]
        hidden = response_states(model, [examples[place] for place in group])
        for place, found in zip(group, hidden, strict=True):
            values = found.to(torch.float16).cpu().numpy()
            if not np.isfinite(values).all():
                raise MedusaError("the backbone's hidden states do not fit into float16, so heads cannot be trained for it")
            rows[states.starts[place] :][: len(values)] = values
        rows.flush()  # written to disk before they are marked as done
        done[group] = True
        tell(int(lengths[done].sum()))
    done.flush()
    barrier()
    return HiddenStates(np.lib.format.open_memmap(directory / ROWS_NAME, "r"), examples)


@torch.no_grad()
def response_states(model: PreTrainedModel, examples: Sequence[Example]) -> list[torch.Tensor]:
    """The rows of some answers, from one forward pass. Returns a tensor [R, C] for each answer."""
    tokens = pad_right([[*example.prompt_ids, *example.response_ids[:-1]] for example in examples]).to(model.device)  # [B, T]
    hidden = model.base_model(
        input_ids=tokens, use_cache=False
    ).last_hidden_state  # [B, T, C]; attention is causal, so padding at the end changes nothing
    first = [len(example.prompt_ids) - 1 for example in examples]
    return [row[at:][: len(e.response_ids)] for row, at, e in zip(hidden, first, examples, strict=True)]


def pad_right(sequences: Sequence[Sequence[int]], fill: int = 0) -> torch.Tensor:
    """Sequences as rows of one tensor, padded at their end. [B, T]"""
    padded = torch.full((len(sequences), max(map(len, sequences))), fill, dtype=torch.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return padded


def _prepare(directory: Path, facts: dict[str, str], shape: tuple[int, int], num_examples: int) -> None:
    """Create empty files, unless there are files of the same run."""
    directory.mkdir(parents=True, exist_ok=True)
    place = directory / FACTS_NAME
    if (directory / ROWS_NAME).exists() and place.exists() and json.loads(place.read_text(encoding="utf-8")) == facts:
        return
    place.unlink(missing_ok=True)
    _allocate(directory / ROWS_NAME, np.float16, shape)
    _allocate(directory / DONE_NAME, np.bool_, (num_examples,))
    write_whole(place, json.dumps(facts, indent=2) + "\n")


def _allocate(place: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    """Write an array of zeros with all its blocks allocated: a full disk is an error now instead of a crash later."""
    np.lib.format.open_memmap(place, "w+", dtype, shape).flush()
    if hasattr(os, "posix_fallocate"):  # not on all systems
        with place.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, place.stat().st_size)
