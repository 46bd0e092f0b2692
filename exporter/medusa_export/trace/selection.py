"""Attention to a selection of the tokens, traced as attention to all: the same, unless there are more than are selected.

Some models score each token's predecessors and attend to the best. While a sequence is no longer than the selection, that is
all of them, and no scores need to be computed or cached. `Backbone.max_seq_len` keeps sequences so short.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A module's setting of how many tokens it selects -> its value while traced. A module that hides what it does not select must
# select all. One that hands its selection to the attention, which takes no notice of it here, may do as little as possible.
WHILE_TRACED = {"keep_window_size": sys.maxsize, "index_topk": 1}


@contextmanager
def selecting_all(model: torch.nn.Module) -> Iterator[None]:
    """While open, no attention of the model hides tokens for not being selected."""
    changed = [
        (module, name, value)
        for module in model.modules()
        for name in WHILE_TRACED
        if isinstance(value := vars(module).get(name), int)
    ]
    for module, name, _ in changed:
        setattr(module, name, WHILE_TRACED[name])
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
