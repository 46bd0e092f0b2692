"""`medusa-export` with FSDP2 between CPU processes, which PyTorch can do and accelerate does not offer: for tests alone.

accelerate takes up FSDP only where it finds GPUs; here it is told after it has looked. All the rest is what runs on GPUs.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState

from medusa_export.cli import main
from medusa_heads.train import fit as loop

_init = AcceleratorState.__init__


def _init_sharded(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _stop_at(place: str, news: Any = loop.News) -> None:
    """Be interrupted when a step is told of: "joint:3"."""

    def telling(*values: Any) -> Any:
        if f"{values[0]}:{values[1]}" == place:
            raise KeyboardInterrupt
        return news(*values)

    loop.News = telling  # type: ignore[assignment,misc]


if __name__ == "__main__":
    AcceleratorState.__init__ = _init_sharded  # type: ignore[method-assign]
    if "STOP_AT" in os.environ:
        _stop_at(os.environ["STOP_AT"])
    main()
