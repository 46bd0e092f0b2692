"""Silence for what PyTorch logs and warns of while it traces: it is for its developers. And no search for garbage meanwhile."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

LOGGERS = ("torch.onnx", "torch._subclasses.fake_tensor")


@contextmanager
def quiet_torch() -> Iterator[None]:
    """While open, PyTorch's exporter says nothing. What it raises is told by whoever catches it."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for log in map(logging.getLogger, LOGGERS):
            stack.callback(log.setLevel, log.level)
            log.setLevel(logging.CRITICAL)
        yield


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """While open, Python does not look for garbage. Tracing makes many objects that stay; looking takes a tenth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
