"""How PyTorch's threads share the machine: set before PyTorch is imported, as OpenMP reads the environment when it is loaded.

OpenMP's threads spin for milliseconds after each operator. Beside another program, each operator then waits for a thread that
waits for a core (docs/decisions/0034-shared-machines.md).
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from medusa_runtime.bundle.cpu import ROOT, num_affine_cores, num_cores

SLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # GNU's OpenMP, which PyPI's PyTorch has; Intel's and LLVM's
ALSO = ("GOMP_SPINCOUNT",)  # with this variable, users say the same to GNU's OpenMP
NUM_THREADS = "OMP_NUM_THREADS"


def share_cores(environment: MutableMapping[str, str] = os.environ, root: Path = ROOT) -> None:
    """Let PyTorch's idle threads sleep, and let there be as many as a container's CPU limit allows.

    Variables that the user has set are kept. If one of them says how threads wait, nothing else is said about that.

    Args:
        environment: the environment of this process.
        root: the file system's root, where `proc` and `sys` are.
    """
    if environment.keys().isdisjoint((*SLEEP, *ALSO)):
        environment.update(SLEEP)
    if (cores := num_cores(root)) < num_affine_cores():  # PyTorch knows the affinity, and no control groups
        environment.setdefault(NUM_THREADS, str(cores))
