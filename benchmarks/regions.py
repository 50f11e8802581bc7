"""Counts the pixels outside a mask that change when a region is cut out, edited and pasted back.

    python -m benchmarks.regions

Every case goes through the functions of the nodes *Cut Region* and *Paste Region*. The edit is that of an autoencoder with factor 8 that is not exact: the cut
at an eighth of its size, enlarged again, darker, with noise. Values are compared bit by bit as float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blended_core.cuts import FITTED, cut_out, paste_back, plan
from blended_core.mask import EditMask

FACTOR = 8


@dataclass(frozen=True)
class Case:
    """Pictures [N, 3 or 4, H, W], masks [M, 1, H, W], and how they are cut and pasted."""

    name: str
    pictures: Tensor
    masks: Tensor
    cut: dict[str, Any] = field(default_factory=dict)
    paste: dict[str, Any] = field(default_factory=dict)
    rule: str = "binary"
    spoil: Callable[[Tensor, Tensor], Tensor] | None = None
    """Changes the edited cuts; it gets their masks too."""


@dataclass(frozen=True)
class Count:
    """Pixels of all results: outside every mask that was pasted there, how many of these changed, and inside, how many of these changed."""

    outside: int
    changed: int
    inside: int
    edited: int
    size: tuple[int, int]


def autoencoded(cuts: Tensor, seed: int = 0) -> Tensor:
    """What a model with a latent space of factor 8 makes of cuts, all of it changed."""
    small = F.interpolate(cuts, scale_factor=1 / FACTOR, mode="area") if min(cuts.shape[-2:]) >= FACTOR else cuts
    noise = torch.rand(cuts.shape, generator=torch.Generator().manual_seed(seed)) / 4
    return (F.interpolate(small, size=cuts.shape[-2:], mode="bilinear") * 0.7 + noise).clamp(0, 1)


def count(case: Case) -> Count:
    """Cuts, edits and pastes a case."""
    mask = EditMask.of(case.masks, case.rule)
    cuts, images, areas = cut_out(case.pictures[:, :3], mask, **{"size": 128, "multiple": 8, **case.cut})
    edited = autoencoded(images)
    if case.spoil is not None:
        edited = case.spoil(edited, areas.values)
    image_of, pastes = plan(cuts, len(edited), len(case.pictures))
    results, before = case.pictures[image_of], case.pictures[image_of]
    paste_back(results[:, :3], edited, cuts, pastes, **case.paste)
    used = case.paste.get("mask", mask)
    inside = torch.zeros(len(results), *results.shape[-2:], dtype=torch.bool)
    for each in pastes:
        inside[each.result] |= used.rows([each.cut]).inside[0, 0]
    changed = (bits(results) != bits(before)).any(1)
    return Count(
        int((~inside).sum()), int((changed & ~inside).sum()), int(inside.sum()), int((changed & inside).sum()), cuts.size
    )  # fmt: skip


def bits(values: Tensor) -> Tensor:
    """Float32 values as whole numbers, so that NaN equals NaN and 0 does not equal −0."""
    return values.contiguous().view(torch.int32)


def picture(width: int, height: int, count: int = 1, channels: int = 3, levels: int = 0) -> Tensor:
    """Random values [count, channels, height, width]; ``levels``: whole multiples of 1/levels, else any."""
    values = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(width + count))
    return (values * levels).round() / levels if levels else values


def boxes(width: int, height: int, *where: tuple[int, int, int, int], value: float = 1.0) -> Tensor:
    """A mask with rectangles (left, top, right, bottom)."""
    mask = torch.zeros(1, 1, height, width)
    for left, top, right, bottom in where:
        mask[..., top:bottom, left:right] = value
    return mask


def blob(width: int, height: int) -> Tensor:
    """A soft ellipse, gray at its edge."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return (1.6 - 2 * (x * x + y * y).sqrt() * 1.4).clamp(0, 1)[None, None]


def moving(width: int, height: int, frames: int) -> Tensor:
    """One box a frame, each elsewhere and of another size; some overlap."""
    step = (width - 60) // frames
    return torch.cat([boxes(width, height, (i * step, 5 + i, i * step + 30 + i, 40 + 2 * i)) for i in range(frames)])


def strange(width: int, height: int) -> Tensor:
    """A picture with values outside 0..1, NaN, Inf, −0 and the smallest positive numbers."""
    values = picture(width, height)
    for i, value in enumerate((float("nan"), float("inf"), -0.0, 1e-45, 7.5, -0.2)):
        values[..., i::11, i::7] = value
    return values


def nan_outside(edited: Tensor, areas: Tensor) -> Tensor:
    """NaN wherever the mask of the cut is 0."""
    return edited.masked_fill(areas == 0, float("nan"))


def cases() -> list[Case]:
    """All of them; small enough for a test."""
    middle = boxes(301, 211, (100, 60, 190, 150))
    fitted = {"shape": FITTED}
    return [
        Case("1 pixel", picture(301, 211), boxes(301, 211, (150, 100, 151, 101))),
        Case("1 pixel in a corner", picture(301, 211), boxes(301, 211, (300, 210, 301, 211))),
        Case("all but 1 pixel", picture(301, 211), 1 - boxes(301, 211, (7, 5, 8, 6))),
        Case("a picture of 1 × 3", picture(1, 3), boxes(1, 3, (0, 1, 1, 2))),
        Case("large: 1999 × 1501, cut to 128", picture(1999, 1501), boxes(1999, 1501, (50, 40, 1900, 1400))),
        Case("extreme aspect: 1501 × 33, a line of 1 pixel", picture(1501, 33), boxes(1501, 33, (20, 16, 1480, 17))),
        Case("extreme aspect, cut as the mask", picture(1501, 33), boxes(1501, 33, (20, 16, 1480, 17)), fitted),
        Case("islands", picture(301, 211), boxes(301, 211, (5, 5, 9, 60), (200, 20, 260, 24), (150, 190, 151, 191))),
        Case("touches all borders", picture(301, 211), boxes(301, 211, (0, 80, 301, 100), (140, 0, 150, 211))),
        Case("reaches beyond the picture, square", picture(301, 99), boxes(301, 99, (3, 2, 297, 97))),
        Case("cut as the mask, multiple of 64", picture(301, 211), middle, {**fitted, "multiple": 64}),
        Case("soft mask", picture(301, 211), blob(301, 211), rule="soft"),
        Case("feather of 12 pixels", picture(301, 211), middle, paste={"feather": 12}),
        Case("tone matching", picture(301, 211), middle, paste={"tone_match": True}),
        Case(
            "another mask for the paste",
            picture(301, 211),
            boxes(301, 211, (80, 40, 210, 170)),
            paste={"mask": EditMask.of(middle), "tone_match": True, "feather": 3},
        ),
        Case("RGBA", picture(301, 211, channels=4), middle),
        Case("values of 8 bits", picture(301, 211, levels=255), middle),
        Case("values of 16 bits", picture(301, 211, levels=65535), middle),
        Case("NaN, Inf, −0 and values beyond 0..1 in the picture", strange(301, 211), middle),
        Case("NaN in the edited cut outside the mask", picture(301, 211), middle, spoil=nan_outside),
        Case("the edited cut enlarged 2 times", picture(301, 211), middle, spoil=lambda e, _: F.interpolate(e, scale_factor=2)),
        Case("16 pictures × 16 masks", picture(301, 211, 16), moving(301, 211, 16)),
        Case("16 pictures × 16 masks, one region", picture(301, 211, 16), moving(301, 211, 16), {"one_region": True}),
        Case("16 pictures × 1 mask", picture(301, 211, 16), middle),
        Case("1 picture × 16 masks, into one picture", picture(301, 211), moving(301, 211, 16)),
        Case("1 picture × 16 masks, 3 edits of each", picture(301, 211), moving(301, 211, 16), spoil=lambda e, _: e.repeat(3, 1, 1, 1)),
        Case("16 pictures × 16 RGBA, soft, tone matching", picture(301, 211, 16, 4), moving(301, 211, 16) * 0.4, rule="soft", paste={"tone_match": True}),
    ]  # fmt: skip


def table() -> str:
    """A Markdown table of all cases."""
    lines = ["| case | cut | pixels outside | changed outside | changed inside |", "|---|---|---|---|---|"]
    for case in cases():
        found = count(case)
        share = found.edited / found.inside
        lines.append(f"| {case.name} | {found.size[1]} × {found.size[0]} | {found.outside:,} | {found.changed:,} | {share:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    sys.exit(0)
