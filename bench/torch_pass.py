"""Times forward passes of a checkpoint in PyTorch, in float32: a process that `shared_machine.py` starts and asks."""

from __future__ import annotations

import sys
import time

import torch
from request_loop import Operations, serve
from transformers import AutoModelForCausalLM


def load(checkpoint: str) -> Operations:
    """The operation `forward`: seconds of one pass over some tokens."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    @torch.no_grad()
    def forward(tokens: int) -> float:
        ids = torch.arange(100, 100 + tokens)[None]
        started = time.perf_counter()
        model(ids, use_cache=False)
        return time.perf_counter() - started

    return {"forward": forward}


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1]))
