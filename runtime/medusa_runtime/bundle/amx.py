"""AMX, the tile registers of Intel's processors: whether ONNX Runtime gets them.

It asks Linux for them when it is imported, and then uses them for all products of integers. Where other programs use the same
physical cores, products of few rows, as in a step of one or two tokens, can be faster without AMX
(docs/decisions/0048-amx-and-few-tokens.md). Users say ``MEDUSA_AMX=off`` for that.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from medusa_runtime.errors import OptionError

VARIABLE = "MEDUSA_AMX"
ARCH_PRCTL = 158  # Linux on x86-64: the call that tells and changes what a process may use
ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 0x1022, 0x1023, 18
SMALL_STACK = 8192  # bytes: room for the registers of AVX-512 in a signal handler, and none for those of AMX
_state = {"left out": False}  # whether ONNX Runtime was imported without AMX
log = logging.getLogger(__name__)


class _Stack(ctypes.Structure):
    """``stack_t``: where a thread's signal handlers run."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def is_wanted() -> bool:
    """Whether ONNX Runtime is to use AMX: the variable ``MEDUSA_AMX``.

    Raises:
        OptionError: the variable is neither ``on`` nor ``off``.
    """
    value = os.environ.get(VARIABLE) or "on"
    if value not in ("on", "off"):
        raise OptionError(f"the variable {VARIABLE} is {value!r}; it must be on or off")
    return value == "on"


def may_use_amx() -> bool:
    """Whether ONNX Runtime may use AMX, if the processor has it. Users may not want that, and a sandbox may refuse it."""
    if _state["left out"] or not (is_wanted() or _is_granted()):
        return False
    return _asks()


@contextmanager
def as_wanted() -> Iterator[None]:
    """ONNX Runtime is imported inside this. If AMX is not wanted, Linux refuses it meanwhile, and may grant it to others later.

    Linux grants AMX to a process only if its registers fit on the stack of each thread's signal handlers. So this thread has a
    small one for a while.

    Raises:
        OptionError: the variable is neither ``on`` nor ``off``.
    """
    if is_wanted() or sys.platform != "linux" or platform.machine() != "x86_64":
        yield
        return
    sigaltstack = ctypes.CDLL(None).sigaltstack
    space, before = ctypes.create_string_buffer(SMALL_STACK), _Stack()
    sigaltstack(ctypes.byref(_Stack(ctypes.addressof(space), 0, SMALL_STACK)), ctypes.byref(before))
    try:
        yield
    finally:
        sigaltstack(ctypes.byref(before), None)
    _state["left out"] = not _is_granted()
    if not _state["left out"]:
        log.warning("%s=off comes too late: this process got AMX before ONNX Runtime was imported by medusa_runtime", VARIABLE)


def _is_granted() -> bool:
    """Whether this process has asked for AMX already and may use it."""
    granted = ctypes.c_uint64()
    refused = _arch_prctl(ARCH_GET_XCOMP_PERM, ctypes.byref(granted))
    return not refused and bool(granted.value >> XFEATURE_XTILEDATA & 1)


@cache
def _asks() -> bool:
    """Ask for AMX as ONNX Runtime does. The process has the permission afterwards, which changes nothing else."""
    return _arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


def _arch_prctl(*arguments: object) -> int:
    """Returns 0, or what a system without such calls gives."""
    try:
        return int(ctypes.CDLL(None).syscall(ARCH_PRCTL, *arguments))
    except (OSError, AttributeError, TypeError):
        return -1
