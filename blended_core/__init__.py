"""Blended diffusion: text-driven local editing of real pictures (Avrahami, Lischinski, Fried, CVPR 2022).

The names below are the library; they are imported when they are first used, because torch takes its time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.calibrate import Trial
    from .checkpoints.load import load_ddpm
    from .clip import ClipModel, Prompt, load_clip
    from .context import DeviceContext
    from .diffusion import DiffusionConfig, DiffusionModel
    from .draws import Draws
    from .edit import (
        PRESETS,
        Candidate,
        EditOptions,
        EditResult,
        Models,
        Step,
        blended_diffusion,
        edit_picture,
        local_clip_guided_diffusion,
        preset,
    )
    from .errors import BlendedError, BlendedWarning
    from .guidance import GuidanceOptions
    from .perceptual import load_perceptual
    from .pictures import Picture, read_mask, read_picture, to_uint8, write_png
    from .schedule import Schedule

__all__ = [
    "BlendedError",
    "BlendedWarning",
    "Candidate",
    "ClipModel",
    "DeviceContext",
    "DiffusionConfig",
    "DiffusionModel",
    "Draws",
    "EditOptions",
    "EditResult",
    "GuidanceOptions",
    "Models",
    "PRESETS",
    "Picture",
    "Prompt",
    "Schedule",
    "Step",
    "Trial",
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
    "checkpoints.calibrate": ("Trial",),
    "checkpoints.load": ("load_ddpm",),
    "clip": ("ClipModel", "Prompt", "load_clip"),
    "context": ("DeviceContext",),
    "diffusion": ("DiffusionConfig", "DiffusionModel"),
    "draws": ("Draws",),
    "edit": (
        "PRESETS",
        "Candidate",
        "EditOptions",
        "EditResult",
        "Models",
        "Step",
        "blended_diffusion",
        "edit_picture",
        "local_clip_guided_diffusion",
        "preset",
    ),
    "errors": ("BlendedError", "BlendedWarning"),
    "guidance": ("GuidanceOptions",),
    "perceptual": ("load_perceptual",),
    "pictures": ("Picture", "read_mask", "read_picture", "to_uint8", "write_png"),
    "schedule": ("Schedule",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
