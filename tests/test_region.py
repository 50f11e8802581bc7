"""The square around the mask: where it lies, that it is cut and put back without a loss, that no mask gets lost in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blended_core.edit import choose_region, edit_picture
from blended_core.errors import BlendedError
from blended_core.mask import EditMask
from blended_core.options import preset
from blended_core.reference import SquashedPicture
from blended_core.region import SMALLEST, SNAP, Region, region_around

from . import tiny

MODEL = 64


@st.composite
def rectangles(draw: st.DrawFn, longest: int = 300) -> tuple[int, int, list[tuple[int, int, int, int]]]:
    """Height and width of a picture, and one to three rectangles (top, left, bottom, right) in it."""
    height, width = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    boxes = []
    for _ in range(draw(st.integers(1, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        bottom, right = draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))
        if draw(st.booleans()):
            bottom = top + 1
        if draw(st.booleans()):
            right = left + 1
        boxes.append((top, left, bottom, right))
    return height, width, boxes


def painted(height: int, width: int, boxes: list[tuple[int, int, int, int]]) -> EditMask:
    """A binary mask with 1 in the boxes."""
    mask = torch.zeros(1, 1, height, width)
    for top, left, bottom, right in boxes:
        mask[..., top:bottom, left:right] = 1
    return EditMask.of(mask)


@settings(max_examples=300, deadline=None)
@given(rectangles(), st.sampled_from([8, 16, 64, 256]), st.floats(1, 4), st.booleans())
def test_the_region_holds_the_mask_and_lies_in_the_picture(
    case: tuple[int, int, list[tuple[int, int, int, int]]], size: int, context: float, soft: bool
) -> None:
    height, width, boxes = case
    mask = painted(height, width, boxes)
    region = region_around(EditMask.of(0.3 * mask.values, "soft") if soft else mask, size, context)
    top, left = min(b[0] for b in boxes), min(b[1] for b in boxes)
    bottom, right = max(b[2] for b in boxes), max(b[3] for b in boxes)
    longer = max(bottom - top, right - left)
    assert region.left <= left and right <= region.left + region.side
    assert region.top <= top and bottom <= region.top + region.side
    assert (region.width, region.height) == (width, height)
    for start, length in ((region.left, width), (region.top, height)):
        if region.side <= length:
            assert start >= 0 and start + region.side <= length, "it fits, so it must lie in the picture"
        else:
            assert start <= 0 and start + region.side >= length, "all of the shorter side belongs to it"
            assert abs((length - start) - (start + region.side)) <= region.side  # reaches over both ends
    assert longer <= region.side <= max(width, height)
    assert region.side >= min(longer * context, max(width, height)) / SNAP - 1, "at least the context asked for, snapping aside"


@settings(max_examples=200, deadline=None)
@given(rectangles(), st.sampled_from([16, 64]), st.floats(1, 5), st.floats(1, 5))
def test_more_context_never_gives_a_smaller_region(
    case: tuple[int, int, list[tuple[int, int, int, int]]], size: int, one: float, other: float
) -> None:
    mask = painted(*case)
    assert region_around(mask, size, min(one, other)).side <= region_around(mask, size, max(one, other)).side


@pytest.mark.parametrize(
    ("height", "width", "box", "side"),
    [
        (200, 200, (90, 90, 130, 130), 64),  # 40 · 1.6 is the model's side
        (200, 200, (80, 80, 130, 130), 64),  # 80, near enough: snapped
        (200, 200, (20, 20, 120, 120), 160),  # too far above to snap
        (200, 200, (90, 90, 92, 92), 16),  # tiny: a fourth of the model's side
        (200, 200, (0, 0, 200, 200), 200),  # full
        (10, 10, (3, 3, 4, 4), 10),  # picture smaller than the smallest region
        (64, 64, (0, 0, 64, 64), 64),
        (40, 300, (0, 0, 40, 300), 300),  # elongated: reaches beyond the shorter side
        (1, 1, (0, 0, 1, 1), 1),
    ],
)
def test_sides(height: int, width: int, box: tuple[int, int, int, int], side: int) -> None:
    assert region_around(painted(height, width, [box]), MODEL).side == side
    assert MODEL // SMALLEST == 16


@settings(max_examples=150, deadline=None)
@given(rectangles(120), st.sampled_from([1, 3]))
def test_cut_and_put_back_is_exact_at_the_model_size(case: tuple[int, int, list[tuple[int, int, int, int]]], batch: int) -> None:
    height, width, boxes = case
    region = region_around(painted(height, width, boxes), 32)
    picture = tiny.random_picture(height, width)
    before = picture.clone()
    cut = region.cut(picture, region.side)
    assert cut.shape == (1, 3, region.side, region.side)
    inner = region.inner()
    window = cut[..., inner.top - region.top : inner.bottom - region.top, inner.left - region.left : inner.right - region.left]
    assert torch.equal(window, picture[..., inner.top : inner.bottom, inner.left : inner.right])
    back = region.put_back(cut.repeat(batch, 1, 1, 1), picture)
    assert back.shape == (batch, 3, height, width)
    assert all(tiny.same_bits(row[None], picture) for row in back)
    marked = region.put_back(torch.full((1, 3, region.side, region.side), 9.0), picture)
    covered = torch.zeros(1, 3, height, width, dtype=torch.bool)
    covered[..., inner.top : inner.bottom, inner.left : inner.right] = True
    assert (marked[covered] == 9).all() and torch.equal(marked[~covered], picture[~covered])
    assert tiny.same_bits(picture, before)


def test_beyond_the_edges_lies_the_reflection() -> None:
    picture = torch.arange(12.0).view(1, 1, 3, 4).repeat(1, 3, 1, 1)
    region = Region(left=-2, top=-3, side=9, width=4, height=3)
    cut = region.cut(picture, 9)[0, 0]
    rows, columns = [1, 2, 1, 0, 1, 2, 1, 0, 1], [2, 1, 0, 1, 2, 3, 2, 1, 0]
    assert torch.equal(cut, picture[0, 0][rows][:, columns])
    lonely = Region(-3, -3, 7, 1, 1).cut(torch.full((1, 3, 1, 1), 0.25), 7)
    assert (lonely == 0.25).all()
    mask = region.cut_mask(EditMask.of(torch.ones(1, 1, 3, 4)), 9).values[0, 0]
    assert mask[3:6, 2:6].all() and mask.sum() == 12, "what lies beyond the edges is not edited"


@settings(max_examples=300, deadline=None)
@given(rectangles(), st.sampled_from([2, 16, 64]), st.floats(1, 4))
def test_a_mask_stays_binary_and_no_island_is_lost(
    case: tuple[int, int, list[tuple[int, int, int, int]]], size: int, context: float
) -> None:
    height, width, boxes = case
    region = region_around(painted(height, width, boxes), size, context)
    small = region.cut_mask(painted(height, width, boxes), size).values
    assert small.shape == (1, 1, size, size)
    assert set(small.unique().tolist()) <= {0.0, 1.0}
    scale = size / region.side
    for top, left, bottom, right in boxes:
        y0, y1 = (top - region.top) * scale, (bottom - region.top) * scale
        x0, x1 = (left - region.left) * scale, (right - region.left) * scale
        around = small[..., max(int(y0) - 1, 0) : int(y1) + 2, max(int(x0) - 1, 0) : int(x1) + 2]
        assert around.any(), f"nothing is left of the rectangle {(top, left, bottom, right)}"


def test_an_island_beside_a_large_part_is_kept() -> None:
    mask = painted(400, 400, [(0, 0, 200, 200), (390, 390, 391, 391), (300, 50, 301, 150)])
    small = region_around(mask, 64).cut_mask(mask, 64).values[0, 0]
    assert small[62, 62] == 1
    assert small[48, 8:24].all()
    assert small[:32, :32].all() and small[34:46].sum() == 0


def test_a_pixel_in_a_huge_region_is_kept() -> None:
    mask = painted(2048, 2048, [(700, 900, 701, 901)])
    assert Region(0, 0, 2048, 2048, 2048).cut_mask(mask, 2).values.tolist() == [[[[1.0, 0.0], [0.0, 0.0]]]]


def test_a_soft_mask_keeps_its_grays() -> None:
    ramp = torch.linspace(0, 1, 64).view(1, 1, 1, 64).repeat(1, 1, 64, 1)
    region = Region(0, 0, 64, 64, 64)
    soft = EditMask.of(ramp, "soft")
    mask = ramp.masked_fill(ramp < 9 / 255, 0)
    assert torch.equal(region.cut_mask(soft, 64).values, mask)
    half = region.cut_mask(soft, 32)
    assert half.soft and torch.allclose(half.values[..., 0], mask[..., :2, :2].mean().expand(1, 1, 32), atol=1e-6)
    assert float(region.cut_mask(soft.with_values(mask * 3), 128).values.max()) == 1


@pytest.mark.parametrize("soft", [False, True])
def test_an_empty_mask_is_a_sentence(soft: bool) -> None:
    mask = torch.zeros(1, 1, 20, 30) if soft else torch.full((1, 1, 20, 30), 127 / 255)
    rule = "soft" if soft else "binary"
    brightest, needed = ("0", r"above 0\.033 \(gray 8 of 255\)") if soft else ("0.498", r"0\.5 or more")
    for crop in ("region", "squash"):
        with pytest.raises(
            BlendedError, match=rf"the mask is empty: its brightest pixel is {brightest} and editing needs {needed}"
        ) as raised:
            choose_region(EditMask.of(mask, rule), 16, crop)
        assert "or invert the mask" in str(raised.value) and raised.value.options == ("invert_mask",)
    with pytest.raises(BlendedError, match="empty"):
        EditMask.of(torch.full((1, 1, 2, 2), float("nan")), rule).box()


@pytest.mark.parametrize(("rule", "needed"), [("binary", r"less than 0\.5"), ("soft", r"below 0\.967"), ("nonzero", "0")])
def test_an_empty_inverted_mask_is_told_with_its_darkest_pixel(rule: str, needed: str) -> None:
    with pytest.raises(
        BlendedError, match=rf"the inverted mask is empty: the darkest pixel of the mask is 0\.98 and editing needs {needed}"
    ):
        EditMask.of(torch.full((1, 1, 4, 4), 0.98), rule, invert=True).box()
    with pytest.raises(BlendedError, match=r"brightest pixel is 0 and editing needs more than 0\."):
        EditMask.of(torch.zeros(1, 1, 4, 4), "nonzero").box()


@pytest.mark.parametrize("context", [0.99, 0, -1, float("nan"), float("inf")])
def test_context_is_checked(context: float) -> None:
    with pytest.raises(BlendedError, match=r"context is"):
        region_around(EditMask.of(torch.ones(1, 1, 9, 9)), 16, context)


def test_squash_takes_the_whole_picture() -> None:
    picture = tiny.random_picture(30, 50)
    whole = choose_region(painted(30, 50, [(3, 3, 9, 9)]), 16, preset("official").crop)
    assert whole == SquashedPicture(50, 30)
    assert whole.cut(picture, 16).shape == (1, 3, 16, 16)
    assert whole.put_back(torch.zeros(2, 3, 16, 16), picture).shape == (2, 3, 30, 50)
    same = SquashedPicture(16, 16)
    square = tiny.random_picture(16, 16)
    assert torch.equal(same.put_back(same.cut(square, 16), square), square)


@pytest.mark.parametrize(("model", "side", "width"), [(256, 64, 25), (256, 110, 45), (64, 16, 5), (64, 50, 20)])
def test_an_enlarged_mask_has_no_ring_around_it(model: int, side: int, width: int) -> None:
    """Bilinear enlarging leaves faint pixels beyond the edge; they are no islands of their own."""
    mask = torch.zeros(1, 1, side, side)
    start = (side - width) // 2
    mask[..., start : start + width, start : start + width] = 1
    region = Region(0, 0, side, side, side)
    row = region.cut_mask(EditMask.of(mask), model).values[0, 0, model // 2]
    changes = int((row[1:] != row[:-1]).sum())
    assert changes == 2, f"{changes} edges in a row that crosses one block"
    assert abs(float(row.sum()) - width * model / side) <= 2


def test_a_mask_lost_by_squashing_is_a_sentence() -> None:
    picture, mask = torch.rand(1, 3, 90, 160), torch.zeros(1, 1, 90, 160)
    mask[..., 1, 1] = 1
    with pytest.raises(BlendedError, match="nothing of the mask is left"):
        edit_picture(picture, mask, None, tiny.tiny_models(), preset("official", steps="2", candidates=1))
    result = edit_picture(picture, mask, None, tiny.tiny_models(), preset("official", steps="2", candidates=1, crop="region"))
    assert len(result.candidates) == 1


@pytest.mark.parametrize("changes", [{"steps": "lots"}, {"steps": "ddim0"}, {"context": 0.5}, {"context": float("nan")}])
def test_options_are_checked_when_they_are_made(changes: dict[str, Any]) -> None:
    with pytest.raises(BlendedError):
        preset("best", **changes)
