"""One ONNX graph in, one serialised TensorRT engine (a *plan*) out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from medusa_export.trt.flavor import TensorRT
from medusa_export.trt.profiles import Profile
from medusa_runtime.errors import ExportError
from medusa_runtime.manifest import FileFacts, GraphFacts

_DTYPES = {"FLOAT": "float", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}
_SOURCE_PLACE = re.compile(r"\.?\s*In \w+ at \S+:\d+\)?")  # TensorRT says where in its own sources it failed


@dataclass
class Network:
    """A parsed network, with what must live as long as it does."""

    name: str
    tensorrt: TensorRT
    log: Any
    builder: Any
    parser: Any
    network: Any

    @classmethod
    def parse(cls, tensorrt: TensorRT, name: str, model: ir.Model, weights: Path) -> Network:
        """Parse a graph into a strongly typed network.

        Args:
            tensorrt: the flavour.
            name: what the graph is called in messages.
            model: the graph. Its large weights are external and are read where they are.
            weights: the directory that holds them.

        Raises:
            ExportError: TensorRT cannot start, or takes no such graph; its first complaint in one line.
        """
        trt = tensorrt.api
        log = _error_log(trt)
        try:
            builder = trt.Builder(log)
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            parser = trt.OnnxParser(network, log)
        except (RuntimeError, TypeError) as error:  # the bindings' way to say that a factory gave nothing
            raise ExportError(f"{tensorrt.name} cannot start: {_one_line([*log.errors, str(error)])}") from error
        parsed = cls(name, tensorrt, log, builder, parser, network)
        # the path is that of a file in the weights' directory; the file itself is not read
        if not parser.parse(ir.to_proto(model).SerializeToString(), str(weights.absolute() / f"{name}.onnx")):
            raise ExportError(f"{tensorrt.name} cannot take the {name} graph: {parsed._parser_error()}")
        return parsed

    def check_contract(self, facts: GraphFacts) -> None:
        """Raise an `ExportError` where inputs or outputs differ from the contract in name, dtype or shape."""
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
                        f"the contract says {_tell(want.get(name))}"
                    )

    def aliases(self) -> dict[str, str]:
        """Output → the input whose memory it must share, for every cache that is updated in place."""
        kind = self.tensorrt.api.LayerType.KV_CACHE_UPDATE
        layers = (self.network.get_layer(index) for index in range(self.network.num_layers))
        return {layer.get_output(0).name: layer.get_input(0).name for layer in layers if layer.type == kind}

    def write_plan(self, path: Path, profiles: dict[str, Profile], capabilities: Sequence[str]) -> FileFacts:
        """Compile, and stream the plan into a file.

        Raises:
            ExportError: TensorRT cannot compile the network, or the file cannot be written.
        """
        config = self.builder.create_builder_config()
        self.tensorrt.set_compute_capabilities(config, capabilities)
        for shapes in profiles.values():
            profile = self.builder.create_optimization_profile()
            for name, bounds in shapes.items():
                profile.set_shape(name, bounds["min"], bounds["opt"], bounds["max"])
            config.add_optimization_profile(profile)
        try:
            with path.open("wb") as file:
                writer = _plan_writer(self.tensorrt.api, file)
                built = self.builder.build_serialized_network_to_stream(self.network, config, writer)
            if writer.error is not None:
                raise writer.error
        except OSError as error:
            raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
        if not built or not writer.size:
            raise ExportError(f"{self.tensorrt.name} cannot build the {self.name} engine: {_one_line(self.log.errors)}")
        return FileFacts(size=writer.size, sha256=writer.digest.hexdigest())

    def _parser_error(self) -> str:
        if not self.parser.num_errors:
            return _one_line(self.log.errors)
        error = self.parser.get_error(0)
        place = f"{error.node_operator()} node {error.node_name()!r}: " if error.node_operator() else ""
        return place + _one_line([error.desc()])


def _error_log(trt: Any) -> Any:
    class ErrorLog(trt.ILogger):  # type: ignore[misc]  # a class of a module that is known only now
        """Keeps errors, in order; the first is the cause. Warnings and the rest are for TensorRT's developers."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return ErrorLog()


def _plan_writer(trt: Any, file: Any) -> Any:
    class PlanWriter(trt.IStreamWriter):  # type: ignore[misc]  # as above
        """Writes and hashes what TensorRT hands out, so that a plan is never whole in memory."""

        def __init__(self) -> None:
            super().__init__()
            self.size = 0
            self.digest = hashlib.sha256()
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
            except OSError as error:  # must not cross C++: told once the build returns
                self.error = error
                return 0
            self.size += len(data)
            self.digest.update(data)
            return len(data)

    return PlanWriter()


def _tell(tensor: tuple[str, list[int]] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} {tensor[1]}"


def _one_line(messages: Sequence[str]) -> str:
    first = next((message for message in messages if message.strip()), "it gave no reason")
    return " ".join(_SOURCE_PLACE.sub("", first.strip().splitlines()[0]).split())
