"""Notes on nodes that bundles keep: what a node is for, so that passes that derive other graphs find it again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

KEY = "medusa.role"  # in a node's metadata


@dataclass(frozen=True)
class Part:
    """Nodes that together compute one thing, such as a layer of experts."""

    nodes: dict[str, ir.Node]  # by role
    facts: dict[str, Any]  # what was noted with the role ``result``

    def read(self, role: str) -> ir.Value:
        """The first input of the node with a role."""
        value = self.nodes[role].inputs[0]
        assert value is not None
        return value

    @property
    def result(self) -> ir.Value:
        """What the part computes: the output of the node with the role ``result``."""
        return self.nodes["result"].outputs[0]


def note_role(node: ir.Node, kind: str, number: int, role: str, **facts: object) -> None:
    """Note a node's role in part `number` of a kind."""
    node.metadata_props[KEY] = json.dumps({"kind": kind, "number": number, "role": role, **facts})


def parts(graph: ir.Graph, kind: str) -> list[Part]:
    """The parts of a kind that have a result, in the order of their results."""
    nodes: dict[int, dict[str, ir.Node]] = {}
    facts: dict[int, dict[str, Any]] = {}
    for node in graph:
        if KEY in node.metadata_props and (note := json.loads(node.metadata_props[KEY]))["kind"] == kind:
            nodes.setdefault(note["number"], {})[note["role"]] = node
            if note["role"] == "result":
                facts[note["number"]] = note
    return [Part(nodes[number], known) for number, known in facts.items()]


def keep_roles(model: ir.Model) -> dict[ir.Node, str]:
    """The notes of a graph, to be put back after a pass that clears all metadata."""
    return {node: node.metadata_props[KEY] for node in model.graph if KEY in node.metadata_props}
