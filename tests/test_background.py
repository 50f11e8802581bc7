"""Outside the mask the result is the original, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from blended_core.cli import edit as edit_command
from blended_core.cli import main
from blended_core.denoiser import DiffusionModel
from blended_core.device import DeviceContext
from blended_core.diffusion import DiffusionConfig
from blended_core.edit import edit_picture
from blended_core.errors import BlendedError
from blended_core.io.images import to_uint8
from blended_core.mask import EditMask, distance_inward, final_paste
from blended_core.options import preset
from blended_core.rank import background_error, seam_energy
from blended_core.region import Region, feather_notes, paste, region_around

from . import tiny

SIDES = st.one_of(st.sampled_from([1, 2, 3, 15, 16, 17, 31, 64, 97, 127, 199, 200]), st.integers(1, 200))
GRAYS = [0.0, 1.0, 127 / 255, 128 / 255, 0.5, float(np.nextafter(np.float32(0.5), np.float32(0))), 1e-7, 1 / 255, 0.25, 0.9]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@st.composite
def masks(draw: st.DrawFn, sides: st.SearchStrategy[int] = SIDES) -> Tensor:
    """[1, 1, H, W] with at least one pixel of 1 and one of a random near-threshold gray where there is room."""
    height, width = draw(sides), draw(sides)
    kind = draw(st.sampled_from(["rectangles", "pixels", "row", "column", "border", "full", "grays"]))
    mask = torch.zeros(height, width)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))

    def rectangle(value: float) -> None:
        y, x = rng.integers(height), rng.integers(width)
        mask[y : y + 1 + rng.integers(height), x : x + 1 + rng.integers(width)] = value

    if kind == "rectangles":
        for _ in range(draw(st.integers(1, 3))):
            rectangle(draw(st.sampled_from(GRAYS)))
    elif kind == "pixels":
        for _ in range(draw(st.integers(1, 4))):
            mask[rng.integers(height), rng.integers(width)] = 1
    elif kind == "row":
        mask[rng.integers(height), :] = 1
    elif kind == "column":
        mask[:, rng.integers(width)] = 1
    elif kind == "border":
        mask[:, 0] = mask[-1, :] = 1
    elif kind == "full":
        mask[:] = 1
    else:
        mask = torch.from_numpy(rng.choice(GRAYS, (height, width)).astype(np.float32))
    if draw(st.booleans()):
        mask[rng.integers(height), rng.integers(width)] = float("nan")
    if not (mask >= 0.5).any():
        mask[rng.integers(height), rng.integers(width)] = 1
    return mask[None, None]


def outside(mask: Tensor, soft: bool, invert: bool = False) -> Tensor:
    """Which pixels must not change, said a second time and differently: a NaN is never edited, and 8 of 255 is black in a soft mask."""
    values = mask.double().numpy()
    if invert:
        values = 1 - values
        # 1 − m is rounded nowhere near a half, and ≥ 0.5 inverted is < 0.5.
        return torch.from_numpy(~(values * 255 > 8.5) if soft else ~(values > 0.5))
    return torch.from_numpy(~(values * 255 > 8.5) if soft else ~(values >= 0.5))


def rule_of(soft: bool) -> str:
    """The rule of a soft or of a binary mask."""
    return "soft" if soft else "binary"


def untouched(result: Tensor, original: Tensor, keep: Tensor) -> bool:
    """Whether the pixels of ``keep`` [1, 1, H, W] have the same bits in both pictures."""
    where = keep.expand_as(result)
    return tiny.same_bits(result[where], original.expand_as(result)[where])


@settings(max_examples=150, deadline=None)
@given(mask=masks(), dtype=st.sampled_from(DTYPES), soft=st.booleans(), feather=st.sampled_from([0, 0, 1, 3, 50]), seed=st.integers(0, 99))
def test_final_paste_never_touches_the_outside(mask: Tensor, dtype: torch.dtype, soft: bool, feather: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    shape = (1, 3, *mask.shape[-2:])
    original = (torch.rand(shape, generator=rng) * 3 - 1).to(dtype)  # values that a clamp would change
    special = torch.rand(shape, generator=rng)
    original[special < 0.05] = float("nan")
    original[(special > 0.05) & (special < 0.1)] = -0.0
    edited = torch.randn((2, *shape[1:]), generator=rng).to(dtype)
    poison = torch.rand(edited.shape, generator=rng)
    edited[poison < 0.2] = float("nan")
    edited[(poison > 0.2) & (poison < 0.3)] = float("inf")
    edited[(poison > 0.3) & (poison < 0.4)] = -float("inf")
    before = original.clone(), edited.clone(), mask.clone()

    result = final_paste(edited, original, EditMask.of(mask, rule_of(soft)), feather)

    keep = outside(mask, soft)
    assert result.shape == edited.shape
    assert result.dtype == dtype
    for row in result:
        assert untouched(row[None], original, keep)
    assert all(tiny.same_bits(a, b) for a, b in zip(before, (original, edited, mask), strict=True)), "an input was written to"
    if feather == 0 and not soft:
        inside = (~keep).expand_as(result)
        assert torch.equal(result[inside].nan_to_num(7.0), edited.clamp(0, 1)[inside].nan_to_num(7.0)), "the edit did not arrive"


def test_the_threshold_lies_between_127_and_128() -> None:
    mask = torch.tensor([127 / 255, 128 / 255, 0.5, float(np.nextafter(np.float32(0.5), np.float32(0))), float("nan")]).view(1, 1, 1, 5)
    original, edited = torch.zeros(1, 3, 1, 5), torch.ones(1, 3, 1, 5)
    assert final_paste(edited, original, EditMask.of(mask))[0, 0, 0].tolist() == [0, 1, 1, 0, 0]
    soft = torch.tensor([1e-30, 8 / 255, 9 / 255, 1.0, float("nan")]).view(1, 1, 1, 5)
    result = final_paste(edited, original, EditMask.of(soft, "soft"))[0, 0, 0].tolist()
    assert result[0] == result[1] == result[4] == 0
    assert 0 < result[2] < 0.2
    assert result[3] == 1


def test_inverting_a_mask_moves_no_threshold() -> None:
    """Of 127 and 128 of 255 exactly one is edited, either way round; a NaN never is."""
    mask = torch.tensor([0.0, 127 / 255, 0.5, 128 / 255, 1.0, float("nan")]).view(1, 1, 1, 6)
    for rule in ("binary", "nonzero", "soft"):
        plain, inverted = (EditMask.of(mask, rule, invert).values[0, 0, 0].tolist() for invert in (False, True))
        assert plain[:5] == {"binary": [0, 0, 1, 1, 1], "nonzero": [0, 1, 1, 1, 1], "soft": mask.flatten().tolist()[:5]}[rule]
        assert inverted[:5] == pytest.approx([1 - m for m in plain[:5]])
        assert plain[5] == inverted[5] == 0


@pytest.mark.parametrize("feather", [1, 4, 9])
def test_feather_fades_inward_only(feather: int) -> None:
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., 5:35, 5:35] = 1
    weights = EditMask.of(mask).paste_weights(feather)
    assert (weights[mask == 0] == 0).all()
    assert (weights[mask == 1] > 0).all()
    middle = weights[0, 0, 20, 5:35]
    depth = middle[:feather]
    assert depth.tolist() == pytest.approx([(i + 1) / feather for i in range(feather)]), "the weight rises with the distance from the edge"
    assert (middle[feather:-feather] == 1).all(), "beyond the feather the edit is whole"


def distance_by_hand(inside: Tensor) -> Tensor:
    """The distance of every pixel inside to the nearest one outside, pair by pair; infinity if there is none outside."""
    points = (
        torch.stack(torch.meshgrid(torch.arange(inside.shape[2]), torch.arange(inside.shape[3]), indexing="ij"), -1).reshape(-1, 2).double()
    )
    out = torch.cdist(points, points[~inside.flatten()]).amin(1) if not inside.all() else torch.full((len(points),), torch.inf).double()
    return out.view(inside.shape)


@settings(max_examples=60, deadline=None)
@given(mask=masks(), limit=st.sampled_from([1, 2, 5, 100]))
def test_the_distance_inward_is_exact(mask: Tensor, limit: int) -> None:
    inside = (mask >= 0.5)[..., :40, :40]
    found = distance_inward(inside, limit)
    assert torch.allclose(found.double(), distance_by_hand(inside).clamp(max=limit), atol=1e-5)


def test_a_feather_leaves_what_its_distance_says() -> None:
    """A window average gave a line of 10 pixels 0.18 at a feather of 8, and the middle of a mask of 43×46 pixels 0.03 at 32."""
    line = torch.zeros(1, 1, 60, 80)
    line[..., 25:35, :] = 1
    assert float(EditMask.of(line).paste_weights(8).max()) == pytest.approx(5 / 8)
    rows, columns = torch.meshgrid(torch.arange(100.0), torch.arange(100.0), indexing="ij")
    ellipse = ((((columns - 50) / 21.5) ** 2 + ((rows - 50) / 23) ** 2) <= 1).float()[None, None]
    used = EditMask.of(ellipse)
    assert 0.6 < float(used.paste_weights(32).max()) < 0.75
    (note,) = feather_notes(used, Region(0, 0, 100, 100, 100), 32)
    assert "at most 67% of the edit" in note and note.options == ("feather",)
    assert (
        feather_notes(used, Region(0, 0, 100, 100, 100), 20)
        == []
        == feather_notes(EditMask.of(torch.ones(1, 1, 9, 9)), Region(0, 0, 9, 9, 9), 50)
    )
    assert (EditMask.of(torch.ones(1, 1, 9, 9)).paste_weights(50) == 1).all(), "the edge of the picture is no edge of the mask"


@pytest.mark.parametrize("floor", [1, 3, 8])
@pytest.mark.parametrize("invert", [False, True])
def test_a_soft_mask_with_a_floor_edits_what_it_would_without(floor: int, invert: bool) -> None:
    """Noise of JPEG or the tail of a sigmoid: the same region and the same pixels as on a black ground, with a note."""
    clean = torch.zeros(1, 1, 128, 512)
    clean[..., 40:80, 200:250] = 0.9
    noisy = torch.maximum(clean, torch.full_like(clean, floor / 255))
    used, without = (EditMask.of(1 - mask if invert else mask, "soft", invert) for mask in (noisy, clean))
    assert torch.equal(used.values, without.values)
    assert region_around(used, 64) == region_around(without, 64)
    assert used.outside_pixels == clean.numel() - 40 * 50
    (note,) = used.notes
    assert "96.95% of the mask is nearly black (1 to 8 of 255); they count as outside." in note and without.notes == []
    official = EditMask.of(noisy, "nonzero")
    assert official.outside_pixels == 0 and "counts them as inside" in official.notes[0]
    assert EditMask.of(noisy).notes == [], "a binary mask has no use for grays"


SOURCE_256 = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)[None]


@pytest.mark.parametrize("size", [8, 16, 24])
@pytest.mark.parametrize("soft", [False, True])
def test_all_256_values_survive_the_way_to_the_file(size: int, soft: bool) -> None:
    """uint8 → tensor → cut, edit, put back, paste → uint8, at sizes below, at and above the region's."""
    original = SOURCE_256.float() / 255
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8, :] = 1
    edited = torch.full((1, 3, size, size), float("nan"))
    region = replace(region_around(EditMask.of(mask), size), side=16, left=0, top=0)
    for half in (mask, 1 - mask):  # every value is once outside
        pasted = paste(edited, original, EditMask.of(half, rule_of(soft)), region)
        numbers = torch.from_numpy(to_uint8(pasted)).permute(2, 0, 1)[None]
        keep = (half == 0).expand_as(numbers)
        assert torch.equal(numbers[keep], SOURCE_256[keep])
    assert np.array_equal(to_uint8(original), SOURCE_256[0].permute(1, 2, 0).numpy())


def seam_of_everything(picture: Tensor, inside: Tensor) -> float:
    """The seam energy pixel by pixel, over the whole picture [C, H, W]."""
    total, count = 0.0, 0
    for colours, within in ((picture, inside), (picture.transpose(1, 2), inside.T)):
        height, width = within.shape
        for y in range(height):
            jumps = [float((colours[:, y, x + 1] - colours[:, y, x]).abs().double().mean()) for x in range(width - 1)]
            for x in range(1, width - 2):
                if bool(within[y, x]) != bool(within[y, x + 1]):
                    total += jumps[x] - (jumps[x - 1] + jumps[x + 1]) / 2
                    count += 1
    return max(0.0, total / count) if count else 0.0


@settings(max_examples=20, deadline=None)
@given(mask=masks(), soft=st.booleans(), feather=st.integers(0, 5), context=st.sampled_from([1.0, 1.3, 4.0]), size=st.sampled_from([8, 20]))
def test_what_is_computed_around_the_mask_is_what_the_whole_picture_gives(
    mask: Tensor, soft: bool, feather: int, context: float, size: int
) -> None:
    used = EditMask.of(mask, rule_of(soft))
    if not bool(used.inside.any()):
        return
    generator = torch.Generator().manual_seed(size)
    original = torch.rand(1, 3, *mask.shape[-2:], generator=generator)
    edited = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    region = region_around(used, size, context)
    whole = final_paste(region.put_back((edited + 1) / 2, original), original, used, feather)
    assert torch.equal(paste(edited, original, used, region, feather), whole)
    assert seam_energy(whole[:1], used) == pytest.approx(seam_of_everything(whole[0], ~outside(mask, soft)[0, 0]))


def test_the_background_error_of_a_large_picture_is_summed_in_bands() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 3, 300, 2100, generator=generator) for _ in range(2))
    mask = EditMask.of((torch.rand(1, 1, 300, 2100, generator=generator) > 0.7).float())
    outside = (mask.values == 0).expand_as(a)
    assert background_error(a, b, mask) == pytest.approx(float((a - b)[outside].abs().double().mean()), rel=1e-9)
    assert background_error(a, b, EditMask.of(torch.ones(1, 1, 300, 2100))) is None, "no pixel was compared"
    broken = torch.where(outside, a, torch.nan)
    assert background_error(broken, a, mask) == 0


MODELS = tiny.tiny_models()
PROMPT = MODELS.clip.prompt("a tree") if MODELS.clip else None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    mask=masks(),
    rule=st.sampled_from(["binary", "soft"]),
    invert=st.booleans(),
    feather=st.sampled_from([0, 2]),
    crop=st.sampled_from(["region", "region", "squash"]),
    guided=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16]),
)
@example(torch.full((1, 1, 1, 1), 1.0), "binary", False, 2, "region", True, torch.float32)
@example(torch.full((1, 1, 1, 200), 1.0), "soft", False, 0, "region", True, torch.float32)
@example(torch.tensor([[[[0.0, float("nan"), 1.0, 0.0]] * 3]]), "binary", True, 0, "region", False, torch.float32)
def test_an_edit_never_touches_the_outside(
    mask: Tensor, rule: str, invert: bool, feather: int, crop: str, guided: bool, dtype: torch.dtype
) -> None:
    picture = tiny.random_picture(int(mask.shape[2]), int(mask.shape[3])).to(dtype)
    options = preset(
        "best", steps="2", strength=1.0, candidates=2, batch=2, views=1, mask_rule=rule, invert_mask=invert, feather=feather, crop=crop
    )
    keep = outside(mask, rule == "soft", invert)
    before = picture.clone(), mask.clone()
    if keep.all():
        with pytest.raises(BlendedError, match="mask is empty"):
            edit_picture(picture, mask, None, MODELS, options)
        return
    try:
        result = edit_picture(picture, mask, PROMPT if guided else None, MODELS, options)
    except BlendedError as error:  # a thin mask may vanish when the whole picture is squashed, and only then
        assert crop == "squash" and "nothing of the mask is left" in str(error)
        return
    assert len(result.candidates) == 2
    for candidate in result.candidates:
        pasted = result.picture(candidate)
        assert untouched(pasted, picture.float(), keep)
        assert candidate.score.background_error == (0.0 if keep.any() else None)
        assert candidate.score.background_pixels == int(keep.sum())
        assert pasted.isfinite().all() and float(pasted.min()) >= 0 and float(pasted.max()) <= 1
    assert tiny.same_bits(picture, before[0]) and tiny.same_bits(mask, before[1]), "an input was written to"
    changed = result.picture(result.candidates[0]) != picture.float()
    assert changed.any(), "an edit that changes nothing proves nothing"


def test_any_gray_counts_in_official() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 2:9, 3:11] = 1 / 255
    picture = tiny.random_picture(16, 16)
    result = edit_picture(picture, mask, None, MODELS, preset("official", steps="2", candidates=1))
    pasted = result.picture(result.candidates[0])
    assert untouched(pasted, picture, mask == 0)
    assert (pasted != picture).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("half", [False, True])
def test_a_run_without_a_finite_candidate_is_an_error(value: float, half: bool) -> None:
    broken = DiffusionModel(tiny.Network(lambda x, _: torch.full_like(x, value)), DiffusionConfig(variance="fixed_small"), 16)
    mask = torch.zeros(1, 1, 20, 33)
    mask[..., 3:9, 5:20] = 1
    models = replace(MODELS, ddpm=broken, context=DeviceContext(dtype=torch.float16 if half else torch.float32))
    seen: list[Any] = []
    options = preset("best", steps="3", candidates=2, views=1, feather=2)
    with pytest.raises(BlendedError, match=r"no candidate is finite.*NaN or Inf in 2 of 2") as raised:
        edit_picture(tiny.random_picture(20, 33), mask, PROMPT, models, options, on_candidate=lambda *given: seen.append(given))
    assert not seen, "a candidate that is not finite is not handed out"
    assert raised.value.options == (("dtype",) if half else ("ddpm", "overrides"))
    assert ("use fp32" in str(raised.value)) is half


def test_a_guidance_scale_out_of_all_proportion_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blended_core.options.validate", lambda options: None)  # its limit is far from where these networks overflow
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3:12, 3:12] = 1
    with pytest.raises(BlendedError, match=r"no candidate is finite.*lower the guidance scale, now 1e\+30") as raised:
        edit_picture(tiny.random_picture(16, 16), mask, PROMPT, MODELS, preset("best", steps="6", candidates=2, views=1, scale=1e30))
    assert raised.value.options == ("scale",)


def test_candidates_that_are_not_finite_are_left_out_with_a_note() -> None:
    """The network breaks for one of two candidates; the outside of the other stays."""

    def network(x: Tensor, _: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[1:2] = float("nan")
        return out

    model = DiffusionModel(tiny.Network(network), DiffusionConfig(variance="fixed_small"), 16)
    mask = torch.zeros(1, 1, 20, 33)
    mask[..., 3:9, 5:20] = 1
    picture = tiny.random_picture(20, 33)
    result = edit_picture(picture, mask, None, replace(MODELS, ddpm=model), preset("best", steps="3", candidates=2, batch=2))
    assert [candidate.index for candidate in result.candidates] == [0]
    assert untouched(result.picture(result.candidates[0]), picture, mask == 0)
    (note,) = result.notes
    assert note.startswith("Candidate 1 was left out: NaN or Inf in 1 of 2") and "half" not in note and "fp32" not in note
    several = edit_picture(picture, mask, None, replace(MODELS, ddpm=model), preset("best", steps="3", candidates=4, batch=2))
    assert several.notes[0].startswith("Candidates 1, 3 were left out: NaN or Inf in 2 of 4")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(0, 0), (10, 16)])
def test_one_value_that_is_not_finite_spoils_nothing_else(value: float, where: tuple[int, int]) -> None:
    """Outside the mask it stays as it is; the edit is as finite as that of a picture without it."""
    picture, mask = tiny.random_picture(24, 33), torch.zeros(1, 1, 24, 33)
    mask[..., 6:18, 8:24] = 1
    picture[0, 1, where[0], where[1]] = value
    result = edit_picture(picture, mask, None, MODELS, preset("best", steps="3", candidates=1))
    pasted = result.picture(result.candidates[0])
    assert untouched(pasted, picture, mask == 0)
    assert pasted[(mask == 1).expand_as(pasted)].isfinite().all()
    assert [str(note) for note in result.notes] == [
        "1 values of the picture are NaN or Inf. Outside the mask they stay; the model sees gray, black or white there."
    ]


def test_background_error_sees_one_changed_bit() -> None:
    original = tiny.random_picture(9, 7)
    mask = torch.zeros(1, 1, 9, 7)
    mask[..., :4, :] = 1
    result = original.clone()
    result[..., :4, :] = 0.123
    assert background_error(result, original, EditMask.of(mask)) == 0.0
    result[0, 1, 8, 3] += 1 / 255
    assert background_error(result, original, EditMask.of(mask)) > 0


# --- files ------------------------------------------------------------------------------------------------------------


def run_on_file(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[np.ndarray[Any, Any]]:
    """The candidates that the terminal writes, with the tiny networks."""
    monkeypatch.setattr(edit_command, "load_models", lambda request: MODELS)
    out = folder / "out"
    common = ["--steps", "2", "--candidates", "2", "--views", "1", "--out", str(out)]
    assert main(["edit", *arguments, *common]) == 0
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert [c["background_error"] for c in report["candidates"]] == [0.0, 0.0]
    pictures = []
    for entry in report["candidates"]:
        with Image.open(out / entry["file"]) as image:
            pictures.append(np.array(image))
    return pictures


@pytest.mark.parametrize(("width", "height"), [(16, 16), (61, 23), (1, 40), (130, 200)])
@pytest.mark.parametrize("extra", [[], ["--soft-mask"], ["--invert-mask"], ["--feather", "3"], ["--crop", "squash"]])
@pytest.mark.parametrize("channels", [3, 4])
def test_png_in_png_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int, extra: list[str], channels: int) -> None:
    rng = np.random.default_rng(width)
    pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
    grey = rng.choice(np.array([0, 0, 1, 127, 128, 255], np.uint8), (height, width))
    grey[0, 0], grey[-1, -1] = 255, 0
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    Image.fromarray(grey).save(tmp_path / "mask.png")
    results = run_on_file(
        tmp_path, monkeypatch, str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png"), "--prompt", "tree", *extra
    )
    keep = grey == 0 if "--soft-mask" in extra else grey >= 128 if "--invert-mask" in extra else grey < 128
    for result in results:
        assert result.shape == pixels.shape
        assert np.array_equal(result[keep], pixels[keep])
        if channels == 4:
            assert np.array_equal(result[..., 3], pixels[..., 3]), "alpha is kept"
    assert any((result != pixels).any() for result in results)


@pytest.mark.parametrize("soft", [False, True])
def test_mask_from_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soft: bool) -> None:
    """What is transparent is edited and becomes opaque; the rest keeps colour and alpha, colour under alpha included."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (21, 34, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[4:12, 6:20, 3] = 0
    pixels[15, :, 3] = 200  # transparent, but less than half
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    results = run_on_file(tmp_path, monkeypatch, str(tmp_path / "picture.png"), "--prompt", "", *(["--soft-mask"] if soft else []))
    edited = pixels[..., 3] < 255 if soft else pixels[..., 3] < 128
    for result in results:
        assert np.array_equal(result[~edited], pixels[~edited])
        assert (result[edited][:, 3] == 255).all()
        assert (result[edited][:, :3] != pixels[edited][:, :3]).any()
