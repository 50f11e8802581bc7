"""Effect of the settings that the terminal makes for its process: it keeps freed memory, and waiting threads spin only briefly."""

from __future__ import annotations

import os
from statistics import median
from typing import Any

from blended_core.cli.process import WAITING_THREADS

from .loading import run_python
from .measure import ratio
from .step import MIB, Log

PROCESS_ROUNDS = {"small": 6, "medium": 2, "full": 2}
STEPS = {"small": 12, "medium": 3, "full": 2}
"""Steps per process, after one warm-up step. The process prints their median."""
WORK = """
import resource, statistics, sys, time
name, steps, keep = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "keep"
if keep:
    from blended_core.cli.process import keep_freed_memory
    assert keep_freed_memory()
from benchmarks.networks import SIZES
from benchmarks.structure import DeviceContext, Setting, library_step
setting, seconds = Setting.build(SIZES[name], DeviceContext()), []
with setting.context.autograd():
    for _ in range(steps + 1):
        start = time.perf_counter()
        library_step(setting, "x0")
        seconds.append(time.perf_counter() - start)
print(statistics.median(seconds[1:]))
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
SETUPS: dict[str, tuple[dict[str, str], str]] = {
    # name → (environment variables, "keep" if the process keeps freed memory)
    "as torch comes": ({}, ""),
    "threads that sleep": ({"OMP_WAIT_POLICY": "PASSIVE"}, ""),
    "threads that wait a little": (WAITING_THREADS, ""),
    "the terminal": (WAITING_THREADS, "keep"),
}


def measure_process(name: str, rounds: int, log: Log) -> dict[str, Any]:
    """Seconds of an x̂0 step in float32 and peak memory of the process, for several setups, with the default number of threads. Requires Linux
    with glibc."""
    log(f"processes, {name}: {', '.join(SETUPS)}, {rounds} rounds")
    seconds: dict[str, list[float]] = {setup: [] for setup in SETUPS}
    memory: dict[str, list[float]] = {setup: [] for setup in SETUPS}
    environment = {key: value for key, value in os.environ.items() if key not in WAITING_THREADS}
    for number in range(rounds):
        for setup in list(SETUPS) if number % 2 else list(reversed(SETUPS)):
            variables, keep = SETUPS[setup]
            taken, peak = run_python(WORK, name, str(STEPS[name]), keep, environment={**environment, **variables})
            seconds[setup].append(float(taken))
            memory[setup].append(float(peak) / MIB)
    return {
        "network": name,
        "seconds": seconds,
        "memory_mib": {setup: median(values) for setup, values in memory.items()},
        "ratios": {
            f"{setup} / as torch comes": vars(ratio(seconds[setup], seconds["as torch comes"]))
            for setup in SETUPS
            if setup != "as torch comes"
        },
        "kept": vars(ratio(seconds["the terminal"], seconds["threads that wait a little"])),
    }
