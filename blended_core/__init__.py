"""Blended diffusion: text-driven local editing of real pictures (Avrahami, Lischinski, Fried, CVPR 2022).

The names below are the library; they are imported when they are first used, because torch takes its time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adm.load import Checkpoint, load_checkpoint, load_ddpm
    from .adm.probe import ProbeOptions
    from .clip.model import ClipModel, Prompt, load_clip
    from .denoiser import DiffusionModel
    from .device import DeviceContext
    from .diffusion import DiffusionConfig
    from .edit import edit_picture
    from .errors import BlendedError, BlendedWarning
    from .io.images import Picture, read_mask, read_picture, to_uint8, write_png
    from .losses import Loss, LossTerm, StepInput, differentiate
    from .mask import EditMask
    from .options import PRESETS, EditOptions, GuidanceOptions, preset
    from .perceptual import load_perceptual
    from .random import SeededRandom
    from .result import Candidate, EditResult
    from .sample import Models, Step, blended_diffusion, local_clip_guided_diffusion
    from .schedule import Schedule

_HOMES = {
    "adm.load": ("Checkpoint", "load_checkpoint", "load_ddpm"),
    "adm.probe": ("ProbeOptions",),
    "clip.model": ("ClipModel", "Prompt", "load_clip"),
    "denoiser": ("DiffusionModel",),
    "device": ("DeviceContext",),
    "diffusion": ("DiffusionConfig",),
    "edit": ("edit_picture",),
    "errors": ("BlendedError", "BlendedWarning"),
    "io.images": ("Picture", "read_mask", "read_picture", "to_uint8", "write_png"),
    "losses": ("Loss", "LossTerm", "StepInput", "differentiate"),
    "mask": ("EditMask",),
    "options": ("PRESETS", "EditOptions", "GuidanceOptions", "preset"),
    "perceptual": ("load_perceptual",),
    "random": ("SeededRandom",),
    "result": ("Candidate", "EditResult"),
    "sample": ("Models", "Step", "blended_diffusion", "local_clip_guided_diffusion"),
    "schedule": ("Schedule",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "PRESETS",
    "BlendedError",
    "BlendedWarning",
    "Candidate",
    "Checkpoint",
    "ClipModel",
    "DeviceContext",
    "DiffusionConfig",
    "DiffusionModel",
    "EditMask",
    "EditOptions",
    "EditResult",
    "GuidanceOptions",
    "Loss",
    "LossTerm",
    "Models",
    "Picture",
    "ProbeOptions",
    "Prompt",
    "Schedule",
    "SeededRandom",
    "Step",
    "StepInput",
    "blended_diffusion",
    "differentiate",
    "edit_picture",
    "load_checkpoint",
    "load_clip",
    "load_ddpm",
    "load_perceptual",
    "local_clip_guided_diffusion",
    "preset",
    "read_mask",
    "read_picture",
    "to_uint8",
    "write_png",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
