"""World 2: scenes from a seed, the split of the photographs, the notice of licenses, and the cases for CLIP and the judge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blended_core.errors import BlendedError
from blended_core.evaluation.judge2 import ANSWERS, Judge2Network
from blended_core.evaluation.world2_cases import NONE, box_blur, damaged, describe, random_case
from blended_core.schedule import Schedule
from blended_core.toy import world, world2
from blended_core.toy.world2 import (
    DESIGN_NAMES,
    GROUNDS,
    SIDE,
    WORDS,
    Crop,
    Placed,
    Scene,
    draw,
    draw_ground,
    photographs,
    random_scene,
    render,
)
from blended_core.toy.world2_sources import HELD_BACK, PHOTOGRAPHS, TRAINING
from blended_core.training.ddpm2 import FRACTION, beginning, errors, folder_batch, loss_of_v, scenes_batch, timesteps, write_small
from blended_core.training.judge2 import as_batch, judge_loss
from blended_core.training.world2_pictures import notice


def test_a_seed_draws_the_same_scene_and_another_seed_another() -> None:
    first, same, other = (random_scene(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first == same
    np.testing.assert_array_equal(render(first), render(same))
    assert render(first).shape == (SIDE, SIDE, 3) and render(first).dtype == np.uint8
    assert not np.array_equal(render(first), render(other))


def test_a_scene_can_be_drawn_at_another_size_and_shape() -> None:
    scene = Scene(Crop("rocks", side=0.5), (Placed("cat", "noto", 0.5, 0.5, 0.5, angle=10, shadow=0.3),))
    small, large = render(scene), render(scene, 256, 256)
    shrunk = large.reshape(SIDE, 4, SIDE, 4, 3).mean((1, 3))
    assert np.abs(shrunk - small).mean() < 8
    assert render(scene, 96, 64).shape == (64, 96, 3)


def test_every_photograph_exists_and_no_photograph_is_in_both_splits() -> None:
    training, held_back = photographs(TRAINING), photographs(HELD_BACK)
    assert not set(training) & set(held_back)
    assert len(training) >= 25 and len(held_back) >= 6
    files = {p.file for p in PHOTOGRAPHS}
    assert files == {p.name for p in (world2.DATA / "photographs").iterdir()}
    assert len({p.name for p in PHOTOGRAPHS}) == len(PHOTOGRAPHS) == len({(p.package, p.path) for p in PHOTOGRAPHS})
    assert {p.ground for p in PHOTOGRAPHS} <= set(GROUNDS)
    with pytest.raises(BlendedError, match="split"):
        photographs("test")


@pytest.mark.parametrize("split", [TRAINING, HELD_BACK])
def test_scenes_of_a_split_show_its_photographs_alone(split: str) -> None:
    rng = np.random.default_rng(0)
    grounds = [random_scene(rng, split=split).ground for _ in range(300)]
    seen = {g.photograph for g in grounds if isinstance(g, Crop)}
    assert seen <= set(photographs(split))
    assert len(seen) > 5
    assert any(isinstance(g, world.Scene) for g in grounds)


def test_the_notice_names_every_picture_and_is_the_stored_one() -> None:
    text = (world2.DATA / "LICENSES.md").read_text(encoding="utf-8")
    assert text == notice()
    for photograph in PHOTOGRAPHS:
        line = next(line for line in text.splitlines() if f"photographs/{photograph.file} " in line)
        assert photograph.author in line and photograph.license in line
    for design in DESIGN_NAMES:
        assert f"| {design} |" in text


def test_the_data_stay_small() -> None:
    assert (world2.DATA / "sprites.webp").stat().st_size < 400_000
    assert sum(p.stat().st_size for p in (world2.DATA / "photographs").iterdir()) < 3_000_000


def test_all_designs_of_a_word_differ_and_are_seen() -> None:
    assert len(WORDS) >= 16 and len(DESIGN_NAMES) >= 3
    for word in WORDS:
        drawn = [world2.sprite(Placed(word, design, 0.5, 0.5, 0.6), 40) for design in DESIGN_NAMES]
        for i, one in enumerate(drawn):
            assert 0.15 < one[..., 3].mean() < 0.95, (word, DESIGN_NAMES[i])
            assert all(np.abs(one - other).mean() > 0.02 for other in drawn[:i]), word


def test_objects_vary_in_size_place_and_design() -> None:
    rng = np.random.default_rng(1)
    placed = [random_scene(rng, objects=1).objects[0] for _ in range(300)]
    sizes = [p.size * SIDE for p in placed]
    assert min(sizes) < 24 and max(sizes) > 48
    assert {p.design for p in placed} == set(DESIGN_NAMES) and {p.name for p in placed} == set(WORDS)
    assert np.std([p.x for p in placed]) > 0.05
    assert {p.mirrored for p in placed} == {True, False} and any(p.shadow for p in placed) and any(p.angle for p in placed)


def test_without_variety_objects_are_of_one_design_and_upright() -> None:
    rng = np.random.default_rng(1)
    scenes = [random_scene(rng, objects=1, size=(0.6, 0.6), wander=0, variety=0, photographic=0) for _ in range(60)]
    for scene in scenes:
        (placed,) = scene.objects
        assert (placed.design, placed.x, placed.y, placed.size) == (DESIGN_NAMES[0], 0.5, 0.5, 0.6)
        assert not (placed.mirrored or placed.angle or placed.shadow) and isinstance(scene.ground, world.Scene)


def test_what_lies_outside_the_object_and_its_shadow_is_the_ground() -> None:
    scene = Scene(Crop("life", side=0.6), (Placed("apple", "twemoji", 0.5, 0.5, 0.5),))
    changed = (draw(scene) != draw_ground(scene.ground)).any(-1)
    left, top, side = scene.objects[0].square(SIDE, SIDE)
    changed[top : top + side, left : left + side] = False
    assert not changed.any()


@pytest.mark.parametrize(("name", "design"), [("unicorn", "noto"), ("cat", "ascii")])
def test_an_unknown_object_is_refused(name: str, design: str) -> None:
    with pytest.raises(BlendedError, match="world 2"):
        Placed(name, design, x=0.5, y=0.5, size=0.5)


def test_an_unknown_photograph_is_refused() -> None:
    with pytest.raises(BlendedError, match="photograph"):
        Crop("moon")


def test_sentences_are_true_of_what_they_describe() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        scene = random_scene(rng)
        things = frozenset(p.name for p in scene.objects)
        assert describe(rng, things, scene.word).matches(things, scene.word)


def test_a_damaged_ground_differs_near_the_mask_only() -> None:
    rng = np.random.default_rng(0)
    ground = draw_ground(Crop("rocks", side=0.5))
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[20:44, 16:40] = 1
    for _ in range(30):
        change = np.abs(damaged(rng, ground, mask, lambda: 1 - ground) - ground)
        assert change[20:44, 16:40].mean() > 0.005
        assert not change[:17].any() and not change[47:].any() and not change[:, :13].any() and not change[:, 43:].any()


def test_cases_cover_every_answer() -> None:
    cases = [random_case(np.random.default_rng(seed)) for seed in range(250)]
    assert {c.answer for c in cases} == set(ANSWERS)
    assert {c.intact for c in cases} == {True, False, None}
    assert all(c.answer == NONE for c in cases if c.intact is None)
    assert all(c.picture.shape == (SIDE, SIDE, 3) and c.picture.min() >= 0 and c.picture.max() <= 1 for c in cases)


def test_a_box_blur_is_a_mean() -> None:
    picture = np.zeros((SIDE, SIDE), np.float32)
    picture[10, 10] = 9
    assert box_blur(picture, 1)[11, 9] == pytest.approx(1)
    assert box_blur(picture, 1)[12, 10] == 0


def test_the_judge_learns_both_questions() -> None:
    torch.manual_seed(0)
    x, answers, intact = as_batch([random_case(np.random.default_rng(seed)) for seed in range(24)])
    network = Judge2Network()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    first = last = judge_loss(network(x), answers, intact)
    for _ in range(6):
        optimizer.zero_grad()
        last = judge_loss(network(x), answers, intact)
        last.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert last.item() < first.item()


class Oracle(torch.nn.Module):
    """Knows the scenes: returns the v of each, beside a fraction of the variance."""

    def __init__(self, x0: torch.Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.x0, self.schedule = x0, schedule

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, s = (
            torch.as_tensor(v, dtype=torch.float32)[t.long()][:, None, None, None]
            for v in (self.schedule.sqrt_alphas_cumprod, self.schedule.sqrt_one_minus_alphas_cumprod)
        )
        return torch.cat([(a * x_t - self.x0) / s, torch.full_like(x_t, -1.0)], 1)


def test_the_loss_of_v_vanishes_for_the_truth() -> None:
    schedule = Schedule("linear", 1000)
    x0, kinds = scenes_batch()(np.random.default_rng(0), 4, 1.0)
    assert x0.shape == (4, 3, SIDE, SIDE) and kinds.shape == (4,)
    t = torch.tensor([0, 50, 400, 999])
    mse, tone, bound = loss_of_v(Oracle(x0, schedule), x0, t, torch.randn(x0.shape), schedule)
    assert float(mse) < 1e-4 and float(tone) < 1e-8 and float(bound) < 0.1
    (row,) = errors(Oracle(x0, schedule), x0, schedule, (200,))
    assert max(row) < 0.01


def test_timesteps_are_dense_at_the_clean_end() -> None:
    t = timesteps(np.random.default_rng(0), 20_000, 1000)
    assert int(t.min()) >= 0 and int(t.max()) <= 999
    # u² falls below 30 in √0.03 of the cases; the other draws do in one of 300.
    assert float((t < 30).float().mean()) == pytest.approx(0.3 * 0.03**0.5, abs=0.01)


def test_a_folder_of_pictures_can_be_trained_on() -> None:
    folder = world2.DATA / "photographs"
    x0, kinds = folder_batch(folder)(np.random.default_rng(0), 3, 1.0)
    assert x0.shape == (3, 3, SIDE, SIDE) and not kinds.any()
    assert float(x0.min()) >= -1 and float(x0.max()) <= 1


def test_a_network_that_predicts_x0_begins_with_its_sign_flipped(tmp_path: Path) -> None:
    weights = {"out.2.weight": torch.ones(6, 1, 1, 1), "out.2.bias": torch.ones(6)}
    for objective, sign in (("x0", -1), ("v", 1)):
        file = tmp_path / f"{objective}.safetensors"
        save_file(weights, str(file), metadata={"diffusion": json.dumps({"objective": objective})})
        begun = beginning(file)
        assert begun["out.2.bias"].tolist() == pytest.approx([sign] * 3 + [FRACTION] * 3)
        assert (begun["out.2.weight"][:3] == sign).all() and not begun["out.2.weight"][3:].any()


def test_the_variance_of_a_sure_prediction_is_the_least() -> None:
    """Where x̂0 is right, the bound is smaller at the lower end of the variance than at the upper one."""
    schedule = Schedule("linear", 1000)
    x0, _ = scenes_batch()(np.random.default_rng(0), 2, 1.0)
    t = torch.tensor([100, 300])

    class Wide(Oracle):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.cat([super().forward(x_t, t)[:, :3], torch.ones_like(x_t)], 1)

    bounds = [float(loss_of_v(net, x0, t, torch.randn(x0.shape), schedule)[2]) for net in (Oracle(x0, schedule), Wide(x0, schedule))]
    assert bounds[0] < bounds[1]


def test_a_small_state_holds_the_averaged_weights_in_half_precision(tmp_path: Path) -> None:
    whole = {
        "model": {"w": torch.zeros(2)},
        "ema": {"w": torch.ones(2)},
        "readers": {"r": torch.ones(1)},
        "step": 5,
        "elapsed": 9.0,
        "optimizers": {"adamw": {"state": {}}},
    }
    torch.save(whole, tmp_path / "state.pt")
    write_small(tmp_path / "state.pt", tmp_path / "small.pt")
    small = torch.load(tmp_path / "small.pt", weights_only=True)
    assert small["model"]["w"].tolist() == [1, 1] and small["model"]["w"].dtype == torch.float16
    assert (small["step"], small["elapsed"], small["optimizers"]) == (5, 9.0, {}) and "ema" not in small
