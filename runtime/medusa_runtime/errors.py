"""Every error a user can meet, in one small hierarchy. The message says what was wrong, what was found and what to do."""

from __future__ import annotations


class MedusaError(Exception):
    """The base of all errors raised on purpose. The command line prints it in one line and exits with `exit_code`."""

    exit_code = 1


class OptionError(MedusaError):
    """An option has a value that cannot be used."""

    exit_code = 2


class MissingExtraError(MedusaError):
    """A command needs packages that one of the optional extras installs."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'medusa-export[{extra}]'")


class BundleError(MedusaError):
    """A bundle is missing, damaged, or of a kind that this version cannot read."""


class CapacityError(MedusaError):
    """A request needs more cache than the bundle, the engine or the memory allows."""


class ContextLengthError(CapacityError):
    """A prompt, or a prompt with its answer, is longer than the bundle or the request allows."""


class QueueFullError(MedusaError):
    """A service has as many requests as it may hold. Try again later, or on another service."""


class QueueTimeoutError(MedusaError):
    """A request waited for a slot longer than its `max_queue_seconds`. Try again later, or on another service."""


class ClosedError(MedusaError):
    """A service was closed before a request was made, or while it was under way."""


class RequestError(MedusaError):
    """A request failed while it was decoded; the others went on."""


class TreeError(MedusaError):
    """A candidate tree is malformed, or deeper or wider than the heads."""

    exit_code = 2


class BackendError(MedusaError):
    """A backend is unknown, is not installed, or cannot run this bundle."""


class DeviceLostError(BackendError):
    """A GPU stopped working for this process: its driver was reset, updated or failed. Close the model and open it again."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_failure(error: BaseException) -> bool:
    """Whether an error is a failure of the work at hand, and not a request to end the program, such as Ctrl-C.

    A panic of a library written in Rust is a failure, though its class is not an `Exception`.
    """
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"
