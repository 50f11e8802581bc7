"""Times and memory on a GPU, the most important first, within a limited time.

    python -m benchmarks.gpu --out runs/gpu --budget 480

Each figure is written as soon as it is measured. What does not fit into the budget is listed as left out; what fails is listed with its error.
Unlike ``python -m benchmarks``, which calls it on a CUDA device, it needs neither open_clip nor safetensors.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import nn

from blended_core.adm.unet import UNet
from blended_core.clip.model import OPENAI_MEAN, OPENAI_STD, ClipModel
from blended_core.clip.towers import clip_of
from blended_core.device import DTYPES, DeviceContext, fast_precision, prefers_channels_last
from blended_core.edit import edit_picture
from blended_core.io.atomic import write_bytes
from blended_core.options import preset

from .measure import Work, peak_bytes, synchronize
from .networks import SIZES, Size
from .structure import Setting, compiled, library_step, plain_attention

BUDGET = 480.0
"""Seconds."""
ROUNDS = 5
WARM_UP_CALLS = 3
"""Calls before a measurement: the second records a CUDA graph, and libraries allocate their workspaces."""
MIB = 2**20
GRADIENTS = ("x0", "unet")
BATCHES = (1, 2, 4, 8, 16, 32)
FULL = replace(SIZES["full"], batch=8)
CANDIDATES = 64

Log = Callable[[str], None]


@dataclass
class Session:
    """Results that are saved one by one, until the time is over."""

    save: Callable[[dict[str, Any]], None]
    log: Log
    budget: float = BUDGET
    clock: Callable[[], float] = time.monotonic
    results: dict[str, Any] = field(default_factory=lambda: {"left out": [], "failed": {}})

    def __post_init__(self) -> None:
        self.end = self.clock() + self.budget

    def measure(self, part: str, name: str, work: Callable[[], Any], needs: float = 5.0) -> None:
        """Stores what ``work`` returns, unless fewer than ``needs`` seconds are left; its error, if it fails."""
        left = self.end - self.clock()
        if left < needs:
            self.results["left out"].append(f"{part}: {name}")
        else:
            self.log(f"{left:4.0f} s left. {part}: {name}")
            try:
                value = work()
            except Exception as error:  # a measurement that fails must not cost the others
                self.results["failed"][f"{part}: {name}"] = f"{type(error).__name__}: {error}"[:500]
            else:
                self.results.setdefault(part, {})[name] = value
        self.save(self.results)


def build(size: Size, device: torch.device) -> Setting:
    """The networks of a size in float32, made on the device with random weights; CLIP with the encoders of the library."""
    context = DeviceContext(device)
    config = {**size.clip, "vision_cfg": {"head_width": 64, **size.clip["vision_cfg"]}}
    with torch.device(device):
        torch.manual_seed(0)
        unet = UNet(size.unet)
    encoders = clip_of(config).to_empty(device=device)
    for network in (unet, encoders):
        for name, parameter in network.named_parameters():
            scale = name.endswith("weight") and parameter.ndim == 1
            if network is encoders or not parameter.any():
                nn.init.ones_(parameter) if scale else nn.init.normal_(parameter, std=0.02)
    side = int(config["vision_cfg"]["image_size"])
    clip = ClipModel(context.place(encoders), None, f"random {side} px", OPENAI_MEAN, OPENAI_STD, side, 16)
    return Setting.of(size, context, unet, clip)


def variant(master: Setting, dtype: torch.dtype, channels_last: bool, clip_dtype: str = "fp32") -> Setting:
    """A copy of the networks in another precision and layout. Copies from float32: half precision cannot be turned back."""
    context = replace(master.context, dtype=dtype, channels_last=channels_last)
    unet = copy.deepcopy(master.model.network)
    if not isinstance(unet, UNet):
        raise TypeError("only an ADM network can be measured.")
    clip = copy.copy(master.clip)
    clip.model = context.place(copy.deepcopy(master.clip.model))
    return Setting.of(master.size, context, unet.set_compute_dtype(dtype), clip.in_precision(clip_dtype))


@contextmanager
def recorded(setting: Setting) -> Iterator[Setting]:
    """The setting with CUDA graphs; a recording that fails is an error."""
    context = replace(setting.context, cuda_graphs=True)
    with warnings.catch_warnings(), replace(setting.models, context=context).recorded() as models:
        warnings.simplefilter("error")
        yield replace(setting, model=models.ddpm)


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": middle, "low": low, "high": high, "rounds": len(seconds)}


def timed(work: Work, device: torch.device) -> dict[str, Any]:
    """Seconds and peak memory of ``work``, and what the first call and the recording or compilation took."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(WARM_UP_CALLS):
        work()
    synchronize(device)
    warm_up, seconds = time.perf_counter() - start, []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {**spread(seconds), "warm_up": warm_up, "memory_mib": peak_bytes(work, device) / MIB}


def waits(setting: Setting, gradient: str) -> int:
    """How often a step waits for the device, by torch's own count; 0 without CUDA."""
    step = partial(library_step, setting, gradient)
    step()
    if setting.context.device.type != "cuda":
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def step_figures(setting: Setting, gradient: str, expected: Any, wrap: Callable[[Setting], Work] | None = None) -> dict[str, Any]:
    """Times of a step, and how far its result is from that in float32: of x, and of the gradient relative to its norm."""
    work = partial(library_step, setting, gradient) if wrap is None else wrap(setting)
    found = timed(work, setting.context.device)
    result: Any = work()
    if expected is not None:
        x, gradients = ((a - b).norm() / b.norm() for a, b in zip(result, expected, strict=True))
        found["difference"] = {"x": float(x), "gradient": float(gradients)}
    return found


def measure_gpu(
    device: torch.device, session: Session, size: Size = FULL, candidates: int = CANDIDATES, compiler: str = "inductor"
) -> None:
    """All parts, in the order of their importance."""
    master = build(size, device)
    best = fast_precision(device) if device.type == "cuda" else torch.float32
    clip_best = next(name for name, dtype in DTYPES.items() if dtype == best)
    automatic = partial(variant, master, best, prefers_channels_last(device, best), clip_best)
    with master.context.autograd():
        chosen = automatic()
        for gradient in GRADIENTS:
            session.measure("waits of a step", gradient, partial(waits, chosen, gradient))
        expected = {gradient: library_step(master, gradient) for gradient in GRADIENTS}
        for gradient in GRADIENTS:
            part = f"step, gradient {gradient}, batch {size.batch}"
            session.measure(part, "fp32", partial(step_figures, master, gradient, expected[gradient]))
            session.measure(part, "automatic", partial(step_figures, chosen, gradient, expected[gradient]))
            session.measure(part, "automatic, CUDA graphs", partial(with_graphs, chosen, gradient, expected[gradient]))
        for batch in BATCHES:
            for gradient in GRADIENTS:
                few = chosen.with_batch(batch, size.views)
                session.measure(f"batch, gradient {gradient}", str(batch), partial(step_figures, few, gradient, None))
                session.measure(f"batch, gradient {gradient}, CUDA graphs", str(batch), partial(with_graphs, few, gradient, None))
        for gradient in GRADIENTS:
            for graphs in (False, True):
                name = f"gradient {gradient}{', CUDA graphs' if graphs else ''}"
                session.measure("edit", name, partial(whole_edit, chosen, gradient, graphs, candidates), needs=60)
        del chosen
        for gradient in GRADIENTS:
            part = f"step, gradient {gradient}, batch {size.batch}"
            for name, dtype in DTYPES.items():
                for last in (False, True):
                    what = f"UNet {name}{', channels last' if last else ''}, CLIP fp32"
                    session.measure(part, what, partial(in_variant, master, dtype, last, "fp32", gradient, expected[gradient]))
            for name in DTYPES:
                what = f"UNet fp32, CLIP {name}"
                session.measure(part, what, partial(in_variant, master, torch.float32, False, name, gradient, expected[gradient]))
            session.measure(part, "fp32, TF32 matrices", partial(in_tf32, master, gradient, expected[gradient]))
            if gradient == "unet":
                plainly = partial(step_figures, master, gradient, expected[gradient], plain_attention)
                session.measure(part, "fp32, plain attention", plainly)
        # Last: a compilation takes minutes.
        for gradient in GRADIENTS:
            for graphs in (False, True):
                name = f"automatic, compiled{' with CUDA graphs' if graphs else ''}"
                part = f"step, gradient {gradient}, batch {size.batch}"
                work = partial(when_compiled, automatic, gradient, expected[gradient], graphs, compiler)
                session.measure(part, name, work, needs=120)


def in_variant(master: Setting, dtype: torch.dtype, channels_last: bool, clip: str, gradient: str, expected: Any) -> dict[str, Any]:
    """The figures of a step in another precision and layout."""
    return step_figures(variant(master, dtype, channels_last, clip), gradient, expected)


def in_tf32(setting: Setting, gradient: str, expected: Any) -> dict[str, Any]:
    """The figures of a step in float32 whose matrices are multiplied in TF32, which torch leaves off."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return step_figures(setting, gradient, expected)
    finally:
        torch.set_float32_matmul_precision(before)


def with_graphs(setting: Setting, gradient: str, expected: Any) -> dict[str, Any]:
    """The figures of a step with CUDA graphs. Its peak memory leaves out what the recordings keep."""
    with recorded(setting) as own:
        return step_figures(own, gradient, expected)


def when_compiled(make: Callable[[], Setting], gradient: str, expected: Any, graphs: bool, compiler: str) -> dict[str, Any]:
    """The figures of a step with the UNet compiled."""
    torch.compiler.reset()  # the limit on compilations of one function counts all variants
    return step_figures(make(), gradient, expected, lambda setting: compiled(setting, graphs, gradient, compiler))


def whole_edit(setting: Setting, gradient: str, graphs: bool, candidates: int) -> dict[str, Any]:
    """An edit with the preset ``best``: seconds of its stages, the batch that was chosen from free memory, and warnings."""
    side = setting.size.unet.image_size
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    options = preset("best", candidates=candidates, batch=0, gradient=gradient)
    models = replace(setting.models, context=replace(setting.context, cuda_graphs=graphs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = edit_picture(picture, setting.mask.cpu(), setting.prompt, models, options)
    steps = models.ddpm.config.respaced(options.steps).start_index(options.strength) + 1
    return {
        "seconds": sum(result.seconds.values()), "stages": dict(result.seconds), "candidates": candidates, "steps": steps,
        "batch": result.options.batch, "views": options.guidance.views, "warnings": [str(warning.message) for warning in caught],
    }  # fmt: skip


def gpu_table(results: dict[str, Any]) -> list[str]:
    """Rows of a Markdown table."""
    rows = []
    for part, figures in results.items():
        if part in ("left out", "failed", "machine"):
            continue
        for name, value in figures.items():
            if part == "edit":
                text = f"{value['seconds']:.1f} s for {value['candidates']} candidates of {value['steps']} steps, {value['batch']} at once"
            elif isinstance(value, dict):
                text = f"{value['median']:.4f} s ({value['low']:.4f}–{value['high']:.4f}), {value['memory_mib']:.0f} MiB"
                if "difference" in value:
                    text += f", x {value['difference']['x']:.1e}, gradient {value['difference']['gradient']:.1e} from fp32"
            else:
                text = str(value)
            rows.append(f"| {part} | {name} | {text} |")
    rows += [f"| left out, no time | {name} | |" for name in results["left out"]]
    rows += [f"| failed | {name} | {error.splitlines()[0] if error else ''} |" for name, error in results["failed"].items()]
    return ["| what | variant | figure (quartiles) |", "|---|---|---|", *rows]


def run_session(device: torch.device, out: Path, budget: float, log: Log) -> dict[str, Any]:
    """Measures and writes ``gpu.json`` and ``gpu.md`` after each figure."""
    out.mkdir(parents=True, exist_ok=True)

    def save(results: dict[str, Any]) -> None:
        write_bytes(out / "gpu.json", json.dumps(results, indent=1).encode() + b"\n")
        write_bytes(out / "gpu.md", "\n".join([*gpu_table(results), ""]).encode())

    session = Session(save, log, budget)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    session.results["machine"] = {"torch": torch.__version__, "device": name, "tf32 of convolutions": torch.backends.cudnn.allow_tf32}
    measure_gpu(device, session)
    return session.results


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds (default: %(default)g)")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = DeviceContext.choose(args.device, "fp32").device
    run_session(device, args.out, args.budget, lambda text: print(text, file=sys.stderr, flush=True))
    print((args.out / "gpu.md").read_text("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
