"""The cost of an edit outside its steps, for images from 256 to 4096 px with the same mask; and edits of many candidates."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

from blended_core.device import DeviceContext
from blended_core.edit import edit_picture
from blended_core.options import EditOptions, GuidanceOptions

from .measure import ratio, time_interleaved
from .networks import SIZES, Size
from .step import Log
from .structure import Setting, floor

SIDES = (256, 512, 1024, 2048, 4096)
MASK = 120  # px, the side of the mask in every image
FULL_EDIT = replace(SIZES["full"], batch=8, views=16)
"""A typical edit on a GPU: 64 candidates in batches of eight, 16 views."""


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


def measure_candidates(context: DeviceContext, log: Log, size: Size = FULL_EDIT, candidates: int = 64, steps: int = 75) -> dict[str, Any]:
    """An edit of many candidates with the full network, in seconds and relative to the floor of the same number of steps.

    The floor is measured before and after each edit, to compensate for a device that slows down in between.
    """
    setting = Setting.build(size, context)
    side = size.unet.image_size
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 6 : -side // 6, side // 6 : -side // 6] = 1
    results: dict[str, Any] = {"candidates": candidates, "steps": steps, "views": size.views, "batch": size.batch}
    floor_steps = steps * candidates / size.batch
    with context.autograd():
        time_interleaved({"floor": partial(floor, setting)}, 1, context.device)
        for gradient in ("unet", "x0"):
            log(f"{candidates} candidates of {side} px, {steps} steps, gradient {gradient}")
            options = EditOptions(
                steps=str(steps),
                strength=1.0,
                batch=size.batch,
                candidates=candidates,
                guidance=GuidanceOptions(gradient=gradient, views=size.views),
            )
            floors = time_interleaved({"floor": partial(floor, setting)}, 2, context.device, warm=False)["floor"]
            taken = edit_picture(picture, mask, setting.prompt, setting.models, options).seconds
            floors += time_interleaved({"floor": partial(floor, setting)}, 2, context.device, warm=False)["floor"]
            seconds = sum(taken.values())
            results[gradient] = {
                "seconds": seconds,
                "parts": taken,
                "floors": floors,
                "over the floor": seconds / (floor_steps * median(floors)),
            }
    return results
