"""ONNX Runtime on the CPU: the cache is one NumPy array that the graph reads and writes in place."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medusa_runtime.arrays import BoolArray, IntArray
from medusa_runtime.backends.base import HeadOutput, StepOutput, bucket, require_room, require_slots
from medusa_runtime.bundle.manifest import HEADS, ORT_CPU, ORT_CPU_SINGLE, STEP, GraphFacts, Manifest
from medusa_runtime.errors import BackendError, CapacityError, MissingExtraError, first_line

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingExtraError("onnxruntime", "cpu") from error

CACHE_DTYPES = {"fp32": np.float32, "fp16": np.float16}
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # which Windows has not
EXACT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})  # as Linux names what a processor can


class OrtCpuBackend:
    """Runs a bundle's graphs with ONNX Runtime's CPU provider: those made for it, or else the portable ones.

    Of a step there may be a graph for one sequence and one for any number. One is open at a time, as each holds the weights:
    that for one, until there is a step of several, and again once the cache has a single slot.

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
                f"ONNX Runtime has no {manifest.precision} kernels for the CPU; export with --dtype fp32 or fp16, "
                "or run it on a GPU (medusa-export doctor says what that takes)"
            )
        self.manifest = manifest
        self._dtype = np.dtype(CACHE_DTYPES[manifest.precision])
        self._bundle, self._num_threads = Path(bundle), num_threads
        self._for_several = manifest.graph(STEP, ORT_CPU)
        self._for_one = manifest.graphs.get(f"{STEP}.{ORT_CPU_SINGLE}", self._for_several)
        self._step_graph = self._for_one
        self._step_session = self._session(STEP, self._step_graph)
        self._heads_session = self._session(HEADS, manifest.graph(HEADS, ORT_CPU))
        self._hidden = np.empty((0, 0, manifest.model.hidden_size), self._dtype)  # [B, R, C] of the last step
        self._logits = np.empty(0, self._dtype)  # room for the largest logits asked for so far
        self._bindings: dict[tuple[int, int, bool], ort.IOBinding] = {}  # by first slot, B, and whether logits are bound
        self._cache = self._new_cache(num_slots=0, capacity=0)

    @property
    def num_slots(self) -> int:
        """See `Backend.num_slots`."""
        return int(self._cache.shape[2])

    @property
    def capacity(self) -> int:
        """See `Backend.capacity`."""
        return int(self._cache.shape[4])

    def resize(self, num_slots: int, capacity: int, lengths: Sequence[int] = ()) -> None:
        """See `Backend.resize`. The capacity is rounded up to a bucket; memory that no entry is written to is not taken."""
        if num_slots == 1:
            self._open_step(self._for_one)
        resized = self._new_cache(num_slots, bucket(capacity))
        for slot, length in enumerate(lengths):
            resized[:, :, slot, :, :length] = self._cache[:, :, slot, :, :length]
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
        batch, rows = logit_rows.shape
        require_slots(first_slot, batch, self.num_slots)
        require_room(cache_lengths, input_ids.shape[1], self.capacity)
        is_warm = batch == 1 or not self._open_step(self._for_several)
        binding = self._binding(first_slot, batch, with_logits=with_logits)
        binding.bind_cpu_input("input_ids", input_ids)
        binding.bind_cpu_input("position_ids", position_ids)
        binding.bind_cpu_input("tree_mask", tree_mask)
        binding.bind_cpu_input("cache_lengths", cache_lengths)
        binding.bind_cpu_input("logit_rows", logit_rows)
        greedy_ids = np.empty((batch, rows), np.int64)
        self._hidden = np.empty((batch, rows, self.manifest.model.hidden_size), self._dtype)
        logits = self._logits_room(batch, rows) if with_logits else None
        for name, array in (("greedy_ids", greedy_ids), ("hidden", self._hidden), ("logits", logits)):
            if array is not None:
                binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        try:
            self._step_session.run_with_iobinding(binding)
        except Exception as error:  # as for opening
            raise BackendError(f"ONNX Runtime cannot run the step: {first_line(error)}") from error
        return StepOutput(greedy_ids, logits, is_warm=is_warm)

    def propose(self, rows: IntArray, root_ids: IntArray) -> HeadOutput:
        """See `Backend.propose`."""
        inputs = {"hidden": self._hidden[np.arange(len(rows)), rows]}  # [B, C]
        if self.manifest.heads.reads_root:
            inputs["root_ids"] = root_ids
        token_ids, log_probs = self._heads_session.run(["head_ids", "head_log_probs"], inputs)
        return HeadOutput(token_ids, log_probs)

    def commit(self, slot: int, start: int, nodes: IntArray) -> None:
        """See `Backend.commit`."""
        first = int(np.argmax(nodes != np.arange(len(nodes))))  # what stands in place already is not moved
        if nodes[first] == first:
            return
        entries = self._cache[:, :, slot]  # [L, 2, Hkv, S, D]
        entries[:, :, :, start + first : start + len(nodes)] = entries[:, :, :, start + nodes[first:]]

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Backend.copy`."""
        self._cache[:, :, target, :, :length] = self._cache[:, :, source, :, :length]

    def swap(self, a: int, b: int, length: int) -> None:
        """See `Backend.swap`."""
        entries = self._cache[:, :, :, :, :length]
        entries[:, :, [a, b]] = entries[:, :, [b, a]]

    def clear(self, slot: int, start: int, stop: int) -> None:
        """See `Backend.clear`."""
        self._cache[:, :, slot, :, start:stop] = 0

    def close(self) -> None:
        """See `Backend.close`: there is nothing."""

    def _open_step(self, graph: GraphFacts) -> bool:
        """Let steps run on that graph. Returns whether it had to be opened, which takes about as long as opening the bundle.

        Raises:
            BackendError: it cannot be opened. The graph before it can still be run.
        """
        if graph == self._step_graph:
            return False
        self._bindings.clear()
        del self._step_session  # its weights, before the next one's are read
        try:
            self._step_session = self._session(STEP, graph)
        except BackendError:
            self._step_session = self._session(STEP, self._step_graph)
            raise
        self._step_graph = graph
        return True

    def _session(self, name: str, graph: GraphFacts) -> ort.InferenceSession:
        session = _open(self._bundle / graph.file, self._num_threads)
        _require_contract(session, self.manifest, name, graph)
        return session

    def _new_cache(self, num_slots: int, capacity: int) -> npt.NDArray[np.floating]:
        model = self.manifest.model
        shape = (model.num_layers, 2, num_slots, model.num_kv_heads, capacity, model.head_dim)
        size = math.prod(shape) * self._dtype.itemsize
        try:
            # Zeros. Pages are taken as they are written to; NumPy's own would be huge ones, taken as soon as a slot begins.
            memory = mmap.mmap(-1, max(size, 1), **PRIVATE)
        except (OSError, OverflowError) as error:
            raise CapacityError(f"no memory for a cache of {num_slots} times {capacity} entries") from error
        return np.frombuffer(memory, self._dtype, math.prod(shape)).reshape(shape)  # [L, 2, slots, Hkv, S, D]

    def _binding(self, first_slot: int, batch: int, *, with_logits: bool) -> ort.IOBinding:
        """The cache of some neighbouring slots, bound as input and output: the graph writes into the array itself.

        What is bound once is used at every run, so a binding with logits is another one than a binding without.
        """
        key = (first_slot, batch, with_logits)
        if key not in self._bindings:
            binding = self._step_session.io_binding()
            for layer, pair in enumerate(self._cache[:, :, first_slot : first_slot + batch]):
                for name, array in zip(("key", "value"), pair, strict=True):
                    shared = ort.OrtValue.ortvalue_from_numpy(array)
                    binding.bind_ortvalue_input(f"past.{layer}.{name}", shared)
                    binding.bind_ortvalue_output(f"present.{layer}.{name}", shared)
            self._bindings[key] = binding
        return self._bindings[key]

    def _logits_room(self, batch: int, rows: int) -> npt.NDArray[np.floating]:
        shape = (batch, rows, self.manifest.model.vocab_size)
        size = math.prod(shape)
        if self._logits.size < size:
            self._logits = np.empty(size, self._dtype)
        return self._logits[:size].reshape(shape)


def _num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(path: Path, num_threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads or _num_cores()
    # The idle threads of one session otherwise spin on the cores that the other one needs: a step and its heads took 86 ms
    # where they now take 46 (docs/decisions/0002-threads-of-two-sessions.md).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")  # 4-bit weights: products in int8
    if not _has_exact_products():  # uint8 times int8 saturates; twice as slow products do not
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 2  # warnings stay on: TensorScatter says so when it had to copy the cache
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common base but this
        raise BackendError(f"ONNX Runtime cannot open {path}: {first_line(error)}") from error


def _has_exact_products() -> bool:
    """Whether ONNX Runtime's products of uint8 with int8 keep all their bits: on x86 only with VNNI or AMX."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        flags = (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("flags")[2].partition("\n")[0].split()
        )
    except OSError:  # not Linux: what the processor has is not known
        return False
    return not EXACT.isdisjoint(flags)


def _require_contract(session: ort.InferenceSession, manifest: Manifest, name: str, facts: GraphFacts) -> None:
    """Refuse a graph that is not the one the manifest describes, or whose cache is not the model's."""
    model = manifest.model
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
