"""A contestant's process: one JSON object per line on stdin and on stdout. It imports only the standard library.

    python request_loop.py with_llama_cpp '{"model": "model.gguf", "threads": 2}'            # load it, and answer requests
    python request_loop.py with_llama_cpp '{"source": "model.gguf", …}' --build              # make its model files

A contestant's module has `load(settings)`, which returns a function that decodes greedily. That function takes token ids, the
number of new tokens, and a function to call with new tokens as they are decoded. It does not stop at end-of-sequence tokens.
A module may also have `build(settings)`. `medusa_export.measure.bench.peers` defines the settings.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

Emit = Callable[[list[int]], None]
Decode = Callable[[list[int], int, Emit], None]
Operations = dict[str, Callable[..., Any]]
STDOUT, STDERR = 1, 2  # file descriptors


def serve(start: Callable[[], Operations]) -> None:
    """Answer requests until stdin ends. The first line on stdout says whether the contestant started.

    A request is ``{"do": name, …arguments}``, the answer ``{"result": …}`` or ``{"error": line}``.
    """
    answers = _private_stdout()

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        operations = {"memory": memory} | start()
    except Exception as error:  # noqa: BLE001 - packages can raise anything; the other side reports it to the user
        tell({"error": _line(error)})
        return
    tell({"result": "ready"})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            tell({"result": operations[request.pop("do")](**request)})
        except Exception as error:  # noqa: BLE001 - as above
            tell({"error": _line(error)})


def timed(decode: Decode) -> Callable[[list[int], int], dict[str, Any]]:
    """The operation `generate`: it returns the new tokens in pieces, and the seconds from the request to each piece."""

    def generate(token_ids: list[int], max_new_tokens: int) -> dict[str, Any]:
        pieces: list[list[int]] = []
        seconds: list[float] = []
        room = max_new_tokens

        def emit(new_ids: list[int]) -> None:
            nonlocal room
            if new_ids := new_ids[:room]:
                seconds.append(time.perf_counter() - started)
                pieces.append(new_ids)
                room -= len(new_ids)

        started = time.perf_counter()
        decode(token_ids, max_new_tokens, emit)
        if room:
            raise RuntimeError(f"it decoded {max_new_tokens - room} tokens instead of {max_new_tokens}")
        return {"pieces": pieces, "seconds": seconds}

    return generate


def memory() -> dict[str, float]:
    """The peak memory of this process in MB, and its current memory if the system reports it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        import resource  # noqa: PLC0415 - not on Windows

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_mb": most / (1e6 if sys.platform == "darwin" else 1e3)}  # macOS counts in bytes
    facts = dict(line.split(":", 1) for line in lines)
    return {name: int(facts[key].split()[0]) * 1024 / 1e6 for name, key in (("peak_mb", "VmHWM"), ("now_mb", "VmRSS"))}


def _private_stdout() -> TextIO:
    """Reserve stdout for answers: anything that a library prints goes to stderr."""
    private = os.fdopen(os.dup(STDOUT), "w", encoding="utf-8")
    os.dup2(STDERR, STDOUT)
    return private


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def main(module: str, settings: str, *flags: str) -> None:
    """Run a contestant's module."""
    contestant = importlib.import_module(module)
    if "--build" in flags:
        contestant.build(json.loads(settings))
    else:
        serve(lambda: {"generate": timed(contestant.load(json.loads(settings)))})


if __name__ == "__main__":
    main(*sys.argv[1:])
