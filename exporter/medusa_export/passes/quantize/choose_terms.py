"""Decides which inputs of integer products need two terms of 8 bits, by the error that one term leaves."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from medusa_export.passes.common.graph_pass import GraphPass
from medusa_export.passes.common.terms import note_terms
from medusa_export.passes.ort_cpu.integer_matmul import multiplies_int8

MOST_ERROR = 3e-4  # of an input's energy: rotated ones lose a fifth to a half of that, inputs with outliers two to ten times


class ChooseTerms(GraphPass):
    """Note on each integer product whether its input is rounded in one term of 8 bits or in two.

    Needs: a graph with int8 weights, and the error of one term for each input, by the input's name; see `with_errors`.
    Result: the same graph. Inputs whose error is above `MOST_ERROR`, or was not measured, keep two terms.

    Args:
        errors: name → mean over tokens of the rounding error's energy, relative to the input's.
    """

    def __init__(self, errors: Mapping[str, float]) -> None:
        super().__init__()
        self.errors = errors
        self.num_products = self.num_with_two = 0

    def rewrite(self, model: ir.Model) -> int:
        """Note in place."""
        self.num_products = self.num_with_two = 0
        for node in model.graph:
            if node.op_type != "MatMul" or not multiplies_int8(node):
                continue
            terms = self._terms(node.inputs[0])
            note_terms(node, terms)
            self.num_products += 1
            self.num_with_two += terms == 2
        return self.num_products

    def _terms(self, value: ir.Value | None) -> int:
        error = self.errors.get("" if value is None else value.name or "")
        if error is None:
            self.decline("an input that was not measured")
        elif error > MOST_ERROR:
            self.decline("an input that one term would change too much")
        return 1 if error is not None and error <= MOST_ERROR else 2
