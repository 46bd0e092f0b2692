"""ONNX Runtime on the CPU: the cache is one NumPy array that the graph reads and writes in place."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medusa_runtime.backends.base import HeadOutput, StepOutput, require_room
from medusa_runtime.errors import BackendError, CapacityError, MissingExtraError, first_line
from medusa_runtime.manifest import HEADS, STEP, Manifest
from medusa_runtime.tree import BoolArray, IntArray

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingExtraError("onnxruntime", "cpu") from error

CACHE_DTYPES = {"fp32": np.float32, "fp16": np.float16}
CAPACITY_BUCKET = 64  # slots the cache grows by at least: attention over a portable graph costs what is allocated


class OrtCpuBackend:
    """Runs the portable graphs with ONNX Runtime's CPU provider.

    Args:
        bundle: the bundle's directory.
        num_threads: threads for the products; 0 for one a core.

    Raises:
        BackendError: the bundle's precision has no CPU kernels, or ONNX Runtime refuses a graph.
    """

    def __init__(self, bundle: str | Path, manifest: Manifest, num_threads: int = 0) -> None:
        if manifest.kind != "onnx":
            raise BackendError(f"ort-cpu runs ONNX bundles; {bundle} is a {manifest.kind} bundle")
        if manifest.precision not in CACHE_DTYPES:
            raise BackendError(
                f"ONNX Runtime has no {manifest.precision} kernels for the CPU; export with --dtype fp32 or fp16"
            )
        self.manifest = manifest
        self._dtype = np.dtype(CACHE_DTYPES[manifest.precision])
        self._step_session = _open(Path(bundle) / manifest.graphs[STEP].file, num_threads)
        self._heads_session = _open(Path(bundle) / manifest.graphs[HEADS].file, num_threads)
        _require_contract(self._step_session, manifest, STEP)
        _require_contract(self._heads_session, manifest, HEADS)
        self.epoch = 0
        self._binding = self._step_session.io_binding()
        self._hidden = np.empty((0, 0, manifest.model.hidden_size), self._dtype)  # [B, R, C] of the last step
        self._cache = self._new_cache(batch_size=0, capacity=0)

    @property
    def capacity(self) -> int:
        """Slots a sequence has in the cache now."""
        return int(self._cache.shape[4])

    def reset(self, batch_size: int, capacity: int) -> None:
        """See `Backend.reset`.

        A cache that a longer request left behind shrinks: attention costs what is allocated. Otherwise it is cleared: slots
        beyond a sequence's length weigh nothing in attention, but nothing times the NaN of an earlier request is NaN.
        """
        self.epoch += 1
        if (batch_size, bucket(capacity)) == (self._cache.shape[2], self.capacity):
            self._cache[...] = 0
            return
        self._cache = self._new_cache(batch_size, bucket(capacity))
        self._bind_cache()

    def reserve(self, batch_size: int, capacity: int) -> None:
        """See `Backend.reserve`. The cache grows in buckets; what is cached is kept."""
        if batch_size == self._cache.shape[2] and capacity <= self.capacity:
            return
        grown = self._new_cache(batch_size, bucket(max(capacity, self.capacity)))
        kept = min(batch_size, self._cache.shape[2])
        grown[:, :, :kept, :, : self.capacity] = self._cache[:, :, :kept]
        self._cache = grown
        self._bind_cache()

    def step(
        self,
        input_ids: IntArray,
        position_ids: IntArray,
        tree_mask: BoolArray,
        cache_lengths: IntArray,
        logit_rows: IntArray,
        *,
        with_logits: bool = False,
    ) -> StepOutput:
        """See `Backend.step`."""
        require_room(cache_lengths, input_ids.shape[1], self.capacity)
        binding = self._binding
        binding.bind_cpu_input("input_ids", input_ids)
        binding.bind_cpu_input("position_ids", position_ids)
        binding.bind_cpu_input("tree_mask", tree_mask)
        binding.bind_cpu_input("cache_lengths", cache_lengths)
        binding.bind_cpu_input("logit_rows", logit_rows)
        batch, rows = logit_rows.shape
        greedy_ids = self._bind_output("greedy_ids", (batch, rows), np.dtype(np.int64))
        self._hidden = self._bind_output("hidden", (batch, rows, self.manifest.model.hidden_size), self._dtype)
        logits = None
        if with_logits:
            logits = self._bind_output("logits", (batch, rows, self.manifest.model.vocab_size), self._dtype)
        try:
            self._step_session.run_with_iobinding(binding)
        except Exception as error:  # as for opening
            raise BackendError(f"ONNX Runtime cannot run the step: {first_line(error)}") from error
        finally:
            if with_logits:  # what is bound is filled at every step: forget it again
                self._bind_cache()
        return StepOutput(greedy_ids, logits)

    def propose(self, rows: IntArray) -> HeadOutput:
        """See `Backend.propose`."""
        hidden = self._hidden[np.arange(len(rows)), rows]  # [B, C]
        token_ids, log_probs = self._heads_session.run(["head_ids", "head_log_probs"], {"hidden": hidden})
        return HeadOutput(token_ids, log_probs)

    def commit(self, sequence: int, start: int, nodes: IntArray) -> None:
        """See `Backend.commit`."""
        first = int(np.argmax(nodes != np.arange(len(nodes))))  # what stands in place already is not moved
        if nodes[first] == first:
            return
        slots = self._cache[:, :, sequence]  # [L, 2, Hkv, S, D]
        slots[:, :, :, start + first : start + len(nodes)] = slots[:, :, :, start + nodes[first:]]

    def _new_cache(self, batch_size: int, capacity: int) -> npt.NDArray[np.floating]:
        model = self.manifest.model
        shape = (model.num_layers, 2, batch_size, model.num_kv_heads, capacity, model.head_dim)
        try:
            return np.zeros(shape, self._dtype)  # [L, 2, B, Hkv, S, D]
        except MemoryError as error:
            raise CapacityError(f"no memory for a cache of {batch_size} times {capacity} slots") from error

    def _bind_cache(self) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        for layer, pair in enumerate(self._cache):
            for name, array in zip(("key", "value"), pair, strict=True):
                shared = ort.OrtValue.ortvalue_from_numpy(array)  # a view: the graph writes into the array itself
                self._binding.bind_ortvalue_input(f"past.{layer}.{name}", shared)
                self._binding.bind_ortvalue_output(f"present.{layer}.{name}", shared)

    def _bind_output(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> npt.NDArray:  # type: ignore[type-arg]
        array = np.empty(shape, dtype)
        self._binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        return array


def _num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(path: Path, num_threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads or _num_cores()
    # The idle threads of one session otherwise spin on the cores that the other one needs: a step and its heads took 86 ms
    # where they now take 46 (docs/decisions/0002-threads-of-two-sessions.md).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 2  # warnings stay on: TensorScatter says so when it had to copy the cache
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common base but this
        raise BackendError(f"ONNX Runtime cannot open {path}: {first_line(error)}") from error


def bucket(capacity: int) -> int:
    """The capacity to allocate: up to the next multiple of 64 slots, or of an eighth of the largest power of two within.

    So at most an eighth is unused, and growing copies little beside the steps between (docs/decisions/0008-cache-growth.md).
    """
    step = max(CAPACITY_BUCKET, 1 << max(capacity.bit_length() - 4, 0))
    return -(-capacity // step) * step


def _require_contract(session: ort.InferenceSession, manifest: Manifest, name: str) -> None:
    """Refuse a graph that is not the one the manifest describes, or whose cache is not the model's."""
    model, facts = manifest.model, manifest.graphs[name]
    found = [(tensor.name, list(tensor.shape)) for tensor in session.get_inputs()]
    cache: list[int | str] = ["batch", model.num_kv_heads, "capacity", model.head_dim]
    expected = [(tensor.name, tensor.shape) for tensor in facts.inputs if not tensor.name.startswith("past.")]
    if name == STEP:
        expected += [(f"past.{layer}.{part}", cache) for layer in range(model.num_layers) for part in ("key", "value")]
    for have, want in itertools.zip_longest(found, expected):
        if have != want:
            raise BackendError(f"{facts.file} has the input {have}, the manifest says {want}; export the bundle again")
    if missing := {tensor.name for tensor in facts.outputs} - {tensor.name for tensor in session.get_outputs()}:
        raise BackendError(f"{facts.file} lacks the output {min(missing)}; export the bundle again")
