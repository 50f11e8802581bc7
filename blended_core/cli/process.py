"""Settings of the terminal's own process: threads, memory, signals and warnings. A library must leave these to its program."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import BlendedWarning

FAILED, INTERRUPTED = 2, 130
"""Exit codes after an error, and after Ctrl-C."""
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""From malloc.h."""
WAITING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""Environment variables for OpenMP threads that spin for some microseconds before they sleep. On a busy machine, threads that spin are tens of times
slower than threads that sleep; on an idle one a quarter faster. A short spin loses little on the first and gains part of that on the second."""


def set_waiting_policy() -> None:
    """Sets WAITING_THREADS unless the user has chosen a policy. It has an effect only before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.update({**WAITING_THREADS, **os.environ})


def keep_freed_memory() -> bool:
    """Makes the process keep freed memory for its next allocations; whether that is possible (with glibc only).

    The intermediate results of a network are large and short-lived. By default glibc returns each such block to the system at once, so that every
    operation writes to new pages, which the system must find and clear first: a fifth of a forward pass of the 552.8 M network.

    The setting applies to the whole process and cannot be undone. Threads that allocate memory after it share the arena of the first thread.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(M_ARENA_MAX, 1) and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


@contextlib.contextmanager
def warnings_to(show: Callable[[BlendedWarning], None]) -> Iterator[None]:
    """Passes the warnings of this package to ``show`` and hides those of libraries."""

    def showwarning(message: Warning | str, *_: Any, **__: Any) -> None:
        if isinstance(message, BlendedWarning):
            show(message)

    with warnings.catch_warnings():
        warnings.simplefilter("always", BlendedWarning)
        warnings.showwarning = showwarning
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores Ctrl-C, so that a second Ctrl-C does not lose what the first one saved."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
