"""Guidance where another program predicts x̂0 and takes the steps (blended_core/shift.py), without ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blended_core.diffusion import DiffusionConfig, guided_x0
from blended_core.errors import BlendedError
from blended_core.options import GuidanceOptions
from blended_core.random import SeededRandom
from blended_core.shift import (
    LARGEST_RATIO,
    SAMPLERS,
    Guide,
    LinearRGB,
    Parameterization,
    ShiftedEstimate,
    sampler_noise,
    share_of,
    strength_for,
)

from .tiny import SIZE, Recorded, rough_perceptual, same_bits, tiny_clip

ROOT = Path(__file__).parent.parent
CLIP = tiny_clip()
SPREAD = 0.5
"""Standard deviation of the world's pixels."""
OPTIONS = GuidanceOptions(views=3, range_scale=20.0)


def identity(x0: Tensor) -> Tensor:
    return x0


def guide(text: str = "an apple", scale: float = 500.0, options: GuidanceOptions = OPTIONS, **more: Any) -> Guide:
    return Guide(options, CLIP, CLIP.prompt(text), scale, more.pop("decode", identity), **more)


def linear_percent(percent: float) -> float:
    """σ from 10 to 0."""
    return 10 * (1 - percent)


def shifted(*guides: Guide, parameterization: Parameterization | None = None, seed: int = 1) -> ShiftedEstimate:
    return ShiftedEstimate(guides, parameterization or Parameterization(), SeededRandom(seed), linear_percent)


def picture(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * SPREAD


# --- the weight -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("index", [3, 40, 98])
def test_the_weight_is_that_of_ddim_and_of_ddpm(schedule: str, index: int) -> None:
    levels = DiffusionConfig(schedule=schedule).respaced(100)
    sigma = torch.tensor([levels.sqrt_recipm1_alphas_cumprod[index]], dtype=torch.float32)
    x, x0, g = picture(1, 1) * 2, picture(1, 2), picture(1, 3)
    weight = Parameterization().weight(sigma)
    moved = guided_x0(x.double(), x0.double(), index, levels, g.double() * strength_for(0.0)) - x0
    assert torch.allclose(moved, (strength_for(0.0) * weight * g).double(), rtol=1e-4, atol=1e-9)
    # The mean of the posterior moves by β/√α·g, which tends to the Σ·g of DDPM where steps are small.
    beta = float(levels.betas[index])
    assert float(weight) * float(levels.posterior_mean_coef1[index]) == pytest.approx(beta / (1 - beta) ** 0.5, rel=1e-4)


def test_a_gradient_through_the_network_follows_the_rule_of_the_score() -> None:
    sigma = torch.tensor([0.05, 0.4, 0.9])
    assert torch.allclose(Parameterization(sigma_data=0.5).weight(sigma, True), sigma**2)
    assert torch.allclose(Parameterization(flow=True).weight(sigma, True), sigma**2 / (1 - sigma))


def test_the_start_of_a_flow_is_limited() -> None:
    flow = Parameterization(flow=True)
    at_start = flow.weight(torch.tensor([1.0]))
    assert float(at_start) == pytest.approx(LARGEST_RATIO**2 / (1 + LARGEST_RATIO**2) ** 0.5)
    assert bool(flow.weight(torch.tensor([1.0]), True).isfinite())
    rising = flow.weight(torch.linspace(0, 1, 50))
    assert bool((rising.diff() >= 0).all())


def world(parameterization: Parameterization, unit: float) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float], float]]:
    """The exact denoiser of normal pixels times ``unit``, and noise-to-signal ratio → σ."""
    spread = SPREAD * unit

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.view(-1, 1, 1, 1)
        signal = 1 - sigma if parameterization.flow else torch.ones_like(sigma)
        return x * signal * spread**2 / (signal**2 * spread**2 + sigma**2)

    return denoise, lambda ratio: ratio / (1 + ratio) if parameterization.flow else ratio * parameterization.sigma_data


def euler(parameterization: Parameterization, unit: float, through: bool) -> Tensor:
    """A guided run of Euler's method along one path of noise-to-signal ratios, in the units of the picture."""
    denoise, sigma_of = world(parameterization, unit)
    options = replace(OPTIONS, gradient="unet" if through else "x0")
    one = guide(options=options, decode=lambda z: z / unit, strength=strength_for(0.0))
    run = shifted(one, parameterization=parameterization)
    ratios = [8.0, 5.0, 3.0, 1.5, 0.7, 0.2, 0.0]
    noise, first = picture(2, 5) / SPREAD, sigma_of(ratios[0])
    x = noise * first * (1.0 if parameterization.flow else unit / parameterization.sigma_data)
    for here, there in pairwise(ratios):
        sigma = torch.full((2,), sigma_of(here))
        leaf = x.clone().requires_grad_()
        with torch.set_grad_enabled(through):
            x0 = denoise(leaf, sigma)
        shift = run(x0, sigma, leaf if through else None)
        assert shift is not None
        guided = x0.detach() + shift
        x = guided + (x - guided) * (sigma_of(there) / sigma_of(here))
    return x / unit


@pytest.mark.parametrize("through", [False, True], ids=["x0", "model"])
@pytest.mark.parametrize(
    ("parameterization", "unit"),
    [(Parameterization(flow=True), 1.0), (Parameterization(sigma_data=0.5), 0.5), (Parameterization(sigma_data=3.0), 3.0)],
    ids=["flow", "EDM 0.5", "EDM 3"],
)
def test_one_scale_gives_one_picture_whatever_the_units_of_the_model(
    parameterization: Parameterization, unit: float, through: bool
) -> None:
    own, other = euler(Parameterization(), 1.0, through), euler(parameterization, unit, through)
    unguided = world(Parameterization(), 1.0)[0]
    assert float((own - unguided(own, torch.tensor([0.0]))).abs().max()) == 0  # the world itself is exact at σ = 0
    assert float(own.abs().max()) > 0.1
    assert torch.allclose(own, other, atol=2e-5)


# --- samplers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "options", "eta"),
    [
        ("sample_euler", {}, 0.0),
        ("sample_euler_ancestral", {}, 1.0),
        ("sample_euler_ancestral", {"eta": 0.0}, 0.0),
        ("sample_dpmpp_2m_sde_gpu", {"eta": 0.5}, 0.5),
        ("sample_dpmpp_sde", {"eta": 7.0}, 1.0),
        ("dpm_adaptive_function", {"eta": 1.0}, 1.0),
        ("dpm_fast_function", {"eta": 1.0}, 0.0),
        ("sample_unipc_bh2", {}, 0.0),
        ("sample_er_sde", {"s_noise": 0.0}, 0.0),
        ("sample_ddpm", {}, 1.0),
    ],
)
def test_the_noise_of_a_sampler(function: str, options: dict[str, Any], eta: float) -> None:
    noise = sampler_noise(function)
    assert noise is not None and noise.of(options) == eta


def test_an_unknown_sampler_has_no_entry() -> None:
    assert sampler_noise("sample_somebodys_own") is None
    assert {noise.kind for noise in SAMPLERS.values()} == {"ode", "sde"}
    assert [strength_for(eta) for eta in (0.0, 1.0)] == [2.0, 1.0]


@pytest.mark.parametrize("page", sorted((ROOT / "web" / "docs" / "BlendedCLIPGuidanceModel").glob("*.md")), ids=lambda p: p.stem)
def test_the_help_page_lists_every_sampler_with_its_kind(page: Path) -> None:
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if "`euler`" in line or "`ddpm`" in line]
    listed = {
        kind: set(re.findall("`([a-z0-9_]+)`", next(line for line in lines if f"`{kind}`" in line))) - {kind} for kind in ("ode", "sde")
    }
    assert listed == {kind: {name for name, noise in SAMPLERS.items() if noise.kind == kind} for kind in listed}


# --- runs -------------------------------------------------------------------------------------------------------------


def test_two_guides_add_and_their_order_does_not_matter() -> None:
    a, b, sigma = guide("an apple"), guide("a zebra", 900.0), torch.full((2,), 2.0)
    alone = [shifted(one)(picture(), sigma) for one in (a, b)]
    both = [shifted(*pair)(picture(), sigma) for pair in ((a, b), (b, a))]
    assert alone[0] is not None and alone[1] is not None and both[0] is not None and both[1] is not None
    assert same_bits(both[0], both[1]) and same_bits(both[0], alone[0] + alone[1])
    assert float(alone[0].abs().max()) > 0 and not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("pair", [("unet", "unet"), ("x0", "unet"), ("unet", "x0")])
def test_two_guides_through_one_network_share_its_graph(pair: tuple[str, str]) -> None:
    sigma, unit = torch.full((2,), 2.0), 0.3
    guides = [guide(text, options=replace(OPTIONS, gradient=kind)) for text, kind in zip(("an apple", "a zebra"), pair, strict=True)]

    def run(*chosen: Guide) -> Tensor:
        leaf = picture().requires_grad_()
        shift = shifted(*chosen)((leaf * unit).tanh(), sigma, leaf)
        assert shift is not None
        return shift

    assert torch.allclose(run(*guides), run(guides[0]) + run(guides[1]), rtol=1e-5, atol=1e-7)


def test_the_views_are_named_by_seed_and_call() -> None:
    random = Recorded(4)
    run = ShiftedEstimate([guide()], Parameterization(), random, linear_percent)
    sigma = torch.full((2,), 1.0)
    first, second = run(picture(), sigma), run(picture(), sigma)
    assert random.asked == [("views", 0, (0, 1)), ("views", 1, (0, 1))]
    assert first is not None and second is not None and not torch.equal(first, second)
    again = ShiftedEstimate([guide()], Parameterization(), SeededRandom(4), linear_percent)(picture(), sigma)
    assert again is not None and same_bits(first, again)


def test_a_row_does_not_depend_on_the_batch() -> None:
    whole, half = (shifted(guide())(picture()[:count], torch.full((count,), 2.0)) for count in (2, 1))
    assert whole is not None and half is not None and torch.allclose(whole[:1], half, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("start", "end", "active"), [(0.0, 1.0, [1, 1, 1]), (0.3, 1.0, [0, 1, 1]), (0.0, 0.7, [1, 1, 0])])
def test_guidance_acts_from_its_start_to_its_end(start: float, end: float, active: list[int]) -> None:
    run = shifted(guide(options=replace(OPTIONS, start=start, end=end)))
    sigmas = [linear_percent(share) for share in (0.1, 0.5, 0.9)]
    assert [int(run(picture(), torch.full((2,), sigma)) is not None) for sigma in sigmas] == active
    assert run(picture(), torch.zeros(2)) is None


def test_early_views_act_in_the_noisier_half() -> None:
    counts: list[int] = []

    class Counting(SeededRandom):
        def views(self, level: int, images: Any, count: int, size: int, symmetric: bool) -> Any:
            counts.append(count + 1)
            return super().views(level, images, count, size, symmetric)

    options = replace(OPTIONS, views=4, early_views=2)
    run = ShiftedEstimate([guide(options=options)], Parameterization(), Counting(0), linear_percent)
    for share in (0.2, 0.8):
        run(picture(), torch.full((2,), linear_percent(share)))
    assert counts == [2, 4]


def test_the_share_of_the_levels_is_found_from_sigma() -> None:
    for share in (0.05, 0.37, 0.8):
        assert share_of(linear_percent(share), linear_percent) == pytest.approx(share, abs=1e-6)
    assert share_of(99.0, linear_percent) == 0.0


def test_a_latent_of_one_frame_is_an_image() -> None:
    flat, sigma = picture(), torch.full((2,), 2.0)
    frame = shifted(guide())(flat.unsqueeze(2), sigma)
    image = shifted(guide())(flat, sigma)
    assert frame is not None and image is not None and same_bits(frame, image.unsqueeze(2))
    leaf = flat.unsqueeze(2).clone().requires_grad_()
    through = shifted(guide(options=replace(OPTIONS, gradient="unet")))(leaf * 1.0, sigma, leaf)
    assert through is not None and through.shape == leaf.shape


def test_the_scale_refers_to_the_size_of_the_picture_not_of_the_latent() -> None:
    sigma = torch.full((2,), 3.0)
    own, latent = (shifted(guide(cell=cell))(picture(), sigma) for cell in (1, 4))
    assert own is not None and latent is not None and own.abs().max() > 0
    torch.testing.assert_close(latent, 16 * own)


def test_the_mask_is_asked_for_at_the_size_of_the_decoded_picture() -> None:
    asked: list[tuple[int, int]] = []

    def mask(size: tuple[int, int]) -> Tensor:
        asked.append(size)
        values = torch.zeros(1, 1, *size)
        values[..., : size[1] // 2] = 1
        return values

    doubled = torch.nn.Upsample(scale_factor=2)
    run = shifted(guide(decode=doubled, mask=mask, options=replace(OPTIONS, range_scale=0.0)))
    for _ in range(2):
        shift = run(picture(), torch.full((2,), 2.0))
    assert asked == [(2 * SIZE, 2 * SIZE)]
    assert shift is not None and float(shift[..., SIZE // 2 :].abs().max()) == 0 < float(shift.abs().max())


def test_the_background_loss_takes_the_source_of_the_guide() -> None:
    source = picture(1, 7)
    options = replace(OPTIONS, background_scale=100.0)
    half = torch.zeros(1, 1, SIZE, SIZE)
    half[..., : SIZE // 2] = 1
    with_loss = guide(options=options, perceptual=rough_perceptual, mask=lambda _: half, source=lambda: source)
    shift = shifted(with_loss)(picture(), torch.full((2,), 2.0))
    assert shift is not None and float(shift[..., SIZE // 2 :].abs().max()) > 0


def test_a_mixed_input_needs_a_schedule() -> None:
    with pytest.raises(BlendedError, match="clip_input 'mixed' needs the noise schedule"):
        shifted(guide(options=replace(OPTIONS, clip_input="mixed")))(picture(), torch.full((2,), 2.0))


def test_gradients_that_are_not_finite_are_left_out_and_counted() -> None:
    def broken(x0: Tensor) -> Tensor:
        return torch.cat([x0[:1], x0[1:] * float("nan")])

    run = shifted(guide(decode=broken))
    shift = run(picture(), torch.full((2,), 2.0))
    assert shift is not None and bool(shift.isfinite().all())
    assert float(shift[1].abs().max()) == 0 < float(shift[0].abs().max()) and int(run.broken) == 1


def test_memory_that_runs_out_halves_the_images_at_once() -> None:
    sizes: list[int] = []

    def hungry(x0: Tensor) -> Tensor:
        sizes.append(len(x0))
        if len(x0) > 1:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return x0

    run, sigma = shifted(guide(decode=hungry)), torch.full((2,), 2.0)
    with pytest.warns(UserWarning, match="memory ran out"):
        found = run(picture(), sigma)
    whole = shifted(guide())(picture(), sigma)
    assert found is not None and whole is not None and torch.allclose(found, whole, rtol=1e-4, atol=1e-6)
    sizes.clear()
    run(picture(), sigma)
    assert sizes == [1, 1]  # it is not tried again, and the size of the picture is known


# --- pictures of latents ----------------------------------------------------------------------------------------------


def test_linear_rgb_is_the_matrix_of_the_previews_and_differentiable() -> None:
    factors, bias = torch.randn(4, 3), torch.randn(3)
    latents = torch.randn(2, 4, 5, 6, requires_grad=True)
    out = LinearRGB(factors, bias)(latents)
    assert torch.allclose(out, torch.einsum("bchw,cr->brhw", latents, factors) + bias.view(1, 3, 1, 1), atol=1e-6)
    out.sum().backward()
    assert latents.grad is not None and torch.allclose(latents.grad, factors.sum(1).view(1, 4, 1, 1).expand(2, 4, 5, 6), atol=1e-6)


def test_linear_rgb_of_pixels_is_the_picture_itself() -> None:
    assert same_bits(LinearRGB(torch.eye(3))(picture()), picture())


def test_latents_may_be_rearranged_before_they_are_a_picture() -> None:
    out = LinearRGB(torch.eye(3), None, torch.nn.PixelShuffle(2))(torch.randn(2, 12, 4, 5))
    assert out.shape == (2, 3, 8, 10)
