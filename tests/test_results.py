"""What a run writes: contact sheets and their texts, the format of the results, the times; and what a report may contain."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blended_core import edit as edit_module
from blended_core import timer
from blended_core.cli import edit as cli
from blended_core.cli.report_input import request_of_report
from blended_core.errors import BlendedError
from blended_core.io import contact_sheet as sheets
from blended_core.io import results
from blended_core.io import text as texts
from blended_core.io.atomic import sha256
from blended_core.io.request import MOST_THREADS, Request
from blended_core.options import MOST

from . import tiny
from .fuzz import mutated
from .terminal import report_of, run

SMALL = ["--steps", "2", "--candidates", "2", "--views", "1", "--batch", "1"]
HEIGHT, WIDTH = 60, 84


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Arguments that name a photo with metadata, and its mask."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 1
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif, dpi=(240, 240), comment=b"a comment", icc_profile=b"a profile")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:50, 40:75] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return [str(tmp_path / "photo.jpg"), "--mask", str(tmp_path / "mask.png")]


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_system_fonts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A computer without any font."""
    monkeypatch.setattr(texts, "SYSTEM_FONTS", ())
    texts.font_of.cache_clear()
    yield
    texts.font_of.cache_clear()


LINES = [
    "café, Größe, naïve, Łódź, señor, ő, ş, ž", "Ελληνικά, Русский, Українська", "사과 한 개와 고양이", "赤いりんごと、ねこ、カメラ", "红苹果和猫",
    "“quotes” – dash … × ≥ → ½ ° λ x̂₀",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_every_character_of_these_languages_has_a_glyph(no_system_fonts: None, line: str) -> None:
    shown = texts.readable(line)
    assert shown == line
    drawn = {}
    for character in shown.replace(" ", ""):
        file = texts.font_of(character)
        assert file is not None, character
        found = texts.font(file, 40)
        assert found is not None
        drawn[character] = bytes(found.getmask(character))
        assert drawn[character] != bytes(found.getmask("\uffff")), f"{character} is a box"
    assert len(set(drawn.values())) == len(drawn), "different characters look different"


def test_what_no_font_has_is_written_in_words(no_system_fonts: None) -> None:
    assert texts.readable("🍎 and 👩\u200d🚀!") == "[red apple] and [woman][rocket]!"
    assert texts.readable("☀\ufe0f 👍🏽") == "☀ [thumbs up sign]"
    assert texts.readable("\u0e44\u0e17\u0e22") == "[U+0E44][U+0E17][U+0E22]"
    assert texts.readable("a\x1b[31m\x00b") == "a[U+001B][31m[U+0000]b"
    assert texts.readable("a\u0301\n  b\tc") == "á b c", "composed, in one line"
    assert texts.readable("\u1112\u1161\u11ab") == "한"


def test_a_font_of_the_system_is_used_before_words(monkeypatch: pytest.MonkeyPatch) -> None:
    western, eastern = texts.OWN_FONTS
    monkeypatch.setattr(texts, "OWN_FONTS", (western,))
    monkeypatch.setattr(texts, "SYSTEM_FONTS", ("no-such-font.ttf", eastern))
    texts.font_of.cache_clear()
    assert texts.font_of("é") == western and texts.font_of("한") == eastern and texts.readable("한") == "한"
    texts.font_of.cache_clear()


def test_a_long_text_is_shortened_with_few_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    width_of = texts.width_of
    monkeypatch.setattr(texts, "width_of", lambda text, size: measured.append(len(text)) or width_of(text, size))
    for text in ("a red apple with a leaf " * 84, "사과 " * 500, "word " * 200_000, "🍎" * 500):
        measured.clear()
        readable = texts.readable(text)
        short = texts.fitted(readable, 24, 1000)
        assert short.endswith("…") and readable.startswith(short[:-1])
        longer = readable[: len(short[:-1]) + 2] + "…"
        assert width_of(short, 24) <= 1000 < width_of(longer, 24)
        assert len(measured) <= 16 and max(measured) <= 20 * texts.LONGEST_LINE
    assert texts.fitted("short", 24, 1000) == "short" and texts.fitted("short", 24, 1) == "…"


def test_parts_of_a_line_share_a_baseline_and_do_not_overlap() -> None:
    def columns(line: str) -> list[int]:
        image = Image.new("L", (600, 60))
        draw = sheets.ImageDraw.Draw(image)
        texts.draw_line(draw, (10, 10), line, 24, 255, 580)  # type: ignore[arg-type]
        return [int(x) for x in np.flatnonzero(np.asarray(image).max(0))]

    alone, both = columns("사과"), columns("apple 사과")
    assert len(both) > len(alone) + 40 and max(both) == pytest.approx(max(alone) + texts.width_of("apple ", 24), abs=2)


# --- contact sheets ---------------------------------------------------------------------------------------------------


def test_a_large_picture_is_only_scaled_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the scaling works on the full size, neither in Pillow nor in torch."""
    seen: list[tuple[int, ...]] = []
    show_mask = sheets.show_mask
    monkeypatch.setattr(sheets, "show_mask", lambda rgb, weight: seen.append((*rgb.shape, *weight.shape)) or show_mask(rgb, weight))
    monkeypatch.setattr(torch.nn.functional, "max_pool2d", lambda *_, **__: pytest.fail("a pooling of the full size"))
    source = np.zeros((1500, 2000, 3), np.uint8)
    mask = torch.zeros(1, 1, 1500, 2000)
    mask[..., 400:900, 500:1100] = 1
    sheets.contact_sheet(tmp_path / "s.png", source, mask, [(source, "a", "b")], "title", "subtitle")
    assert seen == [(192, 256, 3, 192, 256)]


def test_the_mask_is_drawn_with_its_edge() -> None:
    weight = np.zeros((64, 64), np.uint8)
    weight[20:40, 16:48] = 255
    rgb = np.full((64, 64, 3), 100, np.uint8)
    shown = sheets.show_mask(rgb, weight)
    assert (shown[25, 30] == 100).all() and tuple(shown[18, 30]) == sheets.ACCENT and (shown[5, 5] > 140).all()
    faint = sheets.show_mask(rgb, weight // 4)
    assert tuple(faint[18, 30]) == sheets.ACCENT, "also of a mask without any value of a half"
    line = torch.zeros(1, 1, 2000, 2000)
    line[..., 1000, :] = 1
    assert sheets._small_mask(line, 256, 256).max() > 0, "a thin line is not lost"


def test_a_sheet_in_other_languages_is_drawn(tmp_path: Path, inputs: list[str], small_networks: None) -> None:
    def title(prompt: str, name: str) -> np.ndarray[Any, Any]:
        assert run("edit", *inputs, "--prompt", prompt, *SMALL, "--out", tmp_path / name) == 0
        with Image.open(tmp_path / name / "contact_sheet.png") as sheet:
            return np.asarray(sheet.convert("L"))[10:46]

    korean, other = title("사과", "a"), title("고양", "b")
    assert (korean < 100).any() and (korean != other).any()


# --- format and metadata of the results -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "tiff"])
def test_results_in_every_format(tmp_path: Path, inputs: list[str], small_networks: None, capsys: Any, format: str) -> None:
    out = tmp_path / "out"
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--format", format, "--out", out) == 0
    notes = capsys.readouterr().err
    assert ("jpg files are lossy: pixels outside the mask change a little too" in notes) == (format == "jpg")
    with Image.open(inputs[0]) as image, Image.open(inputs[2]) as mask:
        source, outside = np.asarray(image.convert("RGB")), np.asarray(mask) == 0
    for entry in report_of(out)["candidates"]:
        assert entry["file"].endswith(f".{format}")
        with Image.open(out / entry["file"]) as image:
            pixels = np.asarray(image.convert("RGB"))
            exif, info = image.getexif(), dict(image.info)
        assert np.array_equal(pixels[outside], source[outside]) == (format != "jpg")
        assert np.abs(pixels[outside].astype(int) - source[outside]).mean() < 3
        assert exif[0x010F] == "Maker" and info["icc_profile"] == b"a profile"
        about = (
            info["blended-diffusion"] if format == "png" else exif.get_ifd(0x8769)[0x9286].removeprefix(b"ASCII\0\0\0blended-diffusion: ")
        )
        assert json.loads(about)["candidate"] == entry["candidate"]


def test_the_format_is_no_setting_of_an_edit(tmp_path: Path, inputs: list[str], small_networks: None) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--format", "jpg", "--out", out) == 0
    assert run("edit", "--from", out / "report.json", "--format", "webp", "--out", again) == 0
    assert [entry["file"][-5:] for entry in report_of(again)["candidates"]] == [".webp"] * 2
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--out", out) == 2, "results of every format are those of a run"
    assert run("edit", *inputs, "--prompt", "tree", *SMALL, "--overwrite", "--out", out) == 0
    assert sorted(p.suffix for p in (out / "candidates").iterdir()) == [".png"] * 2, "results in another format are replaced"


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupted", [False, True])
def test_every_stage_is_timed_and_the_times_sum_to_the_total(
    tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any, interrupted: bool
) -> None:
    """By a clock that only the stages move: whatever takes time is found, however long the machine needs."""
    clock = [0.0]

    def taking(seconds: float, work: Any) -> Any:
        def slow(*given: Any, **options: Any) -> Any:
            clock[0] += seconds
            return work(*given, **options)

        return slow

    def stop(*_: Any) -> None:
        clock[0] += 2000
        raise KeyboardInterrupt

    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(cli, "load_models", taking(7, lambda request: tiny.tiny_models()))
    monkeypatch.setattr(edit_module, "check_picture", taking(11, edit_module.check_picture))
    monkeypatch.setattr(edit_module, "final_image", taking(13, edit_module.final_image))
    monkeypatch.setattr(edit_module, "diagnose", taking(17, edit_module.diagnose))
    monkeypatch.setattr(results, "write_picture", taking(19, results.write_picture))
    monkeypatch.setattr(results, "contact_sheet", taking(454, results.contact_sheet))
    monkeypatch.setattr(results, "animation", taking(23, results.animation))
    if interrupted:
        image_of = edit_module.final_image
        made: list[int] = []
        monkeypatch.setattr(edit_module, "final_image", lambda *given: stop() if made else (made.append(1), image_of(*given))[1])
    code = run("edit", *inputs, "--prompt", "tree", *SMALL, "--animate", "--out", tmp_path / "out")
    report = report_of(tmp_path / "out")
    seconds = report["seconds"]
    assert sum(seconds.values()) == report["total_seconds"] == clock[0]
    assert seconds["load"] == 7 and seconds["prepare"] == 11 and seconds["contact sheet"] == 454
    if interrupted:
        assert code == 130 and seconds["write"] == 19 and seconds["animations"] == 23 and seconds["unfinished candidates"] == 2000
    else:
        assert code == 0 and seconds["write"] == 38 and seconds["animations"] == 46 and seconds["diffusion"] == 26
    said = capsys.readouterr().out
    assert f"{report['total_seconds']:.1f} s (load 7.0, prepare 11.0" in said and "contact sheet 454.0" in said


# --- reports ----------------------------------------------------------------------------------------------------------

JUNK: list[Any] = [
    None, True, -1, 0, 1.5, 1e30, 10**9, 10**400, float("nan"), float("inf"), "", "x" * 300, "\0", "²", "5" * 5000, "\x1b[31m", "/dev/zero",
    "../../x", [], [1], {}, {"a": 1}, [[[]]], "ddim99999999999",
]  # fmt: skip


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is in nested values."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, item in inside for p in [(*place, key), *places(item, (*place, key))]]


def replaced(value: Any, place: tuple[Any, ...], by: Any) -> Any:
    out = copy.deepcopy(value)
    inner = out
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = by
    return out


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    """A report of an edit whose files exist, all of them small."""
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png")
    Image.new("L", (20, 20), 255).save(tmp_path / "m.png")
    (tmp_path / "ddpm.pt").write_bytes(b"a network")
    request = Request(
        "edit", str(tmp_path / "x.png"), str(tmp_path / "m.png"), ("a tree", ""), (1.0, -0.5), ddpm=str(tmp_path / "ddpm.pt"),
        overrides={"num_heads": 4}, threads=2,
    )  # fmt: skip
    return {
        "version": "0.0.1", "request": request.to_dict(), "versions": {"python": "3.1", "numpy": "0.1"},
        "inputs": {"image": sha256(tmp_path / "x.png"), "mask": sha256(tmp_path / "m.png")},
        "networks": {"sha256": {"ddpm": sha256(tmp_path / "ddpm.pt")}},
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_every_damaged_report_is_repeated_or_refused_with_a_sentence(tmp_path: Path, report: dict[str, Any]) -> None:
    file, told = tmp_path / "report.json", {"repeated": 0, "refused": 0}

    def check(data: bytes) -> None:
        file.write_bytes(data)
        try:
            request = request_of_report(file)
        except BlendedError as error:
            assert str(error).endswith((".", "(--weights).")) and len(str(error)) <= 500 and str(error).isprintable(), str(error)
            told["refused"] += 1
            return
        o, g = request.options, request.options.guidance
        assert all(isinstance(n, int) and 0 <= n <= MOST for n in (o.candidates, o.batch, o.feather, g.views, g.view_chunk, g.early_views))
        assert request.threads is None or 1 <= request.threads <= MOST_THREADS
        assert all(isinstance(t, str) for t in (request.image, request.device, request.clip, request.ddpm, o.steps, *request.prompts))
        told["repeated"] += 1

    rng, whole = random.Random(0), json.dumps(report, indent=2).encode()
    check(whole)
    assert told["repeated"] == 1
    for _ in range(1000):
        check(mutated(whole, rng))
    where = places(report)
    for place in where:
        for junk in JUNK:
            if junk != 10**400:
                check(json.dumps(replaced(report, place, junk)).encode())
        check(json.dumps(replaced(report, place, "the number")).encode().replace(b'"the number"', b"1" + b"0" * 400))
    assert len(where) * len(JUNK) > 1000 and min(told.values()) > 100, told
    for data in (b"[" * 100_000, b"", b"\xff\xfe", b"null", b'{"request": {}}', b'{"a":' * 50_000):
        check(data)


def test_an_unprintable_version_is_not_printed(tmp_path: Path, report: dict[str, Any]) -> None:
    report["versions"]["numpy"] = "\x1b[31m" + "9" * 5000
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.warns(match="that run used") as warned:
        request_of_report(tmp_path / "report.json")
    (text,) = [str(w.message) for w in warned]
    assert text.isprintable() and len(text) < 300 and "python 3.1 (now" in text and "numpy of an unknown version (now" in text
