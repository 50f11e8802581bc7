"""Random numbers depend on the name of their stream alone, and so a candidate on its seed and its number alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blended_core import edit as edit_module
from blended_core.augment import DISTORTION, ViewParameters, balanced_views, corners, draw_views, warp_views
from blended_core.edit import edit_picture
from blended_core.errors import BlendedError
from blended_core.options import preset
from blended_core.random import MAX_SEED, SeededRandom
from blended_core.result import EditResult

from . import tiny

SEEDS = st.integers(0, MAX_SEED)
PURPOSES = st.sampled_from(["start", "step", "background", "views", "class"])
SHAPE = (3, 4, 5)
TOLERANCE = 2e-4
"""Between batches of other sizes, in −1..1: convolutions add in another order, and an edit of few steps amplifies it."""


@settings(max_examples=60, deadline=None)
@given(SEEDS, PURPOSES, st.integers(0, 999), st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True), st.randoms())
def test_random_numbers_depend_on_neither_batch_nor_order(seed: int, purpose: str, level: int, images: list[int], shuffler: object) -> None:
    random = SeededRandom(seed)
    together = random.noise(purpose, level, images, SHAPE)
    assert together.shape == (len(images), *SHAPE) and together.dtype == torch.float32 and together.device.type == "cpu"
    torch.manual_seed(seed % 1000)  # the global generator has no part in it
    for row, image in reversed(list(enumerate(images))):
        assert torch.equal(SeededRandom(seed).noise(purpose, level, [image], SHAPE)[0], together[row])
    other = list(images)
    shuffler.shuffle(other)  # type: ignore[attr-defined]
    assert torch.equal(random.noise(purpose, level, other, SHAPE), together[[images.index(i) for i in other]])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(SEEDS, PURPOSES, st.integers(0, 999), st.integers(0, 10**6)), min_size=2, max_size=6, unique=True)
)  # fmt: skip
def test_other_names_give_other_random_numbers(names: list[tuple[int, str, int, int]]) -> None:
    rows = [SeededRandom(seed).noise(purpose, level, [image], SHAPE) for seed, purpose, level, image in names]
    for i, a in enumerate(rows):
        assert not any(torch.equal(a, b) for b in rows[:i])


def test_names_cannot_run_together() -> None:
    """1 and 11 must not meet 11 and 1."""
    assert not torch.equal(SeededRandom(1).noise("step", 11, [1], SHAPE), SeededRandom(1).noise("step", 1, [11], SHAPE))
    assert not torch.equal(SeededRandom(1).noise("step", 1, [1], SHAPE), SeededRandom(11).noise("step", 1, [1], SHAPE))


@pytest.mark.parametrize("purpose", ["start", "step", "background", "views", "class"])
def test_a_window_and_a_visit_change_the_numbers_and_none_keeps_them(purpose: str) -> None:
    plain = SeededRandom(4)
    assert SeededRandom(4, window=None, visit=None) == plain == plain.at() == plain.at(3, 2).at()
    named = [
        plain,
        plain.at(window=0),
        plain.at(window=1),
        plain.at(visit=0),
        plain.at(visit=1),
        plain.at(0, 0),
        plain.at(0, 1),
        plain.at(1, 0),
    ]
    rows = [random.noise(purpose, 5, [2], SHAPE) for random in named]
    assert torch.equal(rows[0], SeededRandom(4, None, None).noise(purpose, 5, [2], SHAPE))
    for i, a in enumerate(rows):
        assert torch.equal(a, named[i].noise(purpose, 5, [2], SHAPE))
        assert not any(torch.equal(a, b) for b in rows[:i])


def test_a_window_and_a_visit_reach_labels_and_views() -> None:
    plain = SeededRandom(4)
    for other in (plain.at(window=0), plain.at(visit=0)):
        assert not torch.equal(plain.labels(5, range(40), 1000), other.labels(5, range(40), 1000))
        assert not torch.equal(plain.views(5, [0], 4, 16, True).affine, other.views(5, [0], 4, 16, True).affine)
    assert torch.equal(plain.labels(5, range(40), 1000), plain.at().labels(5, range(40), 1000))


def test_noise_is_standard_normal() -> None:
    rows = SeededRandom(3).noise("step", 7, range(50), (3, 32, 32))
    assert abs(float(rows.mean())) < 0.01 and abs(float(rows.std()) - 1) < 0.01
    flat = rows.flatten(1)
    between = torch.corrcoef(flat) - torch.eye(50)
    assert float(between.abs().max()) < 0.1, "two candidates share noise"


def test_a_seed_keeps_its_meaning() -> None:
    """Seeds that people wrote down must give the same picture after the next release."""
    assert SeededRandom(42).generator("step", 3, 1).initial_seed() == 3387141961371519045
    assert torch.allclose(SeededRandom(42).noise("step", 3, [1], (3,)), torch.tensor([[-1.674218, -1.815641, 0.270992]]), atol=1e-5)


@pytest.mark.parametrize("seed", [-1, 2**64, -(2**70)])
def test_seeds_have_bounds(seed: int) -> None:
    with pytest.raises(BlendedError, match=rf"seed is {seed}; give a whole number from 0 to {MAX_SEED}"):
        SeededRandom(seed)
    with pytest.raises(BlendedError, match="seed is"):
        preset("best", seed=seed)
    SeededRandom(0), SeededRandom(MAX_SEED)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 30), st.integers(1, 1000))
def test_labels_are_classes(seed: int, images: int, classes: int) -> None:
    labels = SeededRandom(seed).labels(5, range(images), classes)
    assert labels.shape == (images,) and labels.dtype == torch.int64
    assert int(labels.min()) >= 0 and int(labels.max()) < classes
    assert torch.equal(labels[-1:], SeededRandom(seed).labels(5, [images - 1], classes))


def test_labels_reach_all_classes() -> None:
    assert set(SeededRandom(0).labels(0, range(200), 5).tolist()) == {0, 1, 2, 3, 4}


# --- views ------------------------------------------------------------------------------------------------------------


def test_view_parameters_belong_to_the_image() -> None:
    random = SeededRandom(9)
    together = random.views(4, [0, 1, 2], 5, 16, True)
    assert len(together) == 15
    for image in range(3):
        alone = random.views(4, [image], 5, 16, True)
        for name in ("affine_gate", "affine", "perspective_gate", "perspective"):
            assert torch.equal(getattr(together, name)[image::3], getattr(alone, name)), "rows run image fastest"
    assert not torch.equal(together.affine, random.views(5, [0, 1, 2], 5, 16, True).affine)


def moved(matrices: Tensor, points: Tensor) -> Tensor:
    """Points [K, 2] through each of [R, 3, 3]; → [R, K, 2]."""
    out = torch.cat([points, torch.ones(len(points), 1)], 1).double() @ matrices.double().transpose(1, 2)
    return out[..., :2] / out[..., 2:]


@pytest.mark.parametrize("symmetric", [True, False])
def test_view_parameters_are_those_of_the_paper(symmetric: bool) -> None:
    size, count = 32, 1500
    views = draw_views(torch.Generator().manual_seed(0), count, size, symmetric)
    for gate in (views.affine_gate, views.perspective_gate):
        assert gate.dtype == torch.bool and abs(float(gate.float().mean()) - 0.7) < 0.05
    centre = torch.tensor([[(size - 1) / 2] * 2])
    shift = (moved(views.affine, centre) - centre)[:, 0]
    assert 0.09 * size < float(shift[:, 1].abs().max()) <= 0.1 * size + 1e-3
    if symmetric:
        assert 0.09 * size < float(shift[:, 0].abs().max()) <= 0.1 * size + 1e-3
    else:
        assert float(shift[:, 0].abs().max()) < 1e-3, "the reference shifts along y alone"
    turn = torch.rad2deg(torch.atan2(views.affine[:, 1, 0], views.affine[:, 0, 0]))
    assert 14 < float(turn.abs().max()) <= 15.001
    lengths = views.affine[:, :2, :2].double().square().sum(1).sqrt()
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4), "no scaling"
    ends = moved(views.perspective, corners(size))
    inwards = (ends - corners(size)) * torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    limit = DISTORTION * size / 2
    assert float(inwards.min()) > -1e-3 and 0.95 * limit < float(inwards.max()) <= limit + 1e-3


def test_warps_go_from_source_to_destination() -> None:
    """A dot is found where the matrices say; a closed gate leaves the row as it is."""
    size = 33
    views = draw_views(torch.Generator().manual_seed(5), 40, size)
    picture = torch.zeros(40, 1, size, size)
    picture[..., 15:18, 15:18] = 1
    warped = warp_views(picture, views)
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy"), -1).float()
    for row in range(40):
        matrix = torch.eye(3)
        if views.affine_gate[row]:
            matrix = views.affine[row]
        if views.perspective_gate[row]:
            matrix = views.perspective[row] @ matrix
        target = moved(matrix[None], torch.tensor([[16.0, 16.0]]))[0, 0]
        mass = warped[row, 0]
        found = (grid * mass[..., None]).sum((0, 1)) / mass.sum()
        assert float((found - target).norm()) < 1.0
        if not views.affine_gate[row] and not views.perspective_gate[row]:
            assert torch.equal(warped[row], picture[row])
    assert (picture[:, :, 0] == 0).all() and float(picture.sum()) == 40 * 9, "the input was written to"


def test_balanced_views_cover_the_range_of_warps_evenly() -> None:
    """With the corner that it leaves out, a Sobol sequence of 32 has every quarter of each range, and every share of it, equally often."""
    size, center = 32, torch.tensor([[15.5, 15.5]])
    views = balanced_views(31, size)
    turn = torch.rad2deg(torch.atan2(views.affine[:, 1, 0], views.affine[:, 0, 0])).abs()
    shift = (moved(views.affine, center) - center)[:, 0] / (0.2 * size) + 0.5
    inwards = (moved(views.perspective, corners(size)) - corners(size)).abs() / (DISTORTION * size / 2)
    for values in (*shift.T, *inwards.flatten(1).T):
        assert torch.histc(values + 1e-3, 4, 0, 1).sort().values.tolist() == [7, 8, 8, 8]
    assert int((turn < 7.4).sum()) == 15, "between the angles -7.5 and 7.5, which are points themselves"
    for gate in (views.affine_gate, views.perspective_gate):
        assert int(gate.sum()) in (21, 22), "seven tenths, to the nearest view"
    first = balanced_views(15, size)
    assert torch.equal(first.perspective, views.perspective[:15]) and not torch.equal(balanced_views(15, size, 1).affine, first.affine)


def test_rows_and_interleave_fit_together() -> None:
    views = [draw_views(torch.Generator().manual_seed(i), 4, 8) for i in range(3)]
    woven = ViewParameters.interleave(views)
    assert torch.equal(woven.rows(3, 6).affine, torch.stack([v.affine[1] for v in views]))


# --- whole edits ------------------------------------------------------------------------------------------------------

MODELS = tiny.tiny_models()


def run(
    monkeypatch: pytest.MonkeyPatch, candidates: int, batch: int, **changes: object
) -> tuple[EditResult, dict[tuple[str, int, int], Tensor]]:
    """An edit and all noise that it drew, by name."""
    seen: dict[tuple[str, int, int], Tensor] = {}

    class Watched(SeededRandom):
        def noise(self, purpose: str, level: int, images: object, shape: tuple[int, ...]) -> Tensor:
            rows = super().noise(purpose, level, images, shape)  # type: ignore[arg-type]
            for image, row in zip(images, rows, strict=True):  # type: ignore[call-overload]
                assert (purpose, level, image) not in seen or torch.equal(seen[purpose, level, image], row)
                seen[purpose, level, image] = row
            return rows

    monkeypatch.setattr(edit_module, "SeededRandom", Watched)
    mask = torch.zeros(1, 1, 20, 24)
    mask[..., 4:16, 5:19] = 1
    options = preset("best", **{"steps": "4", "candidates": candidates, "batch": batch, "views": 3, "scale": 100.0, **changes})
    prompt = MODELS.clip.prompt("tree") if MODELS.clip else None
    return edit_picture(tiny.random_picture(20, 24), mask, prompt, MODELS, options), seen


def by_number(result: EditResult) -> dict[int, Tensor]:
    return {c.index: c.edited for c in result.candidates}


@pytest.mark.parametrize("changes", [{}, {"sampler": "ddim", "eta": 0.5}, {"background_noise": "shared"}, {"algorithm": "local"}])
def test_the_batch_size_changes_nothing(monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]) -> None:
    whole, drawn = run(monkeypatch, 4, 4, **changes)
    for batch in (1, 2, 3):
        other, redrawn = run(monkeypatch, 4, batch, **changes)
        assert drawn.keys() == redrawn.keys()
        assert all(torch.equal(drawn[name], redrawn[name]) for name in drawn)
        for index, picture in by_number(other).items():
            assert float((picture - by_number(whole)[index]).abs().max()) <= TOLERANCE * max(1.0, float(picture.abs().max()))
    again, _ = run(monkeypatch, 4, 4, **changes)
    assert all(tiny.same_bits(a.edited, b.edited) for a, b in zip(whole.candidates, again.candidates, strict=True)), (
        "the same run, the same bits"
    )


def test_a_candidate_is_the_same_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = by_number(run(monkeypatch, 1, 1)[0]), by_number(run(monkeypatch, 5, 1)[0])
    assert tiny.same_bits(few[0], many[0])
    assert all(float((many[0] - many[i]).abs().max()) > 0.01 for i in range(1, 5)), "candidates must differ"
    other = by_number(run(monkeypatch, 1, 1, seed=1)[0])
    assert float((few[0] - other[0]).abs().max()) > 0.01, "seeds must differ"
