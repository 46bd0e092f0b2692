"""ONNX Runtime on the CPU: the graph reads and writes the cache in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medusa_runtime.arrays import BoolArray, IntArray
from medusa_runtime.backends.base import HeadOutput, StepOutput, bucket, require_room, require_slots
from medusa_runtime.backends.host_cache import HostCache
from medusa_runtime.bundle.cache_layout import CacheLayout
from medusa_runtime.bundle.cpu import Spin, check_num_threads, check_spin
from medusa_runtime.bundle.manifest import HEADS, ORT_CPU, STEP, Manifest
from medusa_runtime.ending import native_run
from medusa_runtime.errors import BackendError, ClosedError, MissingExtraError, first_line

try:
    from medusa_runtime.backends.ort_library import ort
except ImportError as error:
    raise MissingExtraError("onnxruntime", "cpu") from error

from medusa_runtime.backends.ort_sessions import StepSessions, open_graph, trim_memory

DTYPES = {"fp32": np.float32, "fp16": np.float16}
Inputs = dict[str, npt.NDArray[np.generic]]


class OrtCpuBackend:
    """Runs a bundle's graphs with ONNX Runtime's CPU provider: those made for it, or else the portable ones.

    Args:
        bundle: the bundle's directory.
        manifest: the bundle's manifest.
        num_threads: threads of each matrix product; 0 for one per core.
        spin: how these threads wait for work, see `open_backend`.

    Raises:
        OptionError: num_threads is out of range, or spin is unknown.
        BackendError: the bundle's precision has no CPU kernels, or ONNX Runtime refuses a graph.
    """

    def __init__(self, bundle: str | Path, manifest: Manifest, num_threads: int = 0, spin: Spin = "auto") -> None:
        if manifest.kind != "onnx":
            raise BackendError(f"ort-cpu runs ONNX bundles; {bundle} is a {manifest.kind} bundle")
        if manifest.precision not in DTYPES:
            raise BackendError(
                f"ONNX Runtime has no {manifest.precision} kernels for the CPU; export with --dtype fp32 or fp16, "
                "or run it on a GPU (medusa-export doctor says what that takes)"
            )
        self.manifest = manifest
        self._dtype = np.dtype(DTYPES[manifest.precision])
        bundle, num_threads, spin = Path(bundle).resolve(), check_num_threads(num_threads), check_spin(spin)
        self._bindings: dict[tuple[int, int, bool], ort.IOBinding] = {}  # by first slot, B, and whether logits are bound
        self._steps: StepSessions | None = StepSessions(bundle, manifest, num_threads, spin, self._bindings.clear)
        self._heads_session = open_graph(bundle, manifest, HEADS, manifest.graph(HEADS, ORT_CPU), num_threads, spin)
        self._hidden = np.empty((0, 0, manifest.model.hidden_size), self._dtype)  # [B, R, C] of the last step
        self._logits = np.empty(0, self._dtype)  # room for the largest logits asked for so far
        self._cache = HostCache(CacheLayout.of(manifest.graphs[STEP]), num_slots=0, capacity=0)

    @property
    def num_slots(self) -> int:
        """See `Backend.num_slots`."""
        return self._cache.num_slots

    @property
    def capacity(self) -> int:
        """See `Backend.capacity`."""
        return self._cache.capacity

    def resize(self, num_slots: int, capacity: int, lengths: Sequence[int] = ()) -> None:
        """See `Backend.resize`. The capacity is rounded up to a bucket; memory that no entry is written to is not taken."""
        steps = self._open_steps()
        resized = HostCache(self._cache.layout, num_slots, bucket(capacity))
        if num_slots == 1:
            steps.want_one()
        resized.take(self._cache, lengths)
        self._cache = resized
        self._bindings.clear()

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
        propose_ahead: bool = False,  # noqa: ARG002 - there is nothing to wait for on a CPU
    ) -> StepOutput:
        """See `Backend.step`."""
        steps = self._open_steps()
        batch, rows = logit_rows.shape
        require_slots(first_slot, batch, self.num_slots)
        require_room(cache_lengths, input_ids.shape[1], self.capacity)
        ran_several = steps.runs_several
        steps.prepare(batch)
        inputs: Inputs = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "tree_mask": tree_mask,
            "cache_lengths": cache_lengths,
            "logit_rows": logit_rows,
        }
        self._hidden = np.empty((batch, rows, self.manifest.model.hidden_size), self._dtype)
        greedy_ids = np.empty((batch, rows), np.int64)
        outputs: Inputs = {"greedy_ids": greedy_ids, "hidden": self._hidden}
        logits = self._logits_room(batch, rows) if with_logits else None
        if logits is not None:
            outputs["logits"] = logits
        if batch == 1 or steps.runs_several:
            self._run(first_slot, batch, inputs, outputs)
        else:
            for row in range(batch):
                one = slice(row, row + 1)
                self._run(
                    first_slot + row,
                    1,
                    {name: array[one] for name, array in inputs.items()},
                    {name: array[one] for name, array in outputs.items()},
                )
        finite = np.isfinite(self._hidden.sum(-1, dtype=np.float32))  # a sum over a NaN or infinity is none either
        is_warm = steps.runs_several == ran_several and not steps.is_changing
        return StepOutput(greedy_ids, logits, is_warm=is_warm, finite=finite)

    def propose(self, rows: IntArray, root_ids: IntArray) -> HeadOutput:
        """See `Backend.propose`."""
        self._open_steps()
        inputs = {"hidden": self._hidden[np.arange(len(rows)), rows]}  # [B, C]
        if self.manifest.heads.reads_root:
            inputs["root_ids"] = root_ids
        with native_run():
            token_ids, log_probs = self._heads_session.run(["head_ids", "head_log_probs"], inputs)
        return HeadOutput(token_ids, log_probs)

    def commit(self, slot: int, start: int, nodes: IntArray) -> None:
        """See `Backend.commit`."""
        self._cache.move(slot, start, nodes)

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Backend.copy`."""
        self._cache.copy(source, target, length)

    def swap(self, a: int, b: int, length: int) -> None:
        """See `Backend.swap`."""
        self._cache.swap(a, b, length)

    def clear(self, slot: int, start: int, stop: int) -> None:
        """See `Backend.clear`."""
        self._cache.clear(slot, start, stop)

    def save(self) -> None:
        """See `Backend.save`: there is nothing to keep."""

    def close(self) -> None:
        """See `Backend.close`."""
        if self._steps is None:
            return
        self._steps.close()
        self._bindings.clear()
        self._steps = None
        del self._heads_session
        self._hidden, self._logits = self._hidden[:0].copy(), self._logits[:0].copy()
        self._cache = HostCache(self._cache.layout, num_slots=0, capacity=0)
        trim_memory()

    def _open_steps(self) -> StepSessions:
        if self._steps is None:
            raise ClosedError("this backend is closed")
        return self._steps

    def _run(self, first_slot: int, batch: int, inputs: Inputs, outputs: Inputs) -> None:
        """Run the step's graph on some neighbouring slots."""
        session = self._open_steps().session
        binding = self._binding(session, first_slot, batch, with_logits="logits" in outputs)
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        try:
            with native_run():
                session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's errors have no common base but this
            raise BackendError(f"ONNX Runtime cannot run the step: {first_line(error)}") from error

    def _binding(self, session: ort.InferenceSession, first_slot: int, batch: int, *, with_logits: bool) -> ort.IOBinding:
        """The cache of some neighbouring slots, bound as input and output: the graph writes into the array itself.

        A binding keeps everything that was bound to it, so steps with logits and steps without need two bindings.
        """
        key = (first_slot, batch, with_logits)
        if key not in self._bindings:
            binding = session.io_binding()
            for tensor, array in self._cache.tensors(first_slot, batch):
                shared = ort.OrtValue.ortvalue_from_numpy(array)
                binding.bind_ortvalue_input(tensor.past, shared)
                binding.bind_ortvalue_output(tensor.present, shared)
            self._bindings[key] = binding
        return self._bindings[key]

    def _logits_room(self, batch: int, rows: int) -> npt.NDArray[np.floating]:
        shape = (batch, rows, self.manifest.model.vocab_size)
        size = math.prod(shape)
        if self._logits.size < size:
            self._logits = np.empty(size, self._dtype)
        return self._logits[:size].reshape(shape)
