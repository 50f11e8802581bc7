"""The commands demo and edit: their files, repeated runs, errors, and runs that end early."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blended_core import edit as edit_module
from blended_core.cli import edit as cli
from blended_core.cli import process
from blended_core.cli.messages import message_of
from blended_core.cli.parser import HEADINGS, build_parser, flag_of
from blended_core.cli.report_input import request_of_report
from blended_core.cli.request import options_of_arguments
from blended_core.errors import BlendedError, BlendedWarning
from blended_core.io import folder, results
from blended_core.io.contact_sheet import contact_sheet
from blended_core.io.images import write_picture
from blended_core.io.request import Request
from blended_core.options import PRESETS, EditOptions, GuidanceOptions, declared
from blended_core.sample import Models, Step
from blended_core.toy.models import CLIP, DDPM
from blended_core.toy.world import Placed, Scene, render

from . import tiny
from .terminal import report_of, run

SMALL = ["--steps", "4", "--candidates", "2", "--views", "2", "--batch", "1"]
HEIGHT, WIDTH = 60, 84


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Arguments that name a picture and its mask."""
    scene = Scene("lake", (Placed("cat", 0.3, 0.5, 0.6),), 3)
    Image.fromarray(render(scene, WIDTH, HEIGHT)).save(tmp_path / "picture.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:50, 40:75] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return [str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png")]


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.array(image)


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error message of a run: one line on stderr, exit code 2, no traceback."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# --- a run with the embedded networks ---------------------------------------------------------------------------------


def test_an_edit_writes_its_files_and_can_be_repeated(
    tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch, embedded: Models, capsys: Any
) -> None:
    monkeypatch.setattr(cli, "load_models", lambda request: embedded)
    out = tmp_path / "out"
    assert run("edit", *inputs, "--prompt", "a red apple", *SMALL, "--out", out, "--animate") == 0
    said = capsys.readouterr().out
    assert "«a red apple»" in said and str(out / "contact_sheet.png") in said

    report = report_of(out)
    candidates = report["candidates"]
    assert [c["rank"] for c in candidates] == [1, 2] and {c["candidate"] for c in candidates} == {0, 1}
    assert candidates[0]["clip_distance"] <= candidates[1]["clip_distance"]
    assert all(c["background_error"] == 0 and c["seam_energy"] >= 0 and c["seed"] == 0 for c in candidates)
    assert all(c["gain"] == pytest.approx(report["source_distance"] - c["clip_distance"]) for c in candidates)
    stems = [Path(c["file"]).stem for c in candidates]
    assert files_in(out) == sorted(
        ["contact_sheet.png", "report.json", *(f"candidates/{s}.png" for s in stems), *(f"animations/{s}.webp" for s in stems)]
    )
    assert report["interrupted"] is False and report["request"]["prompts"] == ["a red apple"]
    assert report["request"]["options"]["steps"] == "4" and report["request"]["options"]["guidance"]["views"] == 2
    assert set(report["versions"]) >= {"python", "torch", "open_clip_torch", "kornia"}
    assert report["picture"] == {"width": WIDTH, "height": HEIGHT, "notes": []}
    assert report["region"]["side"] == 64 and set(report["seconds"]) >= {"load", "diffusion", "paste and score"}
    assert report["inputs"] == {"image": sha256(Path(inputs[0])), "mask": sha256(Path(inputs[2]))}
    assert report["networks"]["sha256"] == {"ddpm": sha256(DDPM), "clip": sha256(CLIP)}

    source, mask = pixels(Path(inputs[0])), pixels(Path(inputs[2])) >= 128
    for entry in candidates:
        result = pixels(out / entry["file"])
        assert np.array_equal(result[~mask], source[~mask])
        assert (result[mask] != source[mask]).any()
        with Image.open(out / entry["file"]) as image:
            about = json.loads(image.info["blended-diffusion"])
        names = {"image": "picture.png", "mask": "mask.png"}
        assert about["candidate"] == entry["candidate"] and about["request"] == {**report["request"], **names}
        assert about["score"]["clip_distance"] == entry["clip_distance"]
        with Image.open(out / "animations" / f"{Path(entry['file']).stem}.webp") as film:
            assert film.n_frames in (3, 4)  # 3 denoised steps of 4, and the result, which WebP merges with a last step equal to it
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width >= 3 * 256 and sheet.height > 256

    again = tmp_path / "again"
    assert run("edit", "--from", out / "report.json", "--out", again) == 0
    repeated = report_of(again)["candidates"]
    assert repeated == candidates, "the same scores to the last digit"
    for entry in candidates:
        assert (again / entry["file"]).read_bytes() == (out / entry["file"]).read_bytes()


@pytest.mark.slow
def test_the_demo_runs_without_files(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "demo"
    assert run("demo", "--out", out, "--candidates", "1", "--device", "cpu", "--seed", "3") == 0
    assert files_in(out) == ["candidates/01_candidate_00.png", "contact_sheet.png", "mask.png", "report.json", "source.png"]
    entry = report_of(out)["candidates"][0]
    assert entry["background_error"] == 0 and math.isfinite(entry["clip_distance"])
    outside = pixels(out / "mask.png")[..., 0] == 0
    assert np.array_equal(pixels(out / entry["file"])[outside], pixels(out / "source.png")[outside])


def test_steps_that_are_not_equal_cannot_be_skipped(tmp_path: Path, inputs: list[str], small_networks: None, capsys: Any) -> None:
    assert run("edit", *inputs, *SMALL, "--prompt", "a tree", "--steps", "logsnr6", "--skip", "2", "--out", tmp_path / "out") == 2
    assert "those of logsnr6 are not; give --strength" in capsys.readouterr().err


# --- smaller runs -----------------------------------------------------------------------------------------------------


def test_options_reach_the_report(tmp_path: Path, inputs: list[str], small_networks: None) -> None:
    out = tmp_path / "out"
    given = [
        "--prompt", "tree", "--prompt", "dog", "--prompt-weight", "1", "--prompt-weight", "-0.5", "--seed", "7", "--sampler", "ddim",
        "--eta", "0.5", "--guidance-scale", "300", "--range-scale", "5", "--gradient", "x0", "--clip-input", "mixed", "--distance", "cosine",
        "--view-chunk", "1", "--clamp", "0.2", "--context", "2", "--feather", "2", "--ranking", "reference", "--class", "random",
    ]  # fmt: skip
    assert run("edit", *inputs, *SMALL, *given, "--skip", "1", "--out", out) == 0
    request = report_of(out)["request"]
    options, guidance = request["options"], request["options"]["guidance"]
    assert request["prompts"] == ["tree", "dog"] and request["weights"] == [1.0, -0.5]
    found = {k: options[k] for k in ("seed", "sampler", "eta", "context", "feather", "ranking", "class_choice", "strength")}
    assert found == {
        "seed": 7, "sampler": "ddim", "eta": 0.5, "context": 2, "feather": 2, "ranking": "reference", "class_choice": "random",
        "strength": 0.75,
    }  # fmt: skip
    found = {k: guidance[k] for k in ("scale", "range_scale", "gradient", "clip_input", "distance", "view_chunk", "clamp", "views")}
    assert found == {
        "scale": 300, "range_scale": 5, "gradient": "x0", "clip_input": "mixed", "distance": "cosine", "view_chunk": 1, "clamp": 0.2,
        "views": 2,
    }  # fmt: skip


@pytest.mark.parametrize("arguments", [["--preset", "official"], ["--preset", "paper"], ["--algorithm", "local", "--enforce-background"]])
def test_each_preset_and_algorithm_runs(tmp_path: Path, inputs: list[str], small_networks: None, arguments: list[str]) -> None:
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, *arguments, "--out", tmp_path / "out") == 0
    assert [c["background_error"] for c in report_of(tmp_path / "out")["candidates"]] == [0, 0]


def test_a_report_without_newer_options_is_repeated_with_their_old_values(tmp_path: Path, inputs: list[str], small_networks: None) -> None:
    first, again, as_now = tmp_path / "first", tmp_path / "again", tmp_path / "now"
    ddim = ["--sampler", "ddim", "--reference-size", "0", "--guidance-scale", "300"]
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, *ddim, "--ddim-guidance", "score", "--out", first) == 0
    report = report_of(first)
    del report["request"]["options"]["ddim_guidance"], report["request"]["options"]["guidance"]["reference_size"]
    del report["request"]["ddpm_weights"]
    (first / "report.json").write_text(json.dumps(report), "utf-8")
    assert run("edit", "--from", first / "report.json", "--out", again) == 0
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, *ddim, "--out", as_now) == 0
    found = [[c["clip_distance"] for c in sorted(report_of(out)["candidates"], key=lambda c: c["candidate"])] for out in (again, as_now)]
    told = [c["clip_distance"] for c in sorted(report["candidates"], key=lambda c: c["candidate"])]
    assert found[0] == pytest.approx(told, rel=1e-6) and found[1] != pytest.approx(told, rel=1e-6)


def test_removal_needs_no_clip(tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(cli, "load_models", lambda request: Models(tiny.tiny_model()))
    out = tmp_path / "out"
    assert run("edit", *inputs, "--prompt", "", *SMALL, "--out", out) == 0
    assert "removal" in capsys.readouterr().out
    assert [(c["rank"], c["candidate"], c["clip_distance"], c["gain"]) for c in report_of(out)["candidates"]] == [
        (1, 0, None, None),
        (2, 1, None, None),
    ]


def test_a_conversion_of_the_picture_is_printed_and_reported(tmp_path: Path, inputs: list[str], small_networks: None, capsys: Any) -> None:
    grey = tmp_path / "grey.png"
    Image.fromarray(pixels(Path(inputs[0]))).convert("L").save(grey)
    assert run("edit", grey, *inputs[1:], "--prompt", "", *SMALL, "--out", tmp_path / "out") == 0
    note = "grey.png is a grayscale picture; it is edited as 8-bit RGB."
    assert f"note: {note}" in capsys.readouterr().err and report_of(tmp_path / "out")["picture"]["notes"] == [note]


def test_an_option_without_effect_gives_a_note(tmp_path: Path, inputs: list[str], small_networks: None, capsys: Any) -> None:
    added = ["--sampler", "ddpm", "--eta", "1", "--class", "3", "--lpips", "alex", "--checkpointing", "--cuda-graphs", "auto"]
    assert run("edit", *inputs, "--prompt", "", *SMALL, *added, "--out", tmp_path / "out") == 0
    notes = capsys.readouterr().err
    assert "eta 1 has no effect: only the samplers ddim and dpmpp-2m use it (--eta)." in notes
    assert "class_choice 3 has no effect: the diffusion model is not class-conditional (--class)." in notes
    assert "views 2 has no effect: there is no prompt (--views)." in notes
    assert "(--lpips)" in notes and "(--checkpointing)" in notes
    assert "cuda_graphs auto has no effect on cpu (--cuda-graphs)." in notes
    assert [note for note in report_of(tmp_path / "out")["notes"] if "--eta" in note], "the report has them too"
    for arguments in (["--sampler", "ddim", "--eta", "1"], ["--preset", "official"]):
        assert run("edit", *inputs, "--prompt", "", *SMALL, *arguments, "--overwrite", "--out", tmp_path / "out") == 0
        notes = capsys.readouterr().err
        assert "eta" not in notes and "class_choice" not in notes


def test_the_report_states_the_batch_that_was_chosen(tmp_path: Path, inputs: list[str], small_networks: None) -> None:
    assert run("edit", *inputs, "--prompt", "", *SMALL, "--candidates", "3", "--batch", "0", "--out", tmp_path / "out") == 0
    report = report_of(tmp_path / "out")
    assert report["request"]["options"]["batch"] == 3 and len(report["candidates"]) == 3


def test_the_report_states_the_guidance_scale_of_the_checkpoint(
    tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def models(request: Request) -> Models:
        found = tiny.tiny_models()
        found.ddpm.guidance_scale = 2500.0
        return found

    monkeypatch.setattr(cli, "load_models", models)
    for arguments, scale in (([], 2500), (["--guidance-scale", "1000"], 1000), (["--reference-size", "64"], 2500 / 16)):
        out = tmp_path / f"{scale:g}"
        assert run("edit", *inputs, "--prompt", "tree", *SMALL, *arguments, "--out", out) == 0
        assert report_of(out)["request"]["options"]["guidance"]["scale"] == scale
        assert report_of(out)["networks"]["ddpm"]["guidance_scale"] == 2500
    assert run("edit", "--from", tmp_path / "2500" / "report.json", "--out", tmp_path / "again") == 0
    assert report_of(tmp_path / "again")["candidates"] == report_of(tmp_path / "2500")["candidates"]


def test_the_weight_0_of_a_prompt_is_noted(tmp_path: Path, inputs: list[str], small_networks: None, capsys: Any) -> None:
    texts = ["--prompt", "tree", "--prompt", "cat", "--prompt-weight"]
    assert run("edit", *inputs, *texts, "1", "--prompt-weight", "0", *SMALL, "--out", tmp_path / "one") == 0
    assert "The weight of 'cat' is 0, which has no effect (--prompt-weight)." in capsys.readouterr().err
    assert run("edit", *inputs, *texts, "0", "--prompt-weight", "0", *SMALL, "--out", tmp_path / "none") == 0
    assert "No text is left, so the masked part is filled from its surroundings" in capsys.readouterr().err
    assert [c["clip_distance"] for c in report_of(tmp_path / "none")["candidates"]] == [None, None]
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--out", tmp_path / "alone") == 0
    alone, one = (report_of(tmp_path / name)["candidates"] for name in ("alone", "one"))
    assert [c["clip_distance"] for c in alone] == [c["clip_distance"] for c in one]


def test_a_run_that_gives_only_nan_fails_and_leaves_no_picture(
    tmp_path: Path, inputs: list[str], small_networks: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("blended_core.options.validate", lambda options: None)  # its limit is far from where these networks overflow
    arguments = ["--prompt", "tree", *SMALL, "--guidance-scale", "1e30", "--out", tmp_path / "out"]
    text = failed(capsys, "edit", *inputs, *arguments)
    assert "no candidate is finite" in text and "lower the guidance scale, now 1e+30 (--guidance-scale)." in text
    assert not files_in(tmp_path / "out") if (tmp_path / "out").exists() else True


def test_nearly_opaque_pixels_keep_their_alpha_under_a_soft_mask(
    tmp_path: Path, inputs: list[str], small_networks: None, capsys: Any
) -> None:
    """An alpha of 254 is a mask of 1/255 everywhere, which made the region the whole picture and every pixel opaque."""
    pixels_of = np.dstack([pixels(Path(inputs[0])), np.full((HEIGHT, WIDTH), 254, np.uint8)])
    pixels_of[20:40, 30:50, 3] = 0
    Image.fromarray(pixels_of).save(tmp_path / "alpha.png")
    out = tmp_path / "out"
    assert run("edit", tmp_path / "alpha.png", "--prompt", "", *SMALL, "--soft-mask", "--out", out) == 0
    assert "of the mask is nearly black (1 to 8 of 255); they count as outside" in capsys.readouterr().err
    result = pixels(out / report_of(out)["candidates"][0]["file"])
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[20:40, 30:50] = True
    assert (result[~inside] == pixels_of[~inside]).all() and (result[inside, 3] == 255).all()
    assert report_of(out)["region"]["side"] < HEIGHT and report_of(out)["candidates"][0]["background_pixels"] == (~inside).sum()


def test_the_background_error_says_what_it_compared(tmp_path: Path, inputs: list[str], small_networks: None, capsys: Any) -> None:
    assert run("edit", *inputs, "--prompt", "", *SMALL, "--out", tmp_path / "out") == 0
    outside = WIDTH * HEIGHT - 40 * 35
    assert f"at {outside:,} of {WIDTH * HEIGHT:,} pixels" in capsys.readouterr().out
    white = tmp_path / "white.png"
    Image.new("L", (WIDTH, HEIGHT), 255).save(white)
    assert run("edit", inputs[0], "--mask", white, "--prompt", "", *SMALL, "--out", tmp_path / "whole") == 0
    assert f"at 0 of {WIDTH * HEIGHT:,} pixels" in capsys.readouterr().out
    assert {c["background_error"] for c in report_of(tmp_path / "whole")["candidates"]} == {None}


def test_skip_counts_the_steps_of_the_preset() -> None:
    for sampler, steps in ((None, 30), ("ddpm", 40)):
        args = build_parser().parse_args(["edit", "photo.jpg", "--mask", "mask.png", "--preset", "fast", "--skip", "10"])
        args.sampler = sampler
        assert options_of_arguments(args).strength == (steps - 10) / steps
        args.skip = 60
        with pytest.raises(BlendedError, match=f"--skip is 60 of {steps} steps"):
            options_of_arguments(args)


@pytest.mark.parametrize(("steps", "total"), [("1500", 1500), ("ddim25", 25), ("50,25,10", 85), (" 100 ", 100)])
def test_skip_counts_the_steps_of_the_text(steps: str, total: int) -> None:
    """Whether 1500 steps are possible depends on the model, which may have 4000."""
    options = options_of_arguments(build_parser().parse_args(["edit", "x.png", "--steps", steps, "--skip", "10"]))
    assert options.strength == (total - 10) / total


def test_a_prompt_may_have_several_lines(tmp_path: Path, inputs: list[str], small_networks: None) -> None:
    assert run("edit", *inputs, "--prompt", "a tree\nand a\tdog", *SMALL, "--out", tmp_path / "out") == 0
    assert report_of(tmp_path / "out")["request"]["prompts"] == ["a tree\nand a\tdog"]
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_a_score_of_nan_is_null_in_the_report(
    tmp_path: Path, inputs: list[str], small_networks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit_module, "seam_energy", lambda *_: math.nan)
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--out", tmp_path / "out") == 0
    assert [c["seam_energy"] for c in report_of(tmp_path / "out")["candidates"]] == [None, None]
    (first,) = (tmp_path / "out" / "candidates").glob("*_candidate_00.png")
    with Image.open(first) as image:
        assert "NaN" not in image.info["blended-diffusion"]


def test_a_file_name_that_is_not_utf_8_is_escaped(tmp_path: Path) -> None:
    """As Python represents a Latin-1 file name."""
    assert json.loads(results.as_json({"image": "caf\udce9 λ", "weights": (1.0, math.inf)})) == {
        "image": "caf\udce9 λ",
        "weights": [1.0, None],
    }


def test_a_result_names_no_folders(tmp_path: Path, inputs: list[str], small_networks: None) -> None:
    weights = tmp_path / "clip.pt"
    for file in (weights, tmp_path / "model.pt"):
        file.write_bytes(b"x")
    arguments = ["--ddpm", tmp_path / "model.pt", "--clip", f"ViT-B-16:{weights}"]
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, *arguments, "--out", tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / report_of(tmp_path / "out")["candidates"][0]["file"]) as image:
        about = image.info["blended-diffusion"]
    assert str(tmp_path) not in about
    request = json.loads(about)["request"]
    assert [request[k] for k in ("image", "mask", "ddpm", "clip")] == ["picture.png", "mask.png", "model.pt", "ViT-B-16:clip.pt"]
    assert report_of(tmp_path / "out")["request"]["ddpm"] == str(tmp_path / "model.pt")


def test_the_report_names_the_command(tmp_path: Path, inputs: list[str], small_networks: None) -> None:
    arguments = ["edit", *inputs, "--prompt", "a tree", *SMALL, "--out", str(tmp_path / "out")]
    assert run(*arguments) == 0
    assert report_of(tmp_path / "out")["command"] == shlex.join(["blended-diffusion", *arguments])


def test_the_contact_sheet_needs_only_thumbnails(
    tmp_path: Path, inputs: list[str], small_networks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (inputs[0], inputs[2]):
        with Image.open(name) as image:
            image.resize((700, 500)).save(name)
    sheets: list[Any] = []
    monkeypatch.setattr(results, "contact_sheet", lambda *given: sheets.append(given))
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--out", tmp_path / "out") == 0
    _, source, mask, tiles, *titles = sheets[0]
    assert [tile[0].shape for tile in tiles] == [(183, 256, 3)] * 2
    monkeypatch.undo()
    contact_sheet(tmp_path / "small.png", source, mask, tiles, *titles)
    candidates = report_of(tmp_path / "out")["candidates"]
    full = [(pixels(tmp_path / "out" / c["file"]), *tile[1:]) for c, tile in zip(candidates, tiles, strict=True)]
    contact_sheet(tmp_path / "full.png", source, mask, full, *titles)
    assert np.array_equal(pixels(tmp_path / "small.png"), pixels(tmp_path / "full.png"))


REQUEST = Request("edit", "/a/x.png", None, ("a tree", ""), (1.0, -0.5), overrides={"num_heads": 4}, threads=2)


def test_a_request_is_the_same_after_a_report() -> None:
    values = json.loads(json.dumps(REQUEST.to_dict()))
    assert Request.from_dict(values) == REQUEST
    assert list(values) == [
        "command", "image", "mask", "prompts", "weights", "ddpm", "ddpm_weights", "overrides", "clip", "lpips", "options", "device", "dtype",
        "clip_dtype", "cuda_graphs", "checkpointing", "threads",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "option"), [({"weights": (1.0,)}, "weights"), ({"weights": (1.0, math.inf)}, "weights"), ({"threads": 0}, "threads"),
                            ({"dtype": "fp8"}, "dtype")],
)  # fmt: skip
def test_a_wrong_request_names_its_option(changes: dict[str, Any], option: str) -> None:
    with pytest.raises(BlendedError) as caught:
        replace(REQUEST, **changes)
    assert caught.value.options == (option,)


def test_every_option_with_a_flag_is_an_argument_of_edit() -> None:
    """And the parsed value has the type of the option."""
    values = {"steps": "ddim25", "class_choice": "3", "ddpm": "embedded", "clip": "embedded", "lpips": "auto", "device": "cpu"}
    for kind in (EditOptions, GuidanceOptions, Request):
        for name, (declaration, default) in declared(kind).items():
            if not (flag := flag_of(name, declaration)):
                continue
            if default is False or name == "enforce_background":
                given, wanted = [flag], True
            else:
                text = values.get(name, declaration.choices[-1] if declaration.choices else "1")
                given = [flag, text]
                wanted = (
                    3 if name == "class_choice" else text if isinstance(default, str) else type(default)(1) if default is not None else 1
                )
            args = build_parser().parse_args(["edit", "x.png", *given])
            assert getattr(args, name) == wanted, name
            assert args.flags[name] == flag
            assert default is None or isinstance(getattr(args, name), type(default)) or name == "class_choice"


def test_an_error_is_printed_with_the_flags_of_the_command() -> None:
    error = BlendedError("guidance starts late.", option=("start", "seed"))
    assert message_of(error, build_parser().parse_args(["edit"])) == "guidance starts late (--guide-from, --seed)."
    assert message_of(error, build_parser().parse_args(["demo"])) == "guidance starts late (--seed)."
    assert message_of(error, build_parser().parse_args(["inspect", "x.pt"])) == "guidance starts late."


# --- repeating --------------------------------------------------------------------------------------------------------


def test_a_report_is_repeated_from_a_moved_folder(tmp_path: Path, inputs: list[str], small_networks: None) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--out", out) == 0
    other.mkdir()
    for name in ("picture.png", "mask.png"):
        (tmp_path / name).rename(other / name)
    (out / "report.json").rename(other / "old.json")
    assert run("edit", "--from", other / "old.json", "--out", tmp_path / "again") == 0
    old = json.loads((other / "old.json").read_text("utf-8"))
    assert report_of(tmp_path / "again")["candidates"] == old["candidates"]


def test_from_is_an_error_where_it_would_not_repeat_the_run(tmp_path: Path, inputs: list[str], small_networks: None, capsys: Any) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--out", out) == 0
    report = out / "report.json"
    assert "leave out --seed, --soft-mask." in failed(capsys, "edit", "--from", report, "--seed", "5", "--soft-mask", "--out", again)
    assert run("edit", "--from", report, "--device", "cpu", "--threads", "1", "--out", again) == 0, "the machine may be another"
    assert "does not exist" in failed(capsys, "edit", "--from", tmp_path / "none.json", "--out", tmp_path / "x")
    good = json.loads(report.read_text("utf-8"))
    for name, text in {
        "list": "[]", "broken": "{", "empty": "{}", "no inputs": json.dumps({**good, "inputs": {}}),
        "no options": json.dumps({**good, "request": {"image": "x"}}),
    }.items():  # fmt: skip
        wrong = tmp_path / f"{name}.json"
        wrong.write_text(text)
        assert "is not a report of blended-diffusion" in failed(capsys, "edit", "--from", wrong, "--out", tmp_path / "x")
    good["request"]["options"]["colour"] = 1
    wrong.write_text(json.dumps(good))
    assert "unknown option colour" in failed(capsys, "edit", "--from", wrong, "--out", tmp_path / "x")
    image = Path(inputs[0])
    Image.fromarray(255 - pixels(image)).save(image)
    assert "has changed since that run" in failed(capsys, "edit", "--from", report, "--out", tmp_path / "x")
    image.unlink()
    assert "does not exist anymore" in failed(capsys, "edit", "--from", report, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_hashes_belong_to_the_files_that_were_read(tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The files change while the edit runs."""
    before = {"image": sha256(Path(inputs[0])), "mask": sha256(Path(inputs[2]))}

    def painting(*_: object) -> Models:
        for name in (inputs[0], inputs[2]):
            Image.fromarray(255 - pixels(Path(name))).save(name)
        return tiny.tiny_models()

    monkeypatch.setattr(cli, "load_models", painting)
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--out", tmp_path / "out") == 0
    assert report_of(tmp_path / "out")["inputs"] == before
    assert "has changed since that run" in failed(capsys, "edit", "--from", tmp_path / "out" / "report.json", "--out", tmp_path / "x")


def test_a_report_is_not_repeated_with_other_networks(
    tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tiny.tiny_models()

    class Named:
        name = "embedded"

    monkeypatch.setattr(cli, "load_models", lambda request: replace(models, perceptual=Named()))
    for name in ("model.pt", "clip.pt"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    out = tmp_path / "out"
    given = ["--ddpm", "~/model.pt", "--clip", "ViT-B-16:clip.pt", "--lpips", "auto"]
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, *given, "--out", out) == 0
    report = report_of(out)
    request = report["request"]
    assert [request[k] for k in ("ddpm", "clip", "lpips")] == [str(tmp_path / "model.pt"), f"ViT-B-16:{tmp_path / 'clip.pt'}", "embedded"]
    hashes = report["networks"]["sha256"]
    assert set(hashes) == {"ddpm", "clip", "lpips"} and hashes["clip"] == sha256(tmp_path / "clip.pt")
    assert run("edit", "--from", out / "report.json", "--out", tmp_path / "again") == 0
    (tmp_path / "clip.pt").write_text("other")
    assert "the clip network" in failed(capsys, "edit", "--from", out / "report.json", "--out", tmp_path / "x")
    (tmp_path / "clip.pt").write_text("clip.pt")
    (tmp_path / "model.pt").unlink()
    assert "does not exist anymore" in failed(capsys, "edit", "--from", out / "report.json", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_other_versions_of_libraries_give_a_note(
    tmp_path: Path, inputs: list[str], small_networks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--out", tmp_path / "out") == 0
    report = report_of(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", BlendedWarning)
        request_of_report(tmp_path / "out" / "report.json")
    report["versions"]["torch"] = "1.0"
    (tmp_path / "old.json").write_text(json.dumps(report))
    assert run("edit", "--from", tmp_path / "old.json", "--out", tmp_path / "again") == 0
    assert "note: that run used torch 1.0 (now " in capsys.readouterr().err


def test_a_repeated_demo_is_an_edit(tmp_path: Path, small_networks: None, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert run("demo", "--out", first, "--candidates", "1") == 0
    assert run("edit", "--from", first / "report.json", "--out", again) == 0
    assert report_of(again)["request"]["command"] == "edit"
    assert report_of(again)["candidates"] == report_of(first)["candidates"]
    assert "already holds the results" in failed(capsys, "demo", "--out", again, "--candidates", "1")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_results_are_replaced_only_with_overwrite(tmp_path: Path, inputs: list[str], small_networks: None, capsys: Any) -> None:
    out = tmp_path / "out"
    arguments = ["edit", *inputs, "--prompt", "tree", *SMALL, "--out", out]
    assert run(*arguments, "--candidates", "3", "--animate") == 0
    before = {name: (out / name).read_bytes() for name in files_in(out)}
    assert "already holds the results of a run" in failed(capsys, *arguments)
    assert "already holds" in failed(capsys, "demo", "--out", out)
    assert {name: (out / name).read_bytes() for name in files_in(out)} == before
    (out / "mine.txt").write_text("keep me")
    assert run(*arguments, "--seed", "1", "--overwrite") == 0
    entries = report_of(out)["candidates"]
    assert files_in(out) == sorted(["contact_sheet.png", "mine.txt", "report.json", *(e["file"] for e in entries)]), (
        "nothing of the old run"
    )


@pytest.mark.parametrize("name", ["report.json", "contact_sheet.png", "source.png", "mask.png", "candidates/01_candidate_00.png"])
def test_nothing_is_replaced_without_overwrite(tmp_path: Path, inputs: list[str], small_networks: None, capsys: Any, name: str) -> None:
    """Neither results of either command, nor a file of somebody's own that has the name of a result."""
    out = tmp_path / "out"
    mine = out / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    edit, demo = ["edit", *inputs, "--prompt", "tree", *SMALL, "--out", out], ["demo", "--out", out, "--candidates", "1"]
    for arguments in [demo] if name in ("source.png", "mask.png") else [edit, demo]:
        assert f"({Path(name).name}); choose another --out, or add --overwrite." in failed(capsys, *arguments)
        assert files_in(out) == [name] and mine.read_text() == "mine"
    assert run(*demo, "--overwrite") == 0
    assert not mine.exists() or mine.read_bytes() != b"mine"
    assert "already holds the results of a run" in failed(capsys, *demo)


@pytest.mark.parametrize("place", [0, 2])
def test_a_run_does_not_replace_its_inputs(tmp_path: Path, inputs: list[str], small_networks: None, capsys: Any, place: int) -> None:
    """An edit of an edit, into the same folder."""
    out = tmp_path / "out"
    arguments = ["--prompt", "tree", *SMALL, "--out", out, "--overwrite"]
    assert run("edit", *inputs, *arguments) == 0
    before = {name: (out / name).read_bytes() for name in files_in(out)}
    inputs[place] = str(out / "candidates" / "01_candidate_00.png")
    if not Path(inputs[place]).exists():
        inputs[place] = str(out / "candidates" / "01_candidate_01.png")
    assert "is one of the results" in failed(capsys, "edit", *inputs, *arguments)
    assert {name: (out / name).read_bytes() for name in files_in(out)} == before
    assert run("edit", *inputs, *arguments[:-2], tmp_path / "other") == 0


def test_old_results_are_recognized_by_name(tmp_path: Path, inputs: list[str], small_networks: None, capsys: Any) -> None:
    """A run that was killed left no report, and the user keeps other files in the folder."""
    out = tmp_path / "out"
    old = ["candidates/candidate_07.png", "candidates/03_candidate_09.png", "animations/03_candidate_09.webp"]
    mine = ["candidates/best.png", "candidates/03_candidate_09 (copy).png", "animations/film.webp"]
    for name in old + mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("old")
    arguments = ["edit", *inputs, "--prompt", "tree", *SMALL, "--out", out]
    assert "already holds the results" in failed(capsys, *arguments)
    assert run(*arguments, "--overwrite") == 0
    results = [c["file"] for c in report_of(out)["candidates"]]
    assert files_in(out) == sorted(["contact_sheet.png", "report.json", *mine, *results])


ERRORS: list[tuple[list[str], str]] = [
    (["--prompt", "tree", "--strength", "1.5"], "strength is 1.5; give a number above 0 and at most 1 (--strength)."),
    (["--prompt", "tree", "--steps", "lots"], "respacing 'lots' has the wrong form"),
    (["--prompt", "tree", "--steps", "ddim37"], "no whole stride"),
    (["--prompt", "tree", "--candidates", "0"], "candidates is 0"),
    (["--prompt", "tree", "--views", "0"], "views is 0"),
    (["--prompt", "tree", "--seed", "-1"], "seed is -1"),
    (["--prompt", "tree", "--context", "0.5"], "context is 0.5"),
    (["--prompt", "tree", "--skip", "4"], "--skip is 4 of 4 steps"),
    (["--prompt", "tree", "--class", "dog"], "class_choice is 'dog'; give 'zero', 'random' or the number of a class (--class)."),
    (["--prompt", "tree", "--set", "heads"], "--set 'heads' is not understood"),
    (["--prompt", "tree", "--threads", "0"], "threads is 0; give a whole number of at least 1 and at most 1024 (--threads)."),
    (
        ["--prompt", "tree", "--prompt-weight", "1", "--prompt-weight", "2"],
        "1 prompts were given with 2 weights; give one weight for each prompt (--prompt-weight).",
    ),
    (["--prompt", "tree", "--prompt-weight", "nan"], "the weight of a prompt is nan; give a finite number (--prompt-weight)."),
    (["--prompt", "tree", "--invert-mask", "--mask", "{white}"], "the inverted mask is empty"),
    (["--prompt", "tree", "--mask", "{black}"], "the mask is empty"),
    (["--prompt", "tree", "--mask", "{missing}"], "does not exist"),
    (["--prompt", "tree", "--mask", "{text}"], "is not a picture file"),
    (["--prompt", "tree", "--out", "{text}"], "is a file; name a folder"),
    ([], "no prompt was given"),
]


@pytest.mark.parametrize(("arguments", "words"), ERRORS, ids=[words for _, words in ERRORS])
def test_errors_are_one_sentence_and_write_nothing(
    tmp_path: Path, inputs: list[str], small_networks: None, capsys: Any, arguments: list[str], words: str
) -> None:
    places = {name: str(tmp_path / f"{name}.png") for name in ("white", "black", "missing", "text")}
    Image.new("L", (WIDTH, HEIGHT), 255).save(places["white"])
    Image.new("L", (WIDTH, HEIGHT), 0).save(places["black"])
    Path(places["text"]).write_text("no picture")
    before = files_in(tmp_path)
    assert words in failed(capsys, "edit", *inputs, *SMALL, "--out", tmp_path / "out", *(a.format(**places) for a in arguments))
    assert files_in(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ddpm", "{tmp}/none.pt"], "none.pt: there is no file"),
        (["--device", "abacus"], "'abacus' cannot be used on this computer"),
        (["--clip", "ViT-B-16"], "names no weights"),
        (["--clip", "ViT-B-61:openai"], "open_clip has no model"),
    ],
)
def test_a_missing_network_is_an_error(tmp_path: Path, inputs: list[str], capsys: Any, arguments: list[str], words: str) -> None:
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    assert words in failed(capsys, "edit", *inputs, "--prompt", "a tree", "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--candidates", "0"], "candidates is 0"), (["--seed", "-1"], "seed is -1"), (["--background", "moon"], "unknown background 'moon'")],
)
def test_a_demo_with_wrong_arguments_writes_nothing(tmp_path: Path, capsys: Any, arguments: list[str], words: str) -> None:
    assert words in failed(capsys, "demo", "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["edit", "--steps"], ["paint"], ["edit", "x.png", "--preset", "worst"], ["edit", "--seed", "one"]]
)
def test_a_wrong_command_line_ends_with_code_2(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    "error",
    [BlendedError("a known thing."), RuntimeError("a surprise"), KeyError("odd"), MemoryError(), OSError(28, "No space left on device")],
)
def test_a_traceback_is_printed_only_with_debug(
    tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Exception
) -> None:
    def refuse(*_: object) -> Models:
        raise error

    monkeypatch.setattr(cli, "load_models", refuse)
    arguments = ["edit", *inputs, "--prompt", "tree", "--out", tmp_path / "out"]
    failed(capsys, *arguments)
    assert run(*arguments, "--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "in refuse" in err and err.splitlines()[-1].startswith("error: ")


# --- runs that end early -----------------------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch: pytest.MonkeyPatch, image: int, error: BaseException | None = None) -> None:
    """Ctrl-C, or an error, after the second step of the batch with candidate ``image``."""
    edit_picture = cli.edit_picture

    def interrupted(picture: Any, mask: Any, prompt: Any, models: Any, options: Any, on_step: Any, *rest: Any) -> Any:
        def stop(step: Step) -> None:
            on_step(step)
            if image in step.images and step.done == 2:
                raise error or KeyboardInterrupt

        return edit_picture(picture, mask, prompt, models, options, stop, *rest)

    monkeypatch.setattr(cli, "edit_picture", interrupted)


def test_ctrl_c_keeps_finished_results(
    tmp_path: Path, inputs: list[str], small_networks: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ["edit", *inputs, "--prompt", "tree", *SMALL, "--candidates", "4", "--batch", "2", "--animate"]
    assert run(*arguments, "--out", whole) == 0
    interrupt_at(monkeypatch, 2)
    assert run(*arguments, "--out", out) == 130
    assert "stopped after" in capsys.readouterr().out
    report = report_of(out)
    assert report["interrupted"] is True
    assert [c["rank"] for c in report["candidates"]] == [1, 2] and {c["candidate"] for c in report["candidates"]} == {0, 1}
    assert len(files_in(out)) == 2 + 2 + 2
    finished = {c["candidate"]: whole / c["file"] for c in report_of(whole)["candidates"]}
    for entry in report["candidates"]:
        assert np.array_equal(pixels(out / entry["file"]), pixels(finished[entry["candidate"]]))


def test_ctrl_c_before_the_first_result_writes_nothing(
    tmp_path: Path, inputs: list[str], small_networks: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    interrupt_at(monkeypatch, 0)
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--out", tmp_path / "out") == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_during_writing_keeps_the_earlier_results(
    tmp_path: Path, inputs: list[str], small_networks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the candidate that is being written is lost."""
    written: list[Path] = []

    def interrupted(path: Path, *rest: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        write_picture(path, *rest)

    monkeypatch.setattr(results, "write_picture", interrupted)
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--out", tmp_path / "out") == 130
    report = report_of(tmp_path / "out")
    assert report["interrupted"] is True and [c["candidate"] for c in report["candidates"]] == [0]
    assert files_in(tmp_path / "out") == ["candidates/01_candidate_00.png", "contact_sheet.png", "report.json"]


@pytest.mark.parametrize(
    ("error", "words"),
    [(RuntimeError("CUDA out of memory."), "ran out of memory"), (OSError(28, "No space left on device"), "No space left")],
)
def test_an_error_keeps_finished_results(
    tmp_path: Path, inputs: list[str], small_networks: None, monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Exception, words: str
) -> None:
    interrupt_at(monkeypatch, 2, error)
    out = tmp_path / "out"
    assert words in failed(capsys, "edit", *inputs, "--prompt", "tree", *SMALL, "--candidates", "4", "--batch", "2", "--out", out)
    report = report_of(out)
    assert report["interrupted"] is True and [c["rank"] for c in report["candidates"]] == [1, 2]
    assert "2 of 4 candidates were finished" in report["notes"][-1] and words in report["notes"][-1]
    assert files_in(out) == sorted(["contact_sheet.png", "report.json", *(c["file"] for c in report["candidates"])])


class SmallDisk:
    """A disk with room for some bytes more: beyond them, the beginning of a file is written, and then an error is raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        write, unlink = Path.write_bytes, Path.unlink

        def write_bytes(path: Path, data: bytes) -> int:
            written = write(path, data[: max(0, self.room)])
            self.room -= written
            if written < len(data):
                raise OSError(28, "No space left on device")
            return written

        def remove(path: Path, missing_ok: bool = False) -> None:
            self.room += path.stat().st_size if path.exists() else 0
            unlink(path, missing_ok=missing_ok)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)
        monkeypatch.setattr(Path, "unlink", remove)


def test_a_full_disk_names_the_file_and_what_is_finished(
    tmp_path: Path, inputs: list[str], small_networks: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ["edit", *inputs, "--prompt", "tree", *SMALL, "--candidates", "3"]
    assert run(*arguments, "--out", whole) == 0
    one = max(path.stat().st_size for path in (whole / "candidates").iterdir())
    candidates = out / "candidates"

    with monkeypatch.context() as patch:  # not even a report fits: noticed before networks are loaded
        patch.setattr(cli, "load_models", lambda request: pytest.fail("the disk was not checked before"))
        SmallDisk(patch, 1000)
        assert f"{out} cannot be written (No space left on device); choose another" in failed(capsys, *arguments, "--out", out)
    with monkeypatch.context() as patch:  # a report, but no candidate
        SmallDisk(patch, folder.RESERVE_BYTES + one // 2)
        said = failed(capsys, *arguments, "--out", out)
        assert f"No space left on device: {candidates / 'candidate_00.png'}. None of 3 candidates was finished." in said
        assert not out.exists()
    with monkeypatch.context() as patch:  # one candidate
        SmallDisk(patch, folder.RESERVE_BYTES + one + one // 2)
        said = failed(capsys, *arguments, "--out", out)
        assert f"No space left on device: {candidates / 'candidate_01.png'}. 1 of 3 candidates are in {candidates}." in said
        report = report_of(out)
        assert report["interrupted"] and [c["candidate"] for c in report["candidates"]] == [0]
        assert "1 of 3 candidates were finished. The reason: No space left on device" in report["notes"][-1]
    with monkeypatch.context() as patch:  # somebody else takes the room of the report; the old report describes other files
        disk = SmallDisk(patch, folder.RESERVE_BYTES + 3 * one)
        patch.setattr(results, "free_reserve", lambda _: setattr(disk, "room", -one))
        said = failed(capsys, *arguments, "--out", out, "--overwrite")
        assert f"3 of 3 candidates are in {candidates}, but not the report.json: No space left on device: {out / 'report.json'}." in said
        assert len(files_in(out)) == 3 and {name.rpartition("_")[2] for name in files_in(candidates)} == {"00.png", "01.png", "02.png"}
    assert "already holds the results of a run, or files of the same names" in failed(capsys, *arguments, "--out", out)


def test_an_output_that_cannot_be_written_is_noticed_before_networks_are_loaded(
    tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def read_only(_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(cli, "load_models", lambda request: pytest.fail("the folder was not checked before"))
    arguments = ["edit", *inputs, "--prompt", "tree", *SMALL, "--out"]
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in failed(capsys, *arguments, tmp_path / "file" / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "candidates").write_text("")
    assert "cannot be written (Permission denied)" in failed(capsys, *arguments, tmp_path / "out")
    (tmp_path / "out" / "candidates").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(folder.os, "access", lambda *_: False)  # a test may run as root, who may write everywhere
        assert f"{tmp_path / 'out'} cannot be written (Permission denied); choose another" in failed(capsys, *arguments, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(folder.FileLock, "acquire", read_only)
        assert "cannot be written (Read-only file system)" in failed(capsys, *arguments, tmp_path / "out")
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("number", process.STOP_SIGNALS)
def test_sigterm_and_sighup_keep_finished_results(
    tmp_path: Path,
    inputs: list[str],
    small_networks: None,
    heeded_signals: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    number: signal.Signals,
) -> None:
    edit_picture = cli.edit_picture

    def stopped(picture: Any, mask: Any, prompt: Any, models: Any, options: Any, on_step: Any, *rest: Any) -> Any:
        def stop(step: Step) -> None:
            on_step(step)
            if 1 in step.images:
                signal.raise_signal(number)

        return edit_picture(picture, mask, prompt, models, options, stop, *rest)

    monkeypatch.setattr(cli, "edit_picture", stopped)
    out, before = tmp_path / "out", signal.getsignal(number)
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--out", out) == 130
    report = report_of(out)
    assert report["interrupted"] is True and [c["candidate"] for c in report["candidates"]] == [0]
    assert report["notes"][-1] == f"Stopped early, 1 of 2 candidates were finished. The reason: {number.name}."
    assert signal.getsignal(number) == before and "stopped after" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["contact_sheet", "animation"])
def test_the_report_is_written_even_if_the_sheet_fails(
    tmp_path: Path, inputs: list[str], small_networks: None, monkeypatch: pytest.MonkeyPatch, capsys: Any, broken: str
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("cannot draw")

    monkeypatch.setattr(results, broken, refuse)
    out = tmp_path / "out"
    out.mkdir()
    (out / "contact_sheet.png").write_text("of an earlier run")
    said = failed(capsys, "edit", *inputs, "--prompt", "tree", *SMALL, "--animate", "--overwrite", "--out", out)
    assert "cannot draw" in said and "the results and report.json are in" in said
    report = report_of(out)
    assert report["interrupted"] is False
    stems = [Path(c["file"]).stem for c in report["candidates"]]
    rest = [f"animations/{s}.webp" for s in stems] if broken == "contact_sheet" else ["contact_sheet.png"]
    assert files_in(out) == sorted(["report.json", *(f"candidates/{s}.png" for s in stems), *rest])


def test_a_second_ctrl_c_is_ignored(tmp_path: Path, inputs: list[str], small_networks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGINT)
    draw = results.contact_sheet

    def impatient(*given: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        draw(*given)

    interrupt_at(monkeypatch, 1)
    monkeypatch.setattr(results, "contact_sheet", impatient)
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--out", tmp_path / "out") == 130
    assert files_in(tmp_path / "out") == ["candidates/01_candidate_00.png", "contact_sheet.png", "report.json"]
    assert signal.getsignal(signal.SIGINT) == handler


def test_ctrl_c_at_the_end_names_the_finished_results(
    tmp_path: Path, inputs: list[str], small_networks: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:

    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results.Writer, "_report", refuse)
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--out", tmp_path / "out") == 130
    said = capsys.readouterr().err
    assert "nothing was written" not in said and f"2 finished results are in {tmp_path / 'out' / 'candidates'}" in said


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a surprise")])
def test_a_failed_demo_keeps_the_earlier_one(
    tmp_path: Path, small_networks: None, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = tmp_path / "out"
    assert run("demo", "--out", out, "--candidates", "2") == 0
    before = {name: (out / name).read_bytes() for name in files_in(out)}
    interrupt_at(monkeypatch, 0, error)
    assert run("demo", "--out", out, "--candidates", "2", "--seed", "5", "--background", "lake", "--overwrite") != 0
    assert {name: (out / name).read_bytes() for name in files_in(out)} == before
    monkeypatch.undo()
    monkeypatch.setattr(cli, "load_models", lambda request: tiny.tiny_models())
    assert run("demo", "--out", out, "--candidates", "2", "--seed", "5", "--background", "lake", "--overwrite") == 0
    assert sha256(out / "source.png") == report_of(out)["inputs"]["image"] != json.loads(before["report.json"])["inputs"]["image"]


# --- help -------------------------------------------------------------------------------------------------------------


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The help text of a command line, its lines joined."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments, "--help")
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_help_of_edit_shows_the_defaults_of_the_preset(capsys: pytest.CaptureFixture[str], preset: str) -> None:
    text = help_of(capsys, "edit", "--preset", preset)
    assert text == help_of(capsys, "edit", f"--preset={preset}") and f"those of the preset {preset}." in text
    shown = {}
    for kind, options in ((EditOptions, PRESETS[preset]), (GuidanceOptions, PRESETS[preset].guidance)):
        for name, (declaration, _) in declared(kind).items():
            value = getattr(options, name)
            if (flag := flag_of(name, declaration)) and not isinstance(value, bool) and value is not None:
                own = text[text.index(f" {flag} ") :]
                shown[name] = re.search(r"Default: (\S+)\.(?: |$)", own).group(1)  # type: ignore[union-attr]
                assert shown[name] == (f"{value:g}" if isinstance(value, float) else str(value)), name
    assert len(shown) > 25
    assert help_of(capsys, "edit") == help_of(capsys, "edit", "--preset", "best")


def test_the_help_of_edit_is_grouped_and_has_examples_that_can_be_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    commands = {
        name: parser for action in build_parser()._actions if isinstance(action.choices, dict) for name, parser in action.choices.items()
    }
    for name, parser in commands.items():
        assert all(action.help for action in parser._actions), f"an argument of {name} without a text"
    groups = [group for group in commands["edit"]._action_groups if group._group_actions]
    assert [group.title for group in groups] == ["general", *HEADINGS]
    assert all(3 <= len(group._group_actions) <= 20 or group.title == "general" for group in groups)
    examples = [line.strip() for line in str(commands["edit"].epilog).splitlines() if line.startswith("    blended-diffusion")]
    assert len(examples) >= 4
    for line in examples:
        assert build_parser().parse_args(shlex.split(line)[1:]).command == "edit"
        assert " ".join(line.split()) in help_of(capsys, "edit")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["edit", "cat.png", "mask.png"], "unknown argument mask.png; did you mean --mask mask.png?"),
        (["edit", "cat.png", "my mask.png"], "did you mean --mask 'my mask.png'?"),
        (["edit", "cat.png", "--prompt", "x", "mask.png"], "did you mean --mask mask.png?"),
        (["edit", "cat.png", "corgi"], "did you mean --prompt corgi?"),
        (["edit", "cat.png", "--prompt", "a", "red", "apple"], "put quotes around a text with spaces"),
        (["edit", "cat.png", "--guidence-scale", "3"], "did you mean --guidance-scale?"),
        (["edit", "cat.png", "--maks=x.png"], "did you mean --mask?"),
        (["demo", "--sed", "3"], "did you mean --seed?"),
        (["inspect", "a.pt", "b.pt"], "inspect: error: unknown argument b.pt"),
    ],
)  # fmt: skip
def test_an_unknown_argument_says_what_may_have_been_meant(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err
