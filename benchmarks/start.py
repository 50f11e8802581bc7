"""CPU time of starting: the terminal until an error or its first step, and the pack in ComfyUI. Each measurement runs in its own process, on one thread.

Python keeps what it has compiled of each module. The first start after an installation compiles every module of a package that it imports, and later ones
read what it kept. Both are measured, each with a folder of compiled modules of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.server import COMFYUI, interpreter

from .loading import ROOT
from .measure import quartiles
from .step import Log

FIRST, LATER = "first start", "later start"
TERMINAL = "from blended_core.cli import main\nmain({arguments})\n"
FIRST_STEP = """
import os, sys
from blended_core.cli.process import set_waiting_policy
set_waiting_policy()  # before torch is imported, as the terminal does
from blended_core.cli import edit, main
edit.Writer.step = lambda writer, step: os._exit(0)
main(["demo"])
"""
PACK = """
import asyncio, importlib.util, os, sys, time
root, core = sys.argv[1:]
sys.path.insert(0, core)
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import nodes, comfy_api.latest, comfy_execution.graph_utils  # what ComfyUI has imported before the first pack
start = time.process_time()
spec = importlib.util.spec_from_file_location("pack", os.path.join(root, "__init__.py"), submodule_search_locations=[root])
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)

async def load():
    extension = await pack.comfy_entrypoint()
    await extension.on_load()
    for node in await extension.get_node_list():
        node.GET_SCHEMA()

asyncio.run(load())
print("pack", time.process_time() - start)
"""
PROGRAMS = {
    "import of torch": "import torch",
    "import of the library": "import blended_core.api",
    "--version": TERMINAL.format(arguments=["--version"]),
    "edit with a missing picture": TERMINAL.format(arguments=["edit", "missing.png", "--prompt", "x"]),
    "edit with an unknown option": TERMINAL.format(arguments=["edit", "missing.png", "--prmpt", "x"]),
    "demo to the end of its first step": FIRST_STEP,
}
PACK_IN_COMFYUI = "import of the pack in ComfyUI"
TARGETS = {"edit with a missing picture": 0.3, "demo to the end of its first step": 7.0, PACK_IN_COMFYUI: 0.2}
"""The most CPU seconds of the first start, where importing torch takes four."""


def measure_start(rounds: int, log: Log) -> dict[str, Any]:
    """CPU seconds of :data:`PROGRAMS` and, if there is a ComfyUI, of importing the pack in it; from the start of the process to its end. Not on Windows."""
    names = [*PROGRAMS, *([PACK_IN_COMFYUI] if (COMFYUI / "main.py").is_file() else [])]
    log(f"start, {rounds} rounds: {', '.join(names)}")
    seconds: dict[str, dict[str, list[float]]] = {which: {name: [] for name in names} for which in (FIRST, LATER)}
    with tempfile.TemporaryDirectory() as folder:
        compiled = {which: Path(folder, which) for which in seconds}
        for name in names:
            cpu_seconds(name, {"PYTHONPYCACHEPREFIX": str(compiled[LATER])})
        # The standard library is compiled when Python is installed.
        shutil.copytree(compiled[LATER], compiled[FIRST], ignore=shutil.ignore_patterns("site-packages"))
        shutil.rmtree(compiled[FIRST] / ROOT.relative_to(ROOT.anchor))
        for number in range(rounds):
            for name in names if number % 2 else reversed(names):
                for which, path in compiled.items():
                    variables = {"PYTHONPYCACHEPREFIX": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
                    seconds[which][name].append(cpu_seconds(name, variables))
    return {"seconds": seconds, "quartiles": {which: {n: vars(quartiles(v)) for n, v in of.items()} for which, of in seconds.items()}}


def cpu_seconds(name: str, variables: Mapping[str, str]) -> float:
    """User and system time of one process, with further environment variables."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment = {**kept, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        if name == PACK_IN_COMFYUI:
            environment.pop("PYTHONPATH")  # its folder ``nodes`` would hide the module of ComfyUI
            command = [interpreter(), "-c", PACK, str(ROOT), str(COMFYUI)]
        else:
            command = [sys.executable, "-c", PROGRAMS[name]]
        before = os.times()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        after = os.times()
    if done.returncode and not done.stderr.startswith(("error: ", "usage: ")):
        raise RuntimeError(done.stderr)
    if name == PACK_IN_COMFYUI:
        return next(float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("pack "))
    return after.children_user + after.children_system - before.children_user - before.children_system
