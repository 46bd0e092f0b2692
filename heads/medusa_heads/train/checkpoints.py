"""The work directory of a run: its log, its last checkpoint, and the settings that it may be resumed under."""

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
    """Of one run. Only the main process writes, but for the shards that accelerate has every process write.

    Raises:
        OptionError: it holds something else, or a run with other settings.
    """

    def __init__(self, path: Path, identity: dict[str, Any], accelerator: Accelerator) -> None:
        self.path = path
        self.accelerator = accelerator
        self._check(identity)
        accelerator.wait_for_everyone()  # all have looked before one writes
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
        """The log's lines, but for one that a killed run was writing."""
        place = self.path / LOG_NAME
        lines = place.read_text(encoding="utf-8").split("\n")[:-1] if place.exists() else []
        return [json.loads(line) for line in lines]

    @property
    def stage(self) -> str | None:
        """That the checkpoint is of; none where there is none."""
        place = self._last() / PLACE_NAME
        return str(json.loads(place.read_text(encoding="utf-8"))["stage"]) if place.exists() else None

    @property
    def kept(self) -> str:
        """What there is to go on from, in words."""
        place = self._last() / PLACE_NAME
        if not place.exists():
            return "there is no checkpoint yet"
        found = json.loads(place.read_text(encoding="utf-8"))
        return f"the checkpoint after step {found['step']} of {found['stage']} stays in {self.path}"

    def save(self, stage: str, step: int) -> None:
        """Keep where a stage stands after `step` steps, in place of the checkpoint before."""
        fresh, last = self.path / f"{CHECKPOINT}.new", self.path / CHECKPOINT
        if self.accelerator.is_main_process:
            shutil.rmtree(fresh, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(fresh))
        except (RuntimeError, SafetensorError, OSError) as error:  # torch and safetensors tell of a full disk each in its way
            raise MedusaError(f"{fresh} cannot be written: {first_line(error)}; {self.kept}") from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (fresh / PLACE_NAME).write_text(json.dumps({"stage": stage, "step": step}), encoding="utf-8")
            sync_tree(fresh)
            old = self.path / f"{CHECKPOINT}.old"
            if last.exists():
                shutil.rmtree(old, ignore_errors=True)  # a run was killed before it did
                last.rename(old)
            fresh.rename(last)
            sync_directory(self.path)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def resume(self, stage: str) -> int:
        """Load the checkpoint if it is of that stage. Returns how many of its steps are done.

        Log lines of steps that will be done again are removed.
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
        """The last checkpoint; the one before it where a run was killed between two renames."""
        last, old = self.path / CHECKPOINT, self.path / f"{CHECKPOINT}.old"
        return old if old.exists() and not last.exists() else last

    def _check(self, identity: dict[str, Any]) -> None:
        place = self.path / RUN_NAME
        if not place.exists():
            if self.path.exists() and any(
                entry.name != "hidden" and not is_leftover(entry.name) for entry in self.path.iterdir()
            ):
                raise OptionError(f"{self.path} holds something else; choose another --work")
            return
        try:
            before = dict(json.loads(place.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, ValueError, TypeError) as error:
            raise OptionError(f"{place} is damaged; remove {self.path} to begin again") from error
        changed = [f"{name} was {before.get(name)}, is {now}" for name, now in identity.items() if before.get(name) != now]
        if changed:
            raise OptionError(
                f"{self.path} holds a run with other settings ({'; '.join(changed)}); "
                "go on with those, choose another --work, or remove it"
            )
