"""Time and memory of loading the full network. Each measurement runs in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from blended_core.adm.unet import UNet

from .measure import ratio
from .networks import SIZES
from .step import MIB, Log

ROOT = Path(__file__).parent.parent

READ = """
import sys, time
start = time.perf_counter()
data = open(sys.argv[1], "rb").read()
print(time.perf_counter() - start)
"""
SETUP = """
import sys, time
import torch
from blended_core.adm.load import load_ddpm
from blended_core.device import DeviceContext
precision, _, layout = sys.argv[2].partition(" ")
context = DeviceContext(dtype=getattr(torch, precision), channels_last=layout == "channels_last")
"""
LOAD = """
start = time.perf_counter()
model = load_ddpm(context, sys.argv[1])
print(time.perf_counter() - start)
"""
# Not timed: sampling the memory slows the loading down.
WATCH = """
import threading

def anonymous_memory():  # without file mappings, which the system can drop at any time
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

before, peak, done = anonymous_memory(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous_memory())

watcher = threading.Thread(target=watch)
watcher.start()
model = load_ddpm(context, sys.argv[1])
done.set()
watcher.join()
print(max(peak, anonymous_memory()) - before)
"""
VARIANTS = ("float32", "float32 channels_last", "bfloat16")


def measure_load(rounds: int, log: Log) -> dict[str, Any]:
    """Loads the network of 552.8 M parameters in several precisions and memory formats, relative to reading the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "full.safetensors"
        config = SIZES["full"].unet
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in UNet(config).state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        weights = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
        size = sum(w.numel() * 4 for w in weights.values())
        save_file(weights, path, metadata={"unet": json.dumps(config.to_dict()), "diffusion": "{}"})
        del weights
        log(f"loading {size / MIB:.0f} MiB, {rounds} rounds")
        seconds: dict[str, list[float]] = {name: [] for name in ("read", *VARIANTS)}
        for number in range(rounds + 1):
            names = list(seconds) if number % 2 else list(reversed(seconds))
            for name in names:
                taken = float(run_python(READ if name == "read" else SETUP + LOAD, str(path), name)[0])
                if number:
                    seconds[name].append(taken)
        memory = {name: float(run_python(SETUP + WATCH, str(path), name)[0]) / size for name in VARIANTS}
    return {
        "file_mib": size / MIB,
        "ratios": {name: vars(ratio(seconds[name], seconds["read"])) for name in VARIANTS},
        "seconds": seconds,
        "memory_over_float32_weights": memory,
    }


def run_python(program: str, *arguments: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """Runs a program in a new interpreter, by default with the environment of this process, and returns the lines that it prints."""
    variables = {**(os.environ if environment is None else environment), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.splitlines()
