"""ONNX Runtime sessions of a bundle on the CPU: how a graph is opened and checked, and which of two step graphs is open.

A bundle may have a step graph for one sequence, which is faster, beside the one for any number. Each session holds all weights,
so only one is open: the graph for one, until a step has several sequences. Then the other is opened in the background, if the
memory allows, and the sequences of a step run one after the other until it is ready. If the memory does not allow two
sessions, the first is closed before the second is opened, and that step waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from medusa_runtime.backends.forks import kept_in_children
from medusa_runtime.backends.ort_library import ort
from medusa_runtime.bundle.cache_layout import CacheLayout
from medusa_runtime.bundle.cpu import Spin, available_memory, has_exact_products, num_cores
from medusa_runtime.bundle.manifest import ORT_CPU, ORT_CPU_SINGLE, PORTABLE, STEP, WEIGHTS_NAME, GraphFacts, Manifest
from medusa_runtime.ending import native_run
from medusa_runtime.errors import BackendError, first_line

RETRY_SECONDS = 30.0  # the wait before a graph that could not be opened is tried again
MEMORY_MARGIN = 1.3  # a session takes more than its weights while it is opened
# ONNX Runtime's settings for threads that wait for an operator's work (docs/decisions/0034-shared-machines.md). A thread that
# never spins has to be woken for each operator, which costs up to a quarter of the speed. One that spins long keeps its core
# from other programs, and from a sibling that has work. Most waits within a step end after some microseconds.
SPIN_SETTINGS: dict[Spin, tuple[str, str]] = {
    "auto": ("session.intra_op.spin_duration_us", "50"),
    "on": ("session.intra_op.allow_spinning", "1"),  # about a millisecond
    "off": ("session.intra_op.allow_spinning", "0"),
}
CHANGED = "the bundle's files have changed since it was opened"
log = logging.getLogger(__name__)


class StepSessions:
    """The step's session: of the graph for one sequence, or of the graph for any number.

    Args:
        bundle: the bundle's directory, as an absolute path.
        manifest: the bundle's.
        num_threads: threads of each matrix product; 0 for one a core.
        spin: how they wait, one of `SPINS`.
        forget: drops all references to the open session, so that its memory is freed.

    Raises:
        BackendError: ONNX Runtime refuses the graph.
    """

    def __init__(self, bundle: Path, manifest: Manifest, num_threads: int, spin: Spin, forget: Callable[[], None]) -> None:
        self._bundle, self._manifest, self._forget = bundle, manifest, forget
        self._num_threads, self._spin = num_threads, spin
        self._for_several = manifest.graph(STEP, ORT_CPU)
        self._for_one = manifest.graphs.get(f"{STEP}.{ORT_CPU_SINGLE}", self._for_several)
        self._identity = self._files()
        self._graph = self._for_one
        self._session: ort.InferenceSession | None = self._opened(self._graph)
        self._executor = ThreadPoolExecutor(1, "medusa-runtime-open")
        self._opening: Future[ort.InferenceSession] | None = None  # of the graph for any number
        self._failed_at: float | None = None

    @property
    def session(self) -> ort.InferenceSession:
        """The session that is open.

        Raises:
            BackendError: no session is open, and none can be opened.
        """
        if self._session is None:
            self._session = self._opened(self._graph)
        return self._session

    @property
    def is_changing(self) -> bool:
        """Whether the other graph is being opened in the background: steps take longer meanwhile."""
        return self._opening is not None

    @property
    def runs_several(self) -> bool:
        """Whether the open session runs several sequences in one step."""
        return self._graph is self._for_several

    def prepare(self, batch: int) -> None:
        """Have steps of several sequences run on their own graph as soon as it is open. Call it before every step."""
        if batch > 1 and not self.runs_several and self._opening is None:
            self._begin_opening()
        if self._opening is not None and self._opening.done():
            self._finish_opening(self._opening)

    def want_one(self) -> None:
        """Go back to the graph for one sequence, if there is one."""
        self._opening = None
        if self._graph is self._for_one:
            return
        if self._files() != self._identity:
            self._note_failure(self._for_one, CHANGED)
        else:
            self._change(self._for_one)

    def close(self) -> None:
        """Close the open session, and one that is still being opened."""
        if self._opening is not None:
            with contextlib.suppress(BackendError):
                self._opening.result()
        self._executor.shutdown()
        self._opening = self._session = None

    def _begin_opening(self) -> None:
        """Open the graph for several sequences: in the background, or at once if the memory does not allow two sessions."""
        if self._failed_at is not None and time.monotonic() - self._failed_at < RETRY_SECONDS:
            return
        if self._files() != self._identity:
            self._note_failure(self._for_several, CHANGED)
        elif available_memory() < MEMORY_MARGIN * self._manifest.files[WEIGHTS_NAME].size:
            self._change(self._for_several)
        else:
            log.info("two sequences overlap: the graph for several is opened in the background")
            with contextlib.suppress(RuntimeError):  # the interpreter is ending, so no thread begins any more
                self._opening = self._executor.submit(self._opened, self._for_several)

    def _finish_opening(self, opening: Future[ort.InferenceSession]) -> None:
        self._opening = None
        try:
            session = opening.result()
        except BackendError as error:
            self._note_failure(self._for_several, str(error))
            return
        self._forget()
        self._session, self._graph, self._failed_at = session, self._for_several, None
        trim_memory()
        log.info("steps now run on the graph for several sequences")

    def _change(self, graph: GraphFacts) -> None:
        """Close the session and open the other one, so that the memory holds the weights once."""
        log.info("steps change to %s, which is opened now", graph.file)
        before, self._session = self._graph, None
        self._forget()
        trim_memory()
        try:
            self._session, self._graph = self._opened(graph), graph
        except BackendError as error:
            self._note_failure(graph, str(error))
            self._session = self._opened(before)

    def _note_failure(self, graph: GraphFacts, why: str) -> None:
        self._failed_at = time.monotonic()
        log.warning(
            "the step graph %s of %s cannot be opened (%s); steps go on with the other graph, which is slower, "
            "and it is tried again after %.0f s",
            graph.file,
            self._bundle,
            why,
            RETRY_SECONDS,
        )

    def _opened(self, graph: GraphFacts) -> ort.InferenceSession:
        """Open a graph. A session of other weights would go on with the cache of these, so it is refused."""
        session = open_graph(self._bundle, self._manifest, STEP, graph, self._num_threads, self._spin)
        if self._files() != self._identity:
            raise BackendError(f"{self._bundle / graph.file} cannot be opened: {CHANGED}; open the bundle again")
        return session

    def _files(self) -> list[tuple[int, ...]]:
        """Identities of the files of both graphs, by which replaced files are noticed."""
        found = []
        for name in {self._for_one.file, self._for_several.file, WEIGHTS_NAME}:
            with contextlib.suppress(OSError):  # a missing file is noticed as well
                stat = (self._bundle / name).stat()
                found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return sorted(found)


def open_graph(
    bundle: Path, manifest: Manifest, name: str, graph: GraphFacts, num_threads: int, spin: Spin
) -> ort.InferenceSession:
    """Open one graph of a bundle, and compare it with the manifest.

    Args:
        bundle: the bundle's directory.
        manifest: the bundle's.
        name: ``step`` or ``heads``.
        graph: the graph's facts.
        num_threads: threads of each matrix product; 0 for one a core.
        spin: how they wait, one of `SPINS`.

    Raises:
        BackendError: ONNX Runtime cannot open it, or it is not the graph that the manifest describes.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads or num_cores()
    # Without this, idle threads of one session spin on the cores that the other one needs: a step and its heads took 86 ms
    # instead of 46 (docs/decisions/0002-threads-of-two-sessions.md).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(*SPIN_SETTINGS[spin])
    # How ONNX Runtime multiplies with weights under DequantizeLinear: blocks in int8, which is fast. In bundles of scheme int8,
    # graphs for the CPU have such products of their own, and the portable graph is compared with them: in float32.
    in_float = manifest.quantization is not None and manifest.quantization.scheme == "int8"
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1" if in_float else "4")
    # Without VNNI, uint8 times int8 saturates, so weights become uint8. Portable graphs multiply in float32, and ONNX Runtime
    # 1.31 would give their weights a zero point of a wrong shape (docs/decisions/0041-without-vnni.md).
    if graph.target != PORTABLE and not has_exact_products():
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 2  # warnings stay on: TensorScatter says so if it had to copy the cache
    try:
        with native_run():
            session = kept_in_children(ort.InferenceSession(bundle / graph.file, options, providers=["CPUExecutionProvider"]))
    except Exception as error:  # ONNX Runtime's errors have no common base but this
        raise BackendError(f"ONNX Runtime cannot open {bundle / graph.file}: {first_line(error)}") from error
    _require_contract(session, name, graph, CacheLayout.of(manifest.graphs[STEP]))
    return session


def trim_memory() -> None:
    """Give freed memory back to the system. glibc otherwise keeps it, and a closed session's weights stay resident."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has this
        ctypes.CDLL(None).malloc_trim(0)


def _require_contract(session: ort.InferenceSession, name: str, facts: GraphFacts, cache: CacheLayout) -> None:
    """Refuse a graph that differs from the manifest, or a step graph whose cache has another layout than the bundle's."""
    found = [(tensor.name, list(tensor.shape)) for tensor in session.get_inputs()]
    for have, want in itertools.zip_longest(found, ((tensor.name, tensor.shape) for tensor in facts.inputs)):
        if have != want:
            raise BackendError(f"{facts.file} has the input {have}, the manifest says {want}; export the bundle again")
    if missing := {tensor.name for tensor in facts.outputs} - {tensor.name for tensor in session.get_outputs()}:
        raise BackendError(f"{facts.file} lacks the output {min(missing)}; export the bundle again")
    if name == STEP and (own := CacheLayout.of(facts)) != cache:
        raise BackendError(
            f"the cache of {facts.file} is {own.describe()}, that of the bundle's step is {cache.describe()}; "
            "export the bundle again"
        )
