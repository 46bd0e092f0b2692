"""A stand-in for ONNX Runtime with CUDA: its CPU provider, on the memory and the stream of the driver's stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort

from tests.support.stand_in_cuda import StandInDriver

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class StandInOrt:
    """The module `onnxruntime`, as far as it is used.

    Args:
        driver: whose stream sessions run on.
        providers: which this build has.
        loads: whether its CUDA provider finds its libraries.
    """

    SessionOptions = ort.SessionOptions
    RunOptions = ort.RunOptions

    def __init__(self, driver: StandInDriver, providers: tuple[str, ...] = (CUDA, CPU), *, loads: bool = True) -> None:
        self.driver, self.providers, self.loads = driver, providers, loads
        self.settings: list[dict[str, str]] = []  # of the sessions
        self.num_preloads = 0
        self.graph_ids: list[str] = []  # of the runs that have one

    def preload_dlls(self) -> None:
        self.num_preloads += 1

    def get_available_providers(self) -> list[str]:
        return list(self.providers)

    def InferenceSession(self, path: Path, options: Any, providers: Any) -> Session:  # noqa: N802 - ONNX Runtime's own name
        (name, settings), fallback = providers
        assert (name, fallback) == (CUDA, CPU)
        self.settings.append(settings)
        return Session(self, ort.InferenceSession(path, options, providers=[CPU]))


class Session:
    def __init__(self, api: StandInOrt, session: ort.InferenceSession) -> None:
        self._api, self._session = api, session

    def get_providers(self) -> list[str]:
        return [CUDA, CPU] if self._api.loads else [CPU]

    def io_binding(self) -> Binding:
        return Binding(self._session.io_binding())

    def run_with_iobinding(self, binding: Binding, options: ort.RunOptions) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        if self._api.settings[0]["enable_cuda_graph"] == "1":
            self._api.graph_ids.append(options.get_run_config_entry("gpu_graph_id"))
        self._api.driver.add(lambda: self._session.run_with_iobinding(binding.real))


class Binding:
    def __init__(self, real: ort.IOBinding) -> None:
        self.real = real

    def bind_input(self, name: str, kind: str, index: int, element_type: int, shape: Any, address: int) -> None:
        assert (kind, index) == ("cuda", 0)
        self.real.bind_input(name, "cpu", 0, element_type, shape, address)

    def bind_output(self, name: str, kind: str, index: int, element_type: int, shape: Any, address: int) -> None:
        assert (kind, index) == ("cuda", 0)
        self.real.bind_output(name, "cpu", 0, element_type, shape, address)
