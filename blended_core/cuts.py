"""Regions cut out of pictures for any other program, and pasted back: everything outside the mask stays bit-identical."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .edit import visible
from .errors import BlendedError, Note
from .mask import EditMask, dilated
from .region import Region, aspect_around, feather_notes, pasted_values, rectangle_around, region_around, same_aspect, size_of_aspect
from .tone import tone_shift

SQUARE, FITTED = "square", "as the mask"
SHAPES = (SQUARE, FITTED)
KERNEL = 2
"""Pixels that a resampled pixel is made of on each side, in pixels of the coarser picture. Tone matching corrects as many around the mask, and compares
what lies beyond them."""


@dataclass(frozen=True, eq=False)
class Cuts:
    """What was cut out of which pictures.

    Attributes:
        regions: one for all cuts, or one for each.
        mask: [1 or C, 1, H, W] in the frame of the pictures.
        pictures: their number: one for all cuts, or one for each.
        size: (height, width) of a cut.
    """

    regions: tuple[Region, ...]
    mask: EditMask
    pictures: int
    size: tuple[int, int]

    def __len__(self) -> int:
        return max(self.pictures, len(self.mask))

    def __repr__(self) -> str:
        return (
            f"Cuts({len(self)} of {self.size[1]}×{self.size[0]} from {self.pictures} of {self.regions[0].width}×{self.regions[0].height})"
        )

    @property
    def of_one_picture(self) -> bool:
        """Whether several cuts are of one picture, so that all of them are pasted into it."""
        return self.pictures == 1 and len(self) > 1

    def region(self, index: int) -> Region:
        """The region of a cut."""
        return self.regions[index if len(self.regions) > 1 else 0]


def cut_out(
    picture: Tensor,
    mask: EditMask,
    size: int,
    shape: str = SQUARE,
    multiple: int = 1,
    context: float = 1.6,
    one_region: bool = False,
) -> tuple[Cuts, Tensor, EditMask]:
    """Cuts the region around each mask.

    Args:
        picture: [N, 3, H, W] in 0..1; the cuts have values outside that range, NaN and Inf as the nearest value in it.
        mask: [M, 1, H, W]; N and M are one number, or one of them is 1.
        size: side of a square cut in pixels; another shape has about as many pixels.
        shape: one of :data:`SHAPES`.
        multiple: of which the width and the height of a cut are multiples; ``size`` is rounded to it.
        context: as for :func:`~blended_core.region.region_around`.
        one_region: one region around all masks; else each mask has its own.

    Returns:
        What :func:`paste_back` needs, the cuts [C, 3, h, w] in 0..1, and their masks [C, 1, h, w].

    Raises:
        BlendedError: for numbers of pictures and masks that do not belong together, an empty mask, or an impossible option.
    """
    if shape not in SHAPES:
        raise BlendedError(f"shape is {shape!r}; give one of {', '.join(SHAPES)}.", option="shape")
    if size < 1 or multiple < 1:
        raise BlendedError(f"the size is {size} and its multiple {multiple}; give 1 or more.", option="size")
    count = max(len(picture), len(mask))
    if {len(picture), len(mask)} - {1, count}:
        raise BlendedError(
            f"{len(mask)} masks were given for {len(picture)} pictures; give one mask for all pictures, one for each, or many masks of one picture."
        )
    empty = [str(i + 1) for i, inside in enumerate(mask.inside.flatten(1).any(1).tolist()) if not inside]
    if 0 < len(empty) < len(mask) and not one_region:
        raise BlendedError(
            f"mask {', '.join(empty)} of {len(mask)} is empty, so it has no region; leave it out with its picture, or cut one region around all masks.",
            option="one_region",
        )
    own = [mask] if one_region else [mask.rows([i]) for i in range(len(mask))]
    if shape == SQUARE:
        target = size_of_aspect(1.0, size, multiple)
        regions = [region_around(each, target[0], context) for each in own]
    else:
        aspects = [math.log(aspect_around(each, context)) for each in own]
        target = size_of_aspect(math.exp(sum(aspects) / len(aspects)), size, multiple)
        regions = [rectangle_around(each, target, context) for each in own]
    cuts = Cuts(tuple(regions), mask, len(picture), target)
    shown = visible(picture)
    images = [cuts.region(i).cut(shown[i : i + 1] if len(shown) > 1 else shown, target) for i in range(count)]
    masks = [cuts.region(i).cut_mask(mask.rows([i]), target).values for i in range(count)]
    return cuts, torch.cat(images).clamp(0, 1), mask.with_values(torch.cat(masks))


@dataclass(frozen=True)
class Paste:
    """One edited cut that goes into one result: indices of the result, of the edited cut, and of the cut that it was made from."""

    result: int
    edited: int
    cut: int


def plan(cuts: Cuts, edited: int, originals: int) -> tuple[list[int], list[Paste]]:
    """Which edited cut is pasted into which picture.

    Args:
        cuts: C cuts. edited: their number after the edit: C, or a multiple that repeats all of them in their order.
        originals: number of pictures to paste into.

    Returns:
        For each result the index of its original, and the pastes in their order. Cuts of one picture go into one result, if there are not as many
        originals as cuts.

    Raises:
        BlendedError: if the numbers do not belong together.
    """
    count = len(cuts)
    if edited % count:
        raise BlendedError(
            f"{edited} edited images were given for {count} regions; give one for each region, in the order of the regions, or several whole sets of them."
        )
    sets = edited // count
    if cuts.of_one_picture and originals in (1, sets):
        results = [0 if originals == 1 else i for i in range(sets)]
        return results, [Paste(i, i * count + cut, cut) for i in range(sets) for cut in range(count)]
    if count == 1 and edited == 1:
        return list(range(originals)), [Paste(i, 0, 0) for i in range(originals)]
    if originals not in {edited, count} | ({1} if cuts.pictures == 1 else set()):
        wanted = {1, sets, count, edited} if cuts.pictures == 1 else {count, edited}
        raise BlendedError(
            f"{originals} originals were given for {edited} edited images of {count} regions; give {' or '.join(map(str, sorted(wanted)))}: the "
            "IMAGE that was cut."
        )
    return [i % originals for i in range(edited)], [Paste(i, i, i % count) for i in range(edited)]


def paste_back(
    results: Tensor,
    edited: Tensor,
    cuts: Cuts,
    pastes: Sequence[Paste],
    mask: EditMask | None = None,
    mask_shows_cut: bool = False,
    feather: int = 0,
    tone_match: bool = False,
) -> list[Note]:
    """Pastes edited cuts into pictures. Outside the mask every picture keeps its values bit for bit.

    Args:
        results: [B, 3, H, W] in 0..1: the originals, which are written to.
        edited: [E, 3, h, w] in 0..1, of any size of the cut's aspect ratio. A value that is not finite takes that of the cut itself.
        cuts: from :func:`cut_out`. pastes: from :func:`plan`.
        mask: [1, C or E, 1, …], what is pasted; None: the mask of the cuts.
        mask_shows_cut: whether that mask is in the frame of the cut; else in that of the pictures.
        feather: pixels of the picture over which the edit fades in, inward.
        tone_match: whether the colors of the edit are corrected inside the mask so that they continue the original (:mod:`~blended_core.tone`). It
            compares what the edit shows outside the mask with what was cut.

    Returns:
        What the user should know.

    Raises:
        BlendedError: for sizes and numbers that do not belong together, a mask outside its region, or an edit without a finite value.
    """
    first = cuts.regions[0]
    for name, shape in (
        ("original", results.shape),
        ("mask", mask.values.shape if mask is not None and not mask_shows_cut else results.shape),
    ):
        if tuple(shape[-2:]) != (first.height, first.width):
            raise BlendedError(
                f"the {name} is {shape[-1]}×{shape[-2]}, and the region was cut from {first.width}×{first.height}; connect the IMAGE that was cut, or "
                "a result of the same size."
            )
    if not same_aspect((edited.shape[-2], edited.shape[-1]), cuts.size):
        raise BlendedError(
            f"the edited IMAGE is {edited.shape[-1]}×{edited.shape[-2]} and the cut was {cuts.size[1]}×{cuts.size[0]}, another aspect ratio; connect the "
            "edited cut alone, at any scale. (For an edited IMAGE of the whole picture use Final Paste.)"
        )
    if mask is not None and len(mask) not in (1, len(cuts), len(edited)):
        raise BlendedError(
            f"{len(mask)} masks were given for {len(edited)} edited images of {len(cuts)} regions; give one, or one for each."
        )
    notes: list[Note] = []
    replaced = 0
    before = results.clone() if tone_match and cuts.of_one_picture else results
    for paste in pastes:
        region = cuts.region(paste.cut)
        own = _mask_of(cuts, paste, mask, mask_shows_cut, len(edited))
        inner = region.inner()
        if not bool(own.inside[inner.slices].any()):
            if mask is None:
                continue  # a picture without a mask of its own, in one region around all masks
            raise BlendedError(
                f"the mask for the paste has nothing inside the region of cut {paste.cut + 1} ({region.size[1]}×{region.size[0]} at {region.left}, "
                f"{region.top}); connect a mask that overlaps the one that was cut."
            )
        values = edited[paste.edited : paste.edited + 1]
        source = before[paste.result : paste.result + 1]
        finite = values.isfinite()
        if not bool(finite.all()):
            if not bool(finite.any()):
                raise BlendedError(
                    f"edited image {paste.edited + 1} of {len(edited)} has no finite value (NaN or Inf); look at the sampler before it."
                )
            replaced += int((~finite).count_nonzero())
            values = torch.where(finite, values, _source_of(region, source, values))
        if tone_match:
            known = cuts.mask.rows([paste.cut])
            seen = known if mask is None else known.with_values(torch.maximum(known.values, own.values))
            values = values + _tone(values, _source_of(region, source, values), seen, region)
        if not notes:
            notes += feather_notes(own, region, feather)
        target = results[paste.result : paste.result + 1]
        box, part = pasted_values(values, target, own, region, feather)
        target[box.slices] = part
    if replaced:
        notes.append(Note(f"{replaced} values of the edited images are NaN or Inf; the original is kept there."))
    return notes


def _mask_of(cuts: Cuts, paste: Paste, mask: EditMask | None, mask_shows_cut: bool, edited: int) -> EditMask:
    """The mask of a paste in the frame of the picture, [1, 1, H, W]."""
    if mask is None:
        return cuts.mask.rows([paste.cut])
    own = mask.rows([paste.edited if len(mask) == edited else paste.cut])
    if not mask_shows_cut:
        return own
    region = cuts.region(paste.cut)
    full = region.put_back(own.values, own.values.new_zeros(1, 1, region.height, region.width))
    return EditMask.of(full.clamp(0, 1), "soft" if mask.soft else "binary")


def _source_of(region: Region, source: Tensor, values: Tensor) -> Tensor:
    """What the region of the original shows, at the size of an edited cut."""
    return region.cut(visible(source), (values.shape[-2], values.shape[-1]))


def _tone(values: Tensor, source: Tensor, mask: EditMask, region: Region) -> Tensor:
    """What tone matching adds to an edited cut [1, 3, h, w] in 0..1, with a mask in the frame of the picture."""
    size = (values.shape[-2], values.shape[-1])
    margin = KERNEL * max(1, *(math.ceil(new / old) for new, old in zip(size, region.size, strict=True)))
    inside = dilated(region.cut_mask(mask, size).inside.to(values), margin) > 0
    return tone_shift(values * 2 - 1, source * 2 - 1, inside) / 2
