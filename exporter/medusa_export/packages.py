"""Packages that may not be here: why one cannot be imported, and the command that installs it."""

from __future__ import annotations

import importlib

from medusa_runtime.errors import first_line


def import_problem(module: str) -> str | None:
    """Why a module cannot be imported, in a line; none where it can be."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - whatever a package says when its libraries are not there
        return f"{module} is not installed" if is_absent(module, error) else f"{module} does not load: {first_line(error)}"
    return None


def is_absent(module: str, error: Exception) -> bool:
    """Whether a module could not be imported because it, and not something that it needs, is not installed."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return name is not None and f"{module}.".startswith(f"{name}.")


def install_command(*extras: str) -> str:
    """What installs some of our extras."""
    return f"pip install 'medusa-export[{','.join(extras)}]'"
