"""Exports that share the work on the backbone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import pytest

from medusa_export.bundle import export
from medusa_export.model.checkpoint import Backbone


@contextmanager
def traced_once() -> Iterator[None]:
    """While open, exports load and trace each model once: bundles of one model with several heads share it."""
    load, trace = functools.cache(export.load_backbone), export.trace_step
    steps: dict[tuple[int, bool], ir.Model] = {}

    def trace_once(backbone: Backbone, opset: int, note: Any, *, lm_head_as_table: bool) -> ir.Model:
        key = (id(backbone), lm_head_as_table)
        if key not in steps:
            steps[key] = trace(backbone, opset, note, lm_head_as_table=lm_head_as_table)
        return steps[key].clone()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(export, "load_backbone", load)
        patched.setattr(export, "trace_step", trace_once)
        yield
