"""The access log: one line of JSON for each request."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from medusa_runtime import DecodingStats, OptionError
from medusa_serve.record import RequestRecord

MAX_WAITING, MAX_WAITING_BYTES = 10_000, 64 << 20  # lines and their bytes, which wait if the sink takes no more
MAX_NAME, MAX_ERROR = 200, 1000  # characters of what clients may choose
log = logging.getLogger(__name__)


class Sink(Protocol):
    """What takes lines: a file without a buffer."""

    def write(self, data: bytes, /) -> int | None:
        """Take some of the bytes, and say how many; None if it could take none."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class AccessLog:
    """Writes a line for each request, in a thread of its own.

    A pipe whose reader has stopped blocks whoever writes to it, and a disk may be slow. In the event loop that would stop
    all streams, hence the thread. Lines wait for it in memory. If there are too many, or if the sink takes no more, lines
    are lost and counted: requests are more important than their log.

    Args:
        sink: where the lines go; None for nowhere.
        with_texts: also write prompts and answers, if the records have them.
    """

    def __init__(self, sink: Sink | None, *, with_texts: bool = False) -> None:
        self._sink, self._with_texts = sink, with_texts
        self._changed = threading.Condition()  # its lock guards all attributes below
        self._lines: deque[bytes] = deque()
        self._num_bytes = self._num_lost = 0  # of the lines that wait; lines that are lost
        self._is_closed = self._is_told = False
        self._is_torn = False  # the last line was written in part
        self._thread = threading.Thread(target=self._run, name="medusa-access-log", daemon=True)
        if sink is not None:
            self._thread.start()

    @classmethod
    def open(cls, target: str, *, with_texts: bool = False) -> AccessLog:
        """Open a log.

        Args:
            target: ``-`` for the standard output, ``off``, or the path of a file, to which lines are added.
            with_texts: also write prompts and answers.

        Raises:
            OptionError: the file cannot be opened, or there is no standard output.
        """
        if target == "off":
            return cls(None)
        if target == "-":
            if sys.stdout is None:  # as in a process that was started without one
                raise OptionError("there is no standard output for the access log; choose a file, or off")
            return cls(open(sys.stdout.fileno(), "wb", buffering=0, closefd=False), with_texts=with_texts)
        return cls(LogFile(Path(target)), with_texts=with_texts)

    @property
    def num_lost(self) -> int:
        """Lines that could not be written."""
        with self._changed:
            return self._num_lost

    def write(self, record: RequestRecord) -> None:
        """Log a request that has ended. It does not wait."""
        if self._sink is None:
            return
        line = as_line(record, with_texts=self._with_texts)
        with self._changed:
            if self._is_closed:
                self._lose("the log is closed")
            elif len(self._lines) >= MAX_WAITING or self._num_bytes + len(line) > MAX_WAITING_BYTES:
                self._lose("lines come faster than they can be written")
            else:
                self._lines.append(line)
                self._num_bytes += len(line)
                self._changed.notify()

    def close(self, timeout: float = 2.0) -> None:
        """Write the lines that wait, for `timeout` seconds at most. Lines that come later are lost."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._sink is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        assert self._sink is not None
        while (line := self._next()) is not None:
            try:
                self._put(self._sink, line)
            except (OSError, ValueError) as error:  # a file that is closed raises a ValueError
                with self._changed:
                    self._lose(str(error))
        self._sink.close()

    def _next(self) -> bytes | None:
        """Wait for a line. None if the log is closed and all lines are written."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._is_closed)
            if not self._lines:
                return None
            line = self._lines.popleft()
            self._num_bytes -= len(line)
            return line

    def _put(self, sink: Sink, line: bytes) -> None:
        """Write a whole line.

        Raises:
            OSError, ValueError: the sink does not take it.
        """
        rest = b"\n" + line if self._is_torn else line
        while rest:
            written = sink.write(rest)
            if not written:
                raise OSError("it takes nothing more")
            rest = rest[written:]
            self._is_torn = bool(rest)

    def _lose(self, why: str) -> None:
        self._num_lost += 1
        if not self._is_told:
            self._is_told = True
            log.warning("a line of the access log is lost: %s; metrics count those that follow", why)


class LogFile:
    """A file that lines are added to. If it was moved away, as logrotate does, a new one is begun.

    Raises:
        OptionError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise OptionError(f"the access log {path} cannot be written: {error.strerror}") from error

    def write(self, data: bytes, /) -> int | None:
        """Add to the file; see `Sink`."""
        if not self._is_in_place():
            moved, self._file = self._file, self._path.open("ab", buffering=0)
            moved.close()
        return self._file.write(data)

    def _is_in_place(self) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        return False

    def close(self) -> None:
        """Let the file go."""
        self._file.close()


def as_line(record: RequestRecord, *, with_texts: bool = False) -> bytes:
    """A request as one line of JSON in ASCII: no character in it can end the line or move a terminal's cursor."""
    fields = _request(record) | (_generation(record) if record.stats else {})
    if record.error is not None:
        fields["error"] = record.error[:MAX_ERROR]
    if with_texts:
        fields |= {name: text for name, text in (("prompt", record.prompt), ("answer", record.answer)) if text is not None}
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _request(record: RequestRecord) -> dict[str, Any]:
    return {
        "time": datetime.fromtimestamp(record.since, UTC).isoformat(timespec="milliseconds"),
        "request_id": record.request_id[:MAX_NAME],
        "client": record.client,
        "method": record.method[:MAX_NAME],
        "path": record.path[:MAX_NAME],
        "status": record.status,
        "seconds": round(record.seconds, 6),
        "model": None if record.model is None else record.model[:MAX_NAME],
    }


def _generation(record: RequestRecord) -> dict[str, Any]:
    total = DecodingStats()
    for stats in record.stats:
        total.add(stats)
    first = record.first_token_seconds
    return {
        "streamed": record.streamed,
        "n": record.n,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": total.num_generated_tokens,
        "queue_seconds": round(record.stats[0].queue_seconds, 6),
        "first_token_seconds": None if first is None else round(first, 6),
        "acceptance_length": round(total.tokens_per_step, 3),
        "finish_reasons": record.finish_reasons,
    }
