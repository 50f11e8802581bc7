"""Loading the full network from a file, and importing the pack; each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from blended_core.checkpoints.adm import UNet

from .measure import ratio
from .networks import SIZES
from .step import MIB, Say

ROOT = Path(__file__).parent.parent

READ = """
import sys, time
begun = time.perf_counter()
data = open(sys.argv[1], "rb").read()
print(time.perf_counter() - begun)
"""
LOAD = """
import sys, threading, time
import torch
from blended_core.checkpoints.load import load_ddpm
from blended_core.context import DeviceContext
context = DeviceContext(dtype=getattr(torch, sys.argv[2]))

def own():  # without what is mapped from files, which the system can drop at any time
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

before, peak, done = own(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, own())

watcher = threading.Thread(target=watch)
watcher.start()
begun = time.perf_counter()
model = load_ddpm(context, sys.argv[1])
print(time.perf_counter() - begun)
done.set()
watcher.join()
print(max(peak, own()) - before)
"""
IMPORT = """
import time
begun = time.perf_counter()
import {module}
print(time.perf_counter() - begun)
"""


def measure_load(rounds: int, say: Say) -> dict[str, Any]:
    """Reading the file of the 552.8 M network, and loading it in float32 and bfloat16, by turns."""
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
        say(f"loading {size / MIB:.0f} MiB, {rounds} rounds")
        seconds: dict[str, list[float]] = {"read": [], "float32": [], "bfloat16": []}
        memory: dict[str, float] = {}
        for number in range(rounds + 1):
            names = list(seconds) if number % 2 else list(reversed(seconds))
            for name in names:
                lines = python(READ if name == "read" else LOAD, str(path), name)
                if number:
                    seconds[name].append(float(lines[0]))
                if name != "read":
                    memory[name] = max(memory.get(name, 0.0), float(lines[1]) / size)
    return {
        "file_mib": size / MIB,
        "ratios": {name: vars(ratio(seconds[name], seconds["read"])) for name in ("float32", "bfloat16")},
        "seconds": seconds,
        "memory_over_float32_weights": memory,
    }


def measure_import(rounds: int, say: Say) -> dict[str, Any]:
    """Seconds that a process needs to import the library, beside what torch alone takes."""
    say(f"import, {rounds} rounds")
    seconds: dict[str, list[float]] = {"torch": [], "blended_core": [], "blended_core.edit": []}
    for number in range(rounds + 1):  # the first reads the files into the system's cache
        for name in list(seconds) if number % 2 else list(reversed(seconds)):
            before = "import torch\n" if name.startswith("blended_core.") else ""
            taken = float(python(before + IMPORT.format(module=name))[0])
            if number:
                seconds[name].append(taken)
    return {"seconds": seconds, "median": {name: median(values) for name, values in seconds.items()}}


def python(program: str, *arguments: str) -> list[str]:
    """The lines that a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.splitlines()
