"""Run by ComfyUI's own Python (tests/test_nodes.py): the pack in ComfyUI's memory manager. Prints the observations as JSON."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
import weakref
from functools import partial
from typing import Any

import torch
from contract import NAME, pack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def main() -> None:
    """Two networks are loaded and one is in use; a warning and an error leave the library's scope."""
    pack()
    load = importlib.import_module(f"{NAME}.nodes.load")
    memory = importlib.import_module(f"{NAME}.nodes.memory")
    runtime = importlib.import_module(f"{NAME}.nodes.runtime")
    errors = importlib.import_module(f"{NAME}.blended_core.errors")
    mm = memory.mm
    networks = [torch.nn.Linear(64, 64) for _ in range(2)]
    patchers = [memory.manage(network) for network in networks]
    mm.load_models_gpu(patchers)

    def loaded() -> list[bool]:
        return [any(entry.model is patcher for entry in mm.current_loaded_models) for patcher in patchers]

    before = loaded()
    unloaded = memory.unload_others(mm.get_torch_device(), patchers[:1])
    after = loaded()
    again = memory.unload_others(mm.get_torch_device(), patchers[:1])

    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logging.getLogger().addHandler(Lines())
    others: list[str] = []
    during = 0
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: others.append(str(message))
        warnings.simplefilter("always")
        try:
            with runtime.library_scope("Load DDPM"):
                warnings.warn(errors.BlendedWarning("memory ran out.", "view_chunk"), stacklevel=1)
                during = len(lines)
                warnings.warn("of another library", UserWarning, stacklevel=1)
                raise errors.BlendedError("memory ran out.", option="dtype")
        except errors.BlendedError as error:
            said = str(error)
    context = memory.device_context()
    ddpm, clip = load.load_checkpoint(memory.offload_context(context)).model, load.load_clip(memory.offload_context(context))
    options = memory.GuidanceOptions
    ways = {
        "unguided": (None, options()), "x0": (clip, options()), "x0, 64 views": (clip, options(views=64)),
        "x0, 64 in chunks": (clip, options(views=64, view_chunk=8)), "unet": (clip, options(gradient="unet")),
    }  # fmt: skip
    needed = {name: memory.memory_needed(ddpm, way[0], 4 * 64**2, way[1], 4, context.device) for name, way in ways.items()}
    core = importlib.import_module(f"{NAME}.nodes.model").CoreModel(ddpm, context)
    wrapped = memory.LoadedDDPM(ddpm, memory.manage(core), context), memory.LoadedCLIP(clip, memory.manage(clip.model))
    modes = {
        state.name: guided_in(memory, runtime, *wrapped, state)
        for state in (mm.VRAMState.NORMAL_VRAM, mm.VRAMState.LOW_VRAM, mm.VRAMState.NO_VRAM)
    }
    told = {
        "modes": modes, "taken apart": taken_apart(memory, runtime, wrapped[0]), "before": before, "unloaded": unloaded, "after": after, "again": again, "lines": lines, "during": during, "others": others, "error": said,
        "needed": needed, "told and taken": told_and_taken(memory, load, clip),
        "processor gives up nothing": context.make_room(), "context": type(context).__name__,
    }  # fmt: skip
    print(json.dumps(told))


def guided_in(memory: Any, runtime: Any, ddpm: Any, clip: Any, state: Any) -> dict[str, Any]:
    """A guided step with networks loaded in one of ComfyUI's memory modes: the bytes that each was allowed, and the step's numbers.

    The modes have no effect on a CPU, so while networks are loaded the manager is told that the device is a GPU.
    """
    sample = importlib.import_module(f"{NAME}.blended_core.sample")
    draws = importlib.import_module(f"{NAME}.blended_core.random")
    mm, allowed = memory.mm, []
    load = memory.ModelPatcher.partially_load

    def watched(self: Any, device: Any, extra_memory: float = 0, **more: Any) -> Any:
        allowed.append(extra_memory)
        return load(self, device, extra_memory, **more)

    mm.unload_all_models()
    before = mm.vram_state, mm.is_device_cpu
    options = importlib.import_module(f"{NAME}.blended_core.options").preset("best", steps="10", batch=1)
    try:
        mm.vram_state, mm.is_device_cpu = state, lambda _device: False
        memory.ModelPatcher.partially_load = watched
        with runtime.library_scope("Load DDPM"):
            context = memory.load_to_device(ddpm, clip, None, 64**2, options.guidance)
    finally:
        mm.vram_state, mm.is_device_cpu = before
        memory.ModelPatcher.partially_load = load
    with runtime.library_scope("Load DDPM"):
        x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        step = sample.guided_step(
            memory.edit_models(ddpm, clip, None, context), x, 5, ddpm.model.config.respaced("10"), options, clip.model.prompt("an apple"),
            torch.ones(1, 1, 64, 64), draws.SeededRandom(0), range(1),
        )  # fmt: skip
    return {
        "allowed": allowed, "placed": [whole(part) for part in (ddpm, clip)], "x": step.x.double().sum().item(),
        "gradient": step.gradient.double().abs().sum().item(),
    }  # fmt: skip


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return, until they are freed: what a processor takes that computes in the dtype of the tensors.
    What an operation allocates for itself is not counted, so the numbers are the same on every processor."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def live_bytes(work: Any) -> int:
    """Peak of :class:`LiveTensors`."""
    with LiveTensors() as live:
        work()
    return live.peak


def told_and_taken(memory: Any, load: Any, clip: Any) -> dict[str, list[float]]:
    """For each precision and direction: the estimated bytes, and the measured ones.

    bfloat16 is measured as on a processor with it and on one without it. Without it, convolutions do not go to oneDNN. That can be had on every
    processor; what a processor with it takes is counted by the tensors.
    """
    measure = importlib.import_module(f"{NAME}.benchmarks.measure")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        context = memory.DeviceContext(dtype=dtype)
        with context.autograd():
            model = load.load_checkpoint(context).model
            x, times = torch.zeros(1, 3, 64, 64), torch.tensor([500.0])

            def back(network: Any = model.network, x: Any = x, times: Any = times) -> None:
                with torch.enable_grad():
                    there = x.clone().requires_grad_()
                    torch.autograd.grad(network(there, times).sum(), there)

            for name, work, gradient in (("forward", partial(model.network, x, times), "x0"), ("back", back, "unet")):
                options = memory.GuidanceOptions(gradient=gradient, scale=0.0)
                needed = memory.memory_needed(model, clip, 64**2, options, dtype.itemsize, context.device)
                found[f"{dtype} {name}, here"] = [needed, measure.peak_bytes(work, context.device)]
                if dtype == torch.bfloat16:
                    found[f"{dtype} {name}, with"] = [needed, live_bytes(work)]
                    with torch.backends.mkldnn.flags(enabled=False):
                        found[f"{dtype} {name}, without"] = [needed, measure.peak_bytes(work, context.device)]
    return found


def whole(part: Any) -> bool:
    """Whether the manager considers a network to be on its device as a whole."""
    return bool(part.patcher.loaded_size() == part.patcher.model_size())


def taken_apart(memory: Any, runtime: Any, ddpm: Any) -> dict[str, Any]:
    """A part of a network is unloaded, as with --novram, and the network is used again.

    Both devices are the CPU here, so the test records which layers were moved.
    """
    mm, moved = memory.mm, []
    before, to = (mm.vram_state, mm.is_device_cpu), torch.nn.Module.to

    def watched(self: Any, *where: Any, **how: Any) -> Any:
        moved.extend(id(module) for module in self.modules())
        return to(self, *where, **how)

    mm.unload_all_models()
    try:
        mm.vram_state, mm.is_device_cpu = mm.VRAMState.NO_VRAM, lambda _device: False
        with runtime.library_scope("Load DDPM"):
            memory.load_to_device(ddpm, None)
            (entry,) = (e for e in mm.current_loaded_models if e.model is ddpm.patcher)
            torch.nn.Module.to = watched
            entry.model_unload(ddpm.patcher.model_size() // 4)
            away, apart = set(moved), whole(ddpm)
            moved.clear()
            memory.load_to_device(ddpm, None)
    finally:
        mm.vram_state, mm.is_device_cpu = before
        torch.nn.Module.to = to
    return {"apart": not apart, "away": len(away), "left behind": len(away - set(moved)), "whole again": whole(ddpm)}


main()
