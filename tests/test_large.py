"""Large pictures: what is computed for each candidate and each step is around the mask, and only once."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import blended_core.cli.edit as cli
from benchmarks import large
from benchmarks.measure import peak_bytes
from benchmarks.report import figures, meets_target, table
from blended_core import result as result_module
from blended_core.edit import check_range, edit_picture
from blended_core.errors import BlendedError
from blended_core.io import contact_sheet, images, results
from blended_core.io.formats import FAST, PNG_COMPRESSIONS
from blended_core.mask import EditMask
from blended_core.options import preset
from blended_core.rank import background_error, seam_energy
from blended_core.region import Region, paste, pasted_part
from blended_core.result import EditResult

from . import tiny
from .server import COMFYUI, ROOT, environment, interpreter, needs_comfyui
from .terminal import report_of, run

WIDTH, HEIGHT = 900, 600
SIDE = 64
"""Of the mask, in the middle of the picture; the region is 103 px wide."""
OPTIONS = preset("best", steps="4", candidates=3, batch=1, views=1)


def mask_in_the_middle() -> Tensor:
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., 300 : 300 + SIDE, 400 : 400 + SIDE] = 1
    return mask


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a large picture, a mask and a short edit with tiny networks."""
    monkeypatch.setattr(cli, "load_models", lambda request: tiny.tiny_models())
    pixels, _ = large.scene(WIDTH, HEIGHT)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray((mask_in_the_middle()[0, 0] * 255).byte().numpy()).save(tmp_path / "mask.png")
    short = ["--steps", "4", "--candidates", "3", "--views", "1", "--batch", "1"]
    return [str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png"), "--prompt", "tree", *short, "--out", str(tmp_path / "out")]


# --- a candidate ------------------------------------------------------------------------------------------------------


def test_a_candidate_is_pasted_and_converted_once_and_only_around_the_mask(inputs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pasted: list[tuple[int, ...]] = []
    converted: list[tuple[int, ...]] = []

    def counted_paste(*given: Any) -> Any:
        box, part = pasted_part(*given)
        pasted.append(tuple(part.shape))
        return box, part

    monkeypatch.setattr(result_module, "pasted_part", counted_paste)
    monkeypatch.setattr(result_module, "paste", lambda *_: pytest.fail("a paste of the whole picture"))
    monkeypatch.setattr(results, "to_uint8", lambda part: converted.append(tuple(part.shape)) or images.to_uint8(part))
    assert run("edit", *inputs) == 0
    assert pasted == converted and len(pasted) == 3
    assert all(max(shape[-2:]) < 2 * SIDE for shape in pasted)


@pytest.mark.parametrize("feather", [0, 1, 9])
@pytest.mark.parametrize(
    "region", [Region(390, 290, 90, WIDTH, HEIGHT), Region(-40, -20, 600, WIDTH, HEIGHT), Region(400, 300, SIDE, WIDTH, HEIGHT)]
)
def test_the_pasted_part_has_all_that_differs_and_the_same_scores(region: Region, feather: int) -> None:
    original, mask = tiny.random_picture(HEIGHT, WIDTH), EditMask.of(mask_in_the_middle())
    edited = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = paste(edited, original, mask, region, feather)
    box, part = pasted_part(edited, original, mask, region, feather)
    assert tiny.same_bits(whole[box.slices], part)
    rest = whole.clone()
    rest[box.slices] = original[box.slices]
    assert tiny.same_bits(rest, original)
    around = mask.part(box)
    assert seam_energy(part, around) == seam_energy(whole, mask) > 0
    assert background_error(part, original[box.slices], around, mask.outside_pixels) == background_error(whole, original, mask) == 0
    changed = part.clone()
    changed[0, 0, 0, 0] += 0.5
    shifted = whole.clone()
    shifted[box.slices] = changed
    error = background_error(changed, original[box.slices], around, mask.outside_pixels)
    assert error == pytest.approx(background_error(shifted, original, mask), rel=1e-12) and error


def test_without_the_background_the_part_is_the_whole_picture() -> None:
    original, mask = tiny.random_picture(30, 40) * 3 - 1, EditMask.of(torch.ones(1, 1, 30, 40))
    edited = torch.zeros(1, 3, 8, 8)
    region = Region(5, 5, 16, 40, 30)
    box, part = pasted_part(edited, original, mask, region, 0, keep_background=False)
    assert (box.left, box.top, box.right, box.bottom) == (0, 0, 40, 30)
    assert torch.equal(part, region.put_back(edited * 0 + 0.5, original).clamp(0, 1))
    assert torch.equal(paste(edited, original, mask, region, 0, keep_background=False), part)


def test_an_edit_needs_little_memory_beside_its_copy_of_the_picture() -> None:
    """No candidate, and no check of values, allocates the size of the picture again."""
    picture, mask, models = tiny.random_picture(HEIGHT, WIDTH), mask_in_the_middle(), tiny.tiny_models()
    options = preset("best", steps="2", strength=0.5, candidates=2, batch=2)
    kept: list[EditResult] = []
    whole = picture.numel() * picture.element_size()
    needed = peak_bytes(lambda: kept.append(edit_picture(picture, mask, None, models, options)), torch.device("cpu"))
    assert len(kept[0].candidates) == 2
    # The copy, the mask in float32 (a third), and what the mask rule compares; a paste or a difference of the whole picture would be another 1.
    assert whole < needed < 1.6 * whole


def test_values_are_checked_without_a_second_picture() -> None:
    picture = tiny.random_picture(HEIGHT, WIDTH)
    assert peak_bytes(lambda: check_range(picture, "picture"), torch.device("cpu")) < 1000
    for value, text in ((torch.nan, None), (torch.inf, None), (-torch.inf, None), (20.0, "from 0 to 20"), (-3.0, "from -3 to 1")):
        for dtype in (torch.float32, torch.float16, torch.float64):
            wrong = picture.to(dtype)
            wrong[0, 1, 5, 7] = value
            if text is None:
                check_range(wrong, "picture")
            else:
                with pytest.raises(BlendedError, match=text):
                    check_range(wrong, "picture")


# --- previews and animations ------------------------------------------------------------------------------------------


def test_the_original_is_cut_once_for_all_frames(inputs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[int] = []
    own = Region.cut
    monkeypatch.setattr(Region, "cut", lambda region, picture, size: cut.append(size) or own(region, picture, size))
    frames: list[list[Tensor]] = []
    monkeypatch.setattr(results, "animation", lambda path, shown: frames.append(shown))
    assert run("edit", *inputs, "--animate") == 0
    assert [len(shown) for shown in frames] == [4] * 3, "three steps and the result"
    assert len(cut) == 2, "once for the edit and once for the animations"
    assert {tuple(frame.shape) for shown in frames for frame in shown} == {(1, 3, 16, 16)}


def test_a_preview_is_cut_anew_for_another_size() -> None:
    picture, mask = tiny.random_picture(HEIGHT, WIDTH), EditMask.of(mask_in_the_middle())
    region = Region(390, 290, 90, WIDTH, HEIGHT)
    result = EditResult([], picture, mask, region, OPTIONS, None, [], {})
    for size in (16, 16, 24):
        shown = result.preview(torch.zeros(1, 3, size, size))
        outside = region.cut_mask(mask, size).values.expand_as(shown) == 0
        assert torch.equal(shown[outside], region.cut(picture, size).clamp(0, 1)[outside])


def test_a_region_is_cut_from_its_own_columns() -> None:
    picture = tiny.random_picture(HEIGHT, WIDTH)
    side = 100
    needed = peak_bytes(lambda: Region(700, 20, side, WIDTH, HEIGHT).cut(picture, 16), torch.device("cpu"))
    assert needed < 3 * 3 * 4 * side**2 < 3 * 4 * side * WIDTH


# --- PNG files --------------------------------------------------------------------------------------------------------


def test_the_compression_changes_the_size_and_no_pixel(tmp_path: Path) -> None:
    pixels, _ = large.scene(300, 200)
    size = {}
    for name in PNG_COMPRESSIONS:
        images.write_picture(tmp_path / "p.png", images.Picture(pixels), "png", None, name)
        size[name] = (tmp_path / "p.png").stat().st_size
        with Image.open(tmp_path / "p.png") as image:
            assert np.array_equal(np.asarray(image), pixels)
    assert size["9"] <= size["6"] < size["1"] < size["0"]
    assert size[FAST] < size["1"], "of a photograph"
    default = io.BytesIO()
    Image.fromarray(pixels).save(default, "PNG")
    assert len(default.getvalue()) == size["6"]


def test_the_terminal_compresses_as_asked(inputs: list[str], tmp_path: Path, capsys: Any) -> None:
    size, pixels = {}, {}
    for level in ([], ["--png-compression", "0"], ["--png-compression", "fast"]):
        assert run("edit", *inputs, "--candidates", "1", "--steps", "2", "--overwrite", *level) == 0
        file = tmp_path / "out" / report_of(tmp_path / "out")["candidates"][0]["file"]
        size[" ".join(level)] = file.stat().st_size
        with Image.open(file) as image:
            pixels[" ".join(level)] = np.asarray(image)
    assert size[""] < size["--png-compression 0"] and abs(size[""] - size["--png-compression fast"]) < 100
    assert all(np.array_equal(pixels[""], other) for other in pixels.values())
    capsys.readouterr()
    report = tmp_path / "out" / "report.json"
    assert run("edit", "--from", report, "--out", tmp_path / "again", "--png-compression", "3", "--format", "jpg") == 0
    assert "png_compression 3 has no effect: the format is jpg (--png-compression)." in capsys.readouterr().err


# --- times ------------------------------------------------------------------------------------------------------------


def test_reading_and_imports_are_stages_of_their_own(inputs: list[str], tmp_path: Path) -> None:
    assert run("edit", *inputs) == 0
    stages = list(report_of(tmp_path / "out")["seconds"])
    assert stages[:5] == ["start", "read", "import", "load", "prepare"]


# --- nodes ------------------------------------------------------------------------------------------------------------


@needs_comfyui
def test_nodes_copy_a_large_image_once() -> None:
    command = [interpreter(), str(ROOT / "tests" / "copies.py")]
    done = subprocess.run(command, cwd=COMFYUI, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["exact"], "outside of the mask every value and the alpha channel are those of the image"
    counts = {name: len(found) for name, found in told["copies"].items()}
    assert counts == {"Noise Background": 0, "Blend Latents": 0, "Final Paste of a LATENT": 1, "Final Paste of an IMAGE": 1}, told


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_the_benchmark_of_large_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def run_python(program: str, out: str, *arguments: str, environment: dict[str, str]) -> list[str]:
        calls.append(arguments)
        count = int(arguments[arguments.index("--candidates") + 1])
        stages = {"start": 1.0, "diffusion": 5.0 * count, "write": 2.0 * count, "contact sheet": 0.2}
        stages |= {"animations": 0.5} if "--animate" in arguments else {}
        assert environment["OMP_NUM_THREADS"] == "1" and Path(arguments[1]).is_file()
        return ["…", json.dumps({"stages": stages, "total": sum(stages.values()) * 1.25, "memory": 3 * 2**30})]

    monkeypatch.setattr(large, "run_python", run_python)
    monkeypatch.setattr(large, "scene", lambda width, height: (np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8)))
    found = json.loads(json.dumps({"large": large.measure_large(2, lambda _line: None)}))
    assert len(calls) == 2 * len(large.CASES)
    bars = {
        name.removeprefix("6000×4000: "): (value["median"], meets_target(value, target))
        for (_, name), value, target in figures(found)
        if target
    }
    assert bars.pop("a further candidate outside of the networks, s") == (pytest.approx(2 + 0.25 * 7), True)
    assert bars == {
        "contact sheet of four candidates, s": (0.2, True), "an animation, s": (0.5, True), "largest memory of the process, GiB": (3.0, False),
        "share of the time that is in no stage": (pytest.approx(0.2), False),
    }  # fmt: skip
    text = table(found)
    assert "| whole edit, 6000×4000, 4 candidates | embedded | 36.50 (36.50–36.50) s: start 1.0, diffusion 20.0, write 8.0" in text
    assert "| PNG file of 6000×4000, compression fast |" in text


def test_the_scene_compresses_as_a_photograph_does() -> None:
    pixels, mask = large.scene(600, 400)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert 0.3 < len(buffer.getvalue()) / pixels.size < 0.7
    assert pixels.shape == (400, 600, 3) and mask.shape == (400, 600) and 0.01 < (mask > 0).mean() < 0.04
    assert contact_sheet.thumbnail(pixels).shape == (171, 256, 3)
