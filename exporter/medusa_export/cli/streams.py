"""The standard streams: closed ones, broken pipes, and encodings that cannot hold what is printed."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import TextIO

ESCAPES = "medusa-export-escapes"  # the name of our error handler for encodings
BROKEN_PIPE = 141  # what a shell says of a program that ended because nobody reads its output any more


class _ClosedStdout(io.TextIOBase):
    """Stands for a stdout that was closed before the program began. Printing a result there fails, as in other tools."""

    encoding, errors = "utf-8", "strict"

    def write(self, text: str) -> int:
        if text:
            raise OSError(errno.EBADF, "it is closed", "stdout")
        return 0


def prepare() -> None:
    """Make the standard streams fit to be used, whatever state they were handed over in.

    Closed descriptors are opened on nothing: otherwise the next file that is opened gets the number of stdout, and a library
    that prints writes into it. Letters that an output's encoding lacks are escaped, and bytes of file names stay what they are.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = _ClosedStdout()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    codecs.register_error(ESCAPES, _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPES)


def broken_stream() -> str | None:
    """The name of an output that can no longer be written to. What it still holds is given up, so that exiting stays quiet."""
    found = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            is_broken = _has_no_reader(stream)
        except OSError:
            is_broken = True
        if is_broken:
            found = found or stream.name.strip("<>")
            with suppress(OSError):
                descriptor = os.open(os.devnull, os.O_WRONLY)
                os.dup2(descriptor, stream.fileno())
                os.close(descriptor)
    return found


def _has_no_reader(stream: TextIO) -> bool:
    """Whether it is a pipe whose other end is closed: without a buffer, flushing does not tell."""
    if not hasattr(select, "poll"):  # Windows
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # no file of the system's
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def holds_unicode() -> bool:
    """Whether stdout's encoding has all letters."""
    return codecs.lookup(sys.stdout.encoding or "ascii").name.startswith("utf")


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    r"""Bytes of a file name that are no text stay what they are; other letters become escapes such as \u65e5."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)
