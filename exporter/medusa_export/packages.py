"""Optional packages: why one cannot be imported, and the command that installs it."""

from __future__ import annotations

import importlib

from medusa_runtime.errors import first_line


def import_problem(module: str) -> str | None:
    """The reason why a module cannot be imported, in one line; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a package can raise anything if its libraries are missing
        return f"{module} is not installed" if is_absent(module, error) else f"{module} does not load: {first_line(error)}"
    return None


def is_absent(module: str, error: Exception) -> bool:
    """Whether the import failed because the module itself is not installed, rather than something that it needs."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return name is not None and f"{module}.".startswith(f"{name}.")


def install_command(*extras: str) -> str:
    """The command that installs some of our extras."""
    return f"pip install 'medusa-export[{','.join(extras)}]'"
