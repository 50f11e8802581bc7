"""The LATENT with a known noise level, after what other nodes do to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import pack

latent = pack.load("nodes.latent")
DiffusionConfig = pack.load("blended_core.diffusion").DiffusionConfig
BlendedError = pack.load("blended_core.errors").BlendedError
EditMask = pack.load("blended_core.mask").EditMask
Region = pack.load("blended_core.region").Region
CLEAN = pack.load("blended_core.schedule").CLEAN


def state(index: int = 4, pictures: int = 1, seed: int = 0, **changes: Any) -> Any:
    values = {
        "process": DiffusionConfig(), "respacing": "10", "level": index, "start": 7, "seed": seed, "region": Region(2, 3, 16, 24, 20),
        "soft": False, "sources": torch.zeros(pictures, 3, 8, 8), "masks": None,
    }  # fmt: skip
    return latent.EditState(**{**values, **changes})


def packed(rows: int = 3, pictures: tuple[int, ...] | None = None, base: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    samples = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(changes.get("seed", 0)))
    of = pictures or (0,) * rows
    return latent.pack(samples, state(pictures=max(of) + 1, **changes), of, tuple(range(rows)), base)


def test_a_latent_knows_its_level() -> None:
    noisy = latent.unpack(packed(), "Blend Latents")
    assert (noisy.state.level, noisy.candidates, noisy.images) == (4, (0, 1, 2), (0, 0, 0))
    assert str(noisy.state) == "level 5 of 10, timestep 444 of 1000"
    assert str(state(CLEAN)) == "clean"


def test_rows_taken_out_keep_their_picture_and_number() -> None:
    whole = packed(4, (0, 0, 1, 1))
    taken = {**whole, "samples": whole["samples"][2:3], "batch_index": whole["batch_index"][2:3]}  # as LatentFromBatch does
    noisy = latent.unpack(taken, "x")
    assert (noisy.images, noisy.candidates) == ((1,), (2,))


def test_rows_repeated_get_new_numbers_and_keep_their_picture() -> None:
    whole = packed(2, (0, 1))
    repeated = {**whole, "samples": whole["samples"].repeat(2, 1, 1, 1), "batch_index": [0, 1, 2, 3]}  # as RepeatLatentBatch does
    noisy = latent.unpack(repeated, "x")
    assert (noisy.images, noisy.candidates) == ((0, 1, 0, 1), (0, 1, 2, 3))


def test_rows_with_the_same_samples_keep_their_own_pictures() -> None:
    """Several masks of one image begin with the same noise."""
    images, samples = (0, 0, 1, 1), packed(2)["samples"].repeat(2, 1, 1, 1)
    whole = latent.pack(samples, state(pictures=2), images, (0, 1, 0, 1))
    assert latent.unpack(whole, "x").images == images and latent.unpack(whole, "x").candidates == (0, 1, 0, 1)
    repeated = {**whole, "samples": samples.repeat(2, 1, 1, 1)}
    assert latent.unpack(repeated, "x").images == images * 2
    with pytest.raises(BlendedError, match="1 of 2 rows that begin with the same samples for 2 masks"):
        latent.unpack({**whole, "samples": samples[2:3], "batch_index": [0]}, "x")


def test_joined_latents_of_different_levels_are_refused_and_the_row_is_named() -> None:
    first, second = packed(2), packed(1, index=2, seed=5)
    joined = {**first, "samples": torch.cat([first["samples"], second["samples"]]), "batch_index": [0, 1, 0]}
    with pytest.raises(BlendedError, match=r"row 3 of 3 .*level 5 of 10.*join images after Final Paste"):
        latent.unpack(joined, "Blend Latents")


def test_rows_of_one_edit_joined_again_are_accepted() -> None:
    whole = packed(2)
    joined = {**whole, "samples": whole["samples"].flip(0), "batch_index": [1, 0]}
    assert latent.unpack(joined, "x").candidates == (1, 0)


@pytest.mark.parametrize("change", [lambda x: x * 1.001, lambda x: x + 1e-6, lambda x: x.half()])
def test_samples_that_another_node_changed_are_refused(change: Any) -> None:
    whole = packed(1)
    with pytest.raises(BlendedError, match="another node changed the samples"):
        latent.unpack({**whole, "samples": change(whole["samples"])}, "x")


def test_samples_of_another_size_are_refused_with_both_sizes() -> None:
    whole = packed(1)
    with pytest.raises(BlendedError, match=r"1×3×16×16, but its rows had shape 3×8×8"):
        latent.unpack({**whole, "samples": torch.zeros(1, 3, 16, 16)}, "x")


def test_a_latent_without_the_key_is_refused_and_the_error_says_what_to_do() -> None:
    with pytest.raises(BlendedError, match=r"1×4×8×8.*start with Noise Background"):
        latent.unpack({"samples": torch.zeros(1, 4, 8, 8)}, "CLIP Guidance Step")


def test_two_levels_are_named_when_they_differ() -> None:
    a, b = latent.unpack(packed(1), "x"), latent.unpack(packed(1, index=3), "x")
    with pytest.raises(
        BlendedError, match=r"level 5 of 10, timestep 444 of 1000 and the background at level 4 of 10, timestep 333 of 1000; .*mode match"
    ):
        latent.check_same_level(a, b)
    c = latent.unpack(packed(1, respacing="20"), "x")
    with pytest.raises(BlendedError, match=r"level 5 of 10.*level 5 of 20.*two different noise schedules"):
        latent.check_same_level(a, c)
    d = latent.unpack(packed(1, region=Region(0, 0, 16, 24, 20)), "x")
    with pytest.raises(BlendedError, match="different regions of the image"):
        latent.check_same_level(a, d)
    latent.check_same_level(a, latent.unpack(packed(1), "x"))


def test_a_mask_of_the_picture_is_cut_with_the_region() -> None:
    noisy = latent.unpack(packed(1), "x")
    mask = torch.zeros(1, 1, 20, 24)
    mask[..., 3:11, 2:10] = 1  # the upper left quarter of the region
    cut = noisy.region_mask(mask)
    assert torch.equal(cut.inside[0, 0], torch.arange(8)[:, None].lt(4) & torch.arange(8)[None].lt(4))


def test_a_noise_mask_of_the_samples_size_is_in_their_frame() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :2] = 1
    noisy = latent.unpack(packed(1, base={"noise_mask": mask}), "x")
    assert torch.equal(noisy.region_mask(None).values, mask)
    assert latent.unpack(packed(1), "x").region_mask(None) is None


def test_a_noise_mask_of_the_pictures_size_is_cut_and_of_another_is_stretched() -> None:
    full = torch.zeros(1, 20, 24)
    full[..., 3:11, 2:10] = 1
    noisy = latent.unpack(packed(1, base={"noise_mask": full}), "x")
    assert noisy.region_mask(None).values.sum() == 16
    stretched = latent.unpack(packed(1, base={"noise_mask": torch.ones(1, 5, 5)}), "x")
    assert torch.equal(stretched.region_mask(None).values, torch.ones(1, 1, 8, 8))


def rectangle(left: int, top: int, right: int, bottom: int, size: tuple[int, int] = (20, 24)) -> torch.Tensor:
    mask = torch.zeros(1, 1, *size)
    mask[..., top:bottom, left:right] = 1
    return mask


def started(mask: torch.Tensor, base: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A LATENT that Noise Background gave a mask, with the noise mask of that node or of another."""
    masks = EditMask.of(mask)
    area = changes.get("region", state().region).cut_mask(masks, 8)
    return latent.unpack(packed(2, base={"noise_mask": area.values} if base is None else base, masks=masks, area=area, **changes), "x")


def test_an_edit_has_one_mask_what_lies_inside_all_that_were_given() -> None:
    whole = rectangle(2, 3, 12, 13)
    own = started(whole)
    assert torch.equal(own.full_mask(None).values, whole) and torch.equal(own.region_mask(None).values, own.state.area.values)
    noise_mask = rectangle(7, 5, 20, 19)
    for shape in ((1, 20, 24), (1, 1, 20, 24)):
        both = started(whole, {"noise_mask": noise_mask.reshape(shape)})
        assert torch.equal(both.full_mask(None).values, rectangle(7, 5, 12, 13)), "at full size, not by way of 8 pixels"
        assert torch.equal(both.region_mask(None).values, both.state.region.cut_mask(both.full_mask(None), 8).values)
        given = both.full_mask(rectangle(0, 0, 9, 20))
        assert torch.equal(given.values, rectangle(7, 5, 9, 13))
    alone = latent.unpack(packed(2, base={"noise_mask": noise_mask}), "x")
    assert torch.equal(alone.full_mask(None).values, noise_mask)


def test_masks_that_do_not_overlap_are_an_error_that_names_them() -> None:
    apart = started(rectangle(2, 3, 8, 9), {"noise_mask": rectangle(12, 12, 16, 18)})
    with pytest.raises(
        BlendedError, match=r"the mask of Noise Background \(start\) and the noise mask that the LATENT carries do not overlap"
    ):
        apart.region_mask(None, "Blend Latents")
    with pytest.raises(BlendedError, match=r"Noise Background \(start\) and the mask at Final Paste do not overlap"):
        started(rectangle(2, 3, 8, 9)).full_mask(rectangle(12, 12, 16, 18), "Final Paste")
    with pytest.raises(BlendedError, match="mask at CLIP Guidance Step do not overlap"):
        started(rectangle(2, 3, 8, 9)).seen_mask(rectangle(12, 12, 16, 18), "CLIP Guidance Step")
    with pytest.raises(BlendedError, match=r"mask is empty: its brightest pixel is 0\.3"):
        latent.unpack(packed(1, base={"noise_mask": torch.full((1, 20, 24), 0.3)}), "x").full_mask(None)


def test_clip_may_see_more_than_is_edited() -> None:
    noisy = started(rectangle(4, 5, 12, 13))
    assert int(noisy.seen_mask(rectangle(2, 3, 18, 19), "x").values.sum()) == 64 > int(noisy.region_mask(None).values.sum())


def test_a_noise_mask_of_the_pictures_size_is_in_its_frame_even_where_the_samples_have_that_size() -> None:
    """A picture of 8×8, of which a part of 4×4 is edited at 8×8."""
    whole = rectangle(4, 4, 8, 8, (8, 8))
    noisy = started(whole, {"noise_mask": rectangle(0, 0, 6, 6, (8, 8))}, region=Region(4, 4, 4, 8, 8))
    assert torch.equal(noisy.full_mask(None).values, rectangle(4, 4, 6, 6, (8, 8)))


def test_soft_masks_intersect_at_their_lower_value() -> None:
    light, dark = EditMask.of(torch.full((1, 1, 4, 4), 0.8), "soft"), EditMask.of(torch.full((2, 1, 4, 4), 0.3), "soft")
    assert torch.allclose(light.intersected(dark).values, torch.full((2, 1, 4, 4), 0.3))


def test_a_mask_of_another_aspect_ratio_is_refused() -> None:
    with pytest.raises(BlendedError, match="the mask is 24×24 and the image 24×20, a different aspect ratio"):
        latent.fit_mask(torch.ones(1, 1, 24, 24), (20, 24), False)
    for size in ((10, 12), (5, 6), (40, 48), (3, 4), (21, 25)):
        assert tuple(latent.fit_mask(torch.ones(1, 1, *size), (20, 24), False).values.shape) == (1, 1, 20, 24)


def test_values_of_another_range_are_refused() -> None:
    for values in (torch.full((1, 4, 4), 255.0), torch.full((1, 4, 4), -1.0), torch.full((1, 4, 4), 2.0)):
        with pytest.raises(BlendedError, match=r"the MASK has values from .* give 0\.\.1"):
            latent.as_mask_batch(values)


def test_values_are_matched_to_rows_or_refused() -> None:
    noisy = latent.unpack(packed(4, (0, 0, 1, 1)), "x")
    values = torch.arange(4.0)
    assert noisy.rows_of(values[:1], "v").tolist() == [0]
    assert noisy.rows_of(values[:2], "v").tolist() == [0, 0, 1, 1]
    assert noisy.rows_of(values, "v").tolist() == [0, 1, 2, 3]
    with pytest.raises(BlendedError, match="3 masks were given for a LATENT of 4 rows from 2 images"):
        noisy.rows_of(values[:3], "masks")


def test_inputs_are_not_modified() -> None:
    whole = packed(2, base={"other": 5})
    before = whole["samples"].clone()
    noisy = latent.unpack(whole, "x")
    lower = noisy.at(3, torch.zeros(2, 3, 8, 8))
    assert torch.equal(whole["samples"], before) and whole[latent.KEY].level == 4
    assert lower["other"] == 5 and latent.unpack(lower, "x").state.level == 3


def test_a_mask_that_leaves_nothing_is_refused_with_its_real_peak() -> None:
    assert torch.equal(latent.fit_mask(torch.full((1, 1, 8, 8), 0.4), (16, 16), True).values, torch.full((1, 1, 16, 16), 0.4))
    with pytest.raises(BlendedError, match=r"its brightest pixel is 0\.4 and editing needs 0\.5"):
        latent.fit_mask(torch.full((1, 1, 8, 8), 0.4), (16, 16), False)
    line = torch.zeros(1, 1, 64, 64)
    line[..., 33, :] = 1
    with pytest.raises(BlendedError, match="nothing is left of the MASK of 64×64 when it is stretched to the image's 8×8"):
        latent.fit_mask(line, (8, 8), False)
