"""Ratios of times, and peak memory.

The speed of a shared machine varies over time. All variants are therefore measured once per round, in varying order, and every round
gives one ratio. The median and the quartiles of these ratios are reported.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Time of one variant relative to another, or another figure: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def ratio(numerator: list[float], denominator: list[float]) -> Ratio:
    """The ratio of two lists of seconds with one entry per round."""
    return quartiles([a / b for a, b in zip(numerator, denominator, strict=True)])


def quartiles(values: list[float]) -> Ratio:
    """The median and the quartiles of a figure with one entry per round."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0], values[0], values[0])
    return Ratio(median(values), low, high, len(values))


def time_interleaved(
    variants: Mapping[str, Work], rounds: int, device: torch.device, warm: bool = True, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every variant in every round. With ``warm``, an additional first round is a warm-up and is not counted.

    ``clock`` is ``time.process_time`` for the time of the processor, which excludes that of other programs.

    Every second round has the reverse order, and every two rounds start with another variant, so that no variant always follows the same
    one. An even number of rounds is balanced.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1) if warm else range(1, rounds + 1):
        first = number // 2 % len(variants)
        names = [*list(variants)[first:], *list(variants)[:first]]
        names = names[::-1] if number % 2 else names
        for name in names:
            synchronize(device)
            start = clock()
            variants[name]()
            synchronize(device)
            if number:
                seconds[name].append(clock() - start)
    return seconds


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread, so that the time of the processor is that of the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Work, device: torch.device) -> int:
    """Peak memory in bytes of the tensors that ``work`` allocates, without memory allocated before.

    On CUDA it is the statistics of the allocator. On a CPU it is computed from all allocations that the profiler records. That is exact and
    reproducible, but excludes memory that libraries allocate inside an operation.
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
    """Seconds of each operation of torch without the operations that it calls, as a mean over runs of ``work``. Call ``work`` once before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(times):
            work()
        synchronize(device)
    on_device = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # On CUDA, kernels have their own entries in addition to those of their operations.
    operations = [entry for entry in profile.key_averages() if str(entry.device_type).endswith("CPU")]
    return {entry.key: getattr(entry, on_device) / times / 1e6 for entry in operations}
