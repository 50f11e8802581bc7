"""The cost of an edit outside its steps, for images from 256 to 4096 px with the same mask."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from blended_core.device import DeviceContext
from blended_core.edit import edit_picture
from blended_core.options import EditOptions

from .measure import ratio, time_interleaved
from .networks import SIZES
from .step import Log
from .structure import Setting

SIDES = (256, 512, 1024, 2048, 4096)
MASK = 120  # px, the side of the mask in every image


def measure_edit(context: DeviceContext, rounds: int, log: Log) -> dict[str, Any]:
    """Edits of four steps: the time of the steps and the time of crop, paste and score, relative to an image of 256 px."""
    setting = Setting.build(SIZES["small"], context)
    options = EditOptions(steps="4", strength=1.0, batch=1, candidates=1)
    log(f"images of {', '.join(map(str, SIDES))} px, {rounds} rounds")
    seconds: dict[str, dict[str, list[float]]] = {part: {str(side): [] for side in SIDES} for part in ("steps", "around")}

    def edit(side: int) -> None:
        picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(1, 1, side, side)
        first = (side - MASK) // 2
        mask[..., first : first + MASK, first : first + MASK] = 1
        taken = edit_picture(picture, mask, setting.prompt, setting.models, options).seconds
        seconds["steps"][str(side)].append(taken["diffusion"])
        seconds["around"][str(side)].append(taken["prepare"] + taken["paste and score"])

    time_interleaved({str(side): partial(edit, side) for side in SIDES}, rounds, context.device)
    counted = {part: {n: values[1:] for n, values in of.items()} for part, of in seconds.items()}  # the first round is a warm-up
    quarter = [t / 4 for t in counted["around"]["4096"]]
    return {
        "steps": {n: vars(ratio(values, counted["steps"]["256"])) for n, values in counted["steps"].items()},
        "cut and paste": {n: vars(ratio(values, counted["around"]["256"])) for n, values in counted["around"].items()},
        "a pixel, 4096 / 2048": vars(ratio(quarter, counted["around"]["2048"])),
        "seconds": counted,
    }
