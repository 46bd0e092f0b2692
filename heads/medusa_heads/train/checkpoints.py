"""The work directory of a run: its log, its last checkpoint, and the settings with which it can be resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from medusa_runtime.bundle.files import is_leftover, json_text, sync_directory, sync_tree, write_whole
from medusa_runtime.errors import MedusaError, OptionError, first_line

RUN_NAME, LOG_NAME, CHECKPOINT, PLACE_NAME = "run.json", "log.jsonl", "checkpoint", "place.json"


class WorkDirectory:
    """The work directory of one run. Only the main process writes to it, except for shards, which every process writes.

    Raises:
        OptionError: the directory has other files in it, or a run with other settings.
    """

    def __init__(self, path: Path, identity: dict[str, Any], accelerator: Accelerator) -> None:
        self.path = path
        self.accelerator = accelerator
        self._check(identity)
        accelerator.wait_for_everyone()  # all processes must have checked it before one writes
        if accelerator.is_main_process and not (path / RUN_NAME).exists():
            path.mkdir(parents=True, exist_ok=True)
            write_whole(path / RUN_NAME, json.dumps(identity, indent=2) + "\n")
        accelerator.wait_for_everyone()

    def log(self, **entry: Any) -> None:
        """Append a line to the log."""
        if self.accelerator.is_main_process:
            with (self.path / LOG_NAME).open("a", encoding="utf-8", newline="\n") as file:
                file.write(json_text(entry) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """The log's lines, without an incomplete one of a killed run."""
        place = self.path / LOG_NAME
        lines = place.read_text(encoding="utf-8").split("\n")[:-1] if place.exists() else []
        return [json.loads(line) for line in lines]

    @property
    def stage(self) -> str | None:
        """The stage of the checkpoint; None if there is no checkpoint."""
        place = self._last() / PLACE_NAME
        return str(json.loads(place.read_text(encoding="utf-8"))["stage"]) if place.exists() else None

    @property
    def kept(self) -> str:
        """The checkpoint to continue from, in words."""
        place = self._last() / PLACE_NAME
        if not place.exists():
            return "there is no checkpoint yet"
        found = json.loads(place.read_text(encoding="utf-8"))
        return f"the checkpoint after step {found['step']} of {found['stage']} is kept in {self.path}"

    def save(self, stage: str, step: int) -> None:
        """Write a checkpoint of a stage after `step` steps. It replaces the earlier one."""
        fresh, last = self.path / f"{CHECKPOINT}.new", self.path / CHECKPOINT
        if self.accelerator.is_main_process:
            shutil.rmtree(fresh, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(fresh))
        except (
            RuntimeError,
            SafetensorError,
            OSError,
        ) as error:  # torch and safetensors raise different errors if the disk is full
            raise MedusaError(f"{fresh} cannot be written: {first_line(error)}; {self.kept}") from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (fresh / PLACE_NAME).write_text(json.dumps({"stage": stage, "step": step}), encoding="utf-8")
            sync_tree(fresh)
            old = self.path / f"{CHECKPOINT}.old"
            if last.exists():
                shutil.rmtree(old, ignore_errors=True)  # the leftover of a killed run
                last.rename(old)
            fresh.rename(last)
            sync_directory(self.path)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def resume(self, stage: str) -> int:
        """Load the checkpoint if it belongs to the stage. Returns the number of steps done.

        Log lines of steps that will be repeated are removed.
        """
        step = 0
        if self.stage == stage:
            last = self._last()
            self.accelerator.load_state(str(last))
            step = int(json.loads((last / PLACE_NAME).read_text(encoding="utf-8"))["step"])
        if self.accelerator.is_main_process:
            kept = [entry for entry in self.entries() if entry["stage"] != stage or entry["step"] <= step]
            write_whole(self.path / LOG_NAME, "".join(json_text(entry) + "\n" for entry in kept))
        self.accelerator.wait_for_everyone()
        return step

    def _last(self) -> Path:
        """The last checkpoint; or the one before it, if a run was killed between two renames."""
        last, old = self.path / CHECKPOINT, self.path / f"{CHECKPOINT}.old"
        return old if old.exists() and not last.exists() else last

    def _check(self, identity: dict[str, Any]) -> None:
        place = self.path / RUN_NAME
        if not place.exists():
            if self.path.exists() and any(
                entry.name != "hidden" and not is_leftover(entry.name) for entry in self.path.iterdir()
            ):
                raise OptionError(f"{self.path} has other files in it; choose another --work")
            return
        try:
            before = dict(json.loads(place.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, ValueError, TypeError) as error:
            raise OptionError(f"{place} is damaged; delete {self.path} to start again") from error
        changed = [f"{name} was {before.get(name)}, is {now}" for name, now in identity.items() if before.get(name) != now]
        if changed:
            raise OptionError(
                f"{self.path} has a run with other settings ({'; '.join(changed)}); "
                "continue with those, choose another --work, or delete it"
            )
