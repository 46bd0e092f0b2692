"""Writes a tuning to its bundle, unless decoding was slower or faster than predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medusa_export.errors import PredictionError
from medusa_export.progress import note
from medusa_runtime.bundle.manifest import TUNING_NAME, Manifest
from medusa_runtime.drafting.tuning import DeviceTuning, TunedBatch, Tuning
from medusa_runtime.errors import BundleError


def keep(bundle: Path, manifest: Manifest, device: str, found: DeviceTuning) -> None:
    """Add a device to a bundle's tuning. Other devices' entries are kept, unless they are damaged or the bundle has changed."""
    digest = manifest.content_digest()
    devices: dict[str, DeviceTuning] = {}
    try:
        before = Tuning.load(bundle)
    except BundleError as error:
        note(f"{error}; it is replaced")
    else:
        if before is not None and before.bundle == digest:
            devices = before.devices
        elif before is not None:
            note("the existing tuning belongs to other files; it is replaced")
    Tuning(bundle=digest, devices=devices | {device: found}).save(bundle)


def checks_off(batches: Sequence[TunedBatch]) -> str:
    """The batch sizes whose check was off, each with its error; empty if the tuning holds.

    One table of costs is behind the trees of all batch sizes. So if one of them was not as predicted, none is trusted.
    """
    off = [batch for batch in batches if batch.as_predicted is False]
    return ", ".join(f"{batch.batch_size} ({batch.check.error:+.0%})" for batch in off if batch.check is not None)


def require_held(bundle: Path, found: DeviceTuning) -> None:
    """Raise a PredictionError if the tuning was not kept."""
    off = checks_off(found.batches)
    if not off:
        return
    path = bundle / TUNING_NAME
    left = f"{path} stays as it was" if path.exists() else f"{path} is not written"
    raise PredictionError(
        f"the tuning does not hold: decoding was slower or faster than predicted at batch size {off}; {left}. "
        "Tune again when nothing else runs on the machine"
    )
