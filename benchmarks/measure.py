"""Times as ratios, and peak memory.

A shared machine is slower at one minute than at the next. So the ways to do a thing take turns, round by round and in turned order,
and each round gives a ratio of its own; what is reported is their median and quartiles.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """How many times as long one way takes as another: median and quartiles of rounds."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def ratio(numerator: list[float], denominator: list[float]) -> Ratio:
    """Of two lists of seconds that were taken round by round."""
    each = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, _, high = quantiles(each, n=4, method="inclusive") if len(each) > 1 else (each[0], each[0], each[0])
    return Ratio(median(each), low, high, len(each))


def time_interleaved(variants: Mapping[str, Work], rounds: int, device: torch.device, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of every way in every round; a first round is not counted, and left out where all are warm already.

    The order is turned in every second round, and begins with another way every two rounds, so that none is always after the same one;
    an even number of rounds is balanced.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1) if warm else range(1, rounds + 1):
        first = number // 2 % len(variants)
        names = [*list(variants)[first:], *list(variants)[:first]]
        names = names[::-1] if number % 2 else names
        for name in names:
            wait(device)
            start = time.perf_counter()
            variants[name]()
            wait(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Work, device: torch.device) -> int:
    """The largest sum of tensors alive at once that ``work`` allocated, in bytes; what was there before is not counted.

    On CUDA as its allocator counts. On a CPU from the profiler's record of every allocation, which is exact and the same every
    time; the memory that libraries take inside one operation is not in it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        work()
    kineto = profile.profiler.kineto_results if profile.profiler is not None else None
    if kineto is None:
        raise RuntimeError("the profiler recorded nothing.")
    changes = sorted((event.start_ns(), event.nbytes()) for event in kineto.events() if event.name() == "[memory]")
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


def time_by_operation(work: Work, device: torch.device, times: int = 2) -> dict[str, float]:
    """Seconds of each of torch's operations, without those that it calls, in one run of warm ``work``; the mean of a few."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(times):
            work()
        wait(device)
    on_device = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # On CUDA the kernels are entries of their own beside the operations that they belong to.
    operations = [entry for entry in profile.key_averages() if str(entry.device_type).endswith("CPU")]
    return {entry.key: getattr(entry, on_device) / times / 1e6 for entry in operations}
