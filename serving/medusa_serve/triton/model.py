"""`TritonPythonModel`, which Triton's Python backend runs: one `MedusaLM`, and a thread that sends its answers.

`execute` only takes requests in, and returns at once. So requests join the runtime's continuous batch as they come.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # only Triton has it

from medusa_runtime import MedusaError, MedusaLM, OptionError
from medusa_serve.errors import ApiError
from medusa_serve.triton.answering import Sender, answer
from medusa_serve.triton.request import Asked, read_request
from medusa_serve.triton.settings import ModelSettings


class TritonPythonModel:
    """The interface that Triton's Python backend asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle and warm it up.

        Raises:
            TritonModelException: the configuration or the bundle cannot be used.
        """
        try:
            settings = _settings(json.loads(args["model_config"]))
            self._lm = _open(settings)
        except MedusaError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._open: set[concurrent.futures.Future[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="medusa-triton")
        self._thread.start()
        pb_utils.Logger.log_info(f"medusa: {args['model_name']} is ready: {self._lm.manifest.model.name}")

    def execute(self, requests: list[Any]) -> None:
        """Take requests in. Their responses go to their response senders."""
        for request in requests:
            sender = Sender(request.get_response_sender())
            try:
                asked = self._read(request)
            except (MedusaError, ApiError) as error:
                sender.fail(error)
                continue
            future = asyncio.run_coroutine_threadsafe(answer(self._lm, asked, sender), self._loop)
            self._open.add(future)
            future.add_done_callback(self._open.discard)

    def finalize(self) -> None:
        """End the requests under way with an error, and free the model."""
        self._lm.close()
        concurrent.futures.wait(set(self._open))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _read(self, request: Any) -> Asked:
        def values(name: str) -> list[Any] | None:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()

        return read_request(values, request.parameters(), self._lm.manifest)


def _settings(config: dict[str, Any]) -> ModelSettings:
    count = sum(group.get("count", 1) for group in config.get("instance_group", []))
    if count > 1:
        raise OptionError(
            f"config.pbtxt asks for {count} instances of the model, each of which would load it again; it must ask for 1:"
            " the runtime decodes many requests at once"
        )
    if not config.get("model_transaction_policy", {}).get("decoupled"):
        raise OptionError("config.pbtxt lacks model_transaction_policy { decoupled: true }; answers come in several responses")
    return ModelSettings.of(config.get("parameters", {}))


def _open(settings: ModelSettings) -> MedusaLM:
    lm = MedusaLM.from_bundle(
        Path(pb_utils.get_model_dir()) / settings.bundle,
        settings.backend,
        device=settings.device,
        num_threads=settings.threads,
        spin=settings.spin,
        max_batch_size=settings.max_batch_size,
        max_queue=settings.max_queue,
        allow_engine_code=settings.allow_engine_code,
    )
    lm.warm_up()
    return lm
