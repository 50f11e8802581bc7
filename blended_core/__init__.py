"""Blended diffusion: text-driven local editing of real pictures (Avrahami, Lischinski, Fried, CVPR 2022).

The names below are the library; they are imported when they are first used, because torch takes its time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adm.load import load_ddpm
    from .adm.probe import ProbeOptions
    from .clip.model import ClipModel, Prompt, load_clip
    from .device import DeviceContext
    from .diffusion import DiffusionConfig, DiffusionModel
    from .edit import edit_picture
    from .errors import BlendedError, BlendedWarning
    from .io.images import Picture, read_mask, read_picture, to_uint8, write_png
    from .options import PRESETS, EditOptions, GuidanceOptions, preset
    from .perceptual import load_perceptual
    from .random import SeededRandom
    from .result import Candidate, EditResult
    from .sample import Models, Step, blended_diffusion, local_clip_guided_diffusion
    from .schedule import Schedule

__all__ = [
    "BlendedError",
    "BlendedWarning",
    "Candidate",
    "ClipModel",
    "DeviceContext",
    "DiffusionConfig",
    "DiffusionModel",
    "SeededRandom",
    "EditOptions",
    "EditResult",
    "GuidanceOptions",
    "Models",
    "PRESETS",
    "Picture",
    "Prompt",
    "Schedule",
    "Step",
    "ProbeOptions",
    "blended_diffusion",
    "edit_picture",
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

_HOMES = {
    "adm.probe": ("ProbeOptions",),
    "adm.load": ("load_ddpm",),
    "clip.model": ("ClipModel", "Prompt", "load_clip"),
    "device": ("DeviceContext",),
    "diffusion": ("DiffusionConfig", "DiffusionModel"),
    "random": ("SeededRandom",),
    "edit": (
        "Candidate",
        "EditResult",
        "Models",
        "Step",
        "blended_diffusion",
        "edit_picture",
        "local_clip_guided_diffusion",
    ),
    "errors": ("BlendedError", "BlendedWarning"),
    "options": ("PRESETS", "EditOptions", "GuidanceOptions", "preset"),
    "perceptual": ("load_perceptual",),
    "io.images": ("Picture", "read_mask", "read_picture", "to_uint8", "write_png"),
    "schedule": ("Schedule",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
