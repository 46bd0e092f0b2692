"""Folds constants and removes unused nodes of a trace, without touching the weights."""

from __future__ import annotations

import logging

import onnx_ir as ir
import onnxscript.optimizer


class Simplify(ir.passes.InPlacePass):
    """Run onnxscript's optimizer with the weights hidden from it.

    Needs: nothing.
    Result: an equivalent graph in which no node depends only on constants. Every weight keeps its name: if it were folded into
    an anonymous constant, it could not be replaced by another layer's weight.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Simplify in place."""
        weights = dict(model.graph.initializers)
        values = {name: value.const_value for name, value in weights.items()}
        for value in weights.values():
            value.const_value = None
        log = logging.getLogger("onnx_ir.passes.common.initializer_deduplication")
        level = log.level
        log.setLevel(logging.ERROR)  # it warns about every hidden weight
        try:
            onnxscript.optimizer.optimize(model)
        finally:
            log.setLevel(level)
            for name, value in weights.items():
                value.const_value = values[name]
        return ir.passes.PassResult(model, modified=True)
