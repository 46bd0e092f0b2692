"""The backend for GPUs: cache and buffers on the GPU; one copy up, one copy down and one wait for each step.

An `Executor` runs the graphs: with TensorRT's contexts, or with ONNX Runtime's sessions.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from medusa_runtime.arrays import BoolArray, IntArray
from medusa_runtime.backends.base import HeadOutput, StepOutput, bucket, require_room, require_slots
from medusa_runtime.backends.gpu.cache import DeviceCache
from medusa_runtime.backends.gpu.driver import Gpu
from medusa_runtime.backends.gpu.step import ACCEPTED_HIDDEN, Executor, Shape, StepBuffers, Work
from medusa_runtime.bundle.cache_layout import CacheLayout
from medusa_runtime.bundle.manifest import STEP, Manifest
from medusa_runtime.errors import BackendError, CapacityError, ClosedError

WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # verification steps are padded to these, so that few shapes occur
COLD_RUNS = 2  # the first runs of a shape: engines compile in the first one, and the second one is captured
MAX_WORKS = 64  # shapes of verification steps that are kept ready; beyond them the least recently used one is dropped
log = logging.getLogger(__name__)


class GpuBackend:
    """A bundle's graphs on one GPU.

    If the executor allows it, the work of a step is captured as one CUDA graph when its shape comes the second time, and
    replayed from then on. If the step's graph accepts greedily by itself, a step with `propose_ahead` runs the heads right
    after it, so that a whole decoding step waits for the GPU only once.

    Args:
        manifest: the bundle's.
        gpu: the GPU to run on.
        executor: runs the graphs.
        cuda_graphs: whether to capture steps as CUDA graphs.

    Raises:
        CapacityError: the GPU has no memory for the buffers that the bundle's limits ask for.
    """

    def __init__(self, manifest: Manifest, gpu: Gpu, executor: Executor, *, cuda_graphs: bool = True) -> None:
        self.manifest = manifest
        self.gpu = gpu
        self.num_bytes_down = 0  # copied from the GPU so far
        self._is_closed = False
        self._executor = executor
        self._captures = cuda_graphs and executor.can_be_captured
        self._accepts = ACCEPTED_HIDDEN in {tensor.name for tensor in manifest.graphs[STEP].outputs}
        self._buffers = StepBuffers(gpu, manifest, accepts=self._accepts)
        self._layout = CacheLayout.of(manifest.graphs[STEP])
        self._cache: DeviceCache | None = None
        self._works: OrderedDict[Shape, Work] = OrderedDict()
        self._num_rows = 0  # R of the last step
        self._ahead: tuple[IntArray, IntArray, HeadOutput] | None = None  # rows, root tokens, and the heads' output there
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
        """Bytes of the GPU's memory that this backend holds, by purpose."""
        cache = self._cache.num_bytes if self._cache else 0
        return {"cache": cache, "buffers": self._buffers.num_bytes, **self._executor.memory()}

    def resize(self, num_slots: int, capacity: int, lengths: Sequence[int] = ()) -> None:
        """See `Backend.resize`. An engine's capacity was fixed when it was built, and all of it is allocated.

        If the size stays the same, all addresses stay too, and so do the contexts and CUDA graphs made for them.
        """
        self._require_open()
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
        resized = DeviceCache(self.gpu, self._layout, *size)
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
        self._require_open()
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
        """See `Backend.propose`. If the GPU accepted these rows and roots by itself, the heads' output is here already."""
        self._require_open()
        if (known := self._proposed_ahead(rows, root_ids)) is not None:
            return known
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
        """See `Backend.clear`. Also zeroes up to WIDTHS[-1] entries after `stop`: padding nodes may have written there."""
        self._current_cache().clear(slot, start, min(stop + WIDTHS[-1], self.capacity))

    def save(self) -> None:
        """See `Backend.save`."""
        self._require_open()
        self.gpu.make_current()
        self._executor.save()

    def close(self) -> None:
        """See `Backend.close`. The GPU's context stays: other libraries of this process may use it."""
        if self._is_closed:
            return
        self._is_closed = True
        with suppress(BackendError):  # a GPU that has failed cannot be waited for
            self.gpu.make_current()
            self.gpu.synchronize()
        self._forget()
        self._executor.close()
        self._cache = None
        self._buffers.free()

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError("this backend is closed; open the bundle again")

    def _proposed_ahead(self, rows: IntArray, root_ids: IntArray) -> HeadOutput | None:
        """The heads' output that came with the last step, if it is for these rows and, if the heads read them, these roots."""
        if self._ahead is None:
            return None
        known_rows, known_roots, output = self._ahead
        is_known = np.array_equal(known_rows, rows)
        if self.manifest.heads.reads_root:
            is_known = is_known and np.array_equal(known_roots, root_ids)
        return output if is_known else None

    def _current_cache(self) -> DeviceCache:
        self._require_open()
        self.gpu.make_current()
        assert self._cache is not None
        return self._cache

    def _reserve_limits(self, *, with_logits: bool) -> None:
        """Allocate all buffers now, if the bundle says how large a step can get."""
        limits = self.manifest.limits
        batch, nodes, chunk = limits.max_batch_size, limits.max_tree_nodes, limits.max_prefill_tokens
        if batch is not None and nodes is not None and chunk is not None:
            self._buffers.reserve(batch, max(nodes, chunk), nodes, with_logits=with_logits)

    def _require_limits(self, batch: int, width: int, rows: int) -> None:
        """Refuse a step that no profile of an engine takes: TensorRT's own error would say less."""
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
        """The width that a verification step is padded to; its own width if the cache has no room for the padding nodes."""
        most = self.manifest.limits.max_tree_nodes or WIDTHS[-1]
        padded = min(next((size for size in WIDTHS if size >= width), width), max(most, width))
        return padded if length + padded <= self.capacity else width

    def _work(self, shape: Shape) -> Work:
        """The work of a step of that shape: prepared before, or made now."""
        if (work := self._works.get(shape)) is not None:
            self._works.move_to_end(shape)
            return work
        try:
            if shape.with_logits:
                self._reserve_limits(with_logits=True)  # the host's room for logits: not needed before a step asks for them
            moved = self._buffers.reserve(shape.batch, shape.width, shape.rows, with_logits=shape.with_logits)
        except BaseException:
            self._forget()  # some buffers are new, or gone: what was prepared points at freed memory
            raise
        if moved:
            self._forget()
        assert self._cache is not None
        work = self._buffers.work(shape, self._cache)
        if shape.is_verification:
            self._works[shape] = work
        if len(self._works) > MAX_WORKS:
            oldest = next(iter(self._works))
            del self._works[oldest]  # first its CUDA graph, then the context that the graph was captured from
            self._executor.forget(oldest)
        return work

    def _run(self, work: Work) -> None:
        """Queue a step's work and wait for it. The second run of a shape captures it; later runs launch the CUDA graph."""
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
        """Drop everything that was made for addresses that are no longer valid."""
        self._works.clear()
        self._executor.forget()
        self._ahead = None
