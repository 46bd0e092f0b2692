"""The CPU's two step graphs: which one runs, and what may happen when the other is opened late."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from medusa_runtime import BackendError, ClosedError, Manifest, MedusaLM
from medusa_runtime.backends import ort_sessions
from medusa_runtime.backends.ort_cpu import OrtCpuBackend
from tests.support.logs import recorded
from tests.support.patience import PATIENCE

IDS = np.array([[5, 6, 7, 8]])


@pytest.fixture
def bundle(make_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A bundle of its own, with a graph for one sequence."""
    copy = tmp_path / "bundle"
    shutil.copytree(make_bundle("llama"), copy)
    assert "step.ort-cpu-single" in Manifest.load(copy).graphs
    return copy


@pytest.fixture
def backend(bundle: Path) -> Iterator[OrtCpuBackend]:
    backend = OrtCpuBackend(bundle, Manifest.load(bundle))
    backend.resize(2, 64)
    yield backend
    backend.close()


def step(backend: OrtCpuBackend, batch: int, length: int = 0) -> np.ndarray:
    """A step of some equal sequences. Returns its logits. [B, T, V]"""
    ids = np.repeat(IDS, batch, axis=0)
    rows = np.repeat(np.arange(4)[None], batch, axis=0)
    mask = np.repeat(np.tri(4, dtype=bool)[None], batch, axis=0)
    return backend.step(ids, rows + length, mask, np.full(batch, length), rows, with_logits=True).logits.copy()


def until_several(backend: OrtCpuBackend) -> list[np.ndarray]:
    """Steps of two sequences until they run on their own graph."""
    found = [step(backend, 2)]
    while not backend._steps.runs_several:
        found.append(step(backend, 2))
        time.sleep(0.01)
    return found


def wait_until_opened(backend: OrtCpuBackend) -> None:
    assert backend._steps._opening is not None
    with contextlib.suppress(BackendError):
        backend._steps._opening.result(30)


def test_several_sequences_run_one_after_the_other_until_their_graph_is_open(backend) -> None:
    alone = step(backend, 1)
    assert not backend._steps.runs_several
    with recorded() as records:
        found = until_several(backend)
    for logits in [*found, step(backend, 2)]:
        np.testing.assert_allclose(logits, np.repeat(alone, 2, axis=0), atol=1e-5)
    told = [record.getMessage() for record in records]
    assert [text.split(":")[0] for text in told] == [
        "two sequences overlap",
        "steps now run on the graph for several sequences",
    ]
    backend.resize(1, 64)
    assert not backend._steps.runs_several  # one slot: back to the faster graph


def test_steps_go_on_while_the_interpreter_ends(backend) -> None:
    alone = step(backend, 1)
    backend._steps._executor.shutdown()  # as `concurrent.futures` does before other exit handlers run
    np.testing.assert_allclose(step(backend, 2), np.repeat(alone, 2, axis=0), atol=1e-5)


def test_what_is_cached_stays_when_the_graph_changes(backend) -> None:
    step(backend, 2)
    before = step(backend, 2, length=4)
    until_several(backend)
    step(backend, 2)
    np.testing.assert_allclose(step(backend, 2, length=4), before, atol=1e-5)


def test_without_memory_for_two_sessions_the_first_is_closed_before_the_second_is_opened(backend, monkeypatch) -> None:
    monkeypatch.setattr(ort_sessions, "available_memory", lambda: 0)
    opened, whole = [], ort_sessions.open_graph

    def open_graph(*args):
        opened.append((args[3].file, backend._steps._session))
        return whole(*args)

    monkeypatch.setattr(ort_sessions, "open_graph", open_graph)
    alone = step(backend, 1)
    np.testing.assert_allclose(step(backend, 2), np.repeat(alone, 2, axis=0), atol=1e-5)
    assert opened == [("step.ort-cpu.onnx", None)]
    assert backend._steps.runs_several


@pytest.mark.parametrize("memory", [0, 1 << 40])
def test_a_graph_that_cannot_be_opened_for_a_moment_is_tried_again(backend, monkeypatch, memory) -> None:
    monkeypatch.setattr(ort_sessions, "available_memory", lambda: memory)
    monkeypatch.setattr(ort_sessions, "RETRY_SECONDS", 0.0)
    alone, failures, whole = step(backend, 1), [], ort_sessions.open_graph

    def open_graph(*args):
        if len(failures) < 2 and args[3].file == "step.ort-cpu.onnx":
            failures.append(args[3].file)
            raise BackendError("too many open files")
        return whole(*args)

    monkeypatch.setattr(ort_sessions, "open_graph", open_graph)
    with recorded() as records:
        found = until_several(backend)
    assert len(failures) == 2
    for logits in found:
        np.testing.assert_allclose(logits, np.repeat(alone, 2, axis=0), atol=1e-5)
    assert sum("too many open files" in record.getMessage() for record in records) == 2


def test_a_session_that_cannot_be_opened_again_comes_back_when_it_can(backend, monkeypatch) -> None:
    monkeypatch.setattr(ort_sessions, "available_memory", lambda: 0)
    alone, whole = step(backend, 1), ort_sessions.open_graph

    def fail(*_):
        raise BackendError("too many open files")

    monkeypatch.setattr(ort_sessions, "open_graph", fail)
    for _ in range(2):
        with pytest.raises(BackendError, match="too many open files"):
            step(backend, 2)
    monkeypatch.setattr(ort_sessions, "open_graph", whole)
    np.testing.assert_allclose(step(backend, 2), np.repeat(alone, 2, axis=0), atol=1e-5)


def test_a_bundle_that_was_replaced_is_never_mixed_with_the_old_one(backend, bundle, make_bundle, tmp_path) -> None:
    """The old weights go on: several sequences run on the graph that was opened."""
    alone = step(backend, 1)
    other = tmp_path / "other"
    shutil.copytree(make_bundle("llama"), other)
    weights = np.fromfile(other / "weights.bin", np.float32) * np.float32(1.5)
    weights.tofile(other / "weights.bin")
    bundle.rename(tmp_path / "old")
    other.rename(bundle)
    with recorded() as records:
        for _ in range(3):
            np.testing.assert_allclose(step(backend, 2), np.repeat(alone, 2, axis=0), atol=1e-5)
            time.sleep(0.05)
    assert not backend._steps.runs_several
    assert [record.levelname for record in records] == ["WARNING"]
    assert "the bundle's files have changed since it was opened" in records[0].getMessage()


def test_a_bundle_that_was_replaced_is_not_opened_when_one_slot_is_left(backend, bundle, tmp_path) -> None:
    until_several(backend)
    alone = step(backend, 1)
    (bundle / "weights.bin").rename(tmp_path / "old.bin")  # other weights take its place
    (np.fromfile(tmp_path / "old.bin", np.float32) * np.float32(1.5)).tofile(bundle / "weights.bin")
    backend.resize(1, 64)
    np.testing.assert_allclose(step(backend, 1), alone, atol=1e-5)


def test_a_bundle_that_is_replaced_while_its_graph_is_opened_is_refused(backend, bundle, tmp_path, monkeypatch) -> None:
    alone, whole = step(backend, 1), ort_sessions.open_graph

    def replace_and_open(*args):
        (bundle / "weights.bin").rename(tmp_path / "old.bin")
        (np.fromfile(tmp_path / "old.bin", np.float32) * np.float32(1.5)).tofile(bundle / "weights.bin")
        return whole(*args)

    monkeypatch.setattr(ort_sessions, "open_graph", replace_and_open)
    step(backend, 2)
    wait_until_opened(backend)
    np.testing.assert_allclose(step(backend, 2), np.repeat(alone, 2, axis=0), atol=1e-5)
    assert not backend._steps.runs_several


def test_a_graph_that_was_opened_is_taken_up_by_a_step_of_one_sequence(backend) -> None:
    """Else both sessions hold the weights, and no step counts as warm, until two sequences overlap again."""
    step(backend, 2)
    wait_until_opened(backend)
    step(backend, 1)
    assert not backend._steps.is_changing
    assert backend._steps.runs_several


def test_a_change_of_the_working_directory_does_not_matter(bundle, monkeypatch) -> None:
    monkeypatch.chdir(bundle.parent)
    lm = MedusaLM.from_bundle(bundle.name, max_batch_size=2)
    monkeypatch.chdir("/")
    prompts = ["the quick brown fox", "a small model"]
    alone = [lm.generate(prompt, max_new_tokens=8).token_ids for prompt in prompts]
    while not lm.engine.backend._steps.runs_several:
        assert [one.token_ids for one in lm.generate_batch(prompts, max_new_tokens=8)] == alone
    assert [one.token_ids for one in lm.generate_batch(prompts, max_new_tokens=8)] == alone
    lm.close()


def test_a_closed_backend_says_so(bundle) -> None:
    backend = OrtCpuBackend(bundle, Manifest.load(bundle))
    backend.resize(1, 64)
    step(backend, 1)
    backend.save()
    backend.close()
    backend.close()  # again: nothing happens
    assert (backend.num_slots, backend.capacity) == (0, 0)
    for use in (
        lambda: step(backend, 1),
        lambda: backend.resize(1, 64),
        lambda: backend.propose(np.zeros(1, int), np.zeros(1, int)),
    ):
        with pytest.raises(ClosedError, match="this backend is closed"):
            use()


def test_numbers_that_are_not_finite_are_told(bundle) -> None:
    backend = OrtCpuBackend(bundle, Manifest.load(bundle))
    backend.resize(1, 64)
    step(backend, 1)
    rows = np.arange(4)[None]
    good = backend.step(IDS, rows + 4, np.tri(4, dtype=bool)[None], np.array([4]), rows)
    backend._cache.arrays[0][..., 1, :] = np.nan
    bad = backend.step(IDS, rows + 4, np.tri(4, dtype=bool)[None], np.array([4]), rows)
    assert (good.finite.tolist(), bad.finite.tolist()) == ([[True] * 4], [[False] * 4])
    backend.close()


@pytest.mark.parametrize("num_threads", ["2", -1, 100_000, 1.5, True])
def test_a_number_of_threads_that_cannot_be_is_refused_at_once(bundle, num_threads) -> None:
    from medusa_runtime import OptionError

    with pytest.raises(OptionError, match="num_threads is"):
        MedusaLM.from_bundle(bundle, num_threads=num_threads)


def test_arguments_are_checked_before_the_weights_are_read(bundle, monkeypatch) -> None:
    from medusa_runtime import CandidateTree, MedusaError, opening

    monkeypatch.setattr(opening, "open_placement", lambda *_, **__: pytest.fail("the backend was opened"))
    monkeypatch.setattr(Manifest, "require_intact", lambda *_: pytest.fail("the files were read"))
    deep = CandidateTree.from_choices([[0] * 9])
    for fields in (
        {"max_batch_size": 0},
        {"max_queue": -1},
        {"costs": "cheap"},
        {"tree": deep},
        {"backend": "tpu"},
        {"device": "tpu"},
        {"num_threads": -1},
        {"max_gap_seconds": 0},
        {"max_cache_bytes": "1 GB"},
        {"tree": 5},
        {"costs": 5},
        {"device": 5},
        {"reuse_prefixes": "no"},
        {"prompt_lookup": "no"},
        {"cuda_graphs": "no"},
        {"verify_files": 0},
        {"allow_failed": "no"},
        {"allow_engine_code": "no"},
    ):
        with pytest.raises(MedusaError, match=next(iter(fields)).partition("_")[0]):
            MedusaLM.from_bundle(bundle, **fields)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_closing_gives_the_memory_back(bundle) -> None:
    """The weights are made large here: 120 MB that the session holds once more."""
    program = """
import sys
from medusa_runtime import MedusaLM
def resident():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon"))) / 1e3
MedusaLM.from_bundle(sys.argv[1], verify_files=False).close()
before = resident()
for _ in range(5):
    lm = MedusaLM.from_bundle(sys.argv[1], verify_files=False)
    lm.generate_batch(["the quick", "brown fox"], max_new_tokens=4)
    lm.close()
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program, str(bundle)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 30  # MB


def test_leaving_a_program_in_the_middle_of_a_stream_ends_it_cleanly(bundle) -> None:
    program = """
import sys
from medusa_runtime import MedusaLM
lm = MedusaLM.from_bundle(sys.argv[1], verify_files=False)
for chunk in lm.stream("the quick", max_new_tokens=200, ignore_eos=True):
    sys.exit(7)
"""
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", program, os.fspath(bundle)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (7, "")


def test_a_program_ends_while_its_model_is_between_two_runs(bundle) -> None:
    """The end waits for the thread that decodes. So this thread may not be held back before its next run."""
    program = """
import sys, time
from medusa_runtime import MedusaLM
from medusa_runtime.backends.ort_cpu import OrtCpuBackend
lm = MedusaLM.from_bundle(sys.argv[1], verify_files=False)
propose = OrtCpuBackend.propose
def slowly(*arguments):
    time.sleep(0.3)
    return propose(*arguments)
for chunk in lm.stream("the quick", max_new_tokens=200, ignore_eos=True):
    OrtCpuBackend.propose = slowly
    time.sleep(0.1)
    sys.exit(7)
"""
    words = [sys.executable, "-c", program, os.fspath(bundle)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize("leave", ["sys.exit(3)", "raise KeyError('x')", "pass"])
def test_a_program_can_end_while_a_thread_decodes(bundle, leave) -> None:
    """A thread of the user's own that comes back from ONNX Runtime while the interpreter ends would abort the process."""
    program = f"""
import sys, threading, time
from medusa_runtime import DecodingEngine, DecodingOptions, Manifest
from medusa_runtime.backends.choosing import open_backend
engine = DecodingEngine(open_backend(sys.argv[1], Manifest.load(sys.argv[1])))
def work():
    while True:
        engine.add([5, 9, 7], DecodingOptions.of(max_new_tokens=100))
        while not engine.is_idle:
            engine.step()
            begun.set()
begun = threading.Event()
threading.Thread(target=work, daemon=True).start()
begun.wait()
{leave}
"""
    code = {"sys.exit(3)": 3, "pass": 0}.get(leave, 1)
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program, os.fspath(bundle)], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("work", ["lm.close()", "lm.engine.backend.close()", "del lm, unused; gc.collect()"])
def test_a_child_of_a_fork_can_close_and_drop_a_model(bundle, work) -> None:
    """The child has none of ONNX Runtime's threads, and freeing a session waits for them."""
    program = f"""
import gc, os, signal, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from medusa_runtime import MedusaLM
lm, unused = (MedusaLM.from_bundle(sys.argv[1], verify_files=False, num_threads=2) for _ in range(2))
lm.generate("the quick", max_new_tokens=3)
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    {work}
    os._exit(5)
_, status = os.waitpid(pid, 0)
print(os.waitstatus_to_exitcode(status), lm.generate("the quick", max_new_tokens=3).finish_reason)
"""
    done = subprocess.run([sys.executable, "-c", program, os.fspath(bundle)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("5 length\n", "")
