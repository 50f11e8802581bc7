"""The sets of options that an evaluation compares. Imports no torch."""

from __future__ import annotations

from typing import Any

from ..options import PRESETS, EditOptions, preset
from ..toy.world import GUIDANCE_SCALE, SIDE

STEPS = "40"
CANDIDATES = 8
REFERENCE_SIZE = 256


def _row(name: str, **changes: Any) -> EditOptions:
    return preset(name, **{"scale": GUIDANCE_SCALE, "steps": STEPS, **changes})


ROWS: dict[str, EditOptions] = {
    "best": _row("best"),
    "paper": _row("paper"),
    # Its loss weights are not scaled with the image size; this scale has the same effect at 64 px as that of the other rows.
    "official": _row("official", scale=GUIDANCE_SCALE / (REFERENCE_SIZE / SIDE) ** 2),
    "local-100": _row("best", algorithm="local", background_scale=100.0),
    "local-1000": _row("best", algorithm="local", background_scale=1000.0),
    "local-10000": _row("best", algorithm="local", background_scale=10000.0),
    "no-augmentation": _row("best", views=1),
    "naive-paste": _row("best", algorithm="local", background_scale=0.0, enforce_background=True),
    "x0-gradient": _row("best", gradient="x0"),
    "unet-gradient": _row("best", gradient="unet"),
    "ddim-10": _row("best", sampler="ddim", steps="ddim10"),
    "ddim-20": _row("best", sampler="ddim", steps="ddim20"),
    "ddim-25": _row("best", sampler="ddim", steps="ddim25"),
    "ddim-30": _row("best", sampler="ddim", steps="ddim30"),
    "ddim-50": _row("best", sampler="ddim", steps="ddim50"),
    "guide-to-0.8": _row("best", end=0.8),
    "guide-from-0.2": _row("best", start=0.2),
    "early-views-2": _row("best", early_views=2),
    "half-steps": _row("best", steps=str(int(STEPS) // 2)),
    "tone-end": _row("best", tone_match="end"),
    "tone-late": _row("best", tone_match="late"),
    "fast": _row("fast", steps=str(round(int(STEPS) * int(PRESETS["fast"].steps) / int(PRESETS["best"].steps)))),
}
"""Name → options. ``local-λ`` is Algorithm 1. ``naive-paste`` is Algorithm 1 without D_bg, and pastes the background at the end. The steps of
``fast`` and ``best`` have the ratio that they have in the presets."""
