"""DPM-Solver++(2M), log-SNR spacing, and the image encoder of CLIP."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from blended_core.diffusion import DiffusionConfig, ddim_step, dpmpp_2m_step
from blended_core.errors import BlendedError
from blended_core.options import preset
from blended_core.sample import edit_steps
from blended_core.schedule import log_snr_timesteps

from . import tiny

SIZE = tiny.SIZE


def solved(respacing: str, multistep: bool, spread: float = 0.5) -> float:
    """x at the clean end where x_T is 1, for normal pixels of that spread, in float64: the solver on the exact x̂0."""
    schedule = DiffusionConfig().respaced(respacing)
    x, previous = torch.ones(1, 1, 1, 1, dtype=torch.float64), None
    for index in range(len(schedule) - 1, 0, -1):
        share = float(schedule.alphas_cumprod[index])
        x0 = x * (math.sqrt(share) * spread**2 / (share * spread**2 + 1 - share))
        x, previous = dpmpp_2m_step(x, x0, previous if multistep else None, index, None, schedule), x0
    return float(x)


def exact(spread: float = 0.5) -> float:
    """The same by the solution of the probability flow: x keeps its share of the standard deviation of its level."""
    alphas = DiffusionConfig().respaced("1000").alphas_cumprod
    deviations = np.sqrt(alphas * spread**2 + 1 - alphas)
    return float(deviations[0] / deviations[-1])


def test_two_steps_give_an_order_more_than_one() -> None:
    errors = {many: [abs(solved(f"logsnr{n}", many) / exact() - 1) for n in (20, 40, 80)] for many in (False, True)}
    orders = {many: [math.log2(a / b) for a, b in pairwise(found)] for many, found in errors.items()}
    assert all(0.8 < order < 1.3 for order in orders[False])
    assert all(order > 1.9 for order in orders[True])
    assert errors[True][1] < errors[False][1] / 5


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("index", [1, 20, 38])
def test_its_first_step_is_one_of_ddim(eta: float, index: int) -> None:
    schedule = DiffusionConfig().respaced(40)
    x, x0, noise = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    step = dpmpp_2m_step(x, x0, None, index, noise, schedule, eta)
    torch.testing.assert_close(step, ddim_step(x, x0, index, noise, schedule, eta), atol=1e-5, rtol=1e-5)
    assert torch.equal(dpmpp_2m_step(x, x0, x, 0, noise, schedule, eta), x0)


def test_noise_keeps_the_variance_of_a_level() -> None:
    """A step of the random process takes x_t of the data's own distribution to x_{t−1} of it, to first order in the size of the step."""
    schedule, spread, index = DiffusionConfig().respaced("logsnr200"), 0.5, 120
    share, share_next = (float(schedule.alphas_cumprod[i]) for i in (index, index - 1))
    generator = torch.Generator().manual_seed(1)
    x = math.sqrt(share * spread**2 + 1 - share) * torch.randn(1, 1, 400, 400, generator=generator)
    x0 = x * (math.sqrt(share) * spread**2 / (share * spread**2 + 1 - share))
    reached = dpmpp_2m_step(x, x0, None, index, torch.randn(x.shape, generator=generator), schedule, 1.0)
    assert float(reached.var()) == pytest.approx(share_next * spread**2 + 1 - share_next, rel=0.01)
    with pytest.raises(BlendedError, match="needs noise"):
        dpmpp_2m_step(x, x0, None, index, None, schedule, 0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("count", [1, 2, 7, 20, 100, 400, 1000])
def test_log_snr_spacing_keeps_as_many_steps_as_asked_for(schedule: str, count: int) -> None:
    alphas = DiffusionConfig(schedule=schedule).respaced("1000").alphas_cumprod
    kept = log_snr_timesteps(alphas, count)
    assert len(kept) == count and kept == sorted(set(kept)) and kept[0] == 0
    assert kept[-1] == (999 if count > 1 else 0)


def test_log_snr_spacing_is_even_where_whole_steps_allow_it() -> None:
    schedule = DiffusionConfig().respaced("logsnr20")
    gaps = -np.diff(schedule.half_log_snr)
    assert gaps.std() / gaps.mean() < 0.12
    with pytest.raises(BlendedError, match="at most 1000"):
        len(DiffusionConfig().respaced("logsnr1001"))
    with pytest.raises(BlendedError, match="logsnr20"):
        preset("best", steps="logsnr")


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.75, 1.0])
def test_strength_means_one_noise_in_every_spacing(strength: float) -> None:
    process = DiffusionConfig()
    even, spaced = process.respaced("1000"), process.respaced("logsnr40")
    wanted = even.half_log_snr[even.start_index(strength)]
    found = spaced.half_log_snr[spaced.start_index(strength)]
    assert abs(found - wanted) <= 0.51 * np.abs(np.diff(spaced.half_log_snr)).max()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
def test_a_loop_with_a_perfect_network_ends_at_its_picture(objective: str, eta: float) -> None:
    truth = tiny.random_picture(SIZE, SIZE, seed=99) * 2 - 1
    models = tiny.tiny_models(tiny.oracle_model(truth, objective))
    mask = tiny_mask()
    options = preset("best", steps="logsnr8", strength=1.0, sampler="dpmpp-2m", eta=eta, tone_match="off")
    source = torch.zeros(1, 3, SIZE, SIZE)
    *_, last = edit_steps(models, source, mask, None, options, tiny.Recorded(), [0])
    assert torch.allclose(last.x, torch.where(mask.inside, truth, source), atol=2e-3)


def tiny_mask() -> Any:
    from blended_core.mask import EditMask

    values = torch.zeros(1, 1, SIZE, SIZE)
    values[..., 3:13, 4:12] = 1
    return EditMask.of(values)


def test_it_extrapolates_from_the_step_before() -> None:
    """Two steps of a loop are those of the formula, with x̂0 of the first step in the second; splitting the batch changes nothing."""
    options = preset("best", steps="logsnr6", strength=1.0, sampler="dpmpp-2m")
    source, mask = torch.zeros(1, 3, SIZE, SIZE), tiny_mask()

    def run(models: Any, images: list[int]) -> list[Any]:
        return list(edit_steps(models, source, mask, None, options, tiny.Recorded(), images))

    steps = run(tiny.tiny_models(), [0, 1])
    schedule = DiffusionConfig().respaced("logsnr6")
    inside = mask.inside.expand(2, 3, -1, -1)
    second = dpmpp_2m_step(steps[0].x, steps[1].x0, steps[0].x0, 4, None, schedule)
    assert torch.allclose(steps[1].x[inside], second[inside], atol=1e-6)
    first_order = dpmpp_2m_step(steps[0].x, steps[1].x0, None, 4, None, schedule)
    assert not torch.allclose(steps[1].x[inside], first_order[inside], atol=1e-3)
    limited = tiny.tiny_models()
    limited.limits.rows = 1
    apart = run(limited, [0, 1])
    torch.testing.assert_close(apart[-1].x, steps[-1].x, rtol=1e-4, atol=1e-3)
