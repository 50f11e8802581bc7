"""The judge, the evaluation and the training examples."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blended_core.cli import main
from blended_core.cli.parser import build_parser
from blended_core.cli.request import options_of_arguments
from blended_core.diffusion import DiffusionConfig
from blended_core.errors import BlendedError
from blended_core.evaluation import metrics, plots
from blended_core.evaluation.ground import ground_error, tone_and_edge
from blended_core.evaluation.judge import ANSWERS, NONE, Judge, Verdict
from blended_core.evaluation.metrics import as_table, pairs, rank_auc, summary
from blended_core.evaluation.rows import ROWS, shortened
from blended_core.io.atomic import sha256
from blended_core.mask import distance_inward
from blended_core.options import PRESETS
from blended_core.sample import Models
from blended_core.toy import corrupt
from blended_core.toy.captions import describe
from blended_core.toy.models import CLIP, DDPM, JUDGE
from blended_core.toy.world import BACKGROUNDS, OBJECTS, Placed, Scene, draw_background, random_scene, render
from blended_core.training import judge as judge_training
from blended_core.training.clip import CORRUPTED, Examples, estimator, match_matrix, matching_loss, shape_mask

from .tiny import tiny_models

ROOT = Path(__file__).parent.parent
EMBEDDED = {"ddpm": DDPM, "clip": CLIP, "judge": JUDGE}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.mark.parametrize("kind", ["one", "two", "empty"])
def test_the_judge_classifies_validation_scenes(judge: Judge, kind: str) -> None:
    assert judge_training.accuracy(judge, kind, 300) >= 0.99


@pytest.mark.parametrize("kind", ["scrambled", "fragment", "mixture", "blob"])
def test_the_judge_rejects_corrupted_objects(judge: Judge, kind: str) -> None:
    rng = np.random.default_rng(99)
    rows, masks = [], []
    for _ in range(100):
        scene = random_scene(rng, objects=1, size=(34 / 64, 46 / 64), centered=1.0)
        placed, intact_scenes, empty = scene.objects[0], corrupt.render_float(scene), draw_background(scene)
        picture = {
            "scrambled": lambda w=intact_scenes, p=placed: corrupt.scrambled(rng, w, p),
            "fragment": lambda w=intact_scenes, e=empty, p=placed: corrupt.fragment(rng, w, e, p),
            "mixture": lambda w=intact_scenes, s=scene, p=placed: corrupt.mixture(rng, w, s, p),
            "blob": lambda e=empty, p=placed: corrupt.blob(rng, e, p),
        }[kind]()
        half = placed.size * 0.6
        rows.append(picture)
        masks.append(shape_mask(rng, (placed.x - half, placed.y - half, placed.x + half, placed.y + half)))
    x = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() * 2 - 1
    answers = judge(x, torch.from_numpy(np.stack(masks))[:, None])
    assert sum(v.answer == NONE for v in answers) >= 90, Counter(v.answer for v in answers)


def test_the_mask_selects_the_object(judge: Judge) -> None:
    left, right = Placed("rocket", 0.25, 0.5, 0.42), Placed("tree", 0.75, 0.5, 0.42)
    picture = torch.from_numpy(corrupt.render_float(Scene("meadow", (left, right)))).permute(2, 0, 1)[None] * 2 - 1
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, :, 16:48, 1:31] = 1
    masks[1, :, 16:48, 33:63] = 1
    first, second = judge(picture.expand(2, -1, -1, -1), masks)
    assert first.accepts("rocket") and second.accepts("tree") and not first.accepts("tree")
    large = torch.nn.functional.interpolate(picture, scale_factor=2, mode="bilinear")
    assert judge(large, torch.nn.functional.interpolate(masks[:1], scale_factor=2))[0].accepts("rocket")


def test_a_verdict_below_one_half_is_not_accepted() -> None:
    assert not Verdict("cat", {"cat": 0.49, NONE: 0.4}).accepts("cat")
    assert Verdict("cat", {"cat": 0.51, NONE: 0.4}).accepts("cat")


def test_the_judge_checks_shapes(judge: Judge) -> None:
    with pytest.raises(BlendedError, match=r"not \(1, 4, 64, 64\) and \(1, 1, 64, 64\)"):
        judge(torch.zeros(1, 4, 64, 64), torch.zeros(1, 1, 64, 64))
    for masks in (torch.zeros(2, 1, 64, 64), torch.zeros(1, 1, 32, 64)):
        with pytest.raises(BlendedError, match="the judge takes"):
            judge(torch.zeros(3, 3, 64, 64), masks)
    assert (*OBJECTS, NONE) == ANSWERS and JUDGE.stat().st_size < 2_000_000


def test_guidance_does_not_import_the_judge() -> None:
    users = {
        p.relative_to(ROOT).as_posix()
        for folder in ("blended_core", "nodes")
        for p in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(from|import)\b.*\bjudge\b", p.read_text("utf-8"), re.MULTILINE)
    }
    trained = {"training/judge.py", "training/judge2.py"}
    asked = {"evaluation/judge2.py", "evaluation/metrics.py", "cli/evaluate.py"}
    assert users == {f"blended_core/{name}" for name in trained | asked}


def test_pairs_are_fixed_and_the_lists_are_disjoint() -> None:
    chosen, held_back = pairs(50), pairs(50, held_back=True)
    assert chosen == pairs(50) and chosen[:7] == pairs(7)
    assert not {(p.background, p.seed) for p in chosen} & {(p.background, p.seed) for p in held_back}
    for list_of_pairs in (chosen, held_back):
        counts = Counter(p.name for p in list_of_pairs)
        assert set(counts) == set(OBJECTS) and max(counts.values()) - min(counts.values()) <= 1
        assert {p.background for p in list_of_pairs} == set(BACKGROUNDS)
    assert {p.prompt for p in chosen if p.name in ("apple", "cat")} == {"an apple", "a cat"}


def record(*candidates: tuple[float | None, bool], **more: Any) -> dict[str, Any]:
    rows = [
        {"clip_distance": d, "gain": None if d is None else 1 - d, "background_error": 0.0, "tone": 2.0, "edge": None, "answer": "cat" if a else NONE,
         "accepted": a, "one_view_distance": None if d is None else -d}
        for d, a in candidates
    ]  # fmt: skip
    return {"task": metrics.ADD, "candidates": rows, "diversity": 0.5, "seconds": 2.0, **more}


def removed(*errors: tuple[float, float]) -> dict[str, Any]:
    rows = [{"candidate": i, "ground_rmse": rmse, "ground_low": low} for i, (rmse, low) in enumerate(errors)]
    return {"task": metrics.REMOVE, "candidates": rows, "seconds": 99.0}


def test_summary_of_a_row() -> None:
    records = [
        record((0.1, True), (0.2, True), (0.3, False), (0.4, False)),
        record((0.1, False), (0.2, True), (0.3, False), (0.4, False), diversity=0.3, seconds=4.0),
        removed((9.0, 4.0), (11.0, 2.0)),
    ]
    row = summary("x", records)
    assert row["batch_precision"] == 3 / 8 and row["best_precision"] == 1 / 2 and row["nothing"] == 5 / 8
    assert row["top_fifth"] == 1 / 2 and row["bottom_fifth"] == 0
    assert row["rank_auc"] == pytest.approx((4 + 2) / 7)  # correct: all 4 comparisons of the first pair, 2 of 3 of the second
    assert row["one_view_auc"] == pytest.approx(1 / 7), "the same comparisons with reversed order"
    assert row["diversity"] == pytest.approx(0.4) and row["seconds"] == 3 and row["clip_gain"] == pytest.approx(0.75)
    assert row["pairs"] == 2 and row["candidates"] == 8 and row["background_error_max"] == 0
    assert row["by_rank"] == [0.5, 1, 0, 0]
    assert (row["tone"], row["edge"], row["ground_rmse"], row["ground_low"]) == (2, None, 10, 3)
    assert rank_auc([record((0.1, True), (0.1, False))]) == 0.5
    assert rank_auc([record((None, True), (0.1, False))]) is None
    assert summary("y", [record((None, True), diversity=None)])["clip_gain"] is None
    table = as_table([row, summary("y", [record((None, False), diversity=None)])])
    assert "37.5%" in table and "50% / 0%" in table and "10.0 / 3.0" in table and "– / –" in table
    assert len({len(line) for line in table.splitlines()}) == 1


def within_a_disc(side: int = 64, radius: float = 20.0) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    return (((rows - side / 2) ** 2 + (columns - side / 2) ** 2).sqrt() <= radius)[None, None]


def test_tone_and_edge_see_a_cast_and_neither_texture_nor_objects() -> None:
    inside, ground = within_a_disc(), torch.full((1, 3, 64, 64), 0.5)
    checks = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    beside = torch.where(torch.arange(64) < 32, 1.0, -1.0).expand(64, 64)
    fading = (1 - distance_inward(inside, 5)[0, 0] / 5).clamp(min=0)
    pictures = torch.cat([ground + 5 / 255 * pattern * inside for pattern in (torch.ones(64, 64), checks, beside, fading)])
    (cast, edge), (texture, _), (opposed, _), (faded, faded_edge) = tone_and_edge(pictures, ground, inside)
    assert cast == pytest.approx(5, abs=1e-3) and edge == pytest.approx(5, abs=1e-3)
    assert texture is not None and texture < 0.5
    assert opposed == pytest.approx(5, abs=0.1), "a cast to both sides does not cancel"
    assert faded is not None and faded_edge is not None and faded < 3 < faded_edge
    pictures[:1, :, 20:44, 20:44] += 0.3
    ((with_object, _),) = tone_and_edge(pictures[:1], ground, inside)
    assert with_object == pytest.approx(5, abs=0.1)
    assert tone_and_edge(ground + 0.4 * inside, ground, inside) == [(None, None)], "no ground is left"
    ((thin, _),) = tone_and_edge(ground + 5 / 255, ground, torch.zeros_like(inside).index_fill(3, torch.tensor([7]), True))
    assert thin == pytest.approx(5, abs=1e-3)


def test_the_error_of_the_ground_and_its_low_frequencies() -> None:
    inside, ground = within_a_disc(), torch.full((1, 3, 64, 64), 0.5)
    checks = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    outside_only = (~inside).float()
    pictures = torch.cat([ground + 5 / 255 * pattern for pattern in (torch.ones(64, 64), checks, outside_only[0, 0])])
    cast, texture, clean = ground_error(pictures, ground, inside)
    assert cast == pytest.approx((5, 5), abs=1e-3)
    assert texture[0] == pytest.approx(5, abs=1e-3) and texture[1] < 1
    assert clean == (0, 0)


def test_removals_are_pairs_the_other_way_round() -> None:
    cases = metrics.removals(pairs(8))
    assert [(c.number, c.task) for c in cases] == [(0, metrics.REMOVE), (4, metrics.REMOVE)]
    assert [c.prompt for c in cases] == [f"an empty {pair.background}" for pair in pairs(8)[::4]]
    best = ROWS["best"]
    assert cases[0].options(best) == replace(best, strength=1.0) and pairs(1)[0].options(best) == best


def test_rows_match_their_names() -> None:
    assert (
        ROWS["naive-paste"].algorithm == "local"
        and ROWS["naive-paste"].keeps_background
        and not ROWS["naive-paste"].guidance.needs_perceptual
    )
    for weight in (100, 1000, 10000):
        row = ROWS[f"local-{weight}"]
        assert row.guidance.background_scale == weight and not row.keeps_background
    assert ROWS["no-augmentation"].guidance.views == 1 and ROWS["x0-gradient"].guidance.gradient == "x0"
    assert ROWS["ddpm"].guidance == replace(ROWS["best"].guidance, end=1.0) and (ROWS["ddpm"].sampler, ROWS["ddpm"].steps) == ("ddpm", "40")
    assert ROWS["unet-gradient"] == replace(ROWS["ddpm"], guidance=replace(ROWS["ddpm"].guidance, gradient="unet"))
    assert all(ROWS[f"ddim-{n}"].steps == f"ddim{n}" and ROWS[f"ddim-{n}"].sampler == "ddim" for n in (10, 20, 25, 30, 50))
    for name, options in PRESETS.items():
        row = ROWS[name]
        scaled = replace(options.guidance, scale=row.guidance.scale)
        assert row == replace(options, steps=shortened(options.steps), guidance=scaled), "a preset with fewer steps and a scale"
        assert float(row.steps) / float(ROWS["paper"].steps) == float(options.steps) / float(PRESETS["paper"].steps)
    assert [ROWS[f"tone-{choice}"].tone_match for choice in ("off", "end")] == ["off", "end"] and ROWS["best"].tone_match == "late"


class FixedVerdict(Verdict):
    """A verdict that accepts every object, unless its answer is NONE."""

    def accepts(self, name: str) -> bool:
        return self.answer != NONE


class EverySecond:
    """A judge that accepts every second candidate, starting with the first."""

    def __call__(self, pictures: Any, masks: Any) -> list[Verdict]:
        assert pictures.shape[1:] == (3, 64, 64) and masks.shape == (1, 1, 64, 64)
        return [FixedVerdict(NONE if i % 2 else "cat", dict.fromkeys(OBJECTS, 0.5)) for i in range(len(pictures))]


def distance(a: Any, b: Any) -> Any:
    return (a - b).abs().mean((1, 2, 3))


@pytest.fixture
def models() -> Models:
    return tiny_models()


@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
def test_a_stopped_run_resumes(tmp_path: Path, models: Models) -> None:
    rows = {"best": replace(ROWS["best"], steps="4"), "ddim": replace(ROWS["ddim-10"], steps="ddim4")}
    cases = pairs(3)
    seen: list[tuple[str, int, bool]] = []

    def run(stop_at: int | None = None, networks: dict[str, str] | None = None) -> list[dict[str, Any]]:
        seen.clear()

        def on_pair(name: str, pair: Any, reused: bool) -> None:
            seen.append((name, pair.number, reused))
            if len(seen) == stop_at:
                raise KeyboardInterrupt

        judge: Any = EverySecond()
        return metrics.evaluate(tmp_path, models, distance, judge, rows, cases, 3, networks, on_pair=on_pair)

    with pytest.raises(KeyboardInterrupt):
        run(stop_at=3)
    first = run()
    assert seen == [("best", 0, True), ("ddim", 0, True), ("best", 1, True), ("ddim", 1, False), ("best", 2, False), ("ddim", 2, False)]
    assert run() == first and all(reused for _, _, reused in seen)
    (tmp_path / "pairs" / "best" / "001.json").write_text("[]")
    (tmp_path / "pairs" / "ddim" / "002.png").unlink()
    again = run()
    assert [s[:2] for s in seen if not s[2]] == [("best", 1), ("ddim", 2)]
    for a, b in zip(first, again, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    run(networks={"ddpm": "another"})
    assert not any(reused for _, _, reused in seen)
    assert first[0]["candidates"] == 9 and first[0]["background_error"] == 0.0 and first[0]["diversity"] > 0


@pytest.mark.filterwarnings("ignore::blended_core.errors.BlendedWarning")
def test_rows_with_equal_options_are_measured_once(tmp_path: Path, models: Models) -> None:
    options = replace(ROWS["best"], steps="4")
    rows = {"best": options, "other": replace(options, seed=options.seed + 1), "again": options}
    reused: dict[str, bool] = {}

    def run() -> list[dict[str, Any]]:
        judge: Any = EverySecond()
        return metrics.evaluate(
            tmp_path, models, distance, judge, rows, pairs(1), 2, on_pair=lambda name, _pair, flag: reused.update({name: flag})
        )

    best, other, again = run()
    assert reused == {"best": False, "other": False, "again": True}
    assert {**again, "name": "best"} == best and other["clip_gain"] != best["clip_gain"]
    files = [metrics.record_path(tmp_path, name, pairs(1)[0]).with_suffix(".png").read_bytes() for name in rows]
    assert files[2] == files[0] != files[1]


def test_the_command_writes_table_plot_and_contact_sheets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ROWS, "best", replace(ROWS["best"], steps="3"))
    out = tmp_path / "out"
    arguments = ["evaluate", "--only", "best", "--pairs", "2", "--candidates", "2", "--out", str(out), "--device", "cpu"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    report = json.loads((out / "evaluation.json").read_text("utf-8"))
    assert [row["name"] for row in report["rows"]] == ["best"] and report["rows"][0]["background_error"] == 0
    measured = set(report["rows"][0])
    assert {"batch_precision", "best_precision", "background_error", "diversity", "clip_gain", "seconds"} <= measured
    assert {"tone", "edge", "ground_rmse", "ground_low"} <= measured
    assert report["pairs"] == 2 and len(report["networks"]["ddpm"]) == 64
    assert as_table(report["rows"]) in output and (out / "evaluation.md").read_text("utf-8").strip() in output
    for name in ("evaluation.png", "best.png", "comparison.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 200
    monkeypatch.setitem(ROWS, "paper", replace(ROWS["paper"], steps="2"))
    assert main([*arguments[:2], "paper", *arguments[3:]]) == 0, "a second run in the same folder"
    both = json.loads((out / "evaluation.json").read_text("utf-8"))["rows"]
    assert [row["name"] for row in both] == ["best", "paper"] and both[0] == report["rows"][0]
    stamp = (out / "pairs" / "best" / "000.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (out / "pairs" / "best" / "000.json").stat().st_mtime_ns == stamp
    capsys.readouterr()
    assert sorted(p.name for p in (out / "pairs" / "best").iterdir()) == [
        f"{name}.{kind}" for name in ("000-removed", "000", "001") for kind in ("json", "png")
    ]
    for arguments_of_error, message in (
        (["--only", "better"], "unknown row better; known are best, fast"),
        (["--pairs", "0"], "--pairs is 0"),
        (["--threads", "-1"], "threads is -1; give a whole number of at least 1 and at most 1024 (--threads)"),
        (["--out", str(out / "evaluation.json")], "is a file; name a folder"),
    ):
        assert main(["evaluate", "--device", "cpu", *arguments_of_error]) == 2
        assert message in capsys.readouterr().err


def test_the_message_of_a_stopped_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "evaluate", stopped)
    assert main(["evaluate", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 130
    assert f"kept in {tmp_path / 'out'}, and the same command continues" in capsys.readouterr().err


def test_a_full_disk_ends_an_evaluation_with_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, on_pair: Any, **__: Any) -> None:
        on_pair("best", pairs(1)[0], False)
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "pairs" / "best" / "001.json"))

    monkeypatch.setattr(metrics, "evaluate", full)
    assert main(["evaluate", "--only", "best", "--pairs", "2", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert (
        f"No space left on device: {tmp_path / 'out' / 'pairs' / 'best' / '001.json'}. 1 of 3 pairs are finished in {tmp_path / 'out'}"
        in said
    )


def test_contact_sheets_frame_accepted_candidates(tmp_path: Path, models: Models) -> None:
    judge: Any = EverySecond()
    cases = pairs(1)
    metrics.evaluate(tmp_path, models, distance, judge, {"r": replace(ROWS["best"], steps="2")}, cases, 2)
    plots.row_sheet(tmp_path / "r.png", tmp_path, "r", cases)
    with Image.open(tmp_path / "r.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    y = 74 + plots.TILE // 2
    frames = [tuple(pixels[y, plots.LABEL + i * (plots.TILE + plots.GAP) - 2]) for i in range(3)]
    assert frames == [plots.PAGE, plots.ACCEPTED, plots.REJECTED]


def test_the_published_table_supports_its_text() -> None:
    text = (ROOT / "docs" / "quality.md").read_text("utf-8")
    report = json.loads((ROOT / "docs" / "quality.json").read_text("utf-8"))
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [name for name in ROWS if name in rows] and {*PRESETS} - {"official"} <= set(rows)
    local = ["local-1000"]
    assert rows["local-1000"]["background_error"] > 0
    for name, row in rows.items():
        assert name in local or row["background_error_max"] == 0
        assert row["edge"] < rows["naive-paste"]["edge"] or name in ("naive-paste", *local)
        if ROWS[name].ranking != "reference":
            assert row["top_fifth"] > row["bottom_fifth"] and row["rank_auc"] > 0.5
    assert rows["ddpm"]["batch_precision"] > rows["no-augmentation"]["batch_precision"] + 0.1
    assert all(row["rank_auc"] >= row["one_view_auc"] for row in (rows["best"], rows["ddpm"]))
    assert rows["best"]["batch_precision"] >= rows["ddpm"]["batch_precision"], "in half of the time"
    edges = [rows[name]["edge"] for name in ("naive-paste", "tone-off", "tone-end", "best")]
    assert edges == sorted(edges, reverse=True) and edges[-1] < 1.3
    assert rows["best"]["batch_precision"] > rows["tone-off"]["batch_precision"] - 0.02
    earlier = text.split("## Rows measured earlier")[1].split("##")[0]
    assert {*rows, *re.findall(r"^\| ([a-z0-9.-]+)  +\|", earlier, re.M)} - {"row"} == set(ROWS)
    assert rows["fast"]["best_precision"] >= 0.95 * rows["best"]["best_precision"]
    assert as_table(report["rows"]) in text and "@@" not in text
    # The results belong to the shipped weights.
    assert {name: sha256(file) for name, file in EMBEDDED.items()} == {name: report["networks"][name] for name in EMBEDDED}


def test_the_presets_call_the_networks_as_seldom_as_the_text_says() -> None:
    def calls(name: str) -> tuple[int, int]:
        """(of the diffusion model, views that CLIP sees) for one candidate."""
        options = ROWS[name]
        schedule = DiffusionConfig().respaced(options.steps)
        start = schedule.start_index(options.strength)
        guided = [options.guidance.at(index, len(schedule)) for index in range(start + 1)]
        return start + 1, sum(guidance.views for guidance in guided if guidance is not None)

    assert {name: calls(name) for name in ("ddpm", "best", "fast")} == {"ddpm": (30, 240), "best": (15, 104), "fast": (9, 56)}


def test_the_held_back_results_belong_to_the_shipped_weights_and_meet_the_target() -> None:
    text = (ROOT / "docs" / "quality.md").read_text("utf-8")
    report = json.loads((ROOT / "docs" / "quality_held_back.json").read_text("utf-8"))
    (row,) = report["rows"]
    assert row["name"] == "ddpm" and report["held_back"] is True and (report["pairs"], report["candidates"]) == (50, 8)
    assert row["background_error_max"] == 0 and row["batch_precision"] >= 0.6 and row["best_precision"] >= 0.9
    assert f"{row['batch_precision']:.1%}" in text and f"{row['best_precision']:.1%}" in text and f"{row['rank_auc']:.2f}" in text
    assert {name: sha256(file) for name, file in EMBEDDED.items()} == {name: report["networks"][name] for name in EMBEDDED}
    presets = json.loads((ROOT / "docs" / "quality_held_back_presets.json").read_text("utf-8"))
    assert (
        presets["held_back"] is True
        and presets["networks"] == report["networks"]
        and [row["candidates"] for row in presets["rows"]] == [128] * 3
    )
    assert f"\n{as_table(presets['rows'])}\n" in text


def test_the_documented_commands_match_the_rows() -> None:
    """The commands in docs/quality.md cover all rows, with the guidance scale and the steps for photographs."""
    text = (ROOT / "docs" / "quality.md").read_text("utf-8")
    (block,) = (b for b in re.findall(r"```bash\n(.*?)```", text, flags=re.S) if "edit()" in b)
    lines = [shlex.split(line) for line in block.splitlines() if line.startswith("edit ")]
    assert [name for _, name, *_ in lines] == list(ROWS)
    for _, name, *options in lines:
        args = build_parser().parse_args(["edit", "photo.jpg", "--mask", "mask.png", *options])
        row = ROWS[name]
        plain = replace(row, guidance=replace(row.guidance, scale=PRESETS[row.preset].guidance.scale), candidates=8)
        options = options_of_arguments(args)
        steps = row.steps if row.sampler == "ddim" else shortened(options.steps)
        assert replace(options, steps=steps) == replace(plain, steps=row.steps), name


def test_examples_contain_estimates_of_the_diffusion_model() -> None:
    levels_seen: list[int] = []

    def estimate(pictures: Any, levels: Any) -> Any:
        levels_seen.extend(levels)
        return pictures // 2

    examples = Examples(np.random.default_rng(0), 200, corrupt=0.5, estimates=0.5, estimate=estimate)
    intact_scenes = [(scene, picture) for scene, picture, intact in examples.pool if intact]
    estimated = [not (picture == render(scene)).all() for scene, picture in intact_scenes]
    assert 0.35 < sum(estimated) / len(estimated) < 0.65 and len(intact_scenes) < 200
    assert 0.35 < len(levels_seen) / 200 < 0.65 and max(levels_seen) > 700
    corrupted = [level for level in levels_seen if level < 100]
    assert corrupted  # corrupted objects get less noise
    pictures, masks, truths = examples.draw(8, renew=4)
    assert pictures.shape == (8, 3, 64, 64) and masks.shape == (8, 1, 64, 64) and len(truths) == 8
    truths = examples.draw(200, renew=0)[2]
    spoiled_ones = [t for t in truths if CORRUPTED in t[0]]
    assert 20 < len(spoiled_ones) < 120
    captions = [describe(examples.rng, *t) for t in truths if CORRUPTED not in t[0]]
    truth = match_matrix(captions, truths)
    assert truth.sum(1).min() >= 1  # each caption matches its own image
    corrupted_columns = [i for i, t in enumerate(truths) if CORRUPTED in t[0]]
    assert truth[:, corrupted_columns].sum() == 0  # captions of empty scenes do not match either
    logits = torch.randn(truth.shape, requires_grad=True)
    loss = matching_loss(logits, truth)
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad[:, corrupted_columns].abs().sum() > 0


def test_the_error_of_an_estimate_grows_with_the_noise() -> None:
    rng = np.random.default_rng(0)
    scenes = np.stack([render(random_scene(rng, objects=1)) for _ in range(4)])

    def error(level: int) -> float:
        found = estimator(torch.device("cpu"), np.random.default_rng(1))(scenes, np.full(4, level))
        assert found.shape == scenes.shape and found.dtype == np.uint8
        return float(np.square(found.astype(float) - scenes).mean())

    assert 0 < error(100) < error(400) < error(700)
