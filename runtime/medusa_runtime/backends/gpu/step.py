"""A step on a GPU: the memory of its inputs and results, and the graph calls it consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from medusa_runtime.arrays import BoolArray, IntArray
from medusa_runtime.backends.base import HeadOutput
from medusa_runtime.backends.gpu.buffers import Layout, Packet, Tensor
from medusa_runtime.backends.gpu.cache import DeviceCache
from medusa_runtime.backends.gpu.driver import CudaGraph, Gpu
from medusa_runtime.bundle.manifest import HEADS, PREFILL, STEP, VERIFY, Manifest

DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}  # NumPy has no bfloat16
# outputs of a step graph that accepts by itself
ACCEPTED_ROWS, ACCEPTED_IDS, ACCEPTED_HIDDEN = "accepted_rows", "accepted_ids", "accepted_hidden"


@dataclass(frozen=True)
class Shape:
    """Everything that distinguishes one step from another except the numbers in its inputs."""

    first_slot: int
    batch: int
    width: int  # T
    rows: int  # R
    with_logits: bool
    propose_ahead: bool

    @property
    def is_verification(self) -> bool:
        """Whether all rows are evaluated. Such shapes come again and again; those of prompts rarely do."""
        return self.rows == self.width


@dataclass(frozen=True)
class Call:
    """One run of a graph, with the tensors that are bound for it."""

    graph: str  # STEP or HEADS
    profile: str  # PREFILL, VERIFY or HEADS
    key: Shape | None  # of a verification step, for which an executor may keep things until the shape's next run
    tensors: dict[str, Tensor]


class Executor(Protocol):
    """Runs graphs on a GPU's stream."""

    can_be_captured: bool  # whether what `run` queues can be part of a CUDA graph

    def run(self, call: Call) -> None:
        """Queue a graph.

        Raises:
            BackendError: the graph cannot be run.
        """
        ...

    def forget(self, key: Shape | None = None) -> None:
        """Drop what is kept for calls with that key, or for all calls if no key is given."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes of the GPU's memory that it holds, by purpose."""
        ...

    def save(self) -> None:
        """Keep on disk what lets the next process start faster. Runs are still possible afterwards."""
        ...

    def close(self) -> None:
        """Free the graphs and everything made for them. No run is possible afterwards, but closing again does nothing."""
        ...


@dataclass
class Work:
    """A step of one shape, ready to be queued any number of times."""

    shape: Shape
    calls: list[Call]
    up: Layout
    down: Layout
    logits: Layout | None
    num_runs: int = 0
    graph: CudaGraph | None = None


class StepBuffers:
    """Memory for the inputs and results of steps.

    Hidden rows stay on the GPU, and so do logits unless a step asks for them. Token ids and a few numbers are downloaded.

    Args:
        gpu: the GPU that holds them.
        manifest: the bundle's.
        accepts: whether the step's graph accepts greedily by itself.
    """

    def __init__(self, gpu: Gpu, manifest: Manifest, *, accepts: bool) -> None:
        self._gpu, self._manifest, self._accepts = gpu, manifest, accepts
        self._dtype = np.dtype(DTYPES[manifest.precision])
        self._fetches_all = manifest.kind == "tensorrt"  # an engine writes all its outputs, needed or not
        self._up, self._down = Packet(gpu, "a step's inputs"), Packet(gpu, "a step's results")
        self._logits = Packet(gpu, "logits")
        self._hidden = Packet(gpu, "hidden states")  # [B, R, C] of the last step
        self._heads_input = Packet(gpu, "the heads' input")  # [B, C]
        self._roots = Packet(gpu, "root tokens")  # [B]; at one address, whether the step's graph writes them or the host
        self._packets = (self._up, self._down, self._logits, self._hidden, self._heads_input, self._roots)
        self._tells_roots = ACCEPTED_IDS in {tensor.name for tensor in manifest.graphs[STEP].outputs}

    @property
    def num_bytes(self) -> int:
        """Bytes on the GPU."""
        return sum(packet.num_bytes for packet in self._packets)

    def free(self) -> None:
        """Give all memory back. No queued work may use it."""
        for packet in self._packets:
            packet.free()

    def reserve(self, batch: int, width: int, rows: int, *, with_logits: bool) -> bool:
        """Make room for a step of this size. No queued work may use the buffers. Returns whether addresses changed."""
        hidden = batch * self._manifest.model.hidden_size * self._dtype.itemsize
        changed = [
            self._up.reserve(self._up_layout(batch, width, rows).num_bytes),
            self._down.reserve(self._down_layout(batch, rows, with_heads=True).num_bytes),
            self._hidden.reserve(rows * hidden, on_host=False),
            self._heads_input.reserve(hidden, on_host=False),
            self._roots.reserve(self._roots_layout(batch).num_bytes),
        ]
        if with_logits or self._fetches_all:
            changed.append(self._logits.reserve(self._logits_layout(batch, rows).num_bytes, on_host=with_logits))
        return any(changed)

    def work(self, shape: Shape, cache: DeviceCache) -> Work:
        """The work of a step of that shape."""
        up = self._up_layout(shape.batch, shape.width, shape.rows)
        down = self._down_layout(shape.batch, shape.rows, with_heads=shape.propose_ahead)
        logits = self._logits_layout(shape.batch, shape.rows)
        calls = [self._step_call(shape, cache, up, down, logits)]
        if shape.propose_ahead:
            calls.append(self._heads_call(shape.batch, down, calls[0].key))
        return Work(shape, calls, up, down, logits if shape.with_logits else None)

    def heads_work(self, num_rows: int, rows: IntArray, root_ids: IntArray) -> Work:
        """The heads alone, at one of the last step's rows for each sequence. Queues the copies of their inputs now.

        Args:
            num_rows: how many rows the last step evaluated.
            rows: the row that the heads read, of each sequence. [B]
            root_ids: the token that was decided after that row. [B]
        """
        batch = len(rows)
        size = self._manifest.model.hidden_size * self._dtype.itemsize
        for sequence, row in enumerate(rows.tolist()):
            source = self._hidden.address + (sequence * num_rows + row) * size
            self._gpu.copy(self._heads_input.address + sequence * size, source, size)
        if self._manifest.heads.reads_root:
            roots = self._roots_layout(batch)
            self._roots.host(roots.places["root_ids"])[:] = root_ids
            self._roots.upload(roots)
        down = Layout.of(**self._heads_arrays(batch))
        shape = Shape(0, batch, 0, num_rows, with_logits=False, propose_ahead=False)
        return Work(shape, [self._heads_call(batch, down, key=None)], Layout.of(), down, None)

    def fill(
        self,
        work: Work,
        input_ids: IntArray,
        position_ids: IntArray,
        tree_mask: BoolArray,
        cache_lengths: IntArray,
        logit_rows: IntArray,
    ) -> None:
        """Copy a step's inputs into the upload buffer.

        Padding nodes attend to themselves and the cache, and no node attends to them.
        """
        places, width, rows = work.up.places, input_ids.shape[1], logit_rows.shape[1]
        ids, positions = self._up.host(places["input_ids"]), self._up.host(places["position_ids"])
        mask, evaluated = self._up.host(places["tree_mask"]), self._up.host(places["logit_rows"])
        if work.shape.width > width:
            ids[:, width:], positions[:, width:], mask[:] = 0, position_ids[:, :1], np.eye(work.shape.width, dtype=np.bool_)
            evaluated[:, rows:] = np.arange(rows, work.shape.rows)
        ids[:, :width], positions[:, :width], mask[:, :width, :width] = input_ids, position_ids, tree_mask
        evaluated[:, :rows] = logit_rows
        self._up.host(places["cache_lengths"])[:] = cache_lengths

    def upload(self, work: Work) -> None:
        """Queue the copy of the inputs to the GPU."""
        if work.up.places:
            self._up.upload(work.up)

    def download(self, work: Work) -> None:
        """Queue the copy of the results to the host."""
        self._down.download(work.down)
        if work.logits is not None:
            self._logits.download(work.logits)

    def greedy_ids(self, work: Work, rows: int) -> IntArray:
        """The most likely next tokens that were downloaded. [B, rows]"""
        return self._down.host(work.down.places["greedy_ids"])[:, :rows].copy()

    def accepted_rows(self, work: Work) -> IntArray:
        """The rows that the step's graph accepted by itself; the heads have read these. [B]"""
        return self._down.host(work.down.places[ACCEPTED_ROWS]).copy()

    def heads(self, work: Work) -> HeadOutput:
        """The heads' candidates that were downloaded."""
        token_ids, log_probs = (self._down.host(work.down.places[name]).copy() for name in ("head_ids", "head_log_probs"))
        return HeadOutput(token_ids, log_probs)

    def logits(self, work: Work, rows: int) -> npt.NDArray[np.floating[Any]] | None:
        """The downloaded logits; None if the step did not ask for them. The next step overwrites them. [B, rows, V]"""
        if work.logits is None:
            return None
        logits = self._logits.host(work.logits.places["logits"])[:, :rows]
        if self._manifest.precision == "bf16":  # the upper half of a float32
            return (logits.astype(np.uint32) << 16).view(np.float32)
        return logits

    def _step_call(self, shape: Shape, cache: DeviceCache, up: Layout, down: Layout, logits: Layout) -> Call:
        model, batch = self._manifest.model, shape.batch
        tensors = {name: self._up.tensor(place) for name, place in up.places.items()}
        for cached, shared in cache.tensors(shape.first_slot, batch):
            tensors[cached.past] = tensors[cached.present] = shared
        tensors["greedy_ids"] = self._down.tensor(down.places["greedy_ids"])
        tensors["hidden"] = Tensor(self._hidden.address, (batch, shape.rows, model.hidden_size))
        if shape.with_logits or self._fetches_all:
            tensors["logits"] = self._logits.tensor(logits.places["logits"])
        if self._accepts:
            tensors[ACCEPTED_ROWS] = self._down.tensor(down.places[ACCEPTED_ROWS])
            tensors[ACCEPTED_HIDDEN] = Tensor(self._heads_input.address, (batch, model.hidden_size))
        if self._tells_roots:
            tensors[ACCEPTED_IDS] = self._root_ids(batch)
        most = self._manifest.limits.max_tree_nodes or shape.width
        is_verification = shape.is_verification and shape.width <= most
        return Call(STEP, VERIFY if is_verification else PREFILL, shape if is_verification else None, tensors)

    def _heads_call(self, batch: int, down: Layout, key: Shape | None) -> Call:
        tensors = {name: self._down.tensor(down.places[name]) for name in ("head_ids", "head_log_probs")}
        tensors["hidden"] = Tensor(self._heads_input.address, (batch, self._manifest.model.hidden_size))
        if self._manifest.heads.reads_root:
            tensors["root_ids"] = self._root_ids(batch)
        return Call(HEADS, HEADS, key, tensors)

    def _up_layout(self, batch: int, width: int, rows: int) -> Layout:
        return Layout.of(
            input_ids=((batch, width), np.int64),
            position_ids=((batch, width), np.int64),
            tree_mask=((batch, width, width), np.bool_),
            cache_lengths=((batch,), np.int64),
            logit_rows=((batch, rows), np.int64),
        )

    def _down_layout(self, batch: int, rows: int, *, with_heads: bool) -> Layout:
        heads = self._heads_arrays(batch) if with_heads else {}  # first, so that their addresses do not depend on the rows
        accepted = {ACCEPTED_ROWS: ((batch,), np.int64)} if self._accepts else {}
        return Layout.of(**heads, **accepted, greedy_ids=((batch, rows), np.int64))

    def _root_ids(self, batch: int) -> Tensor:
        return self._roots.tensor(self._roots_layout(batch).places["root_ids"])

    def _roots_layout(self, batch: int) -> Layout:
        return Layout.of(root_ids=((batch,), np.int64))

    def _heads_arrays(self, batch: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        shape = (batch, self._manifest.heads.num_heads, self._manifest.heads.top_k)
        return {"head_ids": (shape, np.int64), "head_log_probs": (shape, np.float32)}

    def _logits_layout(self, batch: int, rows: int) -> Layout:
        return Layout.of(logits=((batch, rows, self._manifest.model.vocab_size), self._dtype))
