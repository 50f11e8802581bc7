"""Regions cut out for any model and pasted back: nothing outside the mask changes, and every edit lands where it was cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.regions import Case, autoencoded, bits, boxes, cases, count, picture
from blended_core.cuts import FITTED, SHAPES, Cuts, Paste, cut_out, paste_back, plan
from blended_core.errors import BlendedError
from blended_core.mask import EditMask
from blended_core.region import LONGEST_ASPECT, STRETCH, rectangle_around, size_of_aspect
from blended_core.tone import LIMIT

from .test_region import painted, rectangles


def masked(*where: tuple[int, int, int, int], width: int = 90, height: int = 70) -> EditMask:
    return EditMask.of(boxes(width, height, *where))


def pasted(pictures: torch.Tensor, edited: torch.Tensor, cuts: Cuts, originals: int | None = None, **more: Any) -> torch.Tensor:
    """Results of edited cuts in copies of the pictures."""
    image_of, pastes = plan(cuts, len(edited), originals or len(pictures))
    results = pictures[image_of]
    paste_back(results, edited, cuts, pastes, **more)
    return results


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_case_of_the_table_changes_nothing_outside(case: Case) -> None:
    found = count(case)
    assert found.changed == 0
    assert found.edited >= 0.99 * found.inside > 0, "the edit is there"


@settings(max_examples=80, deadline=None)
@given(rectangles(120), st.sampled_from([16, 40, 64]), st.sampled_from(SHAPES), st.sampled_from([1, 8, 16]), st.floats(1, 3), st.booleans())
def test_any_mask_in_any_picture(
    case: tuple[int, int, list[tuple[int, int, int, int]]], size: int, shape: str, multiple: int, context: float, soft: bool
) -> None:
    height, width, where = case
    mask = painted(height, width, where)
    mask = EditMask.of(0.5 * mask.values, "soft") if soft else mask
    source = picture(width, height)
    cuts, images, areas = cut_out(source, mask, size, shape, multiple, context)
    region = cuts.region(0)
    assert images.shape == (1, 3, *cuts.size) and areas.values.shape == (1, 1, *cuts.size)
    assert cuts.size[0] % multiple == cuts.size[1] % multiple == 0
    assert bool(areas.inside.any()), "nothing of a mask gets lost"
    box, inner = mask.box(), region.inner()
    assert inner.left <= box.left and inner.top <= box.top and inner.right >= box.right and inner.bottom >= box.bottom
    enlarged = max(new / old for new, old in zip(cuts.size, region.size, strict=True))
    assert enlarged <= 4.01 or min(region.size) >= min(height, width)
    result = pasted(source, autoencoded(images), cuts)
    outside = ~mask.inside.expand_as(source)
    assert torch.equal(bits(result)[outside], bits(source)[outside])
    assert not torch.equal(result, source)


@settings(max_examples=200, deadline=None)
@given(rectangles(400), st.sampled_from([64, 256]), st.sampled_from([1, 8, 64]), st.floats(1, 3))
def test_a_fitted_region_has_the_shape_of_its_cut(
    case: tuple[int, int, list[tuple[int, int, int, int]]], size: int, multiple: int, context: float
) -> None:
    mask = painted(*case)
    cuts, _, _ = cut_out(torch.zeros(1, 3, *case[:2]), mask, size, FITTED, multiple, context)
    (rows, columns), region = cuts.size, cuts.region(0)
    assert max(rows / columns, columns / rows) <= LONGEST_ASPECT + multiple / min(rows, columns)
    # Rounding to whole pixels aside, one axis is stretched where the picture ends.
    down, across = region.size
    assert down - 1 <= across * rows / columns * STRETCH + 1 and across - 1 <= down * columns / rows * STRETCH + 1


def test_a_fitted_region_stays_in_the_picture_where_a_square_one_does_not() -> None:
    mask = EditMask.of(boxes(400, 100, (60, 10, 340, 90)))
    for shape, beyond in (("square", True), (FITTED, False)):
        cuts, _, _ = cut_out(torch.zeros(1, 3, 100, 400), mask, 128, shape, 8)
        region = cuts.region(0)
        assert (region.top < 0) == beyond, shape
    assert cuts.size == (64, 256) and region.size == (100, 400)


def test_near_its_own_size_a_region_is_cut_without_resampling() -> None:
    mask = EditMask.of(boxes(300, 300, (100, 120, 180, 160)))
    source = picture(300, 300)
    cuts, images, _ = cut_out(source, mask, 96, FITTED, 8)
    region = cuts.region(0)
    assert region.size == cuts.size == (80, 112)
    assert torch.equal(images, source[..., region.top : region.top + 80, region.left : region.left + 112])
    assert torch.equal(pasted(source, images, cuts), source), "and an unchanged cut changes nothing inside either"
    assert rectangle_around(mask, cuts.size).size == region.size


@pytest.mark.parametrize(
    ("aspect", "side", "multiple", "size"),
    [
        (1.0, 1024, 64, (1024, 1024)),
        (1.5, 1024, 64, (832, 1280)),
        (0.25, 1024, 64, (2048, 512)),
        (1.0, 1000, 64, (1024, 1024)),
        (2.0, 64, 64, (64, 64)),
    ],
)
def test_sizes_have_the_pixels_of_a_square(aspect: float, side: int, multiple: int, size: tuple[int, int]) -> None:
    assert size_of_aspect(aspect, side, multiple) == size


def test_each_edit_lands_in_its_own_picture() -> None:
    pictures, masks = picture(90, 70, 3), EditMask.of(torch.cat([boxes(90, 70, (i * 20, 10, i * 20 + 15, 30)) for i in range(3)]))
    cuts, images, areas = cut_out(pictures, masks, 32)
    assert len(cuts) == len(images) == len(areas) == len(cuts.regions) == 3 and not cuts.of_one_picture
    edited = torch.stack([torch.full_like(images[0], 0.1 * (i + 1)) for i in range(3)])
    result = pasted(pictures, edited, cuts)
    for i in range(3):
        inside = masks.inside[i].expand(3, -1, -1)
        assert result[i][inside].sub(0.1 * (i + 1)).abs().max() < 1e-6
        assert torch.equal(result[i][~inside], pictures[i][~inside])


def test_many_regions_go_into_one_picture_and_the_later_one_lies_above() -> None:
    source = picture(90, 70)
    where = [(5, 5, 40, 40), (30, 20, 60, 50)]
    masks = EditMask.of(torch.cat([boxes(90, 70, one) for one in where]))
    cuts, images, _ = cut_out(source, masks, 32)
    edited = torch.stack([torch.full_like(images[0], value) for value in (0.2, 0.8)])
    (result,) = pasted(source, edited, cuts)
    assert result[:, 25, 35].sub(0.8).abs().max() < 1e-6 and result[:, 10, 10].sub(0.2).abs().max() < 1e-6
    # The same with a chain of two nodes.
    chained = source
    for i, one in enumerate(where):
        own, image, _ = cut_out(source, EditMask.of(boxes(90, 70, one)), 32)
        chained = pasted(chained, torch.full_like(image, (0.2, 0.8)[i]), own)
    assert torch.equal(chained[0], result)
    # Sets of edits make a picture each; as many originals as cuts keep them apart.
    assert len(pasted(source, edited.repeat(3, 1, 1, 1), cuts)) == 3
    apart = pasted(source.repeat(2, 1, 1, 1), edited, cuts)
    assert torch.equal(apart[0][:, 40:], source[0][:, 40:]) and not torch.equal(apart[1][:, 40:], source[0][:, 40:])


@pytest.mark.parametrize(
    ("pictures", "masks", "edited", "originals", "image_of", "pastes"),
    [
        (1, 1, 1, 1, [0], [(0, 0, 0)]),
        (1, 1, 3, 1, [0, 0, 0], [(0, 0, 0), (1, 1, 0), (2, 2, 0)]),
        (1, 1, 1, 2, [0, 1], [(0, 0, 0), (1, 0, 0)]),
        (1, 1, 2, 2, [0, 1], [(0, 0, 0), (1, 1, 0)]),
        (2, 2, 4, 2, [0, 1, 0, 1], [(0, 0, 0), (1, 1, 1), (2, 2, 0), (3, 3, 1)]),
        (2, 1, 2, 2, [0, 1], [(0, 0, 0), (1, 1, 1)]),
        (1, 2, 2, 1, [0], [(0, 0, 0), (0, 1, 1)]),
        (1, 2, 4, 1, [0, 0], [(0, 0, 0), (0, 1, 1), (1, 2, 0), (1, 3, 1)]),
        (1, 2, 6, 3, [0, 1, 2], [(0, 0, 0), (0, 1, 1), (1, 2, 0), (1, 3, 1), (2, 4, 0), (2, 5, 1)]),
        (1, 2, 2, 2, [0, 1], [(0, 0, 0), (1, 1, 1)]),
    ],
)
def test_which_edit_goes_where(
    pictures: int, masks: int, edited: int, originals: int, image_of: list[int], pastes: list[tuple[int, int, int]]
) -> None:
    cuts, _, _ = cut_out(torch.zeros(pictures, 3, 70, 90), EditMask.of(boxes(90, 70, (5, 5, 20, 20)).expand(masks, -1, -1, -1)), 16)
    assert plan(cuts, edited, originals) == (image_of, [Paste(*paste) for paste in pastes])


@pytest.mark.parametrize(
    ("pictures", "masks", "edited", "originals", "message"),
    [
        (2, 2, 3, 2, "3 edited images were given for 2 regions"),
        (2, 2, 2, 1, "1 originals were given for 2 edited images of 2 regions; give 2"),
        (1, 1, 3, 2, "2 originals were given for 3 edited images of 1 regions; give 1 or 3"),
        (1, 2, 2, 5, "5 originals were given for 2 edited images of 2 regions; give 1 or 2"),
    ],
)
def test_numbers_that_do_not_belong_together(pictures: int, masks: int, edited: int, originals: int, message: str) -> None:
    cuts, _, _ = cut_out(torch.zeros(pictures, 3, 70, 90), EditMask.of(boxes(90, 70, (5, 5, 20, 20)).expand(masks, -1, -1, -1)), 16)
    with pytest.raises(BlendedError, match=message):
        plan(cuts, edited, originals)


def test_what_cannot_be_cut_or_pasted_is_refused_with_a_sentence() -> None:
    source, mask = picture(90, 70), masked((5, 5, 20, 20))
    cuts, images, _ = cut_out(source, mask, 32)
    one = [Paste(0, 0, 0)]
    with pytest.raises(BlendedError, match="3 masks were given for 2 pictures"):
        cut_out(source.repeat(2, 1, 1, 1), EditMask.of(torch.ones(3, 1, 70, 90)), 32)
    with pytest.raises(BlendedError, match="the mask is empty: its brightest pixel is 0"):
        cut_out(source, masked(), 32)
    with pytest.raises(BlendedError, match=r"context is 0\.5"):
        cut_out(source, mask, 32, FITTED, context=0.5)
    with pytest.raises(BlendedError, match="original is 80×70, and the region was cut from 90×70"):
        paste_back(source[..., :80].clone(), images, cuts, one)
    with pytest.raises(BlendedError, match=r"edited IMAGE is 90×70 and the cut was 32×32.*Final Paste"):
        paste_back(source.clone(), source, cuts, one)
    with pytest.raises(BlendedError, match="nothing inside the region of cut 1"):
        paste_back(source.clone(), images, cuts, one, masked((80, 60, 90, 70)))
    with pytest.raises(BlendedError, match="edited image 1 of 1 has no finite value"):
        paste_back(source.clone(), images * float("nan"), cuts, one)


def test_frames_without_a_mask_need_one_region_and_stay_as_they_are() -> None:
    pictures = picture(90, 70, 2)
    masks = EditMask.of(torch.cat([boxes(90, 70), boxes(90, 70, (5, 5, 20, 20))]))
    with pytest.raises(BlendedError, match="mask 1 of 2 is empty"):
        cut_out(pictures, masks, 32)
    cuts, images, areas = cut_out(pictures, masks, 32, one_region=True)
    assert len(cuts.regions) == 1 and len(images) == 2 and not bool(areas.inside[0].any())
    result = pasted(pictures, 1 - images, cuts)
    assert torch.equal(result[0], pictures[0]) and not torch.equal(result[1], pictures[1])


def test_a_mask_for_the_paste_in_the_frame_of_the_cut() -> None:
    source = picture(120, 120)
    cuts, images, areas = cut_out(source, EditMask.of(boxes(120, 120, (30, 30, 90, 90))), 64)
    region = cuts.region(0)
    half = areas.values.clone()
    half[..., :32] = 0  # only the right half of what was sampled
    result = pasted(source, 1 - images, cuts, mask=EditMask.of(half), mask_shows_cut=True)
    changed = (result != source).any(1)[0].nonzero()
    middle = region.left + region.side / 2
    assert changed[:, 1].min() >= middle - 1 and changed[:, 1].max() == 89 and changed[:, 0].min() == 30


@pytest.mark.parametrize("size", [40, 64, 200])
def test_tone_matching_takes_back_what_the_edit_does_around_the_mask(size: int) -> None:
    """An autoencoder that makes everything a little darker at the top and redder at the bottom; the object inside is another color."""
    mask = EditMask.of(boxes(150, 130, (50, 40, 110, 100)))
    y, x = torch.meshgrid(torch.linspace(0, 1, 130), torch.linspace(0, 1, 150), indexing="ij")
    source = torch.stack([0.3 + 0.2 * x, 0.4 + 0.2 * y, 0.6 - 0.2 * x * y])[None]
    cuts, images, _ = cut_out(source, mask, size)
    shift = torch.tensor([0.03, -0.03, -0.02]).view(1, 3, 1, 1) * torch.linspace(0.5, 1, size).view(1, 1, -1, 1)
    inside = mask.inside.expand_as(source)
    error = {}
    for tone in (False, True):
        result = pasted(source, images + shift, cuts, tone_match=tone)
        assert torch.equal(result[~inside], source[~inside])
        error[tone] = float((result - source)[inside].abs().max())
    assert error[False] > 0.025 and error[True] < 0.1 * error[False]
    # A new object keeps its color: no more than the limit is added.
    moved = pasted(source, images * 0 + 0.9, cuts, tone_match=True) - pasted(source, images * 0 + 0.9, cuts)
    assert float(moved.abs().max()) <= 1.01 * LIMIT / 2


def test_values_that_are_not_finite_keep_the_original_and_are_told() -> None:
    source = picture(90, 70)
    cuts, images, _ = cut_out(source, masked((5, 5, 80, 60)), 32)
    edited = torch.full_like(images, 0.5)
    edited[..., 10:14, 10:14] = float("inf")
    results = source.clone()
    (note,) = paste_back(results, edited, cuts, [Paste(0, 0, 0)])
    assert "48 values" in note and bool(results.isfinite().all())


def test_the_cut_shows_values_a_model_can_take_and_the_original_keeps_its_own() -> None:
    source = picture(90, 70) * 3 - 0.2
    source[0, 0, 0, 0] = float("nan")
    cuts, images, _ = cut_out(source, masked((5, 5, 80, 60)), 64)
    assert bool(images.isfinite().all()) and float(images.min()) >= 0 and float(images.max()) <= 1
    result = pasted(source, images, cuts)
    outside = ~masked((5, 5, 80, 60)).inside.expand_as(source)
    assert torch.equal(bits(result)[outside], bits(source)[outside])


def test_a_feather_wider_than_the_mask_is_told() -> None:
    source, mask = picture(90, 70), masked((5, 5, 15, 15))
    cuts, images, _ = cut_out(source, mask, 32)
    (note,) = paste_back(source.clone(), images, cuts, [Paste(0, 0, 0)], feather=20)
    assert "feather of 20 pixels is wider than the mask" in note
