"""The LATENT with a known noise level, after what other nodes do to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import pack

latent = pack.load("nodes.latent")
DiffusionConfig = pack.load("blended_core.diffusion").DiffusionConfig
BlendedError = pack.load("blended_core.errors").BlendedError
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
