"""Whole edits of large pictures by the terminal with the embedded networks: processor time by stage, and the largest memory of the process.

Each edit runs in a process of its own with one thread. Its stages are timed by the processor time of the process, which other programs on the machine
change less than the time on the clock. The pictures are made here: smooth colors with detail at several scales and noise, as in a photograph.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from blended_core.io.formats import FAST
from blended_core.io.images import Picture, UInt8
from blended_core.io.metadata import encoded

from .loading import run_python
from .measure import ratio
from .step import MIB, Log

LARGE = (6000, 4000)
SIZES = ((1024, 1024), (2048, 2048), LARGE)
COMPRESSIONS = ("0", "1", "3", "6", "9", FAST)
WORK = """
import json, os, resource, sys, time
from types import SimpleNamespace
from blended_core import timer
timer.time = SimpleNamespace(perf_counter=time.process_time)
from blended_core.cli import main
assert main(sys.argv[2:]) == 0
spent = resource.getrusage(resource.RUSAGE_SELF)
report = json.load(open(os.path.join(sys.argv[1], "report.json"), encoding="utf-8"))
print(json.dumps({"stages": report["seconds"], "total": spent.ru_utime + spent.ru_stime, "memory": 1024 * spent.ru_maxrss}))
"""
SETTINGS = ("--prompt", "an apple", "--steps", "8", "--batch", "1", "--threads", "1", "--device", "cpu", "--dtype", "fp32")
"""Six of eight steps, since the stages around the sampling are what is measured."""
FEW, MANY = 1, 4
CASES: dict[str, tuple[tuple[int, int], int, tuple[str, ...]]] = {
    # name → (size, candidates, further arguments)
    **{
        f"{width}×{height}, {count} candidate{'s' * (count > 1)}": ((width, height), count, ())
        for width, height in SIZES
        for count in (FEW, MANY)
    },
    "6000×4000, 1 candidate, 16 views": (LARGE, FEW, ("--views", "16")),
    "6000×4000, 1 candidate, animation": (LARGE, FEW, ("--animate",)),
    "6000×4000, 1 candidate, inverted mask": (LARGE, FEW, ("--invert-mask",)),
}
ONE, FOUR, ANIMATED = "6000×4000, 1 candidate", "6000×4000, 4 candidates", "6000×4000, 1 candidate, animation"
TARGETS = {
    "contact sheet of four candidates, s": 1.0,
    "a further candidate outside of the networks, s": 4.5,
    "an animation, s": 2.0,
    "largest memory of the process, GiB": 2.5,
    "share of the time that is in no stage": 0.05,
}
"""Figures of :func:`bars` → at most."""
SAMPLING = ("diffusion", "score")
"""The stages that run the networks."""


def scene(width: int, height: int) -> tuple[UInt8, UInt8]:
    """A picture [H, W, 3] and a mask [H, W] of an ellipse, a sixth as wide as the picture."""
    random = np.random.default_rng(0)
    values = random.normal(0, 2, (height, width, 1)).astype(np.float32).repeat(3, axis=2)
    for cells, strength in ((6, 110), (40, 50), (300, 20)):
        grid = random.random((cells * height // width + 2, cells + 2, 3), dtype=np.float32)
        for channel in range(3):
            smooth = Image.fromarray(grid[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            values[..., channel] += strength * np.asarray(smooth)
    y, x = np.ogrid[:height, :width]
    inside = ((x - width / 2) / (width / 12)) ** 2 + ((y - 0.55 * height) / (width / 15)) ** 2 <= 1
    return values.clip(0, 255).round().astype(np.uint8), inside.astype(np.uint8) * np.uint8(255)


def measure_large(rounds: int, log: Log) -> dict[str, Any]:
    """Edits of every case, in turn. Requires a system that has the module resource."""
    measured: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for width, height in SIZES:
            for name, pixels in zip(("picture", "mask"), scene(width, height), strict=True):
                Image.fromarray(pixels).save(Path(folder, f"{name}{width}.png"))
        for number in range(rounds):
            log(f"whole edits of {', '.join(f'{width}×{height}' for width, height in SIZES)}, round {number + 1} of {rounds}")
            for case in list(CASES) if number % 2 else list(reversed(CASES)):
                (width, _), count, more = CASES[case]
                out, picture, mask = (str(Path(folder, name)) for name in ("out", f"picture{width}.png", f"mask{width}.png"))
                files = (picture, "--mask", mask, "--out", out, "--overwrite")
                printed = run_python(WORK, out, "edit", *files, *SETTINGS, "--candidates", str(count), *more, environment=environment)
                measured[case].append(json.loads(printed[-1]))
    return {
        "cases": {case: summary(runs) for case, runs in measured.items()},
        "bars": bars(measured),
        "png": measure_png(rounds, log),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds of a case: processor seconds of the process and of each stage, and the largest memory in MiB."""
    stages = {name: median(run["stages"].get(name, 0.0) for run in runs) for name in runs[0]["stages"]}
    return {
        "seconds": spread([run["total"] for run in runs]),
        "stages": stages,
        "memory_mib": median(run["memory"] / MIB for run in runs),
    }


def bars(measured: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What has a target, for the largest picture, with quartiles."""

    def around(run: dict[str, Any]) -> float:
        seconds: float = run["total"] - sum(run["stages"].get(name, 0.0) for name in SAMPLING)
        return seconds

    one, four, animated = measured[ONE], measured[FOUR], measured[ANIMATED]
    return {
        "contact sheet of four candidates, s": spread([run["stages"]["contact sheet"] for run in four]),
        "a further candidate outside of the networks, s": spread(
            [(around(more) - around(less)) / (MANY - FEW) for more, less in zip(four, one, strict=True)]
        ),
        "an animation, s": spread([run["stages"]["animations"] for run in animated]),
        "largest memory of the process, GiB": spread([run["memory"] / MIB / 1024 for run in four]),
        "share of the time that is in no stage": spread([1 - sum(run["stages"].values()) / run["total"] for run in one + four]),
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles in the form of a ratio."""
    return vars(ratio(values, [1.0] * len(values)))


def measure_png(rounds: int, log: Log) -> dict[str, Any]:
    """Processor seconds and MiB of the largest picture as a PNG file, by its compression."""
    log(f"PNG files, compression {', '.join(COMPRESSIONS)}")
    pixels = scene(*LARGE)[0]
    seconds: dict[str, list[float]] = {name: [] for name in COMPRESSIONS}
    size: dict[str, float] = {}
    for number in range(rounds):
        for name in COMPRESSIONS if number % 2 else reversed(COMPRESSIONS):
            start = time.process_time()
            size[name] = len(encoded(pixels, "png", Picture(pixels).metadata, None, png_compression=name)) / MIB
            seconds[name].append(time.process_time() - start)
    return {name: {"seconds": spread(seconds[name]), "mib": size[name]} for name in COMPRESSIONS}
