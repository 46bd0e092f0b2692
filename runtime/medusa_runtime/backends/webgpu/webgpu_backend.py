"""ONNX Runtime's WebGPU provider: the cache and the hidden states stay on the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_runtime.arrays import BoolArray, IntArray
from medusa_runtime.backends.base import HeadOutput, StepOutput, bucket, require_room, require_slots
from medusa_runtime.backends.webgpu.adapters import Adapter, held, require_graphs
from medusa_runtime.bundle.cache_layout import CacheLayout
from medusa_runtime.bundle.manifest import CACHE, HEADS, ORT_WEBGPU, STEP, GraphFacts, Manifest
from medusa_runtime.errors import ClosedError, MissingExtraError

try:
    from medusa_runtime.backends.ort_library import ort
except ImportError as error:
    raise MissingExtraError("onnxruntime", "cpu") from error

from medusa_runtime.backends.webgpu.device_slots import DeviceSlots
from medusa_runtime.backends.webgpu.running import open_session, run

ROWS = "rows"  # the input of the heads' graph that says which rows of the hidden states it reads
DTYPES = {"fp32": np.float32, "fp16": np.float16}


class OrtWebGpuBackend:
    """Runs a bundle's graphs for WebGPU. The sequences of a step run one after the other.

    Token ids, positions, the tree mask and a few numbers go to the device. Greedy ids, the heads' candidates and, if they are
    asked for, logits come back.

    Args:
        bundle: the bundle's directory.
        manifest: the bundle's manifest.
        adapter: the GPU to run on.

    Raises:
        BackendError: the bundle has no graphs for WebGPU, or ONNX Runtime refuses one.
    """

    def __init__(self, bundle: str | Path, manifest: Manifest, adapter: Adapter) -> None:
        require_graphs(manifest)
        self.manifest, self._adapter = manifest, adapter
        self._dtype = np.dtype(DTYPES[manifest.precision])
        self._memory = adapter.device.memory_info(ort.OrtDeviceMemoryType.DEFAULT)
        bundle = Path(bundle).resolve()
        step, heads, editor = (open_session(bundle / graph.file, adapter) for graph in _graphs(manifest))
        self._sessions: tuple[ort.InferenceSession, ort.InferenceSession] | None = (step, heads)
        self._slots = DeviceSlots(CacheLayout.of(manifest.graphs[STEP]), editor, adapter)
        self._bindings: dict[tuple[int, bool], ort.IOBinding] = {}  # by slot, and whether logits are bound
        self._hidden: list[Any] = []  # of each sequence of the last step, [1, R, C] on the device
        self._rooms: dict[int, Any] = {}  # by sequence: memory for the hidden states of one step
        self._known: set[tuple[int, int, bool]] = set()  # shapes that have run, so their shaders are compiled

    @property
    def num_slots(self) -> int:
        """See `Backend.num_slots`."""
        return self._slots.num_slots

    @property
    def capacity(self) -> int:
        """See `Backend.capacity`."""
        return self._slots.capacity

    def resize(self, num_slots: int, capacity: int, lengths: Sequence[int] = ()) -> None:
        """See `Backend.resize`. The capacity is rounded up to a bucket."""
        self._require_open()
        self._bindings.clear()
        self._slots.resize(num_slots, bucket(capacity), lengths)

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
        propose_ahead: bool = False,  # noqa: ARG002 - the host decides what is accepted
    ) -> StepOutput:
        """See `Backend.step`."""
        self._require_open()
        (batch, tokens), rows = input_ids.shape, logit_rows.shape[1]
        require_slots(first_slot, batch, self.num_slots)
        require_room(cache_lengths, tokens, self.capacity)
        inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "tree_mask": tree_mask,
            "cache_lengths": cache_lengths,
            "logit_rows": logit_rows,
        }
        greedy_ids = np.empty((batch, rows), np.int64)
        logits = np.empty((batch, rows, self.manifest.model.vocab_size), self._dtype) if with_logits else None
        self._hidden = [self._room(sequence, rows) for sequence in range(batch)]
        for sequence, hidden in enumerate(self._hidden):
            one = slice(sequence, sequence + 1)
            outputs = {"greedy_ids": greedy_ids[one]} | ({} if logits is None else {"logits": logits[one]})
            binding = self._binding(first_slot + sequence, with_logits=with_logits)
            for name, array in inputs.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(array[one]))
            for name, array in outputs.items():
                binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
            binding.bind_ortvalue_output("hidden", hidden)
            run(self._require_open()[0], binding, STEP, self._adapter)
        shape = (tokens, rows, with_logits)
        is_warm = shape in self._known
        self._known.add(shape)
        return StepOutput(greedy_ids, logits, is_warm=is_warm)

    def propose(self, rows: IntArray, root_ids: IntArray) -> HeadOutput:
        """See `Backend.propose`."""
        session = self._require_open()[1]
        shape = (len(rows), self.manifest.heads.num_heads, self.manifest.heads.top_k)
        token_ids, log_probs = np.empty(shape, np.int64), np.empty(shape, np.float32)
        for sequence, row in enumerate(rows.tolist()):
            one = slice(sequence, sequence + 1)
            binding = held(session.io_binding())
            binding.bind_ortvalue_input("hidden", self._hidden[sequence])
            binding.bind_cpu_input(ROWS, np.array([row], np.int64))
            if self.manifest.heads.reads_root:
                binding.bind_cpu_input("root_ids", np.ascontiguousarray(root_ids[one], np.int64))
            for name, array in (("head_ids", token_ids), ("head_log_probs", log_probs)):
                binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array[one]))
            run(session, binding, HEADS, self._adapter)
        return HeadOutput(token_ids, log_probs)

    def commit(self, slot: int, start: int, nodes: IntArray) -> None:
        """See `Backend.commit`."""
        self._slots.move(slot, start, nodes)

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Backend.copy`."""
        self._slots.copy(source, target, length)

    def swap(self, a: int, b: int, length: int) -> None:  # noqa: ARG002 - whole slots are exchanged
        """See `Backend.swap`."""
        self._slots.swap(a, b)
        self._bindings.clear()

    def clear(self, slot: int, start: int, stop: int) -> None:
        """See `Backend.clear`."""
        self._slots.clear(slot, start, stop)

    def save(self) -> None:
        """See `Backend.save`: there is nothing to keep."""

    def close(self) -> None:
        """See `Backend.close`."""
        self._sessions = None
        self._bindings.clear()
        self._hidden, self._rooms = [], {}
        self._slots.free()

    def _require_open(self) -> tuple[ort.InferenceSession, ort.InferenceSession]:
        if self._sessions is None:
            raise ClosedError("this backend is closed")
        return self._sessions

    def _room(self, sequence: int, rows: int) -> Any:
        """Memory on the device for the hidden states of one sequence's rows. [1, R, C]"""
        shape = [1, rows, self.manifest.model.hidden_size]
        if sequence not in self._rooms or self._rooms[sequence].shape() != shape:
            room = held(ort.OrtValue.ortvalue_from_shape_and_type(shape, self._dtype.type, memory_info=self._memory))
            self._rooms[sequence] = room
        return self._rooms[sequence]

    def _binding(self, slot: int, *, with_logits: bool) -> ort.IOBinding:
        """A slot's cache, bound as input and output: the graph writes into the buffers themselves."""
        key = (slot, with_logits)
        if key not in self._bindings:
            binding = held(self._require_open()[0].io_binding())
            for tensor, buffer in self._slots.tensors(slot):
                binding.bind_ortvalue_input(tensor.past, buffer)
                binding.bind_ortvalue_output(tensor.present, buffer)
            self._bindings[key] = binding
        return self._bindings[key]


def _graphs(manifest: Manifest) -> list[GraphFacts]:
    return [manifest.graphs[f"{name}.{ORT_WEBGPU}"] for name in (STEP, HEADS, CACHE)]
