"""Algorithm 2's background for samplers of other programs, and Blended Noise in a real ComfyUI."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from blended_core.background import AUTO, DILATIONS, Background, dilation_at, dilations_for
from blended_core.errors import BlendedError
from blended_core.mask import EditMask, dilated
from blended_core.random import SeededRandom

from .server import needs_comfyui, observed

SIGMAS = (10.0, 5.0, 2.0, 1.0, 0.0)
SHAPE = (2, 3, 8, 8)


def box(value: float = 1.0) -> torch.Tensor:
    """A mask whose middle has a value."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = value
    return mask


def background(mask: torch.Tensor | None = None, dilations: int = 0, seed: int = 1) -> Background:
    return Background.of(box() if mask is None else mask, SIGMAS, SeededRandom(seed), dilations)


def test_the_phases_are_those_of_the_paper() -> None:
    """Fifty steps and three dilations: 13 blends each with 7, 5 and 3, and 11 with the mask itself."""
    grown = [dilation_at(blend, 50, 3) for blend in range(50)]
    assert [grown.count(by) for by in (3, 2, 1, 0)] == [13, 13, 13, 11] and grown == sorted(grown, reverse=True)
    assert [dilation_at(blend, 50, 0) for blend in range(51)] == [0] * 51
    for steps in range(1, 12):
        for dilations in range(5):
            stages = [dilation_at(blend, steps, dilations) for blend in range(steps + 1)]
            assert stages == sorted(stages, reverse=True) and stages[0] == dilations and stages[-1] == 0


def test_a_mask_grows_by_squares_and_keeps_its_gray_values() -> None:
    point = torch.zeros(2, 1, 3, 9, 9)
    point[1, 0, 2, 4, 4] = 0.5
    grown = dilated(point, 3)
    assert grown.shape == point.shape and float(grown.sum()) == 0.5 * 49 and float(grown[1, 0, 2, 1, 7]) == 0.5
    assert dilated(point, 0) is point


@pytest.mark.parametrize(("width", "dilations"), [(1, DILATIONS), (4, DILATIONS), (5, 0), (12, 0)])
def test_thin_masks_are_grown_by_themselves(width: int, dilations: int) -> None:
    mask = torch.zeros(1, 2, 3, 20, 20)
    mask[..., 2:18, 4 : 4 + width] = 1
    assert dilations_for(EditMask.of(mask)) == dilations
    assert background(mask, AUTO).dilations == dilations and background(mask, 0).dilations == 0
    flat = Background.of(torch.ones(1, 1, 5), SIGMAS, SeededRandom(1), 3)
    assert flat.dilations == 0, "samples without a height are not grown"


def test_a_call_is_placed_among_the_levels() -> None:
    here = background()
    assert [here.place(sigma) for sigma in SIGMAS] == [(j, 0.0) for j in range(5)]
    assert here.place(5.0 * (1 + 5e-6)) == (1, 0.0) == here.place(5.0 * (1 - 5e-6))
    assert here.place(20.0) == (0, 0.0)
    assert here.place(8.0) == (0, pytest.approx(0.4)) and here.place(0.25) == (3, pytest.approx(0.75))


def test_noise_depends_on_the_seed_the_row_and_the_level_alone() -> None:
    one, two = background(), background(seed=2)
    assert one.noise(10.0, SHAPE) is None, "the samples have that noise already"
    first, second, between = (one.noise(sigma, SHAPE) for sigma in (5.0, 2.0, 3.0))
    assert first is not None and second is not None and between is not None
    assert torch.equal(first, one.noise(5.0, SHAPE)) and torch.equal(first[:1], one.noise(5.0, (1, *SHAPE[1:])))
    assert torch.equal(first, SeededRandom(1).noise("background", 2, range(2), SHAPE[1:])), "that of the pack's own loop"
    others = [second, between, one.noise(2.9, SHAPE), two.noise(5.0, SHAPE), first.flip(0)]
    assert not any(torch.equal(first, other) for other in others) and not torch.equal(between, others[2])


def test_gray_values_are_released_by_level_and_the_last_blend_frees_all() -> None:
    """Blend j of T = 4 frees what is above (T − j)/T."""
    here = background(box(0.6))
    freed = [bool(here.weights_before(sigma).any()) for sigma in SIGMAS]
    assert freed == [False, False, True, True, True]
    assert torch.equal(here.weights_after(1.0), (box() > 0).float())
    for sigma, after in itertools.pairwise(SIGMAS):
        assert torch.equal(here.weights_after(sigma), here.weights_before(after))
    # Between two levels both are those of the lower one.
    assert torch.equal(here.weights_before(3.0), here.weights_before(2.0)) and torch.equal(
        here.weights_after(3.0), here.weights_before(2.0)
    )


def test_a_mask_shrinks_to_itself() -> None:
    here = background(dilations=2)
    sides = [int(here.weights_before(sigma)[0, 0, 3].sum()) for sigma in SIGMAS]
    assert sides == [0, 8, 6, 6, 4], "the first blend has no gray value above its threshold: all is noise"
    assert torch.equal(here.weights_after(1.0), box())


def test_the_source_comes_back_to_the_last_bit() -> None:
    here, source = background(box(0.4)), torch.randn(SHAPE)
    result = here.restored(source + 1, source)
    assert torch.equal(result[..., :2, :], source[..., :2, :]) and torch.equal(result[..., 2:6, 2:6], source[..., 2:6, 2:6] + 1)
    noisy = Background.of(box(), SIGMAS[:-1], SeededRandom(1), 0)
    assert noisy.restored(source, source) is source, "a run that ends at a noisy level is left as it is"


def test_an_empty_mask_is_refused_with_its_size() -> None:
    with pytest.raises(BlendedError, match=r"empty at the size of the samples, 8×8 \(peak 0.02\).*Grow the mask"):
        background(box(0.02))


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What tests/core_noise.py saw in ComfyUI's own process."""
    return observed("core_noise.py")


@needs_comfyui
@pytest.mark.slow
def test_core_s_samplers_blend_as_algorithm_2(told: dict[str, Any]) -> None:
    assert len(told["equalities"]) == 3 * 2 * 3 * 2
    for case, (patched, plain, edited) in told["equalities"].items():
        assert patched < 5e-5, case
        assert plain > 0.03 and edited > 0.5, f"{case}: core's one noise is another blend"


@needs_comfyui
@pytest.mark.slow
def test_runs_repeat_and_leave_nothing_on_the_model(told: dict[str, Any]) -> None:
    found = told["batches"]
    assert found["patched"] > 0.1 and found["another seed"] > 0.1
    for name in ("again", "plain again", "first row alone", "two rows", "one mask for all", "twice", "inference mode"):
        assert found[name] < 1e-5, name
    assert found["again"] == found["plain again"] == 0 and found["outside"] == [0, 0, 0]
    assert found["on the model"] == found["options"] == []


@needs_comfyui
@pytest.mark.slow
def test_every_sampler_runs_and_gives_the_source_back_outside(told: dict[str, Any]) -> None:
    assert len(told["all_samplers"]) >= 40
    for name, found in told["all_samplers"].items():
        assert isinstance(found, list), (name, found)
        outside, inside, finite = found
        assert outside == 0 and 0.1 < inside < 3 and finite, (name, found)


@needs_comfyui
@pytest.mark.slow
def test_wrong_use_runs_as_without_the_patch_and_is_told(told: dict[str, Any]) -> None:
    found = told["wrong_use"]
    for name, words in (
        ("no mask", "Set Latent Noise Mask"),
        ("no noise", "first sampler alone"),
        ("own loop", "OwnLoop has its own sampling loop"),
    ):
        difference, lines = found[name]
        assert difference == 0, name
        assert len(lines) == 1 and lines[0].startswith("Blended Diffusion: Blended Noise (MODEL) has no effect: ") and words in lines[0]
    (line,) = found["own network"]
    assert "network CFGGuider has no noise and no latent_image; choose a sampler of KSampler." in line
    assert "empty at the size of the samples, 16×16" in found["empty"] and found["empty"] == found["lost"]
    assert found["interrupted"] == "InterruptProcessingException"
    assert found["sampler after it"] == "sample_euler", "the sampler itself is as it was"


@needs_comfyui
@pytest.mark.slow
def test_differential_diffusion_sets_the_mask_and_the_patch_the_noise(told: dict[str, Any]) -> None:
    found = told["differential"]
    assert found["order"] == 0 and found["noise"] > 0.01
    ramp = found["ramp"]
    assert ramp[0] == 0 and sum(ramp[:4]) < sum(ramp[4:8]) < sum(ramp[8:12]) + 0.2
    assert len(found["said"]) == 2 and all("shrink is 2" in line and "Differential Diffusion" in line for line in found["said"])


@needs_comfyui
@pytest.mark.slow
def test_any_kind_of_model_gets_fresh_noise_of_its_own_formula(told: dict[str, Any]) -> None:
    """ε, v, EDM and flow models with images and videos: outside the mask, the noise is standard normal and new at every level."""
    assert sorted(told["kinds"]) == ["EDM 4", "EPS 5", "FLOW 4", "FLUX 5", "V_PREDICTION 4"]
    for kind, found in told["kinds"].items():
        assert found["plain calls"] == found["patched calls"] == 6, kind
        assert found["patched outside"] == 0, kind
        assert all(abs(deviation - 1) < 0.05 for deviation in found["patched deviation"]), kind
        assert min(found["plain correlation"]) > 0.999 and max(map(abs, found["patched correlation"])) < 0.12, kind
