"""The method: guidance, blending, algorithms, samplers, presets, and the network under them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blended_core.adm.unet import AttentionBlock, ResBlock
from blended_core.cli.parser import build_parser
from blended_core.cli.request import options_of_arguments
from blended_core.clip.model import ClipModel, Prompt
from blended_core.denoiser import NO_CLASS, DiffusionModel
from blended_core.diagnose import diagnose, options_without_effect
from blended_core.diffusion import DiffusionConfig, ddim_step, ddpm_step, posterior_mean, predict_x0, q_sample
from blended_core.edit import edit_picture, prepare
from blended_core.errors import BlendedError, Note
from blended_core.guidance import Guidance, GuidedPrediction
from blended_core.losses import StepInput, background_loss, cosine_distance, range_loss, spherical_distance
from blended_core.mask import EditMask, blend
from blended_core.options import PRESETS, EditOptions, GuidanceOptions, preset
from blended_core.random import SeededRandom
from blended_core.rank import Score, clip_distance, clip_distance_of_views, ranking, seam_energy
from blended_core.reference import batch_background_loss, reference_index, unclamped_distance
from blended_core.region import Region
from blended_core.result import Candidate, EditResult
from blended_core.sample import DISTANCES, Models, Step, class_labels, edit_steps, guidance_from, guided_step, noise_background, with_scale
from blended_core.schedule import CLEAN

from . import tiny

SIZE = tiny.SIZE
CLIP = tiny.tiny_clip()
PROMPT = CLIP.prompt("a tree")
MASK = torch.zeros(1, 1, SIZE, SIZE)
MASK[..., 3:13, 4:12] = 1
EDIT_MASK = EditMask.of(MASK)
SOURCE = tiny.random_picture(SIZE, SIZE, seed=8) * 2 - 1
INDEX = 30


class Counted(nn.Module):
    """A network that counts its forwards and backwards."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.forwards, self.backwards = network, 0, 0

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        self.forwards += 1
        out: Tensor = self.network(x, timesteps, labels)
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, _: Tensor) -> None:
        self.backwards += 1


def counted(model: DiffusionModel) -> tuple[DiffusionModel, Counted]:
    network = Counted(model.network)
    return DiffusionModel(network, model.config, model.image_size, model.num_classes, model.multiple_of, model.label_dim), network


def noisy(batch: int, seed: int = 0) -> Tensor:
    schedule = tiny.tiny_model().config.respaced(100)
    return q_sample(SOURCE, INDEX, SeededRandom(seed).noise("start", INDEX, range(batch), (3, SIZE, SIZE)), schedule)


def guided(
    model: DiffusionModel,
    x: Tensor,
    options: GuidanceOptions,
    clip: ClipModel | None = CLIP,
    prompt: Prompt | None = PROMPT,
    source: Tensor | None = SOURCE,
    perceptual: Any = tiny.rough_perceptual,
) -> Any:
    """A guided prediction at INDEX of 100."""
    guidance = guidance_from(options, Models(model, clip, perceptual), prompt)
    return guidance(model, StepInput(x, INDEX, model.config.respaced(100), range(len(x)), SeededRandom(0), MASK, source))


# --- one guided prediction --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["unet", "x0"])
@pytest.mark.parametrize("clip_input", ["x0", "mixed"])
@pytest.mark.parametrize("background_loss", ["paper", "reference"])
def test_one_forward_and_the_backward_that_was_asked_for(
    model: DiffusionModel, gradient: str, clip_input: str, background_loss: str
) -> None:
    watched, network = counted(model)
    options = GuidanceOptions(
        gradient=gradient, clip_input=clip_input, background_loss=background_loss, background_scale=10.0, views=3, view_chunk=1
    )
    result = guided(watched, noisy(2), options)
    assert network.forwards == 1
    assert network.backwards == (1 if gradient == "unet" else 0)
    assert result.gradient is not None and result.gradient.abs().sum() > 0
    assert not any(t.requires_grad for t in (result.gradient, result.prediction.x0, result.prediction.mean, *result.values.values()))
    assert set(result.values) == {"clip", "range", "background"}
    assert all(p.grad is None for p in network.parameters())


def test_a_whole_edit_runs_the_network_once_a_step(model: DiffusionModel) -> None:
    watched, network = counted(model)
    options = preset("best", steps="6", strength=0.5, views=2, candidates=4, batch=2)
    edit_picture((SOURCE + 1) / 2, MASK, None, replace(tiny.tiny_models(), ddpm=watched), options)
    assert network.forwards == 3 * 2
    assert network.backwards == 0, "a removal needs no gradient"
    for gradient, backwards in (("unet", 3), ("x0", 0)):
        network.forwards = network.backwards = 0
        changed = replace(options, guidance=replace(options.guidance, gradient=gradient))
        steps = list(edit_steps(tiny.tiny_models(watched), SOURCE, EDIT_MASK, PROMPT, changed, SeededRandom(0), [0, 1]))
        assert network.forwards == len(steps) == 3 and network.backwards == backwards


@pytest.mark.parametrize("gradient", ["unet", "x0"])
def test_the_gradient_is_that_of_the_losses(model: DiffusionModel, gradient: str) -> None:
    """Against the plain composition of the paper's formulas in one graph."""
    options = GuidanceOptions(gradient=gradient, background_scale=70.0, views=1, reference_size=0)
    x, schedule = noisy(2), model.config.respaced(100)
    result = guided(model, x, options)
    x = x.clone().requires_grad_()
    x0 = model.predict(x, INDEX, schedule).x0
    variable = x
    if gradient == "x0":
        variable = x0 = x0.detach().requires_grad_()
    pooled = torch.nn.functional.avg_pool2d(x0 * MASK, SIZE // tiny.CLIP_SIZE)
    image, text = CLIP.encode_image(pooled), PROMPT.embeddings[0]
    cosine = torch.nn.functional.cosine_similarity(image, text[None])
    loss = 1000 * 0.5 * cosine.arccos().square()  # the great circle, squared: 2·arcsin²(‖a−b‖/2) = ½·angle²
    loss = loss + 50 * ((x0.abs() - 1).clamp(min=0) ** 2).mean((1, 2, 3))
    a, b = x0 * (1 - MASK), SOURCE * (1 - MASK)
    loss = loss + 70 * 0.5 * ((a - b).square().mean((1, 2, 3)) + tiny.rough_perceptual(a, b.expand_as(a)))
    expected = -torch.autograd.grad(loss.sum(), variable)[0]
    assert torch.allclose(result.gradient, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))
    assert torch.allclose(result.values["clip"], 0.5 * cosine.arccos().square(), atol=1e-4)
    assert torch.allclose(result.values["range"], ((x0.abs() - 1).clamp(min=0) ** 2).mean((1, 2, 3)), atol=1e-5)
    expected_background = 0.5 * ((a - b).square().mean((1, 2, 3)) + tiny.rough_perceptual(a, b.expand_as(a)))
    assert torch.allclose(result.values["background"], expected_background, rtol=1e-4)


@pytest.mark.parametrize("size", [SIZE, 4 * SIZE])
def test_the_weights_of_the_losses_are_meant_for_one_size_of_picture(model: DiffusionModel, size: int) -> None:
    """A mean over a quarter of the side has sixteen times the gradient at each pixel; brought to the reference it has not."""
    plain = guided(model, noisy(2), GuidanceOptions(views=1, reference_size=0)).gradient
    brought = guided(model, noisy(2), GuidanceOptions(views=1, reference_size=size)).gradient
    assert torch.allclose(brought, plain * (SIZE / size) ** 2)
    assert PRESETS["official"].guidance.reference_size == 0
    with pytest.raises(BlendedError, match="reference_size is -1"):
        GuidanceOptions(reference_size=-1)


@pytest.mark.parametrize("gradient", ["unet", "x0"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 99])
def test_chunks_of_views_change_nothing(model: DiffusionModel, gradient: str, chunk: int) -> None:
    whole = guided(model, noisy(2), GuidanceOptions(views=5, gradient=gradient))
    parts = guided(model, noisy(2), GuidanceOptions(views=5, gradient=gradient, view_chunk=chunk))
    assert torch.allclose(whole.gradient, parts.gradient, rtol=1e-3, atol=1e-5 * float(whole.gradient.abs().max()))
    assert torch.allclose(whole.values["clip"], parts.values["clip"], atol=1e-6)


def test_views_change_the_gradient(model: DiffusionModel) -> None:
    one, five = (guided(model, noisy(1), GuidanceOptions(views=n, range_scale=0)).gradient for n in (1, 5))
    assert float((one - five).norm() / one.norm()) > 0.05


def alone_and_together(model: DiffusionModel, options: GuidanceOptions) -> float:
    """How much the gradient of image 0 changes when image 1 is beside it, relative to itself."""
    x = noisy(2)
    together, alone = guided(model, x, options).gradient[0], guided(model, x[:1], options).gradient[0]
    return float((together - alone).norm() / alone.norm())


@pytest.mark.parametrize("gradient", ["unet", "x0"])
def test_a_gradient_does_not_depend_on_its_neighbors(model: DiffusionModel, gradient: str) -> None:
    options = GuidanceOptions(gradient=gradient, views=3, background_scale=1000.0)
    assert alone_and_together(model, options) < 1e-4
    assert alone_and_together(model, replace(options, scale=0.0, background_loss="reference")) > 0.1, "docs/method.md, row 6: there it does"


@pytest.mark.parametrize("prompt", [None, CLIP.prompt(""), CLIP.prompt("  ", "")])
def test_removal_is_unguided(model: DiffusionModel, prompt: Prompt | None) -> None:
    watched, network = counted(model)
    result = guided(watched, noisy(2), GuidanceOptions(background_scale=10.0), prompt=prompt, clip=None)
    assert result.gradient is None and result.values == {}
    assert (network.forwards, network.backwards) == (1, 0)


def test_what_is_missing_is_named(model: DiffusionModel) -> None:
    options = GuidanceOptions(views=1, background_scale=1.0)
    with pytest.raises(BlendedError, match="without a CLIP model"):
        guided(model, noisy(1), options, clip=None)
    with pytest.raises(BlendedError, match="LPIPS"):
        guided(model, noisy(1), options, perceptual=None)
    with pytest.raises(BlendedError, match="source"):
        guided(model, noisy(1), options, source=None)


class Cracked(nn.Module):
    """A CLIP that breaks where a picture is bright."""

    def __init__(self, network: nn.Module, limit: float) -> None:
        super().__init__()
        self.network, self.limit = network, limit

    def encode_image(self, pictures: Tensor) -> Tensor:
        out: Tensor = self.network.encode_image(pictures)  # type: ignore[operator]
        bright = pictures.mean((1, 2, 3), keepdim=True).flatten(1) > self.limit
        return out * torch.where(bright, float("nan"), 1.0)


@pytest.mark.parametrize("gradient", ["unet", "x0"])
def test_a_gradient_that_is_not_finite_is_left_out_for_its_image_alone(gradient: str) -> None:
    model = tiny.gaussian_model()
    x = torch.cat([noisy(1) - 0.3, noisy(1) + 8.0, noisy(1)])
    cracked = tiny.tiny_clip()
    cracked.model = Cracked(cracked.model, 0.8)
    options = GuidanceOptions(gradient=gradient, views=1)
    result, whole = guided(model, x, options, cracked), guided(model, x, options)
    assert result.broken == 1 and whole.broken == 0
    assert result.gradient.isfinite().all()
    assert (result.gradient[1] == 0).all() and (whole.gradient[1] != 0).any()
    assert torch.allclose(result.gradient[[0, 2]], whole.gradient[[0, 2]])


@pytest.mark.parametrize("limit", [1e-3, 0.5])
def test_clamp_shortens_and_does_not_turn(model: DiffusionModel, limit: float) -> None:
    free = guided(model, noisy(2), GuidanceOptions(views=1)).gradient
    held = guided(model, noisy(2), GuidanceOptions(views=1, clamp=limit)).gradient
    rms = held.square().mean((1, 2, 3)).sqrt()
    assert torch.allclose(rms, torch.minimum(free.square().mean((1, 2, 3)).sqrt(), torch.tensor(limit)), rtol=1e-4)
    assert torch.allclose(torch.nn.functional.cosine_similarity(free.flatten(1), held.flatten(1)), torch.ones(2), atol=1e-5)
    loose = guided(model, noisy(2), GuidanceOptions(views=1, clamp=1e9)).gradient
    assert torch.equal(loose, free)


def test_weights_and_several_texts(model: DiffusionModel) -> None:
    options = GuidanceOptions(views=1, range_scale=0)
    tree, dog = (guided(model, noisy(1), options, prompt=CLIP.prompt(t)).gradient for t in ("a tree", "a dog"))
    both = guided(model, noisy(1), options, prompt=CLIP.prompt("a tree", "a dog", weights=[2.0, -0.5])).gradient
    assert torch.allclose(both, 2 * tree - 0.5 * dog, rtol=1e-3, atol=1e-4 * float(both.abs().max()))


def test_guidance_options_are_checked() -> None:
    bad: list[dict[str, Any]] = [
        {"scale": -1}, {"scale": math.nan}, {"range_scale": math.inf}, {"views": 0}, {"view_chunk": -1}, {"clamp": 0.0}, {"clamp": math.nan},
        {"gradient": "both"}, {"clip_input": "x"}, {"distance": "far"}, {"background_loss": "none"}, {"background_scale": -0.1},
    ]  # fmt: skip
    for values in bad:
        with pytest.raises(BlendedError, match=next(iter(values)).split("_")[0]):
            GuidanceOptions(**values)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_distances() -> None:
    a, b = torch.tensor([[3.0, 0.0], [0.0, 0.2], [-5.0, 0.0]]), torch.tensor([1.0, 0.0])
    right = math.pi / 2
    assert torch.allclose(unclamped_distance(a, b), torch.tensor([0.0, right**2 / 2, math.pi**2 / 2]), atol=1e-5)
    assert torch.allclose(spherical_distance(a, b), torch.tensor([0.0, right**2 / 2, math.pi**2 / 2]), atol=1e-2)
    assert torch.allclose(cosine_distance(a, b), torch.tensor([0.0, 1.0, 2.0]), atol=1e-6)
    assert {"spherical_unclamped": unclamped_distance, "spherical": spherical_distance, "cosine": cosine_distance} == DISTANCES
    with pytest.raises(BlendedError, match="distance is 'euclidean'; give one of spherical, cosine, spherical_unclamped") as raised:
        GuidanceOptions(distance="euclidean")
    assert raised.value.options == ("distance",)


@pytest.mark.parametrize("distance", ["spherical", "cosine"])
def test_distances_have_a_gradient_everywhere_but_at_the_goal(distance: str) -> None:
    for angle in (1e-3, 1.0, math.pi - 1e-3, math.pi):
        a = torch.tensor([[math.cos(angle), math.sin(angle)]], requires_grad=True)
        (gradient,) = torch.autograd.grad(DISTANCES[distance](a, torch.tensor([1.0, 0.0])).sum(), a)
        assert gradient.isfinite().all()


def test_range_and_background_losses() -> None:
    x = torch.zeros(2, 3, 4, 4)
    x[1, :, 0, 0] = 3
    assert torch.allclose(range_loss(x), torch.tensor([0.0, 4 / 16]))
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 0, 0] = 1
    none = torch.zeros(1, 3, 4, 4)
    assert background_loss(x, none, mask, tiny.rough_perceptual).tolist() == [0.0, 0.0], "what lies in the mask does not count"
    assert float(background_loss(x, none, 1 - mask, tiny.rough_perceptual)[1]) > 0
    source = torch.ones(1, 3, 4, 4)
    assert float(batch_background_loss(source, source, mask, tiny.rough_perceptual, 0, 16)) == pytest.approx(1.0), (
        "the source is not masked"
    )


# --- masks and blending -----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20), st.integers(0, 99))
def test_a_soft_mask_opens_as_noise_goes(values: list[float], start: int) -> None:
    mask = torch.tensor(values).view(1, 1, 1, -1)
    levels = [EditMask.of(mask, "soft").at_level(index, start) for index in range(start, -1, -1)]
    for level in levels:
        assert set(level.unique().tolist()) <= {0.0, 1.0}
        assert (level[mask * 255 <= 8.5] == 0).all(), "black is never edited"
        assert (level[mask == 1] == 1).all(), "1 is free all the way"
    for before, after in pairwise(levels):
        assert (after >= before).all(), "what is free stays free"
    assert torch.equal(levels[-1], (mask * 255 > 8.5).to(mask)), "at the end all that is not black is free"
    order = mask.flatten().argsort()
    free = sum(levels).flatten()[order]  # type: ignore[union-attr]
    assert (free.diff() >= 0).all(), "the lighter, the longer"
    binary = EditMask.of(mask)
    assert all(torch.equal(binary.at_level(index, start), (mask >= 0.5).to(mask)) for index in range(start + 1)), "the same at every level"


def test_a_half_gray_pixel_is_free_for_half_of_the_steps() -> None:
    free = [float(EditMask.of(torch.full((1, 1, 1, 1), 0.5), "soft").at_level(index, 99)) for index in range(100)]
    assert sum(free) == 50 and free[0] == 1 and free[49] == 1 and free[50] == 0


def run_loop(options: EditOptions, prompt: Prompt | None = None, images: tuple[int, ...] = (0, 1)) -> Iterator[Step]:
    return edit_steps(tiny.tiny_models(), SOURCE, EDIT_MASK, prompt, options, SeededRandom(5), images)


@pytest.mark.parametrize(("level", "offset"), [("matched", 0), ("one_off", 1)])
@pytest.mark.parametrize("shared", [False, True])
def test_the_background_has_the_level_that_was_asked_for(level: str, offset: int, shared: bool) -> None:
    options = preset("best", steps="10", background_level=level, background_noise="shared" if shared else "per_image")
    schedule = tiny.tiny_model().config.respaced("10")
    outside = (MASK == 0).expand(2, 3, -1, -1)
    for step in run_loop(options):
        at = step.level + offset
        if at == CLEAN:
            expected = SOURCE.expand(2, -1, -1, -1)
        else:
            noise = SeededRandom(5).noise("background", at, [0, 0] if shared else [0, 1], (3, SIZE, SIZE))
            expected = math.sqrt(schedule.alphas_cumprod[at]) * SOURCE + math.sqrt(1 - schedule.alphas_cumprod[at]) * noise
        assert torch.allclose(step.x[outside], expected[outside], atol=1e-6)
        assert not torch.allclose(step.x[~outside], expected[~outside], atol=1e-2)
    assert step.level == CLEAN and step.done == step.total
    if level == "matched":
        assert torch.equal(step.x[outside], SOURCE.expand(2, -1, -1, -1)[outside])


def test_algorithm_1_blends_nothing() -> None:
    """Its steps are the guided steps alone, and its background drifts unless it is put back."""
    models, random = tiny.tiny_models(), SeededRandom(5)
    options = preset("best", sampler="ddpm", algorithm="local", steps="4", views=1, candidates=1)
    schedule = models.ddpm.config.respaced("4")
    x = noise_background(SOURCE, 2, schedule, random, [0], "start")
    for index, step in zip((2, 1, 0), run_loop(options, prompt=PROMPT, images=(0,)), strict=True):
        with torch.no_grad():
            x = guided_step(models, x, index, schedule, options, PROMPT, MASK, random, [0], SOURCE).x
        assert torch.equal(step.x, x)
    picture = (SOURCE + 1) / 2
    outside = (MASK == 0).expand_as(picture)
    for enforce, kept in ((None, False), (False, False), (True, True)):
        result = edit_picture(picture, MASK, PROMPT, models, replace(options, enforce_background=enforce, candidates=1))
        pasted = result.picture(result.candidates[0])
        assert bool((pasted[outside] == picture[outside]).all()) is kept
        assert (result.candidates[0].score.background_error == 0) is kept
    blended = replace(options, algorithm="blended", candidates=1)
    assert blended.keeps_background and not options.keeps_background
    assert EditOptions(algorithm="blended", enforce_background=False).keeps_background is False


def test_algorithm_1_asks_for_the_background() -> None:
    """λ of D_bg pulls what lies outside the mask to the source."""
    models = tiny.tiny_models(tiny.gaussian_model())
    away = []
    for scale in (0.0, 300.0, 3000.0):
        options = preset("best", algorithm="local", steps="50", strength=0.5, views=1, background_scale=scale, reference_size=0)
        last = list(edit_steps(models, SOURCE, EDIT_MASK, PROMPT, options, SeededRandom(0), [0]))[-1]
        away.append(float(((last.x - SOURCE) * (1 - MASK)).square().mean()))
    assert away[0] > 1.05 * away[1] > 1.1 * away[2]
    assert preset("best", algorithm="local").guidance.background_scale == 1000
    assert preset("best", algorithm="local", background_scale=7.0).guidance.background_scale == 7


def test_guidance_reaches_its_prompt() -> None:
    models = tiny.tiny_models(tiny.gaussian_model())
    distances = {}
    for scale in (0.0, 1000.0):
        options = preset("best", steps="50", views=1, scale=scale)
        last = list(edit_steps(models, SOURCE, EDIT_MASK, PROMPT, options, SeededRandom(0), [0, 1, 2]))[-1]
        distances[scale] = clip_distance(last.x, MASK, CLIP, PROMPT)
    assert (distances[1000.0] < 0.7 * distances[0.0]).all()


# --- samplers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
@pytest.mark.parametrize("index", [0, 1, 50, 99])
def test_every_objective_recovers_the_picture(objective: str, index: int) -> None:
    model = tiny.oracle_model(SOURCE, objective)
    schedule = model.config.respaced(100)
    x = q_sample(SOURCE, index, SeededRandom(1).noise("start", index, [0, 1], (3, SIZE, SIZE)), schedule)
    for which in (index, torch.tensor([index, index])):
        prediction = model.predict(x, which, schedule)
        assert torch.allclose(prediction.x0, SOURCE.expand_as(x), atol=2e-3)
        assert torch.allclose(prediction.mean, posterior_mean(SOURCE, x, index, schedule), atol=2e-3)


def test_objectives_are_told_apart() -> None:
    x, schedule = noisy(1), DiffusionConfig().respaced(100)
    found = [predict_x0(x, 0.3 * x, INDEX, schedule, o) for o in ("eps", "v", "x0")]
    assert all(float((found[i] - found[j]).abs().max()) > 0.01 for i in range(3) for j in range(i))
    with pytest.raises(BlendedError, match="unknown objective"):
        predict_x0(x, x, INDEX, schedule, "score")


@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
@pytest.mark.parametrize("output", ["sample", "x0"])
def test_a_loop_with_a_perfect_network_ends_at_its_picture(objective: str, sampler: str, eta: float, output: str) -> None:
    truth = tiny.random_picture(SIZE, SIZE, seed=99) * 2 - 1
    models = tiny.tiny_models(tiny.oracle_model(truth, objective))
    options = preset("best", steps="12", strength=1.0, sampler=sampler, eta=eta, output=output, candidates=1, context=1.0)
    result = edit_picture((SOURCE + 1) / 2, MASK, None, models, options)
    expected = torch.where(MASK > 0, (truth + 1) / 2, (SOURCE + 1) / 2)
    assert torch.allclose(result.picture(result.candidates[0]), expected, atol=2e-3)


@pytest.mark.parametrize("index", [1, 40, 99])
def test_ddim_with_eta_1_is_the_posterior(index: int) -> None:
    schedule = DiffusionConfig().respaced(100)
    x, x0, noise = noisy(2, 1), noisy(2, 2).clamp(-1, 1), noisy(2, 3)
    step = ddim_step(x, x0, index, noise, schedule, 1.0)
    expected = posterior_mean(x0, x, index, schedule) + math.sqrt(schedule.posterior_variance[index]) * noise
    assert torch.allclose(step, expected, atol=1e-5)
    half = ddim_step(x, x0, index, noise, schedule, 0.5)
    assert not torch.allclose(half, step, atol=1e-4)
    with pytest.raises(BlendedError, match="needs noise"):
        ddim_step(x, x0, index, None, schedule, 0.5)


@pytest.mark.parametrize(("sampler", "eta", "noisy_steps"), [("ddpm", 0.0, [3, 2, 1]), ("ddim", 0.0, []), ("ddim", 0.3, [3, 2, 1])])
def test_random_numbers_are_drawn_only_where_they_are_used(sampler: str, eta: float, noisy_steps: list[int]) -> None:
    random = tiny.Recorded()
    options = preset("best", steps="4", strength=1.0, sampler=sampler, eta=eta)
    list(edit_steps(tiny.tiny_models(), SOURCE, EDIT_MASK, None, options, random, [2, 3]))
    assert [level for purpose, level, _ in random.asked if purpose == "step"] == noisy_steps
    assert [(p, s) for p, s, _ in random.asked if p != "step"] == [("start", 3), ("background", 2), ("background", 1), ("background", 0)]
    assert {images for _, _, images in random.asked} == {(2, 3)}


def test_ddpm_moves_along_the_gradient_by_the_variance(model: DiffusionModel) -> None:
    schedule = model.config.respaced(100)
    with torch.no_grad():
        prediction = model.predict(noisy(1), INDEX, schedule)
    gradient, noise = torch.ones(1, 3, SIZE, SIZE), torch.zeros(1, 3, SIZE, SIZE)
    moved = ddpm_step(prediction, INDEX, noise, gradient) - ddpm_step(prediction, INDEX, noise)
    assert torch.allclose(moved, prediction.variance, atol=1e-5)
    assert torch.allclose(ddpm_step(prediction, 0, noise + 5, None), prediction.mean), "no noise at the last step"


# --- classes, indices, strength ---------------------------------------------------------------------------------------


def test_classes() -> None:
    model = tiny.tiny_model(num_classes=5)

    def step_at(index: int, images: tuple[int, ...]) -> StepInput:
        return StepInput(torch.zeros(len(images), 3, SIZE, SIZE), index, model.config.respaced(100), images, SeededRandom(1), MASK)

    def labels(choice: str | int, index: int = 7, images: tuple[int, ...] = (0, 1, 2)) -> Tensor | None:
        return class_labels(model, choice, step_at(index, images))

    assert torch.equal(labels("zero"), torch.zeros(3, 4 * 32))
    assert labels(4).tolist() == [4, 4, 4]
    drawn = torch.stack([labels("random", index) for index in range(40)])
    assert set(drawn.flatten().tolist()) == {0, 1, 2, 3, 4}, "a new one every step and image"
    assert torch.equal(labels("random", 7, (1,)), labels("random")[1:2])
    for wrong in (5, -1):
        with pytest.raises(BlendedError, match=rf"class {wrong} does not exist; the model has classes 0 to 4"):
            labels(wrong)
    assert class_labels(tiny.tiny_model(), "random", step_at(0, (0,))) is None
    with pytest.raises(BlendedError, match="class_choice"):
        EditOptions(class_choice="dog")
    results = {}
    for choice in ("zero", "random", 0, 3):
        options = preset("best", steps="3", class_choice=choice)
        results[choice] = list(edit_steps(tiny.tiny_models(model), SOURCE, EDIT_MASK, None, options, SeededRandom(0), [0]))[-1].x
    values = list(results.values())
    assert all(not torch.equal(values[i], values[j]) for i in range(4) for j in range(i)), "a class must reach the network"


def test_a_label_for_no_class_is_an_embedding_of_zeros() -> None:
    model = tiny.tiny_model(num_classes=5, use_scale_shift_norm=True)
    torch.nn.init.normal_(model.network.label_emb.weight, generator=torch.Generator().manual_seed(0))
    x, steps = noisy(3), torch.full((3,), 500.0)
    with torch.no_grad():
        zeros, none = model.network(x, steps, torch.zeros(3, model.label_dim)), model.network(x, steps, torch.full((3,), NO_CLASS))
        mixed, third = model.network(x, steps, torch.tensor([NO_CLASS, 3, NO_CLASS])), model.network(x, steps, torch.full((3,), 3))
    assert torch.equal(none, zeros)
    assert torch.allclose(mixed[[0, 2]], none[[0, 2]], atol=1e-5) and torch.allclose(mixed[1], third[1], atol=1e-5)
    assert not torch.allclose(none, third, atol=1e-3)
    assert [model.class_index(choice) for choice in ("zero", 0, 4)] == [NO_CLASS, 0, 4]
    for wrong, said in ((5, "classes 0 to 4"), (-1, "classes 0 to 4"), ("random", "'zero' or the number")):
        with pytest.raises(BlendedError, match=said):
            model.class_index(wrong)
    assert tiny.tiny_model().class_index("zero") == NO_CLASS
    with pytest.raises(BlendedError, match="class 0 does not exist; the model has no classes"):
        tiny.tiny_model().class_index(0)


@pytest.mark.parametrize("steps", [250, 1000, 4000])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_an_output_is_what_a_prediction_is_made_of(steps: int, rescale: bool, variance: str) -> None:
    """At a step of the whole process, without the schedule that a prediction needs."""
    process = DiffusionConfig("cosine", steps, rescale, "x0", variance)
    model = tiny.tiny_model(process, out_channels=6 if variance == "learned_range" else 3, use_scale_shift_norm=True)
    schedule, x = process.respaced(10), noisy(2)
    with torch.no_grad():
        found = model.output(x, torch.full((2,), float(schedule.timestep_map[4])))
        assert torch.equal(found, model.predict(x, 4, schedule).x0) and found.shape == x.shape


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 1000), st.data())
def test_skip_and_strength_say_the_same(total: int, data: st.DataObject) -> None:
    skip = data.draw(st.integers(0, total - 1))
    options = options_of_arguments(build_parser().parse_args(["edit", "x.png", "--steps", str(total), "--skip", str(skip)]))
    schedule = DiffusionConfig().respaced(options.steps)
    assert len(schedule) == total
    assert schedule.start_index(options.strength) == total - skip - 1


@pytest.mark.parametrize(("strength", "start"), [(1.0, 99), (0.75, 74), (0.67, 66), (0.6, 59), (0.001, 0)])
def test_strength(strength: float, start: int) -> None:
    assert DiffusionConfig().respaced("100").start_index(strength) == start


@pytest.mark.parametrize("arguments", [["--skip", "100"], ["--skip", "-1"], ["--skip", "3", "--strength", "0.5"]])
def test_skip_is_checked(arguments: list[str]) -> None:
    with pytest.raises(BlendedError, match="--skip"):
        options_of_arguments(build_parser().parse_args(["edit", "x.png", *arguments]))


@pytest.mark.parametrize("respacing", ["1000", "100", "50", "25", "ddim25", "ddim50", "250"])
def test_the_reference_index_is_right_for_even_respacing(respacing: str) -> None:
    schedule = DiffusionConfig().respaced(respacing)
    wrong = [i for i in range(len(schedule)) if reference_index(i, schedule) != i]
    assert len(wrong) == 0


def test_the_reference_index_is_wrong_for_sections() -> None:
    schedule = DiffusionConfig().respaced("50,25,10")
    assert [reference_index(i, schedule) for i in range(85)] != list(range(85))
    official, exact = (preset("official", steps="6,3,2", strength=1.0, index_lookup=i, views=1) for i in ("reference", "exact"))
    a, b = (list(run_loop(o, prompt=PROMPT))[-1].x for o in (official, exact))
    assert not torch.allclose(a, b, atol=1e-3), "the option must reach the network"
    even = [list(run_loop(replace(o, steps="10"), prompt=PROMPT))[-1].x for o in (official, exact)]
    assert torch.equal(*even)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("index", [30, 100, 200])
def test_guidance_moves_a_ddim_step_as_far_as_a_ddpm_step(monkeypatch: pytest.MonkeyPatch, eta: float, index: int) -> None:
    """One of 250 steps with a pull that is the same everywhere, and without."""
    pull = 0.0

    def pulled(_: Guidance, network: DiffusionModel, step: StepInput, labels: Tensor | None = None) -> GuidedPrediction:
        return GuidedPrediction(network.predict(step.x, step.index, step.schedule), torch.full_like(step.x, pull))

    monkeypatch.setattr(Guidance, "__call__", pulled)
    models = tiny.tiny_models(tiny.gaussian_model())
    x = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    moved = {}
    for name, options in {
        "ddpm": preset("best", steps="250"),
        "matched": preset("best", steps="250", sampler="ddim", eta=eta),
        "score": preset("best", steps="250", sampler="ddim", eta=eta, ddim_guidance="score"),
    }.items():
        ends = []
        for pull in (0.0, 1.0):  # noqa: B007 - read by pulled
            ends.append(
                guided_step(models, x, index, models.ddpm.config.respaced("250"), options, PROMPT, MASK, SeededRandom(0), range(1)).x
            )
        moved[name] = float((ends[1] - ends[0]).mean())
    assert moved["matched"] == pytest.approx(moved["ddpm"], rel=0.1)
    assert moved["score"] == pytest.approx((1 + eta**2) / 2 * moved["ddpm"], rel=0.1)


# --- the network ------------------------------------------------------------------------------------------------------


def kernels(action: Any) -> set[str]:
    """Names of the attention kernels that ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        action()
    return {e.key for e in recorded.key_averages() if "_scaled_dot_product" in e.key}


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_attention_does_not_fall_back_to_the_slow_kernel(new_order: bool, with_gradient: bool) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    block = AttentionBlock(32, 2, new_order)
    x = torch.randn(2, 32, 8, 8, requires_grad=with_gradient)
    used = kernels(lambda: block(x))
    assert used and not any("math" in name for name in used), used
    with sdpa_kernel(SDPBackend.MATH):
        assert any("math" in name for name in kernels(lambda: block(x))), "the check must be able to fail"
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        assert torch.allclose(block(x), block(x))


def test_gradient_checkpointing_changes_memory_alone() -> None:
    plain, thrifty = tiny.tiny_model(), tiny.tiny_model()
    thrifty.network.gradient_checkpointing = True  # type: ignore[assignment]
    calls = {"plain": 0, "thrifty": 0}
    for name, model in (("plain", plain), ("thrifty", thrifty)):
        block = next(m for m in model.network.modules() if isinstance(m, ResBlock))

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        block.register_forward_pre_hook(count)
    options = GuidanceOptions(gradient="unet", views=2)
    a, b = guided(plain, noisy(2), options), guided(thrifty, noisy(2), options)
    assert torch.allclose(a.gradient, b.gradient, atol=1e-6 * float(a.gradient.abs().max()))
    assert torch.equal(a.prediction.x0, b.prediction.x0)
    assert calls == {"plain": 1, "thrifty": 2}, "the blocks must have run a second time"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype: torch.dtype) -> None:
    full, half = tiny.tiny_model(), tiny.tiny_model()
    half.network.set_compute_dtype(dtype)  # type: ignore[operator]
    options = GuidanceOptions(gradient="unet", views=1)
    a, b = guided(full, noisy(2), options), guided(half, noisy(2), options)
    assert b.prediction.x0.dtype == b.gradient.dtype == torch.float32
    error = (a.prediction.x0 - b.prediction.x0).abs().max() / a.prediction.x0.abs().max()
    assert 0 < float(error) < 0.03
    cosine = torch.nn.functional.cosine_similarity(a.gradient.flatten(1), b.gradient.flatten(1))
    assert float(cosine.min()) > 0.995


def test_guidance_works_in_its_part_of_the_levels_alone(model: DiffusionModel) -> None:
    """Outside of it a step is the unguided one with the same draws, and CLIP is not asked."""
    models = tiny.tiny_models(model)
    assert models.clip is not None
    asked: list[int] = []
    encode = models.clip.model.encode_image

    def counted(pictures: Tensor) -> Any:
        asked.append(len(pictures))
        return encode(pictures)  # type: ignore[operator]

    models.clip.model.encode_image = counted  # type: ignore[assignment]

    def run(**changes: Any) -> tuple[list[bool], list[int]]:
        asked.clear()
        options = preset("best", **{"steps": "10", "strength": 1.0, "views": 6, "end": 1.0, **changes})
        steps = list(edit_steps(models, SOURCE, EDIT_MASK, PROMPT, options, SeededRandom(0), [0]))
        assert all((s.gradient is None) == (s.clip_distance is None) for s in steps)
        return [s.gradient is not None for s in steps], list(asked)

    assert run() == ([True] * 10, [6] * 10)
    assert run(start=0.2, end=0.7) == ([False] * 2 + [True] * 5 + [False] * 3, [6] * 5)
    assert run(early_views=2) == ([True] * 10, [2] * 5 + [6] * 5)
    unguided = preset("best", steps="10", strength=1.0, start=0.95, end=0.99)  # between two levels
    parted = list(edit_steps(models, SOURCE, EDIT_MASK, PROMPT, unguided, SeededRandom(0), [0]))
    removal = list(edit_steps(models, SOURCE, EDIT_MASK, None, unguided, SeededRandom(0), [0]))
    assert all(torch.equal(a.x, b.x) for a, b in zip(parted, removal, strict=True))
    for wrong in ({"start": 0.5, "end": 0.5}, {"start": -0.1}, {"end": 1.5}):
        with pytest.raises(BlendedError, match=r"a start below the end|start is|end is"):
            GuidanceOptions(**wrong)
    with pytest.raises(BlendedError, match="early_views is -1"):
        GuidanceOptions(early_views=-1)
    kept = GuidanceOptions(end=0.5, background_scale=100.0)
    late = kept.at(1, 10)
    assert kept.at(9, 10) == kept and late is not None and (late.scale, late.range_scale, late.background_scale) == (0, 0, 100)
    models = replace(models, perceptual=tiny.rough_perceptual)
    asked.clear()
    options = preset("best", algorithm="local", steps="10", strength=1.0, views=6, end=0.5)
    steps = list(edit_steps(models, SOURCE, EDIT_MASK, PROMPT, options, SeededRandom(0), [0]))
    assert asked == [6] * 5 and all(s.gradient is not None for s in steps), "the background is kept at every level"


def test_sizes_that_do_not_fit_are_a_sentence(model: DiffusionModel) -> None:
    assert model.network(torch.zeros(1, 3, 12, 20), torch.zeros(1)).shape == (1, 6, 12, 20)
    with pytest.raises(BlendedError, match="multiples of 2, not 16×13"):
        model.network(torch.zeros(1, 3, 13, 16), torch.zeros(1))


# --- options ----------------------------------------------------------------------------------------------------------


def test_presets_are_those_of_the_method() -> None:
    """docs/method.md, row by row: (official, paper, best)."""
    rows: dict[str, tuple[Any, Any, Any]] = {
        "background_level": ("one_off", "matched", "matched"),
        "guidance.gradient": ("unet", "x0", "x0"),
        "guidance.distance": ("spherical_unclamped", "cosine", "spherical"),
        "guidance.range_scale": (50.0, 0.0, 50.0),
        "guidance.background_scale": (0.0, 0.0, 0.0),
        "guidance.background_loss": ("reference", "paper", "paper"),
        "guidance.lpips_scale": (1000.0, 1000.0, 1000.0),
        "guidance.l2_scale": (10000.0, 10000.0, 10000.0),
        "ranking": ("reference", "corrected", "views"),
        "output": ("x0", "sample", "sample"),
        "background_noise": ("shared", "per_image", "per_image"),
        "index_lookup": ("reference", "exact", "exact"),
        "guidance.symmetric_views": (False, True, True),
        "mask_rule": ("nonzero", "binary", "binary"),
        "crop": ("squash", "region", "region"),
        "guidance.views": (8, 16, 8),
        "guidance.scale": (None, None, None),
        "steps": ("100", "100", "50"),
        "strength": (0.75, 0.75, 0.75),
        "sampler": ("ddpm", "ddpm", "dpmpp-2m"),
        "ddim_guidance": ("score", "score", "matched"),
        "algorithm": ("blended", "blended", "blended"),
        "tone_match": ("off", "off", "off"),
    }
    for name, values in rows.items():
        for which, value in zip(("official", "paper", "best"), values, strict=True):
            options: Any = PRESETS[which]
            for part in name.split("."):
                options = getattr(options, part)
            assert options == value, f"{name} of {which}"
    assert PRESETS["official"].guidance.clip_input == "mixed" and PRESETS["paper"].guidance.clip_input == "x0"
    assert PRESETS["official"].class_choice == "random" and PRESETS["paper"].class_choice == PRESETS["best"].class_choice == "zero"
    assert {k: v.preset for k, v in PRESETS.items()} == {k: k for k in PRESETS}
    assert PRESETS["best"] == EditOptions() and PRESETS["best"].guidance == GuidanceOptions(end=0.9)


def test_presets_with_a_sampler_of_one_step_are_those_of_earlier_versions() -> None:
    """Workflows name their sampler, so that they keep the number of steps and the guidance that the preset had with it."""
    for sampler in ("ddpm", "ddim"):
        best, fast = preset("best", sampler=sampler), preset("fast", sampler=sampler)
        assert (best.sampler, best.steps, best.guidance) == (sampler, "100", GuidanceOptions())
        assert (fast.sampler, fast.steps, fast.guidance) == (sampler, "40", GuidanceOptions(views=4, early_views=2, end=0.8))
        assert preset("paper", sampler=sampler) == replace(PRESETS["paper"], sampler=sampler)
    assert preset("fast", sampler="ddim", steps="ddim25", views=3).steps == "ddim25"
    assert all(preset(name, sampler=options.sampler) == options for name, options in PRESETS.items())


def test_options_survive_a_report() -> None:
    import json

    for name in PRESETS:
        options = preset(name, seed=2**64 - 1, clamp=0.5, class_choice=3, feather=2)
        assert EditOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    with pytest.raises(BlendedError, match="unknown option color"):
        EditOptions.from_dict({"color": 1})
    with pytest.raises(BlendedError, match="unknown guidance option color"):
        EditOptions.from_dict({"guidance": {"color": 1}})
    with pytest.raises(BlendedError, match="unknown option color"):
        preset("best", color=1)
    with pytest.raises(BlendedError, match="unknown preset 'worst'; known are best, fast, paper, official"):
        preset("worst")


def test_options_are_checked() -> None:
    bad: list[dict[str, Any]] = [
        {"algorithm": "x"}, {"strength": 0}, {"strength": 1.01}, {"candidates": 0}, {"batch": -1}, {"eta": 2}, {"feather": -1},
        {"sampler": "euler"}, {"mask_rule": "x"}, {"crop": "x"}, {"output": "x"}, {"ranking": "x"}, {"background_level": "x"},
    ]  # fmt: skip
    for values in bad:
        with pytest.raises(BlendedError, match=next(iter(values))):
            EditOptions(**values)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("picture", (0.0, 255.0)), ("picture", (0.0, 3.0)), ("picture", (-1.0, 1.0)), ("mask", (0.0, 255.0)), ("mask", (0.0, 2.0)),
        ("mask", (-1.0, 1.0)), ("mask", (0.0, 1.4)),
    ],
)  # fmt: skip
def test_values_of_another_range_are_refused(name: str, values: tuple[float, float], models: Any) -> None:
    """8-bit values in a float tensor, however dark, and −1..1."""
    given = {"picture": torch.full((1, 3, 8, 8), 0.5), "mask": torch.ones(1, 1, 8, 8)}
    given[name][..., :4, :], given[name][..., 4:, :] = values
    with pytest.raises(BlendedError, match=rf"the {name} has values from .*; give 0\.\.1, for a {name} in"):
        edit_picture(given["picture"], given["mask"], None, models, preset("best", steps="2", candidates=1))


def test_overshoot_and_highlights_are_kept_outside_and_limited_for_the_model() -> None:
    picture = tiny.random_picture(24, 24)
    picture[..., :2, :], picture[..., 2:4, :] = 6.5, -0.1
    mask = torch.zeros(1, 1, 24, 24)
    mask[..., 6:18, 6:18] = 1
    result = edit_picture(picture, mask, None, tiny.tiny_models(), preset("best", steps="2", candidates=1))
    assert torch.equal(result.picture(result.candidates[0])[..., :4, :], picture[..., :4, :])
    assert float(prepare(picture, EditMask.of(mask), 24).source.abs().max()) <= 1


def test_shapes_are_checked(models: Any) -> None:
    with pytest.raises(BlendedError, match="one RGB picture"):
        edit_picture(torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 8, 8), None, models)
    with pytest.raises(BlendedError, match="of the same size"):
        edit_picture(torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 9), None, models)


# --- ranking and notes ------------------------------------------------------------------------------------------------


def test_ranking() -> None:
    assert ranking([0.3, 0.1, 0.2, 0.1]) == [1, 3, 2, 0]
    assert ranking([None, None, None]) == [0, 1, 2], "without distances, as they are"
    assert ranking([float("nan"), 0.5, None, 0.4]) == [3, 1, 0, 2], "what has no distance is last"


def test_candidates_come_best_first() -> None:
    options = preset("best", steps="8", views=1, candidates=6, batch=4)
    result = edit_picture((SOURCE + 1) / 2, MASK, PROMPT, tiny.tiny_models(tiny.gaussian_model()), options)
    distances = [c.score.clip_distance for c in result.candidates]
    assert distances == sorted(distances) and len(set(distances)) == 6  # type: ignore[type-var]
    assert [c.rank for c in result.candidates] == [1, 2, 3, 4, 5, 6]
    assert sorted(c.index for c in result.candidates) == [0, 1, 2, 3, 4, 5]
    for candidate in result.candidates:
        assert candidate.score.gain == pytest.approx(result.source_distance - candidate.score.clip_distance)
        again = clip_distance_of_views(candidate.edited, MASK, CLIP, PROMPT)
        assert float(again) == pytest.approx(candidate.score.clip_distance, abs=1e-5)


def test_seam_energy_sees_a_seam() -> None:
    mask = torch.zeros(1, 1, 20, 20)
    mask[..., 5:15, 5:15] = 1
    ramp = torch.linspace(0, 1, 20).expand(1, 3, 20, 20)
    assert seam_energy(ramp, EditMask.of(mask)) == pytest.approx(0, abs=1e-6), "a slope is no seam"
    assert seam_energy(0.1 + 0 * ramp + mask * 0.4, EditMask.of(mask)) == pytest.approx(0.4, abs=0.001)
    assert seam_energy(ramp, EditMask.of(torch.ones_like(mask))) == 0


def notes_of(**changes: Any) -> list[Note]:
    models = tiny.tiny_models(tiny.gaussian_model())
    result = edit_picture((SOURCE + 1) / 2, MASK, PROMPT, models, preset("best", **{"steps": "40", "views": 1, "candidates": 2, **changes}))
    return result.notes


def test_a_run_says_when_guidance_had_no_effect() -> None:
    (note,) = notes_of(scale=0.0, range_scale=0.0)
    assert note.startswith("Guidance had no effect") and "the guidance scale is 0" in note and note.options == ("scale",)
    (note,) = notes_of(scale=1e-6, range_scale=0.0, strength=0.05, end=1.0)
    assert "raise the guidance scale, now 1e-06" in note and "at strength 0.05 little can change" in note
    assert note.options == ("scale", "strength")
    (note,) = notes_of(strength=0.2, end=0.8)
    assert "guidance acts from 0 to 0.8 of the levels, and strength 0.2 begins after that" in note
    assert "scale" not in note and set(note.options) == {"strength", "end"}


def notes_with(before: float, now: float, without: float | None, **changes: Any) -> list[Note]:
    """The notes of an edit with these CLIP distances, of which guidance moved every step by its own noise."""
    options = preset("best", **{"scale": 1000.0, **changes})
    score = Score(now, before - now, 0.0, 0.0, 1)
    result = EditResult([Candidate(0, SOURCE, score, 1)], SOURCE, EDIT_MASK, Region(0, 0, 16, 16, 16), options, before, [], {})
    return diagnose(result, EDIT_MASK, DiffusionConfig().respaced("100"), 1.0, 0, torch.float32, lambda _: without)


def test_notes_agree_with_the_numbers() -> None:
    assert notes_with(0.9, 0.3, 0.9) == [], "a gain of two thirds"
    assert notes_with(0.9, 0.85, 0.9) == [], "a small gain, all of it by guidance"
    (same,) = notes_with(0.9, 0.89, 0.89)
    assert same.startswith(
        "Guidance had no effect: the CLIP distance to the prompt was 0.900 before the edit and is 0.890 now (gain +0.010, 0.890 w"
    )
    (filled,) = notes_with(0.9, 0.854, 0.855)
    assert (
        filled.startswith("Guidance had no effect beyond that of an edit without prompt")
        and "gain +0.046, 0.855 without any prompt" in filled
    )
    (little,) = notes_with(0.9, 0.854, None)
    assert little.startswith("Guidance had little effect")
    (worse,) = notes_with(0.7, 0.822, 0.822)
    assert worse.startswith("The result is further from the prompt than the source image") and "gain -0.122" in worse
    (kept,) = notes_with(0.3, 0.422, 0.9)
    assert kept.startswith("The result is further from the prompt") and "the source image shows much of it already" in kept


@pytest.mark.parametrize(
    ("changes", "prompted", "named"),
    [
        ({}, True, []),
        ({"algorithm": "local"}, False, []),
        ({"sampler": "ddim", "eta": 0.5, "ddim_guidance": "score"}, True, []),
        ({"eta": 0.5, "ddim_guidance": "score"}, True, []),
        ({"sampler": "ddpm", "eta": 0.5, "ddim_guidance": "score"}, True, [("eta", "ddim_guidance")]),
        ({"background_scale": 500.0}, True, [("background_scale",)]),
        ({"background_scale": 500.0, "gradient": "unet"}, True, []),
        ({"background_scale": 500.0, "algorithm": "local"}, True, []),
        ({"lpips_scale": 1.0, "l2_scale": 2.0}, True, [("lpips_scale", "l2_scale")]),
        ({"lpips_scale": 1.0, "algorithm": "local", "background_loss": "reference"}, True, []),
        ({"feather": 4, "algorithm": "local"}, True, [("feather",)]),
        ({"feather": 4, "algorithm": "local", "enforce_background": True}, True, []),
        ({"feather": 1}, True, [("feather",)]),
        ({"enforce_background": True}, True, [("enforce_background",)]),
        ({"context": 2.0, "crop": "squash"}, True, [("context",)]),
        ({"scale": 5.0, "views": 2, "ranking": "corrected"}, False, [("scale", "views", "ranking")]),
        ({"x0_if_needed": True}, True, [("x0_if_needed",)]),
        ({"x0_if_needed": True, "gradient": "unet"}, True, []),
        ({"class_choice": 3}, True, [("class_choice",)]),
        ({"start": 0.2, "strength": 0.75}, True, [("start",)]),
        ({"start": 0.3, "strength": 0.75}, True, []),
    ],
)  # fmt: skip
def test_options_without_effect_are_noted(changes: dict[str, Any], prompted: bool, named: list[tuple[str, ...]]) -> None:
    model = tiny.tiny_model()
    options = preset("best", **changes)
    options = replace(options, guidance=with_scale(options.guidance, model))
    assert [note.options for note in options_without_effect(options, model, prompted)] == named


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("prompted", [True, False])
def test_a_preset_as_it_is_has_no_option_without_effect(name: str, prompted: bool) -> None:
    model = tiny.tiny_model()
    model.guidance_scale = 3000.0
    for guidance in (PRESETS[name].guidance, GuidanceOptions()) if name in ("best", "fast") else (PRESETS[name].guidance,):
        options = replace(PRESETS[name], guidance=with_scale(guidance, model))
        assert options_without_effect(options, model, prompted) == []


def test_the_lambda_of_algorithm_2_that_is_noted_changes_nothing() -> None:
    """The note is true: the same pictures, bit for bit, whatever the background scale."""
    models = replace(tiny.tiny_models(), perceptual=lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)))
    pictures = []
    for scale in (0.0, 5000.0):
        options = preset("best", steps="6", views=1, candidates=1, background_scale=scale)
        pictures.append(edit_picture((SOURCE + 1) / 2, MASK, PROMPT, models, options).candidates[0].edited)
    assert torch.equal(*pictures)


def test_the_guidance_scale_is_the_one_given_else_that_of_the_checkpoint_else_1000() -> None:
    own = GuidanceOptions()
    assert own.scale_for(None, 64) == own.scale_for(None, 512) == 1000
    assert own.scale_for(3000.0, 64) == own.scale_for(3000.0, 256) == 3000
    assert GuidanceOptions(scale=1000.0).scale_for(3000.0, 64) == 1000 and GuidanceOptions(scale=0.0).scale_for(3000.0, 64) == 0
    assert PRESETS["official"].guidance.scale_for(3000.0, 64) == 187.5, "its losses are not scaled to the size of the image"
    assert PRESETS["official"].guidance.scale_for(None, 64) == 1000
    model = tiny.tiny_model()
    model.guidance_scale = 700.0
    models = replace(tiny.tiny_models(), ddpm=model)
    short: dict[str, Any] = {"steps": "4", "views": 1, "candidates": 1}
    default, given, other = (
        edit_picture((SOURCE + 1) / 2, MASK, PROMPT, models, preset("best", **short, **scale))
        for scale in ({}, {"scale": 700.0}, {"scale": 1000.0})
    )
    assert default.options.guidance.scale == 700
    assert torch.equal(default.candidates[0].edited, given.candidates[0].edited)
    assert not torch.equal(default.candidates[0].edited, other.candidates[0].edited)


@pytest.mark.parametrize("soft", [False, True])
def test_the_score_is_that_of_what_is_delivered(soft: bool) -> None:
    """A feather wider than the mask leaves a part of the edit, and the distance is that of this part."""
    options = preset("best", steps="20", views=1, candidates=2, feather=0 if soft else 9, mask_rule="soft" if soft else "binary")
    mask = MASK * 0.12 if soft else MASK
    result = edit_picture((SOURCE + 1) / 2, mask, PROMPT, tiny.tiny_models(tiny.gaussian_model()), options)
    for candidate in result.candidates:
        delivered = result.region.cut(result.picture(candidate), 16) * 2 - 1
        shown = clip_distance_of_views(delivered, result.region.cut_mask(result.mask, 16).for_clip(), CLIP, PROMPT)
        assert candidate.score.clip_distance == pytest.approx(float(shown), abs=1e-5)
        raw = clip_distance_of_views(candidate.edited, MASK, CLIP, PROMPT)
        assert abs(float(raw) - float(shown)) > 1e-3, "the edit itself has another score"
    if not soft:
        assert any("The feather of 9 pixels is wider than the mask" in note for note in result.notes)


def test_an_edit_that_worked_says_nothing() -> None:
    assert notes_of() == []
    assert notes_of(gradient="x0") == []


def test_a_removal_says_nothing_of_guidance() -> None:
    result = edit_picture((SOURCE + 1) / 2, MASK, None, tiny.tiny_models(), preset("best", steps="3", candidates=2))
    assert result.notes == [] and result.source_distance is None
    assert [c.score.clip_distance for c in result.candidates] == [None, None]
    assert [c.index for c in result.candidates] == [0, 1]


def test_blend_is_the_formula() -> None:
    mask = torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 1, 3)
    assert blend(torch.full((1, 3, 1, 3), 4.0), torch.full((1, 3, 1, 3), 8.0), mask)[0, 0, 0].tolist() == [8, 7, 4]


def test_schedules_agree_with_their_definition() -> None:
    whole, spaced = DiffusionConfig("cosine", 4000).respaced("4000"), DiffusionConfig("cosine", 4000).respaced("50,25,10")
    assert np.allclose(spaced.alphas_cumprod, whole.alphas_cumprod[spaced.timestep_map], rtol=1e-12)
    assert spaced.model_timestep(84) == pytest.approx(3999 / 4)
