"""Blended diffusion: text-driven local editing of real pictures (Avrahami, Lischinski, Fried, CVPR 2022).

The names below are the library. ``api.py`` imports them when the first of them is used, because torch takes its time.
"""

# ruff: noqa: F403, F405
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import *

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
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
