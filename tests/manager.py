"""Run by ComfyUI's own Python (tests/test_nodes.py): what the pack asks of its memory manager; prints what happened as JSON."""

from __future__ import annotations

import importlib
import json
import logging
import warnings

import torch
from contract import NAME, pack


def main() -> None:
    """Two networks are loaded and one is in use; a warning and an error come out of the engine's scope."""
    pack()
    load = importlib.import_module(f"{NAME}.nodes.load")
    glue = importlib.import_module(f"{NAME}.nodes.glue")
    errors = importlib.import_module(f"{NAME}.blended_core.errors")
    mm = glue.mm
    networks = [torch.nn.Linear(64, 64) for _ in range(2)]
    patchers = [glue.manage(network) for network in networks]
    mm.load_models_gpu(patchers)

    def loaded() -> list[bool]:
        return [any(entry.model is patcher for entry in mm.current_loaded_models) for patcher in patchers]

    before = loaded()
    unloaded = glue.unload_others(mm.get_torch_device(), patchers[:1])
    after = loaded()
    again = glue.unload_others(mm.get_torch_device(), patchers[:1])

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
            with glue.engine():
                warnings.warn("memory ran out; use --view-chunk.", errors.BlendedWarning, stacklevel=1)
                during = len(lines)
                warnings.warn("of another library", UserWarning, stacklevel=1)
                raise errors.BlendedError("try --dtype bf16")
        except errors.BlendedError as error:
            said = str(error)
    context = glue.device_context()
    ddpm, clip = load.load_ddpm(glue.resting(context)), load.load_clip(glue.resting(context))
    options = glue.GuidanceOptions
    ways = {
        "unguided": (None, options()), "x0": (clip, options()), "x0, 64 views": (clip, options(views=64)),
        "x0, 64 in chunks": (clip, options(views=64, view_chunk=8)), "unet": (clip, options(gradient="unet")),
    }  # fmt: skip
    needed = {name: glue.memory_needed(ddpm, way[0], 4 * 64**2, way[1], 4) for name, way in ways.items()}
    told = {
        "before": before, "unloaded": unloaded, "after": after, "again": again, "lines": lines, "during": during, "others": others, "error": said,
        "needed": needed,
        "processor gives up nothing": context.make_room(), "context": type(context).__name__,
    }  # fmt: skip
    print(json.dumps(told))


main()
