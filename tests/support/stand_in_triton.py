"""A stand-in of Triton's Python backend, after its public documentation: `triton_python_backend_utils`, and a server.

It has what our model uses: requests with response senders, tensors, errors and the logger. The server reads `config.pbtxt` with
Triton's own protobuf description (from the package tritonclient), and refuses what Triton refuses: inputs that are not declared
or have another type or shape, outputs that are not declared or have another type, and responses after the last one.

What it leaves open: the real process of the backend and its shared memory, the time that sending takes, what HTTP and gRPC
make of the tensors, and whether a client that goes away is noticed. Only a real Triton can show these.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

TYPES = {
    "TYPE_STRING": np.object_, "TYPE_BOOL": np.bool_, "TYPE_INT32": np.int32, "TYPE_UINT32": np.uint32,
    "TYPE_UINT64": np.uint64, "TYPE_FP32": np.float32,
}  # fmt: skip
FINAL = 1


class Tensor:
    """A tensor, which copies nothing."""

    def __init__(self, name: str, values: np.ndarray) -> None:
        assert isinstance(values, np.ndarray)
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values


class TritonError:
    """An error of one response, with Triton's codes."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class TritonModelException(Exception):  # noqa: N818 - Triton's name
    """What a model raises if it cannot be loaded."""


class InferenceResponse:
    """One response: tensors, or an error."""

    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        assert isinstance(output_tensors, list)
        self._tensors, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def error(self) -> TritonError | None:
        return self._error


class ResponseSender:
    """Takes the responses to one request, and knows whether the request was cancelled."""

    def __init__(self, outputs: dict[str, type]) -> None:
        self._outputs = outputs
        self._has_ended = False
        self.is_gone = False
        self.arrived: queue.Queue[dict[str, list[Any]] | TritonError | None] = queue.Queue()  # None after the last one

    def is_cancelled(self) -> bool:
        assert not self._has_ended, "the sender was used after its last response"
        return self.is_gone

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self._has_ended, "a response was sent after the last one"
        self._has_ended = flags == FINAL
        if response is not None:
            self.arrived.put(response.error() or self._checked(response))
        if self._has_ended:
            self.arrived.put(None)

    def _checked(self, response: InferenceResponse) -> dict[str, list[Any]]:
        told = {}
        for tensor in response.output_tensors():
            values = tensor.as_numpy()
            assert values.dtype == self._outputs[tensor.name()], f"{tensor.name()} is {values.dtype}"
            assert values.ndim == 1
            told[tensor.name()] = [value.decode() if isinstance(value, bytes) else value for value in values.tolist()]
        return told


class InferenceRequest:
    """One request. Triton frees its tensors once it is released, so they can be read during `execute` alone."""

    def __init__(self, inputs: list[Tensor], parameters: dict[str, Any], sender: ResponseSender) -> None:
        self._inputs, self._parameters, self._sender = inputs, parameters, sender
        self.is_released = False

    def inputs(self) -> list[Tensor]:
        assert not self.is_released, "the inputs were read after execute"
        return self._inputs

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def get_response_sender(self) -> ResponseSender:
        return self._sender


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def install() -> ModuleType:
    """Put the stand-in where the model imports `triton_python_backend_utils` from; the same one each time."""
    if "triton_python_backend_utils" not in sys.modules:
        module = ModuleType("triton_python_backend_utils")
        for part in (Tensor, TritonError, TritonModelException, InferenceResponse, InferenceRequest, get_input_tensor_by_name):
            setattr(module, part.__name__, part)
        module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
        module.messages = []
        module.Logger = SimpleNamespace(log_info=module.messages.append, log_error=module.messages.append)
        sys.modules["triton_python_backend_utils"] = module
    return sys.modules["triton_python_backend_utils"]


def read_config(path: Path) -> dict[str, Any]:
    """A model's configuration, read with Triton's own description of it, as the JSON that the model is given."""
    json_format = pytest.importorskip("google.protobuf.json_format")
    text_format = pytest.importorskip("google.protobuf.text_format")
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package tritonclient, which describes Triton's configuration, is not installed")
    file = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"  # without gRPC, which its package needs
    if "tests_model_config_pb2" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tests_model_config_pb2", file)
        sys.modules["tests_model_config_pb2"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tests_model_config_pb2"])
    message = sys.modules["tests_model_config_pb2"].ModelConfig()
    text_format.Parse(path.read_text(encoding="utf-8"), message)
    config: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return config


class Asking:
    """A client of one request."""

    def __init__(self, sender: ResponseSender) -> None:
        self._sender = sender

    def next(self) -> dict[str, list[Any]] | TritonError | None:
        """The next response; None if the last one has come."""
        return self._sender.arrived.get(timeout=60)

    def all(self) -> list[Any]:
        """All responses that are still to come."""
        return list(iter(self.next, None))

    def only(self) -> dict[str, list[Any]]:
        """The one response of a request that succeeds."""
        (response,) = self.all()
        assert isinstance(response, dict), response.message()
        return response

    def error(self) -> TritonError:
        """The one response of a request that fails."""
        (response,) = self.all()
        assert isinstance(response, TritonError), response
        return response

    def go_away(self) -> None:
        """Cancel the request."""
        self._sender.is_gone = True


class TritonServer:
    """Serves one model of a repository."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        pb_utils = install()
        self.config = read_config(directory / "config.pbtxt") | changes
        version = directory / "1"
        pb_utils.get_model_dir = lambda: str(version)
        spec = importlib.util.spec_from_file_location("model", version / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.model = module.TritonPythonModel()
        self.model.initialize({
            "model_config": json.dumps(self.config), "model_instance_kind": "MODEL", "model_instance_device_id": "0",
            "model_repository": str(directory), "model_version": "1", "model_name": self.config["name"],
        })  # fmt: skip

    def ask(self, parameters: dict[str, Any] | None = None, *, is_gone: bool = False, **inputs: Any) -> Asking:
        """Send a request. Inputs are given by name, as one value or as a list."""
        sender = ResponseSender({output["name"]: TYPES[output["data_type"]] for output in self.config["output"]})
        sender.is_gone = is_gone
        tensors = [self._tensor(name, value) for name, value in inputs.items()]
        request = InferenceRequest(tensors, parameters or {}, sender)
        assert self.model.execute([request]) is None
        request.is_released = True
        return Asking(sender)

    def close(self) -> None:
        self.model.finalize()

    def _tensor(self, name: str, value: Any) -> Tensor:
        (declared,) = [entry for entry in self.config["input"] if entry["name"] == name]
        values = value if isinstance(value, list) else [value]
        assert declared["dims"] == ["-1"] or len(values) == 1
        if declared["data_type"] == "TYPE_STRING":
            values = [entry if isinstance(entry, bytes) else entry.encode() for entry in values]
        return Tensor(name, np.array(values, TYPES[declared["data_type"]]))
