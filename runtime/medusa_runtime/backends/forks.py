"""ONNX Runtime's objects in a child of a fork: they are never freed there."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any, TypeVar

T = TypeVar("T")
_open: weakref.WeakSet[Any] = weakref.WeakSet()


def kept_in_children(value: T) -> T:
    """Note an object that must not be freed in a child of a fork.

    A session that is freed waits for its threads to end. A child has none of them, so it would wait for ever, or crash.
    """
    _open.add(value)
    return value


def _keep() -> None:
    """In a child: give each object one reference more, which nobody drops."""
    for value in list(_open):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep)
