"""The benchmark of the views that rank the candidates of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import ranking
from blended_core.clip.model import ClipModel
from blended_core.rank import RANKING_VIEWS, clip_distance_of_views
from blended_core.toy.world import demo_scene

from .tiny import tiny_clip

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The result of an edit of which the judge accepted a part, and of one of which it accepted all."""
    scene, _ = demo_scene("snow", 1000)
    for number, accepted in enumerate(([True, False, True], [True, True, True])):
        file = tmp_path / "pairs" / "best" / f"{number:03}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        pair = {"number": number, "background": "snow", "seed": 1000, "name": "dog"}
        record = {"asked": {"pair": pair}, "candidates": [{"accepted": a, "clip_distance": 0.0} for a in accepted]}
        file.write_text(json.dumps(record), "utf-8")
        tiles = [scene, 255 - scene, scene // 2]
        Image.fromarray(np.concatenate(tiles, 1)).save(file.with_suffix(".png"))
    return tmp_path


def test_edits_that_no_order_serves_are_left_out(folder: Path) -> None:
    (edit,) = ranking.rankable(folder)
    squares, mask, prompt, record = edit
    assert squares.shape == (3, 3, 64, 64) and mask.shape == (1, 1, 64, 64) and prompt == "a dog"
    assert [c["accepted"] for c in record["candidates"]] == [True, False, True]


def test_distances_are_those_that_rank_an_edit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "COUNTS", (1, 4, 32))
    clip: ClipModel = tiny_clip()
    ((squares, mask, prompt, _),) = ranking.rankable(folder)
    found = ranking.distances(squares, mask, clip, prompt, seeds=2)
    assert {kind: scores.shape for kind, scores in found.items()} == {"random": (2, 3, 3), "scrambled Sobol": (2, 3, 3), "Sobol": (1, 3, 3)}
    for place, views in enumerate(ranking.COUNTS):
        used = clip_distance_of_views(squares, mask, clip, clip.prompt(prompt), views=views)
        np.testing.assert_allclose(found["Sobol"][0, place], used.numpy(), rtol=1e-5)
    assert (found["random"][:, 0] == found["Sobol"][:, 0]).all(), "the first view is not warped"
    assert (found["random"][0, 1:] != found["random"][1, 1:]).all()


def test_the_spread_of_a_score_ignores_what_all_candidates_share() -> None:
    record = {"candidates": [{"accepted": a} for a in (True, False)]}
    scores = np.array([[[0.1, 0.2]], [[0.5, 0.8]]])  # two sets, one number of views, two candidates
    figures = ranking.row([(record, {"random": scores})], "random", 0)
    assert figures["auc"] == [1.0, 1.0] and figures["spread"] == pytest.approx(np.std([-0.05, -0.15], ddof=1))
    reverse = ranking.row([(record, {"random": scores[..., ::-1]})], "random", 0)
    assert reverse["auc"] == [0.0, 0.0] and reverse["spread"] == pytest.approx(figures["spread"])


def test_the_table_has_a_line_for_each_number_of_views(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "COUNTS", (1, 2))
    figures = ranking.measure(folder, tiny_clip(), 2)
    assert (figures["edits"], figures["candidates"], figures["seeds"]) == (1, 3, 2)
    lines = ranking.table(figures).splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {7} and lines[2].endswith("| 0.0000 | 0.0000 |")


def test_the_published_table_is_that_of_the_record() -> None:
    figures = json.loads((ROOT / "docs" / "quality_views.json").read_text("utf-8"))
    assert ranking.table(figures) in (ROOT / "docs" / "quality.md").read_text("utf-8")
    place = figures["views"].index(RANKING_VIEWS)
    drawn, scrambled = (figures["rows"][kind][place] for kind in ("random", "scrambled Sobol"))
    assert scrambled["spread"] < drawn["spread"] and abs(np.mean(scrambled["auc"]) - np.mean(drawn["auc"])) < np.ptp(drawn["auc"]) / 2
