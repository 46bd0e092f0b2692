"""The access log: a line of JSON for each request, whatever clients send and whatever becomes of the log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_runtime import DecodingStats, OptionError
from medusa_serve.telemetry import AccessLog
from medusa_serve.telemetry.access_log import MAX_WAITING, as_line
from tests.support.logs import recorded
from tests.support.telemetry import record_of

STATS = DecodingStats(num_generated_tokens=21, num_decoded_tokens=20, num_steps=8, queue_seconds=0.05)


class Sink:
    """Takes lines as long as `take` lets it."""

    def __init__(self, take: Callable[[bytes], int | None] = len) -> None:
        self.taken, self.take, self.is_closed = b"", take, False

    def write(self, data: bytes) -> int | None:
        written = self.take(data)
        self.taken += data[: written or 0]
        return written

    def close(self) -> None:
        self.is_closed = True


@contextmanager
def opened(log: AccessLog) -> Iterator[AccessLog]:
    try:
        yield log
    finally:
        log.close(30)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_request_is_one_line_with_what_operators_ask_for(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    with opened(AccessLog.open(str(path))) as log:
        log.write(record_of(STATS, streamed=True))
        log.write(record_of(path="/v1/models", method="GET", status=401, error="there is no such key", model=None))
    first, second = lines_of(path)
    assert first == {
        "time": "2023-11-14T22:13:20.000+00:00",
        "request_id": "req-1",
        "client": "10.0.0.7",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "seconds": 0.9,
        "model": "tiny",
        "streamed": True,
        "n": 1,
        "prompt_tokens": 12,
        "cached_tokens": 4,
        "completion_tokens": 21,
        "queue_seconds": 0.05,
        "first_token_seconds": 0.2,
        "acceptance_length": 2.5,
        "finish_reasons": ["stop"],
    }
    assert (second["status"], second["error"], "completion_tokens" in second) == (401, "there is no such key", False)


def test_texts_are_written_only_if_asked_for() -> None:
    record = record_of(STATS, prompt="my secret", answer="your secret")
    assert b"secret" not in as_line(record)
    assert json.loads(as_line(record, with_texts=True))["prompt"] == "my secret"
    assert json.loads(as_line(record, with_texts=True))["answer"] == "your secret"
    sinks = Sink(), Sink()
    for sink, with_texts in zip(sinks, (False, True), strict=True):
        with opened(AccessLog(sink, with_texts=with_texts)) as log:
            log.write(record)
    assert [b"secret" in sink.taken for sink in sinks] == [False, True]


@given(st.text(), st.text(), st.text())
def test_no_text_ends_a_line_or_moves_the_cursor(name: str, error: str, prompt: str) -> None:
    line = as_line(record_of(STATS, model=name, request_id=name, error=error, prompt=prompt), with_texts=True)
    assert line.endswith(b"\n")
    assert all(32 <= byte < 127 for byte in line[:-1])
    assert json.loads(line)["model"] == name[:200]
    assert json.loads(line)["prompt"] == prompt


def test_an_injected_line_stays_inside_its_own() -> None:
    line = as_line(record_of(error='x"}\n{"status": 200, "request_id": "forged\u2028\x1b[2J'))
    assert line.count(b"\n") == 1
    assert b"\x1b" not in line


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), ValueError("closed file")])
def test_a_sink_that_fails_is_told_once_and_its_lines_are_counted(error: Exception) -> None:
    def fail(_: bytes) -> int:
        raise error

    with recorded("medusa_serve") as logs, opened(AccessLog(Sink(fail))) as log:
        for _ in range(5):
            log.write(record_of(STATS))
        log.close(30)
        assert log.num_lost == 5
    assert len(logs) == 1
    assert str(error) in logs[0].getMessage()


def test_a_sink_that_comes_back_gets_whole_lines_again() -> None:
    sizes = iter([40, 0, 10**6, 10**6])  # a disk that is full after 40 bytes, and then is not
    sink = Sink(lambda data: min(next(sizes), len(data)))
    with recorded("medusa_serve"), opened(AccessLog(sink)) as log:
        for number in range(3):
            log.write(record_of(STATS, request_id=f"req-{number}"))
    torn, *whole = sink.taken.splitlines()
    assert len(torn) == 40
    assert [json.loads(line)["request_id"] for line in whole] == ["req-1", "req-2"]
    assert (log.num_lost, sink.is_closed) == (1, True)


def test_a_sink_that_blocks_stops_nobody_and_takes_no_memory_without_end() -> None:
    may_go_on, is_inside = threading.Event(), threading.Event()

    def block(data: bytes) -> int:
        is_inside.set()
        assert may_go_on.wait(60)
        return len(data)

    sink, record = Sink(block), record_of()
    with recorded("medusa_serve") as logs, opened(AccessLog(sink)) as log:
        log.write(record)
        assert is_inside.wait(30)
        for _ in range(MAX_WAITING + 7):
            log.write(record)
        assert (log.num_lost, len(logs)) == (7, 1)
        log.close(0.01)  # does not wait for ever
        may_go_on.set()
    assert sink.taken.count(b"\n") == MAX_WAITING + 1


def test_lines_that_wait_are_bounded_in_bytes_too() -> None:
    may_go_on, is_inside = threading.Event(), threading.Event()

    def block(data: bytes) -> int:
        is_inside.set()
        assert may_go_on.wait(60)
        return len(data)

    sink, record = Sink(block), record_of(prompt="x" * (20 << 20))
    with recorded("medusa_serve"), opened(AccessLog(sink, with_texts=True)) as log:
        log.write(record)
        assert is_inside.wait(30)
        for _ in range(5):
            log.write(record)
        assert log.num_lost == 2  # three of 20 MiB may wait
        may_go_on.set()
    assert sink.taken.count(b"\n") == 4


def test_a_process_without_standard_output_is_told(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OptionError, match="there is no standard output"):
        AccessLog.open("-")


def test_what_comes_after_the_end_is_lost() -> None:
    sink = Sink()
    with recorded("medusa_serve"), opened(AccessLog(sink)) as log:
        log.close(30)
        log.write(record_of())
        assert (log.num_lost, sink.taken) == (1, b"")


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path, written = tmp_path / "access.log", threading.Semaphore(0)
    with opened(AccessLog.open(str(path))) as log:
        whole = log._put
        log._put = lambda sink, line: (whole(sink, line), written.release())  # type: ignore[method-assign]
        log.write(record_of(request_id="first"))
        assert written.acquire(timeout=30)
        path.rename(tmp_path / "access.log.1")
        log.write(record_of(request_id="second"))
    assert [line["request_id"] for line in lines_of(tmp_path / "access.log.1")] == ["first"]
    assert [line["request_id"] for line in lines_of(path)] == ["second"]


def test_a_file_is_added_to(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    for name in ("first", "second"):
        with opened(AccessLog.open(str(path))) as log:
            log.write(record_of(request_id=name))
    assert [line["request_id"] for line in lines_of(path)] == ["first", "second"]


def test_a_file_that_cannot_be_opened_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"the access log .* cannot be written: No such file or directory"):
        AccessLog.open(str(tmp_path / "nowhere" / "access.log"))


def test_off_is_no_log_and_no_thread() -> None:
    before = threading.active_count()
    log = AccessLog.open("off")
    log.write(record_of(STATS))
    assert (threading.active_count(), log.num_lost) == (before, 0)
    log.close()


SCRIPT = """
from medusa_serve.telemetry import AccessLog
from tests.support.telemetry import record_of
log = AccessLog.open("-")
for number in range(2000):
    log.write(record_of(request_id=str(number)))
log.close(30)
print("lost", log.num_lost, file=__import__("sys").stderr)
"""


def test_the_standard_output_may_be_closed_by_its_reader() -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=root
    ) as process:
        assert json.loads(process.stdout.readline())["request_id"] == "0"
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(60) == 0, errors
    assert 0 < int(errors.split("lost")[-1]) < 2000
    assert errors.count("Broken pipe") == 1
