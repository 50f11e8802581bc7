"""Measures time and memory of the library and writes a table, a JSON file and a plot.

    python -m benchmarks --only step --out runs/benchmarks

Times are ratios of variants that are measured in turn; see benchmarks/measure.py.
"""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before the import of torch; otherwise its profiler logs every start and stop

import argparse
import contextlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from blended_core.device import DeviceContext
from blended_core.io.atomic import write_bytes

from .edit import measure_edit
from .encoder import measure_encoder
from .gpu import BUDGET, gpu_table, run_session
from .large import measure_large
from .loading import measure_load
from .networks import computes_bfloat16
from .process import PROCESS_ROUNDS, measure_process
from .reference import measure_reference
from .report import encoder_table, plot, reference_table, table
from .start import measure_start
from .step import measure_growth, measure_step

PARTS = ("step", "edit", "large", "load", "start", "process", "encoder", "reference")
GPU = "gpu"
ROUNDS = {"small": 10, "medium": 6, "full": 4}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*PARTS, GPU], nargs="+", help=f"parts to measure (default: {GPU} on a GPU, else all others)")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds of the part {GPU} (default: %(default)g)")
    parser.add_argument(
        "--reference", type=Path, metavar="PATH", help="a clone of omriav/blended-diffusion; without it the part reference is left out"
    )
    parser.add_argument(
        "--networks",
        choices=list(ROUNDS),
        nargs="+",
        default=list(ROUNDS),
        help="networks of the parts step, process and reference (default: all)",
    )
    parser.add_argument("--rounds", type=int, help=f"rounds of every comparison (default: by network, {ROUNDS})")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--channels-last", action="store_true", help="use the memory format channels_last")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.only == ["reference"] and args.reference is None:
        parser.error("the part reference needs --reference PATH, a clone of https://github.com/omriav/blended-diffusion")
    if args.threads:
        torch.set_num_threads(args.threads)
    context = DeviceContext.choose(args.device, args.dtype)
    if args.channels_last:
        context = DeviceContext(context.device, context.dtype, True)

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    only = args.only or ([GPU] if context.device.type == "cuda" else PARTS)
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(context)}

    def save() -> None:
        write_bytes(args.out / "benchmarks.json", json.dumps(results, indent=1).encode() + b"\n")
        write_bytes(args.out / "benchmarks.md", f"{tables(results)}\n".encode())

    if GPU in only:
        results[GPU] = run_session(context.device, args.out, args.budget, log)
    if "step" in only:
        results["steps"] = []
        for name in args.networks:
            results["steps"].append(measure_step(name, context, args.rounds or ROUNDS[name], log))
            save()
        if "small" in args.networks:
            results["growth"] = measure_growth(context, args.rounds or ROUNDS["small"], log)
    if "edit" in only:
        results["edit"] = measure_edit(context, args.rounds or ROUNDS["medium"], log)
    if "large" in only and os.name == "posix":
        results["large"] = measure_large(args.rounds or ROUNDS["full"], log)
        save()
    if "load" in only:
        results["load"] = measure_load(args.rounds or ROUNDS["full"], log)
    if "start" in only and sys.platform != "win32":
        results["start"] = measure_start(args.rounds or ROUNDS["medium"], log)
    if "process" in only and sys.platform == "linux" and context.device.type == "cpu":
        results["process"] = []
        for name in args.networks:
            results["process"].append(measure_process(name, args.rounds or PROCESS_ROUNDS[name], log))
            save()
    if "encoder" in only:
        results["encoder"] = measure_encoder(args.rounds or ROUNDS["medium"], log)
    if "reference" in only and args.reference is not None:
        results["reference"] = []
        for name in args.networks:
            results["reference"].append(measure_reference(args.reference, name, args.rounds or ROUNDS[name], log))
            save()
    save()
    plot(args.out / "benchmarks.png", results)
    print("\n".join(gpu_table(results[GPU])) if GPU in results else tables(results))
    return 0


def tables(results: dict[str, Any]) -> str:
    """All tables of the measured parts."""
    makers = {"reference": reference_table, "encoder": encoder_table}
    return "\n\n".join([*(make(results) for part, make in makers.items() if part in results), table(results)])


def processor() -> str:
    """The name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(context: DeviceContext) -> dict[str, Any]:
    """Hardware and settings of the run."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else processor(),
        "bfloat16": computes_bfloat16(context.device),
        "threads": torch.get_num_threads(),
        "dtype": str(context.dtype).removeprefix("torch."),
        "channels_last": context.channels_last,
    }


if __name__ == "__main__":
    sys.exit(main())
