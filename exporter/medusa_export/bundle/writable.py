"""Checks that a bundle's directory can be written, before the work whose result goes there."""

from __future__ import annotations

import os
from pathlib import Path

from medusa_runtime.errors import OptionError


def require_writable(bundle: Path, file: str) -> None:
    """Refuse a bundle on a read-only file system or in a directory of others.

    Args:
        bundle: its directory. If it is missing, nothing is checked: opening it says so.
        file: the name of the file that is to be written, for the message.

    Raises:
        OptionError: no file can be made there.
    """
    if not bundle.is_dir():
        return
    probe = bundle / f".{file}.partial-{os.urandom(8).hex()}"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        probe.unlink()
    except OSError as error:
        raise OptionError(
            f"{bundle} cannot be written ({error.strerror}), and {file} is to be written there; copy the bundle elsewhere"
        ) from error
