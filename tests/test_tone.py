"""Tone matching: the membrane, and where it acts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blended_core import sample as sample_module
from blended_core.denoiser import DiffusionModel
from blended_core.diagnose import options_without_effect
from blended_core.diffusion import DiffusionConfig
from blended_core.edit import edit_picture
from blended_core.mask import EditMask
from blended_core.options import PRESETS, EditOptions, preset
from blended_core.random import SeededRandom
from blended_core.sample import Models, Step, edit_steps, guided_step, noise_background
from blended_core.tone import LATE, LIMIT, acts_at, membrane, tone_shift

from .tiny import Network, oracle_model, same_bits, tiny_models


def ellipse(height: int, width: int, x: float = 0.5, y: float = 0.5, radius: float = 0.35) -> Tensor:
    """[1, 1, H, W] bool; center and radius as shares of the sides."""
    rows, columns = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return (((columns - x) / radius) ** 2 + ((rows - y) / radius) ** 2 <= 1)[None, None]


def values(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth random values [count, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(count, 3, 5, 5, generator=generator), (height, width), mode="bilinear", align_corners=True)


def solved_directly(given: Tensor, inside: Tensor) -> Tensor:
    """The membrane of one image by one dense system, written down pixel by pixel."""
    height, width = inside.shape[-2:]
    pixels = [(int(y), int(x)) for y, x in inside[0, 0].nonzero()]
    number = {pixel: i for i, pixel in enumerate(pixels)}
    matrix, load = np.zeros((len(pixels), len(pixels))), np.zeros((len(pixels), given.shape[1]))
    for (y, x), i in number.items():
        for pixel in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= pixel[0] < height and 0 <= pixel[1] < width:
                matrix[i, i] += 1
                if pixel in number:
                    matrix[i, number[pixel]] -= 1
                else:
                    load[i] += given[0, :, pixel[0], pixel[1]].double().numpy()
    out = torch.zeros_like(given)
    for pixel, solution in zip(pixels, np.linalg.solve(matrix, load), strict=True):
        out[0, :, pixel[0], pixel[1]] = torch.from_numpy(solution).float()
    return out


MASKS = {
    "ellipse": ellipse(40, 40),
    "at the left border": ellipse(33, 40, x=0.05),
    "in a corner": ellipse(40, 37, x=0.0, y=1.0, radius=0.6),
    "across": torch.zeros(1, 1, 24, 31, dtype=torch.bool).index_fill(2, torch.arange(8, 15), True),
    "two islands": ellipse(40, 40, 0.25, 0.25, 0.15) | ellipse(40, 40, 0.75, 0.7, 0.2),
    "a line": torch.zeros(1, 1, 20, 20, dtype=torch.bool).index_fill(3, torch.tensor([9]), True),
    "ring": ellipse(40, 40) & ~ellipse(40, 40, radius=0.15),
    "comb": (torch.arange(30) % 3 > 0)[None, None, None] & ellipse(30, 30),
    "all but one pixel": torch.ones(1, 1, 24, 24, dtype=torch.bool).index_put((torch.tensor(0), torch.tensor(0), torch.tensor(3), torch.tensor(5)), torch.tensor(False)),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_the_membrane_is_the_solution_of_the_equation(name: str) -> None:
    inside = MASKS[name]
    given = values(1, *inside.shape[-2:])
    found, expected = membrane(given, inside), solved_directly(given, inside)
    around = given[(~inside).expand_as(given)]
    assert float((found - expected).abs().max()) < 0.02 * float(around.max() - around.min()), name
    assert bool((found[(~inside).expand_as(found)] == 0).all())


@pytest.mark.parametrize("name", MASKS)
def test_the_membrane_stays_between_the_values_around_it_and_a_constant_stays_constant(name: str) -> None:
    inside = MASKS[name]
    given = values(1, *inside.shape[-2:], seed=1)
    found = membrane(given, inside)
    for channel in range(3):
        around, within = given[0, channel][~inside[0, 0]], found[0, channel][inside[0, 0]]
        room = 0.01 * float(around.max() - around.min())
        assert float(around.min()) - room <= float(within.min()) and float(within.max()) <= float(around.max()) + room
    constant = membrane(torch.full((1, 3, *inside.shape[-2:]), 0.03), inside)
    torch.testing.assert_close(constant, 0.03 * inside.expand_as(constant).float(), rtol=1e-5, atol=0)


def test_islands_do_not_see_each_other() -> None:
    first, second = ellipse(64, 64, 0.2, 0.2, 0.12), ellipse(64, 64, 0.75, 0.75, 0.2)
    given = values(1, 64, 64)
    both = membrane(given, first | second)
    torch.testing.assert_close(both * first, membrane(given, first), atol=0.02, rtol=0)
    changed = torch.where(ellipse(64, 64, 0.75, 0.75, 0.3), given + 5, given)
    torch.testing.assert_close(membrane(changed, first | second) * first, both * first, atol=0.02, rtol=0)


def test_a_batch_is_its_images_one_by_one() -> None:
    masks = torch.cat(
        [ellipse(48, 48), ellipse(48, 48, 0.2, 0.4, 0.3), torch.ones(1, 1, 48, 48, dtype=torch.bool), ellipse(48, 48, radius=0.0)]
    )
    given = values(4, 48, 48)
    together = membrane(given, masks)
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], membrane(given[i : i + 1], masks[i : i + 1]), atol=0.01, rtol=0)
        one_mask = membrane(given, masks[:1])[i : i + 1]
        torch.testing.assert_close(one_mask, membrane(given[i : i + 1], masks[:1]), atol=1e-6, rtol=0)
    assert not together[2:].any(), "nothing is known of a full mask, and nothing is asked of an empty one"


def test_what_is_large_is_an_object_and_not_a_tone() -> None:
    source = values(1, 32, 32) * 0.1
    inside = ellipse(32, 32)
    x0 = source.clone()
    x0[..., :8] += 1.5
    x0[0, 0, 20, 31] = torch.nan
    shift = tone_shift(x0, source, inside)
    assert bool(shift.isfinite().all()) and float(shift.abs().max()) <= LIMIT
    assert torch.equal(tone_shift(x0, source, torch.ones_like(inside)), torch.zeros_like(source))


SAMPLERS = ("ddpm", "ddim", "dpmpp-2m")
SIZE = 16
CAST = 0.06
"""By how much the model of these tests is too bright."""


def options_of(tone_match: str, **changes: Any) -> EditOptions:
    return EditOptions(**{"steps": "8", "candidates": 2, "tone_match": tone_match, **changes})


def region(seed: int = 0) -> Tensor:
    """A source image [1, 3, S, S] in −1..1."""
    return values(1, SIZE, SIZE, seed).clamp(-0.9, 0.9)


def bright_model(source: Tensor, objective: str = "x0") -> Models:
    """Its prediction is the source, and too bright."""
    return Models(oracle_model(source + CAST, objective))


def edited(models: Models, source: Tensor, mask: EditMask, options: EditOptions, images: Sequence[int] = (0, 1)) -> list[Step]:
    """All steps of an edit without a prompt."""
    return list(edit_steps(models, source, mask, None, options, SeededRandom(1), images))


@pytest.mark.parametrize("objective", ["x0", "eps"])
@pytest.mark.parametrize("tone_match", ["end", "late"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_cast_of_the_network_does_not_reach_the_result(sampler: str, tone_match: str, objective: str) -> None:
    source, inside = region(), ellipse(SIZE, SIZE)
    mask, models = EditMask.of(inside.float()), bright_model(source, objective)
    without = edited(models, source, mask, options_of("off", sampler=sampler))[-1].x
    torch.testing.assert_close((without - source) * inside, CAST * inside.expand_as(without).float(), atol=2e-3, rtol=0)
    result = edited(models, source, mask, options_of(tone_match, sampler=sampler))[-1].x
    torch.testing.assert_close(result, source.expand_as(result), atol=2e-3, rtol=0)
    outside = (~inside).expand_as(result)
    assert torch.equal(result[outside], source.expand_as(result)[outside])


def biased_world(source: Tensor, spread: float = 0.1) -> Models:
    """The exact denoiser of pictures that are normal around the source and a cast. It reproduces its input at the last levels."""
    process = DiffusionConfig(objective="x0", variance="fixed_small")
    alphas = torch.from_numpy(process.respaced(1000).alphas_cumprod).float()

    def x0(x: Tensor, timesteps: Tensor) -> Tensor:
        share = alphas[timesteps.round().long()].view(-1, 1, 1, 1)
        trust = share * spread**2 / (share * spread**2 + 1 - share)
        return trust * x / share.sqrt() + (1 - trust) * (source + CAST)

    return Models(DiffusionModel(Network(x0), process, SIZE))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_late_corrects_what_a_network_keeps_from_the_middle_levels(sampler: str) -> None:
    source, inside = region(), ellipse(SIZE, SIZE)

    def cast_of(tone_match: str) -> float:
        options = options_of(tone_match, sampler=sampler, steps="40", strength=1.0)
        result = edited(biased_world(source), source, EditMask.of(inside.float()), options, range(64))[-1].x
        return float((result - source)[inside.expand_as(result)].mean())

    without, end, late = (cast_of(choice) for choice in ("off", "end", "late"))
    assert without == pytest.approx(CAST, rel=0.15)
    assert end > 0.6 * without and abs(late) < 0.25 * without, (without, end, late)


def test_end_acts_on_the_last_step_and_late_on_the_last_levels() -> None:
    schedule = tiny_models().ddpm.config.respaced("40")
    assert [i for i in range(40) if acts_at("end", i, schedule)] == [0]
    late = [i for i in range(40) if acts_at("late", i, schedule)]
    assert late == list(range(len(late))) and 1 < len(late) < 40
    assert schedule.alphas_cumprod[len(late) - 1] >= LATE > schedule.alphas_cumprod[len(late)]
    assert not any(acts_at("off", i, schedule) for i in range(40))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_moves_by_the_coefficient_of_the_prediction_times_the_membrane(sampler: str) -> None:
    source, inside = region(), ellipse(SIZE, SIZE)
    models, index, random = tiny_models(), 1, SeededRandom(2)
    schedule = models.ddpm.config.respaced("8")
    x = noise_background(source, index, schedule, random, [0, 1], "start")
    before = 0.9 * source.expand_as(x)

    def step(tone_match: str) -> Step:
        options = options_of(tone_match, sampler=sampler)
        return guided_step(models, x, index, schedule, options, None, inside.float(), random, [0, 1], source, (), before, inside=inside)

    without, late = step("off"), step("late")
    assert torch.equal(step("end").x, without.x)
    shift = tone_shift(without.x0, source, inside)
    assert bool(shift.any())
    torch.testing.assert_close(late.x0, without.x0 + shift)
    previous, now, noise = schedule.alphas_cumprod[0], schedule.alphas_cumprod[1], 1 - schedule.alphas_cumprod
    if sampler == "ddpm":
        coefficient = previous**0.5 * (1 - now / previous) / noise[1]
    elif sampler == "ddim":
        coefficient = previous**0.5 - (noise[0] / noise[1] * now) ** 0.5
    else:
        h, h_before = (float(schedule.half_log_snr[i] - schedule.half_log_snr[i + 1]) for i in (0, 1))
        coefficient = previous**0.5 * (1 - np.exp(-h)) * (1 + 0.5 * h / h_before)
    torch.testing.assert_close(late.x - without.x, float(coefficient) * shift, atol=1e-5, rtol=1e-4)


def test_a_soft_mask_is_matched_where_the_step_is_blended(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def record(x0: Tensor, source: Tensor, inside: Tensor) -> Tensor:
        seen.append(inside)
        return tone_shift(x0, source, inside)

    monkeypatch.setattr(sample_module, "tone_shift", record)
    source = region()
    mask = EditMask.of(torch.linspace(0, 1, SIZE).expand(1, 1, SIZE, SIZE), "soft")
    result = edited(bright_model(source), source, mask, options_of("late"))[-1].x
    assert len(seen) > 1 and torch.equal(seen[-1], mask.inside)
    areas = [int(inside.sum()) for inside in seen]
    assert areas == sorted(areas) and areas[0] < areas[-1], "more is free at every level"
    torch.testing.assert_close(result, source.expand_as(result), atol=2e-3, rtol=0)


def test_nothing_is_known_around_a_full_mask_and_off_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source, models = region(), tiny_models()
    full = EditMask.of(torch.ones(1, 1, SIZE, SIZE))
    assert torch.equal(edited(models, source, full, options_of("late"))[-1].x, edited(models, source, full, options_of("off"))[-1].x)
    monkeypatch.delattr(sample_module, "tone_shift")
    assert {name: options.tone_match for name, options in PRESETS.items()} == {
        "best": "late",
        "fast": "end",
        "paper": "off",
        "official": "off",
    }
    edited(models, source, EditMask.of(ellipse(SIZE, SIZE).float()), options_of("off"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_candidate_does_not_depend_on_its_batch(sampler: str) -> None:
    source, mask = region(), EditMask.of(ellipse(SIZE, SIZE, 0.2, 0.4, 0.3).float())
    options = options_of("late", sampler=sampler)
    together = edited(tiny_models(), source, mask, options, (0, 1, 2))[-1].x
    alone = edited(tiny_models(), source, mask, options, (1,))[-1].x
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)
    parts = tiny_models()
    parts.limits.rows = 1
    torch.testing.assert_close(edited(parts, source, mask, options, (0, 1, 2))[-1].x, together, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rule", ["binary", "soft"])
def test_pixels_outside_the_mask_keep_their_bits(rule: str) -> None:
    picture = (values(1, 40, 56) * 0.3 + 0.5).clamp(0, 1)
    given = (ellipse(40, 56) | ellipse(40, 56, 0.05, 0.9, 0.2)).float() * 0.9
    result = edit_picture(picture, given, None, tiny_models(), options_of("late", mask_rule=rule))
    outside = ~EditMask.of(given, rule).inside.expand_as(picture)
    for candidate in result.candidates:
        assert same_bits(result.picture(candidate)[outside], picture[outside]) and candidate.score.background_error == 0


def test_algorithm_1_has_nothing_to_match() -> None:
    source, mask, models = region(), EditMask.of(ellipse(SIZE, SIZE).float()), tiny_models()
    first, second = (edited(models, source, mask, options_of(choice, algorithm="local"))[-1].x for choice in ("off", "late"))
    assert torch.equal(first, second)
    notes = options_without_effect(preset("best", algorithm="local", tone_match="end"), models.ddpm, False)
    assert any("tone_match" in note.options for note in notes)
