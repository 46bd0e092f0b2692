"""What all GPU backends share: cache and buffers on the GPU, one copy up, one copy down and one wait a step.

How a graph runs is an `Executor`'s business: TensorRT's contexts, or ONNX Runtime's sessions.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from medusa_runtime.arrays import BoolArray, IntArray
from medusa_runtime.backends.base import HeadOutput, StepOutput, bucket, require_room, require_slots
from medusa_runtime.backends.gpu.cache import DeviceCache
from medusa_runtime.backends.gpu.driver import Gpu
from medusa_runtime.backends.gpu.step import ACCEPTED_HIDDEN, DTYPES, Executor, Shape, StepBuffers, Work
from medusa_runtime.bundle.manifest import STEP, Manifest
from medusa_runtime.errors import BackendError, CapacityError

WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # verification steps are padded to these, so that few shapes occur
COLD_RUNS = 2  # of a shape: engines compile in the first one, and the second one is captured
MAX_WORKS = 64  # shapes of verification steps that are kept ready; then the one goes that was not used longest
log = logging.getLogger(__name__)


class GpuBackend:
    """A bundle's graphs on one GPU.

    From the second step of a shape on, all that it queues is one CUDA graph, where the executor allows that. Where the step's
    graph accepts greedily by itself, the heads follow it at once for those who announce that they will ask: then a whole
    decoding step waits for the GPU once.

    Args:
        manifest: of the bundle.
        gpu: where it runs.
        executor: what runs the graphs.
        cuda_graphs: whether to capture what steps queue.

    Raises:
        CapacityError: the GPU has no memory for the buffers that the bundle's limits ask for.
    """

    def __init__(self, manifest: Manifest, gpu: Gpu, executor: Executor, *, cuda_graphs: bool = True) -> None:
        self.manifest = manifest
        self.gpu = gpu
        self.num_bytes_down = 0  # that came back from the GPU so far
        self._executor = executor
        self._captures = cuda_graphs and executor.can_be_captured
        self._accepts = ACCEPTED_HIDDEN in {tensor.name for tensor in manifest.graphs[STEP].outputs}
        self._buffers = StepBuffers(gpu, manifest, accepts=self._accepts)
        self._cache: DeviceCache | None = None
        self._works: OrderedDict[Shape, Work] = OrderedDict()
        self._num_rows = 0  # R of the last step
        self._ahead: tuple[IntArray, IntArray, HeadOutput] | None = None  # rows, root tokens, and the heads' guesses there
        self.gpu.make_current()
        self._reserve_limits(with_logits=False)

    @property
    def num_slots(self) -> int:
        """See `Backend.num_slots`."""
        return self._cache.num_slots if self._cache else 0

    @property
    def capacity(self) -> int:
        """See `Backend.capacity`."""
        return self._cache.capacity if self._cache else 0

    def memory(self) -> dict[str, int]:
        """Bytes of the GPU's memory that are held here, by purpose."""
        cache = self._cache.num_bytes if self._cache else 0
        return {"cache": cache, "buffers": self._buffers.num_bytes, **self._executor.memory()}

    def resize(self, num_slots: int, capacity: int, lengths: Sequence[int] = ()) -> None:
        """See `Backend.resize`. The capacity of an engine was fixed when it was built, and is allocated whole.

        Where the size stays, so do all addresses, and what is ready for them.
        """
        if (fixed := self.manifest.limits.capacity) is not None and capacity > fixed:
            raise CapacityError(
                f"the engine was built for {fixed} cache entries a sequence, {capacity} are needed; "
                "rebuild it with a larger --max-seq-len"
            )
        self.gpu.make_current()
        size = (num_slots, fixed or bucket(capacity))
        if self._cache is not None and size == (self._cache.num_slots, self._cache.capacity):
            for slot in range(num_slots):
                self._cache.clear(slot, lengths[slot] if slot < len(lengths) else 0, self._cache.capacity)
            return
        item_size = np.dtype(DTYPES[self.manifest.precision]).itemsize
        resized = DeviceCache(self.gpu, self.manifest.model, item_size, *size)
        if self._cache is not None:
            resized.take(self._cache, lengths)
        self._forget()
        self.gpu.synchronize()
        self._cache = resized

    def step(
        self,
        input_ids: IntArray,
        position_ids: IntArray,
        tree_mask: BoolArray,
        cache_lengths: IntArray,
        logit_rows: IntArray,
        *,
        first_slot: int = 0,
        with_logits: bool = False,
        propose_ahead: bool = False,
    ) -> StepOutput:
        """See `Backend.step`."""
        (batch, rows), width = logit_rows.shape, input_ids.shape[1]
        require_slots(first_slot, batch, self.num_slots)
        require_room(cache_lengths, width, self.capacity)
        self._require_limits(batch, width, rows)
        self.gpu.make_current()
        padded = self._padded(width, int(cache_lengths.max())) if rows == width else width
        ahead = propose_ahead and self._accepts
        work = self._work(Shape(first_slot, batch, padded, rows if rows < width else padded, with_logits, ahead))
        self._buffers.fill(work, input_ids, position_ids, tree_mask, cache_lengths, logit_rows)
        self._ahead, self._num_rows = None, work.shape.rows
        self._run(work)
        greedy_ids = self._buffers.greedy_ids(work, rows)
        if ahead:
            accepted = self._buffers.accepted_rows(work)
            self._ahead = accepted, greedy_ids[np.arange(batch), accepted], self._buffers.heads(work)
        return StepOutput(greedy_ids, self._buffers.logits(work, rows), is_warm=work.num_runs > COLD_RUNS)

    def propose(self, rows: IntArray, root_ids: IntArray) -> HeadOutput:
        """See `Backend.propose`. Where the GPU accepted and decided the same by itself, the guesses are here already."""
        if (guesses := self._guessed_ahead(rows, root_ids)) is not None:
            return guesses
        self.gpu.make_current()
        work = self._buffers.heads_work(self._num_rows, rows, root_ids)
        self._run(work)
        return self._buffers.heads(work)

    def commit(self, slot: int, start: int, nodes: IntArray) -> None:
        """See `Backend.commit`."""
        self._current_cache().move(slot, start, nodes)

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Backend.copy`."""
        self._current_cache().copy(source, target, length)

    def swap(self, a: int, b: int, length: int) -> None:
        """See `Backend.swap`."""
        self._current_cache().swap(a, b, length)

    def clear(self, slot: int, start: int, stop: int) -> None:
        """See `Backend.clear`. Behind what the caller knows of there may be padding, which goes too."""
        self._current_cache().clear(slot, start, min(stop + WIDTHS[-1], self.capacity))

    def close(self) -> None:
        """Save what is worth keeping for the next process."""
        self.gpu.make_current()
        self._executor.close()

    def _guessed_ahead(self, rows: IntArray, root_ids: IntArray) -> HeadOutput | None:
        """What the heads guessed with the last step, where that was for these rows and, if it matters to them, these roots."""
        if self._ahead is None:
            return None
        known_rows, known_roots, guesses = self._ahead
        is_known = np.array_equal(known_rows, rows)
        if self.manifest.heads.reads_root:
            is_known = is_known and np.array_equal(known_roots, root_ids)
        return guesses if is_known else None

    def _current_cache(self) -> DeviceCache:
        self.gpu.make_current()
        assert self._cache is not None
        return self._cache

    def _reserve_limits(self, *, with_logits: bool) -> None:
        """Allocate all buffers now, where the bundle says how large a step can get."""
        limits = self.manifest.limits
        batch, nodes, chunk = limits.max_batch_size, limits.max_tree_nodes, limits.max_prefill_tokens
        if batch is not None and nodes is not None and chunk is not None:
            self._buffers.reserve(batch, max(nodes, chunk), nodes, with_logits=with_logits)

    def _require_limits(self, batch: int, width: int, rows: int) -> None:
        """Refuse what no profile of an engine takes: TensorRT would have less to say."""
        limits = self.manifest.limits
        widest = max(limits.max_prefill_tokens or 0, limits.max_tree_nodes or 0) or None
        for what, value, most, option in (
            ("sequences", batch, limits.max_batch_size, "--max-batch-size"),
            ("tokens", width, widest, "--max-prefill-tokens"),
            ("rows to evaluate", rows, limits.max_tree_nodes, "--max-tree-nodes"),
        ):
            if most is not None and value > most:
                raise CapacityError(f"the step has {value} {what}, the engine takes {most}; rebuild it with {option} {value}")

    def _padded(self, width: int, length: int) -> int:
        """How wide a verification step is made, where there is room behind the cache's entries for what pads it."""
        most = self.manifest.limits.max_tree_nodes or WIDTHS[-1]
        padded = min(next((size for size in WIDTHS if size >= width), width), max(most, width))
        return padded if length + padded <= self.capacity else width

    def _work(self, shape: Shape) -> Work:
        """What a step of that shape queues: prepared before, or made now."""
        if (work := self._works.get(shape)) is not None:
            self._works.move_to_end(shape)
            return work
        if shape.with_logits:
            self._reserve_limits(with_logits=True)  # where logits come down: not needed before the first step that wants any
        if self._buffers.reserve(shape.batch, shape.width, shape.rows, with_logits=shape.with_logits):
            self._forget()
        assert self._cache is not None
        work = self._buffers.work(shape, self._cache)
        if shape.is_verification:
            self._works[shape] = work
        if len(self._works) > MAX_WORKS:
            oldest = next(iter(self._works))
            del self._works[oldest]  # its graph goes before what the graph was captured from
            self._executor.forget(oldest)
        return work

    def _run(self, work: Work) -> None:
        """Queue all that a step is, and wait for it. The second time it is captured; from then on it is one launch."""
        if work.graph is None and self._captures and work.num_runs == 1 and work.shape.is_verification:
            self._capture(work)
        work.num_runs += 1
        if work.graph is None:
            self._queue(work)
        else:
            self.gpu.launch(work.graph)
        self.gpu.synchronize()
        self.num_bytes_down += work.down.num_bytes + (work.logits.num_bytes if work.logits else 0)

    def _capture(self, work: Work) -> None:
        try:
            work.graph = self.gpu.capture(lambda: self._queue(work))
        except (BackendError, CapacityError) as error:
            self._captures = False
            log.warning("steps are not captured as CUDA graphs, which makes them slower: %s", error)

    def _queue(self, work: Work) -> None:
        self._buffers.upload(work)
        for call in work.calls:
            self._executor.run(call)
        self._buffers.download(work)

    def _forget(self) -> None:
        """Addresses have changed."""
        self._works.clear()
        self._executor.forget()
        self._ahead = None
