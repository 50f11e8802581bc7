"""How the C library hands out a processor's memory, for programs of our own.

A network's intermediate results are large and short-lived. glibc asks the system for each such block and gives it back at once, so that every
operation writes into pages that the system has to find and clear first: with the 552.8 M network that is a fifth of a forward. A program that keeps
what it freed writes into the same pages again.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Of malloc.h."""


def keep_freed_memory() -> bool:
    """Has the process keep the memory that it frees, for its next use; whether that could be asked for (glibc alone knows it).

    It concerns the whole process and cannot be undone, so it is for a program that owns its process, not for a library. If no other
    thread has asked for memory before, later ones share that of the first, which they would not keep of their own.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(M_ARENA_MAX, 1) and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
