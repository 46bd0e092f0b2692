"""The base of our passes: a pass says what it matched, and why it left the rest as it was."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import Counter

import onnx_ir as ir

log = logging.getLogger(__name__)


class GraphPass(ir.passes.InPlacePass):
    """Edits a graph in place, and logs what it matched and what it declined (`medusa-export onnx --verbose` shows it)."""

    def __init__(self) -> None:
        super().__init__()
        self.declined: Counter[str] = Counter()  # reason -> number of places, of the last graph

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        self.declined.clear()
        matched = self.rewrite(model)
        reasons = "".join(f"; not {count}: {reason}" for reason, count in self.declined.most_common())
        log.info("%s: %d matched%s", type(self).__name__, matched, reasons)
        return ir.passes.PassResult(model, modified=matched > 0)

    @abstractmethod
    def rewrite(self, model: ir.Model) -> int:
        """Edit the graph, and call `decline` for each place that looks alike but does not fit. Returns the number of edits."""

    def decline(self, reason: str) -> None:
        """Count a place that was left as it was."""
        self.declined[reason] += 1
