"""Parses an ONNX graph into a TensorRT network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from medusa_export.engine.complaints import first_complaint, parser_complaints
from medusa_export.engine.flavor import TensorRT
from medusa_export.engine.memory import MappedWeights
from medusa_export.errors import ExportError
from medusa_runtime.backends.gpu.trt import error_log
from medusa_runtime.bundle.manifest import GraphFacts

_DTYPES = {"FLOAT": "float", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}


@dataclass
class Network:
    """A parsed network, together with the objects that must live as long as it does."""

    name: str
    tensorrt: TensorRT
    log: Any
    builder: Any
    parser: Any
    network: Any
    weights: MappedWeights

    @classmethod
    def parse(
        cls, tensorrt: TensorRT, name: str, model: ir.Model, weights: Path, tell: Callable[[str], None] | None = None
    ) -> Network:
        """Parse a graph into a strongly typed network.

        Args:
            tensorrt: the flavour.
            name: the graph's name in messages.
            model: the graph. Its large weights are external; TensorRT reads them from the mapped files.
            weights: the directory that holds them.
            tell: called with each line that TensorRT logs.

        Raises:
            ExportError: TensorRT cannot start, or refuses the graph; the message has a line for each refused node.
        """
        trt = tensorrt.api
        log = error_log(trt, tell)
        try:
            builder = trt.Builder(log)
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            parser = trt.OnnxParser(network, log)
        except (RuntimeError, TypeError) as error:  # the bindings raise these if a factory returns null
            raise ExportError(f"{tensorrt.name} cannot start: {first_complaint([*log.errors, str(error)])}") from error
        parsed = cls(name, tensorrt, log, builder, parser, network, MappedWeights(model, weights))
        if not parsed._parse(ir.to_proto(model).SerializeToString(), weights):
            raise ExportError(parsed._refusal())
        return parsed

    def check_contract(self, facts: GraphFacts) -> None:
        """Raise an `ExportError` if inputs or outputs differ from the contract in name, dtype or shape."""
        network = self.network
        for kind, wanted, found in (
            ("input", facts.inputs, [network.get_input(index) for index in range(network.num_inputs)]),
            ("output", facts.outputs, [network.get_output(index) for index in range(network.num_outputs)]),
        ):
            want = {t.name: (t.dtype, [size if isinstance(size, int) else -1 for size in t.shape]) for t in wanted}
            have = {t.name: (_DTYPES.get(t.dtype.name, t.dtype.name.lower()), list(t.shape)) for t in found}
            for name in {**want, **have}:
                if want.get(name) != have.get(name):
                    raise ExportError(
                        f"the {self.name} engine's {kind} {name} is {_tell(have.get(name))}, "
                        f"but must be {_tell(want.get(name))} by the contract"
                    )

    def aliases(self) -> dict[str, str]:
        """For every cache that is updated in place: output → the input whose memory it must share."""
        kind = self.tensorrt.api.LayerType.KV_CACHE_UPDATE
        layers = (self.network.get_layer(index) for index in range(self.network.num_layers))
        return {layer.get_output(0).name: layer.get_input(0).name for layer in layers if layer.type == kind}

    def _parse(self, proto: bytes, weights: Path) -> bool:
        parser = self.parser
        # the parser only uses the path's directory; the file is not read
        if not parser.load_model_proto(proto, str(weights.absolute() / f"{self.name}.onnx")):
            return False
        return all(parser.load_initializer(name, *self.weights.address(name)) for name in self.weights.tensors) and bool(
            parser.parse_model_proto()
        )

    def _refusal(self) -> str:
        lines = parser_complaints(self.parser) or [first_complaint(self.log.errors)]
        start = f"{self.tensorrt.name} refuses the {self.name} graph:"
        return f"{start} {lines[0]}" if len(lines) == 1 else "\n  ".join([start, *lines])


def _tell(tensor: tuple[str, list[int]] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} {tensor[1]}"
