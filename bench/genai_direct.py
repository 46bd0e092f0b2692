"""ONNX Runtime GenAI's engine, which decodes several requests side by side. `long_prompts.py` starts it in GenAI's environment.

python bench/genai_direct.py MODEL
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import onnxruntime_genai as og
from answer_times import timed
from request_loop import Operations, serve


class Answer:
    """A request under way, and when its tokens came."""

    def __init__(self, engine: Any, number: int, token_ids: list[int], max_tokens: int) -> None:
        self.number, self.started = number, time.perf_counter()
        self.times: list[float] = []
        session = og.RequestOptions()
        session.set_max_session_tokens(len(token_ids) + max_tokens)
        self.request = engine.create_request(options=session)
        turn = og.TurnOptions(self.request)
        turn.set_do_sample(False)
        turn.set_min_generated_tokens(max_tokens)  # an end token does not end it
        turn.set_max_generated_tokens(max_tokens)
        self.turn = self.request.begin_turn(np.array(token_ids, np.int32), turn)


def load(engine: Any, prompts: list[list[int]], streams: int, max_tokens: int) -> dict[str, Any]:
    """Have all prompts answered, `streams` at a time."""
    buffer, waiting = engine.create_event_buffer(4096), list(enumerate(prompts))
    open_answers: dict[Any, Answer] = {}
    told: dict[int, dict[str, Any]] = {}
    started = time.perf_counter()
    while waiting or open_answers:
        while waiting and len(open_answers) < streams:
            answer = Answer(engine, *waiting.pop(0), max_tokens)
            open_answers[answer.request] = answer
        events = engine.run(buffer)
        now = time.perf_counter()
        for event in events:
            answer = open_answers[event.request]
            flags = int(event.flags.value)
            if flags & og.EngineEventFlags.FAILED.value:
                raise RuntimeError(f"a request failed: {event.error_code}")
            if flags & og.EngineEventFlags.TOKEN.value:
                answer.times.append(now)
            if flags & og.EngineEventFlags.TURN_FINISHED.value:
                told[answer.number] = timed(answer.started, answer.times, "", len(answer.times))
                open_answers.pop(event.request).request.close()
    return {"seconds": time.perf_counter() - started, "answers": [told[number] for number in range(len(prompts))]}


def start() -> Operations:
    """Load the model that the command line names."""
    engine = og.Engine(og.Model(og.Config(sys.argv[1])))
    return {"load": lambda **words: load(engine, **words), "version": lambda: str(og.__version__)}


if __name__ == "__main__":
    serve(start)
