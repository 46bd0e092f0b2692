"""Runs a command on a processor with AMX as if it had none: the system call that asks for AMX is refused.

    python bench/without_amx.py medusa-export bench BUNDLE …

ONNX Runtime then takes the kernels of processors that have AVX-512 and VNNI, and so does any engine that asks in this way. The
filter stays with the command and with all processes that it starts. Linux on x86-64 only.
"""

from __future__ import annotations

import ctypes
import os
import sys

from medusa_runtime.bundle.amx import ARCH_PRCTL, ARCH_REQ_XCOMP_PERM

LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # instructions of the kernel's packet filter
X86_64 = 0xC000003E
REFUSE, ALLOW = 0x00050001, 0x7FFF0000  # the former gives the error "not permitted"
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # places in what the filter reads
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2


class Instruction(ctypes.Structure):
    """One instruction of the filter."""

    _fields_ = (("code", ctypes.c_uint16), ("if_true", ctypes.c_uint8), ("if_false", ctypes.c_uint8), ("k", ctypes.c_uint32))


class Program(ctypes.Structure):
    """The filter."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction)))


def refuse_amx() -> None:
    """Have the kernel refuse AMX to this process and all that it starts.

    Raises:
        OSError: the kernel takes no such filter.
    """
    instructions = [
        Instruction(LOAD, 0, 0, ARCHITECTURE),
        Instruction(EQUAL, 0, 5, X86_64),
        Instruction(LOAD, 0, 0, NUMBER),
        Instruction(EQUAL, 0, 3, ARCH_PRCTL),
        Instruction(LOAD, 0, 0, FIRST_ARGUMENT),
        Instruction(EQUAL, 0, 1, ARCH_REQ_XCOMP_PERM),
        Instruction(RETURN, 0, 0, REFUSE),
        Instruction(RETURN, 0, 0, ALLOW),
    ]
    program = Program(len(instructions), (Instruction * len(instructions))(*instructions))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def main() -> None:
    """Run the command that the arguments give."""
    if len(sys.argv) < 2:
        sys.exit("usage: python bench/without_amx.py COMMAND …")
    refuse_amx()
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
