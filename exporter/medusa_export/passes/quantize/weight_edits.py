"""Changes of weights that depend on who reads them: a weight that is read in several ways becomes several weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medusa_export.passes.common.linears import Linear
from medusa_export.passes.common.values import add_initializer, lazy_tensor, shape_of
from medusa_export.passes.quantize.residual_stream import NotExactError

Array = npt.NDArray[np.float32]
Change = Callable[[Array], Array]
Use = tuple[ir.Node, int]  # a node, and which of its inputs


@dataclass
class _Edit:
    change: Change
    uses: set[Use] = field(default_factory=set)


class WeightEdits:
    """Collects what is to become of each weight for each of its readers, and then does it all at once.

    Weights are computed when they are written, so that few are in memory.
    """

    def __init__(self) -> None:
        self._edits: dict[ir.Value, dict[Hashable, _Edit]] = {}

    def add(self, node: ir.Node, place: int, kind: Hashable, change: Change) -> None:
        """Change an input of a node. Two changes of one weight are the same if they are of the same kind."""
        weight = node.inputs[place]
        assert weight is not None
        self._edits.setdefault(weight, {}).setdefault(kind, _Edit(change)).uses.add((node, place))

    def add_linear(self, linear: Linear, kind: Hashable, change: Change) -> None:
        """Change the weight of a linear layer, in the layout that it is stored in.

        Raises:
            NotExactError: other nodes read the same transposed weight.
        """
        if linear.reader is not linear.node:
            if len(linear.reader.outputs[0].uses()) > 1:
                raise NotExactError("several layers read one transposed weight")
            self.add(linear.reader, 0, kind, change)
        else:
            self.add(linear.node, 1, kind, change)

    def apply(self, graph: ir.Graph) -> None:
        """Change the weights. The reader that comes last in the order of adding keeps the weight's name."""
        for weight, edits in self._edits.items():
            tensor = weight.const_value
            assert tensor is not None
            total = {(usage.node, usage.idx) for usage in weight.uses()}
            for number, edit in enumerate(edits.values()):
                total -= edit.uses
                is_last = not total and number == len(edits) - 1
                name = weight.name or ""
                if is_last:
                    weight.const_value = _changed(name, tensor, edit.change)
                    continue
                name = _free(graph, f"{name}.{number}")
                value = add_initializer(graph, name, _changed(name, tensor, edit.change))
                for node, place in edit.uses:
                    node.replace_input_with(place, value)


def _changed(name: str, tensor: ir.TensorProtocol, change: Change) -> ir.LazyTensor:
    return lazy_tensor(name, tensor.dtype, list(shape_of(tensor)), lambda: change(tensor.numpy()))


def _free(graph: ir.Graph, name: str) -> str:
    while name in graph.initializers:
        name += "_"
    return name
