"""The sets of options that an evaluation compares. Imports no numpy and no torch."""

from __future__ import annotations

from typing import Any

from ..options import EditOptions, preset
from ..toy.models import GUIDANCE_SCALE, SIDE

SHARE_OF_STEPS = 0.4
"""Of the steps of a preset: as many as the small embedded model needs."""
CANDIDATES = 8
REFERENCE_SIZE = 256


def _row(name: str, **changes: Any) -> EditOptions:
    options = preset(name, **{"scale": GUIDANCE_SCALE, **changes})
    return options if "steps" in changes else preset(name, **{"scale": GUIDANCE_SCALE, **changes, "steps": shortened(options.steps)})


def shortened(steps: str) -> str:
    """The steps of a row from those of its preset."""
    return str(round(SHARE_OF_STEPS * int(steps)))


def _ddpm(**changes: Any) -> EditOptions:
    return _row("best", **{"sampler": "ddpm", **changes})


ROWS: dict[str, EditOptions] = {
    "best": _row("best"),
    "fast": _row("fast"),
    "paper": _row("paper"),
    # Its loss weights are not scaled with the image size; this scale has the same effect at 64 px as that of the other rows.
    "official": _row("official", scale=GUIDANCE_SCALE / (REFERENCE_SIZE / SIDE) ** 2),
    "ddpm": _ddpm(),
    "ddpm-fast": _row("fast", sampler="ddpm"),
    "local-100": _ddpm(algorithm="local", background_scale=100.0),
    "local-1000": _ddpm(algorithm="local", background_scale=1000.0),
    "local-10000": _ddpm(algorithm="local", background_scale=10000.0),
    "no-augmentation": _ddpm(views=1),
    "naive-paste": _ddpm(algorithm="local", background_scale=0.0, enforce_background=True),
    "x0-gradient": _ddpm(gradient="x0"),
    "unet-gradient": _ddpm(gradient="unet"),
    "ddim-10": _ddpm(sampler="ddim", steps="ddim10"),
    "ddim-20": _ddpm(sampler="ddim", steps="ddim20"),
    "ddim-25": _ddpm(sampler="ddim", steps="ddim25"),
    "ddim-30": _ddpm(sampler="ddim", steps="ddim30"),
    "ddim-50": _ddpm(sampler="ddim", steps="ddim50"),
    "guide-to-0.8": _ddpm(end=0.8),
    "guide-from-0.2": _ddpm(start=0.2),
    "early-views-2": _ddpm(early_views=2),
    "half-steps": _ddpm(steps=shortened("50")),
    "tone-off": _row("best", tone_match="off"),
    "tone-end": _row("best", tone_match="end"),
}
"""Name → options. ``ddpm`` is best with the sampler of the paper, and the rows below it differ from it in what their names say. ``local-λ`` is
Algorithm 1. ``naive-paste`` is Algorithm 1 without D_bg, and pastes the background at the end."""
