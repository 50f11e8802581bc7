"""One guided step compared with the floor and with the structure of the reference code, and its growth with batch and views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from blended_core.device import DeviceContext

from .measure import Work, peak_bytes, ratio, time_by_operation, time_interleaved
from .networks import SIZES, computes_bfloat16
from .structure import Setting, checkpointed, clip_pass, clip_views, floor, forward, library_step, reference_step

Log = Callable[[str], None]
MIB = 2**20
TARGETS = {
    # (network, figure): (value, whether it is the "least" or the "most")
    ("small", "reference / exact"): (1.65, "least"),
    ("full", "reference / exact"): (2.2, "least"),
    ("small", "exact / floor"): (1.05, "most"),
    ("medium", "exact / floor"): (1.05, "most"),
    ("full", "exact / floor"): (1.05, "most"),
    ("small", "reference / x0"): (3.1, "least"),
    ("small", "reference / bf16"): (2.2, "least"),
    ("small", "x0 memory / forward"): (1.15, "most"),
}


INEXACT = ("reference", "floor", "forward", "x0", "bf16")
"""Variants whose results are not compared with those of the reference: the reference itself, variants without a result, and variants
with another gradient or precision."""


def store_result(results: dict[str, Any], name: str, work: Work) -> None:
    """Stores the result of the work."""
    results[name] = work()


def measure_step(name: str, context: DeviceContext, rounds: int, log: Log) -> dict[str, Any]:
    """Times, ratios, memory and differences between the results, for the networks of a size."""
    setting = Setting.build(SIZES[name], context)
    variants: dict[str, Work] = {
        "reference": lambda: reference_step(setting),
        "floor": lambda: floor(setting),
        "exact": lambda: library_step(setting),
        "checkpointing": checkpointed(setting),
        "x0": lambda: library_step(setting, "x0"),
        "forward": partial(forward, setting),
    }
    if context.device.type == "cpu" and computes_bfloat16(context.device):
        variants["bf16"] = partial(library_step, with_context(setting, dtype=torch.bfloat16))
    log(f"{name}: {', '.join(variants)}, {rounds} rounds")
    results: dict[str, Any] = {}
    with context.autograd():
        # The measurement of memory is also the warm-up round, because a round of the full network takes minutes.
        memory = {
            variant: peak_bytes(partial(store_result, results, variant, work), context.device) / MIB for variant, work in variants.items()
        }
        memory["clip"] = peak_bytes(lambda: clip_pass(setting), context.device) / MIB
        seconds = time_interleaved(variants, rounds, context.device, warm=False)
        profiled = {
            "exact": variants["exact"],
            "floor": variants["floor"],
            "open_clip": lambda: library_step(replace(setting, clip=setting.open_clip)),
        }
        times = {variant: time_by_operation(work, context.device) for variant, work in profiled.items()}
        split = library_step(setting, view_chunk=1)
    expected = results["reference"]
    ratios = {f"{variant} / floor": ratio(seconds[variant], seconds["floor"]) for variant in variants if variant != "floor"}
    ratios |= {
        f"reference / {variant}": ratio(seconds["reference"], seconds[variant])
        for variant in variants
        if variant not in ("reference", "floor", "forward")
    }
    shares = {"x0 memory / forward": memory["x0"] / memory["forward"], "exact memory / floor": memory["exact"] / memory["floor"]}
    return {
        "network": name,
        "batch": setting.size.batch,
        "views": setting.size.views,
        "parameters": sum(p.numel() for p in setting.model.network.parameters()),
        "seconds": seconds,
        "ratios": {key: vars(value) for key, value in ratios.items()},
        "memory_mib": memory,
        "memory_ratios": shares,
        "operations": largest_shares(times["exact"]),
        "operations_open_clip": largest_shares(times["open_clip"]),
        "above_the_floor": above_floor(times["exact"], times["floor"]),
        "attention": attention_kernels(times["exact"]),
        "difference": {
            **{variant: differences(expected, results[variant]) for variant in variants if variant not in INEXACT},
            "one view at a time": differences(expected, split),
        },
    }


def with_context(setting: Setting, **changes: Any) -> Setting:
    """The same setting in a changed context. CLIP is shared unless the memory format changes."""
    context = replace(setting.context, **changes)
    shared = (setting.clip, setting.open_clip) if context.channels_last == setting.context.channels_last else None
    return Setting.build(setting.size, context, shared)


def attention_kernels(times: dict[str, float]) -> list[str]:
    """The attention kernels in a profile, such as 'flash_attention_for_cpu', 'efficient_attention' or 'attention_math'."""
    mark = "aten::_scaled_dot_product_"
    return sorted({name.removeprefix(mark).removesuffix("_backward") for name in times if name.startswith(mark)})


REPORTED = 6
"""Number of operations to report."""


def largest_shares(times: dict[str, float]) -> dict[str, float]:
    """The operations that take most of the time of a step, as fractions of the step."""
    total = sum(times.values())
    return {name: seconds / total for name, seconds in sorted(times.items(), key=lambda item: -item[1])[:REPORTED]}


def above_floor(exact: dict[str, float], floor: dict[str, float]) -> dict[str, float]:
    """The operations that take most time in addition to their time in the floor, as fractions of the floor."""
    total = sum(floor.values())
    more = {name: (seconds - floor.get(name, 0.0)) / total for name, seconds in exact.items()}
    return dict(sorted(more.items(), key=lambda item: -item[1])[:REPORTED])


def differences(expected: tuple[torch.Tensor, torch.Tensor], found: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """The largest difference of x_{t−1}, and that of the gradient relative to its largest value."""
    return {
        "x": float((expected[0] - found[0]).abs().max()),
        "gradient": float((expected[1] - found[1]).abs().max() / expected[1].abs().max()),
    }


def measure_growth(context: DeviceContext, rounds: int, log: Log) -> dict[str, Any]:
    """Time per image by batch size, and time and memory of CLIP by number of views, in chunks of four."""
    setting = Setting.build(SIZES["small"], context)
    batches = {count: setting.with_batch(count, setting.size.views) for count in (1, 2, 4, 8)}
    views = {count: setting.with_batch(setting.size.batch, count) for count in (1, 4, 16, 64)}
    log(f"growth with batch {', '.join(map(str, batches))} and views {', '.join(map(str, views))}, {rounds} rounds")
    with context.autograd():
        by_batch = time_interleaved({str(n): partial(library_step, s) for n, s in batches.items()}, rounds, context.device)
        by_views = time_interleaved({str(n): partial(library_step, s, view_chunk=4) for n, s in views.items()}, rounds, context.device)
        chunked = {str(n): peak_bytes(partial(clip_views, s, 4), context.device) / MIB for n, s in views.items()}
        total = {str(n): peak_bytes(partial(clip_views, s, 0), context.device) / MIB for n, s in views.items()}
    per_image = {n: [t / int(n) for t in seconds] for n, seconds in by_batch.items()}
    return {
        "batch": {n: vars(ratio(seconds, per_image["1"])) for n, seconds in per_image.items()},
        "views": {n: vars(ratio(seconds, by_views["1"])) for n, seconds in by_views.items()},
        "views_memory_mib": {"chunks of 4": chunked, "all at once": total},
    }
