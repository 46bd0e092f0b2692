"""Fold constants and drop what a trace leaves behind, without touching the weights."""

from __future__ import annotations

import logging

import onnx_ir as ir
import onnxscript.optimizer


class Simplify(ir.passes.InPlacePass):
    """onnxscript's optimizer with the weights opaque.

    Needs: nothing. Leaves: an equal graph in which no node depends on constants alone, and every weight under its name:
    a weight folded into an anonymous constant could not be replaced by another layer's.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Simplify in place."""
        weights = dict(model.graph.initializers)
        values = {name: value.const_value for name, value in weights.items()}
        for value in weights.values():
            value.const_value = None
        log = logging.getLogger("onnx_ir.passes.common.initializer_deduplication")
        level = log.level
        log.setLevel(logging.ERROR)  # it warns of every opaque weight
        try:
            onnxscript.optimizer.optimize(model)
        finally:
            log.setLevel(level)
            for name, value in weights.items():
                value.const_value = values[name]
        return ir.passes.PassResult(model, modified=True)
