"""What an edit costs beside its steps: pictures from 256 to 4096 px with the same mask."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blended_core.context import DeviceContext
from blended_core.draws import Draws
from blended_core.edit import EditOptions, Models, choose_region, edit_steps, paste, prepared_mask

from .measure import peak_bytes, ratio, side_by_side
from .networks import SIZES
from .step import MIB, Say
from .structure import Setting

SIDES = (256, 512, 1024, 2048, 4096)
MASK = 120  # px, the same in every picture


def measure_edit(context: DeviceContext, rounds: int, say: Say) -> dict[str, Any]:
    """Time of the steps, and of cutting out, putting back and scoring apart, against a picture of 256 px."""
    setting = Setting.build(SIZES["small"], context)
    options = EditOptions(steps="4", batch=1, candidates=1)
    say(f"pictures of {', '.join(map(str, SIDES))} px, {rounds} rounds")
    cases = {str(side): case(side, options, setting.models) for side in SIDES}

    def steps(name: str) -> Tensor:
        _, _, square, mask = cases[name]
        (last,) = deque(edit_steps(setting.models, square, mask, setting.prompt, options, Draws(0), [0]), maxlen=1)
        return last.x

    def around(name: str) -> Tensor:
        picture, mask, square, _ = cases[name]
        region = choose_region(mask, options, setting.model)
        region.cut(picture, setting.model.image_size)
        return paste(square, picture, mask, region, options)

    with context.autograd():
        of_steps = side_by_side({n: partial(steps, n) for n in cases}, rounds, context.device)
        of_paste = side_by_side({n: partial(around, n) for n in cases}, rounds, context.device)
        memory = {n: peak_bytes(partial(around, n), torch.device("cpu")) / MIB for n in cases}
    return {
        "steps": {n: vars(ratio(seconds, of_steps["256"])) for n, seconds in of_steps.items()},
        "cut and paste": {n: vars(ratio(seconds, of_paste["256"])) for n, seconds in of_paste.items()},
        "pixels": {n: (int(n) / 256) ** 2 for n in cases},
        "paste_seconds": of_paste,
        "step_seconds": of_steps,
        "paste_memory_mib": memory,
    }


def case(side: int, options: EditOptions, models: Models) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(picture, mask, the square that is edited, its mask) for a picture of that side."""
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, side, side)
    first = (side - MASK) // 2
    mask[..., first : first + MASK, first : first + MASK] = 1
    mask = prepared_mask(mask, options)
    region = choose_region(mask, options, models.ddpm)
    size = models.ddpm.image_size
    square = models.context.put(region.cut(picture, size) * 2 - 1)
    return picture, mask, square, models.context.put(region.cut_mask(mask, size, False))
