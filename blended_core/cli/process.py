"""Settings of the terminal's own process: streams, threads, memory, signals, warnings and logs. A library must leave these to its program."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import BlendedWarning

FAILED, INTERRUPTED = 2, 130
"""Exit codes after an error, and after Ctrl-C, SIGTERM or SIGHUP."""
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a command as Ctrl-C does: of a service manager or a shutdown, and of a terminal that is closed."""
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""From malloc.h."""
WAITING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""Environment variables for OpenMP threads that spin for some microseconds before they sleep. On a busy machine, threads that spin are tens of times
slower than threads that sleep; on an idle one a quarter faster. A short spin loses little on the first and gains part of that on the second."""


class StopSignal(KeyboardInterrupt):
    """One of STOP_SIGNALS arrived; ``name`` is its name."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.name = signal.Signals(number).name


def open_streams() -> None:
    """Opens what the caller has closed of stdin, stdout and stderr, to nothing; and lets the others replace characters that they cannot show, such as λ.

    Otherwise the first file that is opened would take the number of a closed stream, and what libraries print would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # open until the process ends
        elif hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="replace")


def cache_folder() -> Path | None:
    """The folder that ``BLENDED_DIFFUSION_CACHE`` names for the decisions of the probe; None: the user's cache folder."""
    named = os.environ.get("BLENDED_DIFFUSION_CACHE")
    return Path(named).absolute() if named else None


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
def logs_to(show: Callable[[str], None]) -> Iterator[None]:
    """Passes what libraries log as a warning or an error to ``show``. Without a handler, logging would print it as it is."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show(f"{record.name}: {record.getMessage()}")

    handler, root = Handler(logging.WARNING), logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Raises StopSignal in the main thread when one of STOP_SIGNALS arrives. A signal that the caller ignores, as nohup does, stays ignored."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return

    def stop(number: int, _: object) -> None:
        raise StopSignal(number)

    taken = [number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores Ctrl-C and STOP_SIGNALS, so that a second one does not lose what the first one saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *STOP_SIGNALS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
