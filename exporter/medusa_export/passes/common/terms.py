"""In how many terms of 8 bits the input of an integer product is rounded, noted on the product's node."""

from __future__ import annotations

import json

import onnx_ir as ir

from medusa_export.passes.common.roles import KEY

KIND = "integer product"


def note_terms(node: ir.Node, terms: int) -> None:
    """Note how many terms a product's input has: 1 or 2."""
    node.metadata_props[KEY] = json.dumps({"kind": KIND, "number": 0, "role": "product", "terms": terms})


def noted_terms(node: ir.Node) -> int | None:
    """How many terms a product's input has; None if nothing was noted."""
    note = json.loads(node.metadata_props.get(KEY, "{}"))
    return int(note["terms"]) if note.get("kind") == KIND else None
