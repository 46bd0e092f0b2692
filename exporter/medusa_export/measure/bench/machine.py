"""The description of the machine in a benchmark's result."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

from medusa_runtime.backends.gpu.devices import find_gpus
from medusa_runtime.bundle.cpu import cpu_name, num_cores


def machine() -> dict[str, Any]:
    """Processor, cores, system and GPUs."""
    found = find_gpus()
    gpus = {"gpus": [asdict(gpu) for gpu in found.gpus], "cuda": found.cuda_version} if found.gpus else {}
    return {"cpu": cpu_name(), "cores": num_cores(), "system": platform.system()} | gpus
