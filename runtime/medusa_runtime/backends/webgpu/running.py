"""Sessions on a WebGPU device: how they are opened and run, and what their errors mean."""

from __future__ import annotations

from pathlib import Path

from medusa_runtime.backends.ort_library import ort
from medusa_runtime.backends.webgpu.adapters import Adapter, held, note_loss
from medusa_runtime.ending import native_run
from medusa_runtime.errors import BackendError, CapacityError, DeviceLostError, first_line

LOST = ("is lost", "device lost", "DeviceLost")
NO_MEMORY = ("Invalid Buffer", "OUT_OF_DEVICE_MEMORY")  # a buffer that could not be made is used all the same


def open_session(path: Path, adapter: Adapter) -> ort.InferenceSession:
    """Open a graph on a device.

    Raises:
        BackendError: ONNX Runtime refuses it.
        DeviceLostError: the device was lost.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns about each node that it leaves to the CPU: those that make masks and indices
    options.add_provider_for_devices([adapter.device], {})
    try:
        with native_run():
            return held(ort.InferenceSession(path, options))
    except Exception as error:  # ONNX Runtime's errors have no common base but this
        _require_device(error, adapter)
        raise BackendError(f"ONNX Runtime cannot open {path} on {adapter.name}: {first_line(error)}") from error


def run(session: ort.InferenceSession, binding: ort.IOBinding, name: str, adapter: Adapter) -> None:
    """Run a graph.

    Args:
        session: the graph's.
        binding: its inputs and outputs.
        name: the graph's, for errors.
        adapter: the device.

    Raises:
        DeviceLostError: the device was lost.
        CapacityError: the device has too little memory, or no room for a tensor of such a size.
        BackendError: the graph cannot be run.
    """
    try:
        with native_run():
            session.run_with_iobinding(binding)
    except Exception as error:  # as above
        _require_device(error, adapter)
        if any(words in str(error) for words in NO_MEMORY):
            raise CapacityError(
                f"{adapter.name} has no memory for the {name} graph, or a tensor is larger than its largest buffer; "
                "use a smaller or a quantised bundle (medusa-export doctor tells the limits)"
            ) from error
        if "requires f16" in str(error):
            raise BackendError(f"{adapter.name} cannot compute in fp16 through WebGPU; use a bundle in fp32") from error
        raise BackendError(f"ONNX Runtime cannot run the {name} graph on WebGPU: {first_line(error)}") from error


def _require_device(error: Exception, adapter: Adapter) -> None:
    if any(words in str(error) for words in LOST):
        note_loss()
        raise DeviceLostError(f"{adapter.name} was lost: its driver was reset or failed; open the model again") from error
