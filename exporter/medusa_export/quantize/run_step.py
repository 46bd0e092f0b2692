"""Runs a step graph on whole texts in float32, outside of a backend, so that it may have more outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_runtime.bundle.cache_layout import CacheLayout
from medusa_runtime.bundle.manifest import WEIGHTS_NAME

Array = npt.NDArray[np.float32]


def run_step(
    model: ir.Model, weights: Path, layout: CacheLayout, texts: Iterable[Sequence[int]], outputs: Sequence[str]
) -> Iterator[list[Array]]:
    """The named outputs for each text, which is read at once, with logits after every token.

    Args:
        model: a portable step graph.
        weights: the directory of its weights file.
        layout: the cache that the graph has.
        texts: token ids.
        outputs: names of the graph's outputs.
    """
    from medusa_runtime.backends.ort_library import ort  # noqa: PLC0415 - an extra; opening the backend has checked it

    file = (weights / WEIGHTS_NAME).resolve()  # ONNX Runtime follows no links out of the directory
    proto = ir.to_proto(model)
    for entry in (entry for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"):
        entry.value = file.name
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    options.log_severity_level = 3  # errors only: it warns that the cache is copied, which is intended here
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for text in texts:
        count = len(text)
        rows = np.arange(count)[None]
        feeds = {
            "input_ids": np.array([text], np.int64),
            "position_ids": rows,
            "tree_mask": np.tri(count, dtype=np.bool_)[None],
            "cache_lengths": np.zeros(1, np.int64),
            "logit_rows": rows,
        }
        feeds |= {tensor.past: np.zeros(tensor.shape(1, count), np.float32) for tensor in layout.tensors}
        yield session.run(list(outputs), feeds)
