"""Picture files: what is kept, what is converted with a note, and what is an error."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
import subprocess
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import EpsImagePlugin, ExifTags, Image, ImageCms, ImageDraw, ImageFilter, PngImagePlugin, features

from blended_core.cli.report_input import request_of_report
from blended_core.errors import BlendedError
from blended_core.io import images as pictures
from blended_core.io.atomic import write_bytes
from blended_core.io.images import for_format, read_mask, read_picture, to_uint8, transparency, write_picture, write_png
from blended_core.mask import EditMask, from_labels
from blended_core.toy.world import Placed, Scene, render

from .fuzz import mutated

Array = NDArray[Any]
RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 11, 17
RGBA = RNG.integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
RGBA[0, :, 3] = 0  # colors of transparent pixels are kept too
RGB, GRAY = np.ascontiguousarray(RGBA[..., :3]), np.ascontiguousarray(RGBA[..., 0])


def png(pixels: Array, color_type: int, depth: int, extra: bytes = b"") -> bytes:
    """A PNG written by hand: [H, W, channels] of 8 or 16 bits; ``extra`` are chunks before the data."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2" if depth == 16 else np.uint8).reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


# --- kinds of file ----------------------------------------------------------------------------------------------------


def test_rgb_and_rgba_keep_every_value(tmp_path: Path) -> None:
    plain = read_picture(saved(tmp_path / "a.png", Image.fromarray(RGB)))
    assert np.array_equal(plain.rgb, RGB) and plain.alpha is None and plain.notes == []
    assert plain.size == (WIDTH, HEIGHT)
    clear = read_picture(saved(tmp_path / "b.png", Image.fromarray(RGBA)))
    assert np.array_equal(clear.rgb, RGB) and np.array_equal(clear.alpha, RGBA[..., 3]) and clear.notes == []
    for name in ("c.webp", "d.tiff", "e.bmp"):
        options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        assert np.array_equal(read_picture(saved(tmp_path / name, Image.fromarray(RGB), **options)).rgb, RGB)


def test_a_tensor_gives_the_same_values_back() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    picture = pictures.Picture(every)
    tensor = picture.tensor()
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32 and float(tensor.max()) == 1
    assert np.array_equal(to_uint8(tensor), every)
    for dtype in (torch.float64, torch.float16):
        assert np.array_equal(to_uint8(tensor.to(dtype)), every)
    tensor.zero_()
    assert every.max() == 255, "the tensor must not share memory with the picture"
    assert to_uint8(torch.tensor([-0.009, 1.009, 0.5]).view(1, 3, 1, 1)).tolist() == [[[0, 255, 128]]], "rounding is clamped"


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (torch.full((1, 3, 2, 2), 200, dtype=torch.uint8), r"dtype torch\.uint8.*picture / 255"),
        (torch.tensor([-1.0, 0.5, 1.0]).view(1, 3, 1, 1), r"from -1 to 1.*\(picture \+ 1\) / 2"),
        (torch.tensor([0.0, 128.0, 255.0]).view(1, 3, 1, 1), r"from 0 to 255.*picture / 255"),
        (torch.rand(2, 3, 4, 4), r"shape \(2, 3, 4, 4\)"),
        (torch.rand(3, 4, 4), r"shape \(3, 4, 4\)"),
    ],
)
def test_a_tensor_of_another_range_or_shape_is_refused(picture: torch.Tensor, words: str) -> None:
    with pytest.raises(BlendedError, match=words):
        to_uint8(picture)


@pytest.mark.parametrize("pixels", [RGB / 255, RGB.astype(np.float32), GRAY, RGBA])
def test_pixels_of_another_kind_are_not_written(tmp_path: Path, pixels: Array) -> None:
    with pytest.raises(BlendedError, match="give uint8"):
        write_png(tmp_path / "x.png", pixels)
    assert not (tmp_path / "x.png").exists()


def test_paths_may_be_strings(tmp_path: Path) -> None:
    name = str(tmp_path / "a.png")
    write_png(name, RGB)
    assert np.array_equal(read_picture(name).rgb, RGB)
    assert read_mask(name, (WIDTH, HEIGHT)).shape == (1, 1, HEIGHT, WIDTH)


def test_a_picture_has_a_short_repr() -> None:
    assert repr(pictures.Picture(RGB)) == f"Picture({WIDTH}×{HEIGHT}, RGB)"
    assert repr(pictures.Picture(RGB, RGBA[..., 3])) == f"Picture({WIDTH}×{HEIGHT}, RGBA)"


def test_a_grayscale_file_becomes_rgb(tmp_path: Path) -> None:
    picture = read_picture(saved(tmp_path / "gray.png", Image.fromarray(GRAY)))
    assert np.array_equal(picture.rgb, GRAY[..., None].repeat(3, 2)) and picture.alpha is None
    assert picture.notes == ["gray.png is a grayscale picture; it is edited as 8-bit RGB."]


def test_a_grayscale_file_keeps_its_alpha(tmp_path: Path) -> None:
    image = Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(np.ascontiguousarray(RGBA[..., 3]))])
    picture = read_picture(saved(tmp_path / "la.png", image))
    assert np.array_equal(picture.rgb, GRAY[..., None].repeat(3, 2)) and np.array_equal(picture.alpha, RGBA[..., 3])
    assert picture.notes == ["la.png is a grayscale picture; it is edited as 8-bit RGB."]


@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_file_becomes_rgb(tmp_path: Path, transparent: bool) -> None:
    indices = RNG.integers(0, 4, (HEIGHT, WIDTH), np.uint8)
    colors = np.array([[255, 0, 0], [0, 255, 0], [9, 8, 7], [250, 251, 252]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colors.tobytes())
    assert image.mode == "P"
    picture = read_picture(saved(tmp_path / "p.png", image, **({"transparency": 2} if transparent else {})))
    assert np.array_equal(picture.rgb, colors[indices])
    assert picture.notes == ["p.png is a palette picture; it is edited as 8-bit RGB."]
    if transparent:
        assert np.array_equal(picture.alpha == 0, indices == 2)
    else:
        assert picture.alpha is None


def test_a_transparent_color_becomes_alpha(tmp_path: Path) -> None:
    pixels = RGB.copy()
    pixels[3:6] = (1, 2, 3)
    picture = read_picture(saved(tmp_path / "t.png", Image.fromarray(pixels), transparency=(1, 2, 3)))
    assert np.array_equal(picture.rgb, pixels)
    assert picture.alpha is not None and np.array_equal(picture.alpha == 0, (pixels == (1, 2, 3)).all(-1))


def test_a_black_and_white_file_becomes_rgb(tmp_path: Path) -> None:
    bits = RNG.integers(0, 2, (HEIGHT, WIDTH)).astype(bool)
    picture = read_picture(saved(tmp_path / "one.png", Image.fromarray(bits)))
    assert np.array_equal(picture.rgb[..., 1], bits * 255)
    assert picture.notes == ["one.png is a black-and-white picture; it is edited as 8-bit RGB."]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grayscale_is_scaled_to_8_bits(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    picture = read_picture(saved(tmp_path / f"deep.{suffix}", Image.fromarray(values)))
    assert np.abs(picture.rgb[..., 0] - values / 257).max() <= 0.51
    assert np.ptp(picture.rgb, axis=2).max() == 0
    assert picture.notes == [f"deep.{suffix} is a 16-bit grayscale picture; it is edited as 8-bit RGB."]


def test_a_dark_16_bit_picture_stays_dark(tmp_path: Path) -> None:
    values = RNG.integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint16)
    path = saved(tmp_path / "night.png", Image.fromarray(values))
    assert read_picture(path).rgb.max() <= 1
    labels = read_mask(path, (WIDTH, HEIGHT), [])
    assert torch.equal(labels[0, 0], torch.from_numpy(values.astype(np.float32) / 255)), "as a mask it would be empty, so 255 means white"


@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (6, 4)])
def test_16_bit_color_is_noted(tmp_path: Path, color_type: int, channels: int) -> None:
    values = RNG.integers(0, 65536, (HEIGHT, WIDTH, channels), np.uint16)
    path = tmp_path / "deep.png"
    path.write_bytes(png(values, color_type, 16))
    picture = read_picture(path)
    assert np.abs(picture.rgb - values[..., :3] / 257).max() <= 1.0
    assert picture.notes == ["deep.png has 16 bits per channel; it is edited with 8."]
    assert (picture.alpha is not None) == (channels == 4)


def test_the_hand_written_png_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "hand.png"
    path.write_bytes(png(RGB, 2, 8))
    picture = read_picture(path)
    assert np.array_equal(picture.rgb, RGB) and picture.notes == []


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk_becomes_rgb_without_its_profile(tmp_path: Path, suffix: str) -> None:
    image = Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0))
    picture = read_picture(saved(tmp_path / f"print.{suffix}", image, icc_profile=b"a profile of an ink"))
    assert np.abs(picture.rgb.astype(int) - (0, 255, 255)).max() <= 8
    assert picture.notes[0] == f"print.{suffix} is a CMYK picture; it is edited as 8-bit RGB."
    assert picture.icc is None, "a profile of inks must not be written into an RGB file"


def test_a_color_profile_is_kept(tmp_path: Path) -> None:
    picture = read_picture(saved(tmp_path / "a.png", Image.fromarray(RGB), icc_profile=b"a profile"))
    assert picture.icc == b"a profile"
    write_png(tmp_path / "b.png", picture.rgb, None, None, picture.icc)
    with Image.open(tmp_path / "b.png") as image:
        assert image.info["icc_profile"] == b"a profile"
    assert read_picture(saved(tmp_path / "g.png", Image.fromarray(GRAY), icc_profile=b"a gray profile")).icc is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # light at the top left
    stored: dict[int, Callable[[Array], Array]] = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored[orientation](upright)))
    for name, options in (("photo.jpg", {"quality": 100}), ("photo.png", {}), ("photo.tiff", {}), ("photo.webp", {"lossless": True})):
        picture = read_picture(saved(tmp_path / name, image, exif=exif, **options))
        assert picture.rgb.shape == upright.shape
        assert np.abs(picture.rgb.astype(int) - upright).max() <= 8
        assert picture.notes == ([f"{name} was rotated according to its EXIF data."] if orientation > 1 else [])
    mask = read_mask(saved(tmp_path / "mask.png", image.convert("L"), exif=exif), (32, 16), [])
    assert torch.equal(mask[0, 0] > 0.5, torch.from_numpy(upright[..., 0] > 0))


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    picture = read_picture(saved(tmp_path / "film.gif", frames[0], save_all=True, append_images=frames[1:]))
    assert picture.rgb.reshape(-1, 3).tolist() == [[255, 0, 0]] * 64
    assert picture.notes[0] == "film.gif has 3 frames; the first is edited."


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks_count_by_brightness(tmp_path: Path) -> None:
    size, notes = (WIDTH, HEIGHT), []  # type: tuple[tuple[int, int], list[str]]
    gray = torch.from_numpy(GRAY.astype(np.float32) / 255)
    for name, image in (
        ("l.png", Image.fromarray(GRAY)),
        ("rgb.png", Image.fromarray(GRAY).convert("RGB")),
        ("rgba.png", Image.fromarray(GRAY).convert("RGBA")),
        ("p.png", Image.fromarray(GRAY).convert("P")),
    ):
        mask = read_mask(saved(tmp_path / name, image), size, notes)
        assert mask.shape == (1, 1, HEIGHT, WIDTH) and mask.dtype == torch.float32
        assert torch.equal(mask[0, 0], gray), name
    assert notes == []
    deep = read_mask(saved(tmp_path / "deep.png", Image.fromarray(GRAY.astype(np.uint16) * 257)), size, notes)
    assert torch.allclose(deep[0, 0], gray, atol=0.002)
    bits = read_mask(saved(tmp_path / "bits.png", Image.fromarray(GRAY > 99)), size, notes)
    assert torch.equal(bits[0, 0], torch.from_numpy((GRAY > 99).astype(np.float32)))


def test_a_mask_can_be_in_the_alpha_channel(tmp_path: Path) -> None:
    notes: list[str] = []
    shape = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    shape[2:5, 3:9, 3] = 255
    mask = read_mask(saved(tmp_path / "m.png", Image.fromarray(shape)), (WIDTH, HEIGHT), notes)
    assert torch.equal(mask[0, 0], torch.from_numpy(shape[..., 3] / 255).float())
    assert len(notes) == 1 and "alpha" in notes[0]
    both = shape.copy()
    both[..., :3] = 255
    both[3, :, :3] = 0  # black paint counts as black, transparent white as nothing
    mask = read_mask(saved(tmp_path / "n.png", Image.fromarray(both)), (WIDTH, HEIGHT), [])
    assert torch.equal(mask[0, 0] > 0, torch.from_numpy((both[..., 3] > 0) & (both[..., 0] > 0)))


def test_masks_of_another_size_are_scaled(tmp_path: Path) -> None:
    notes: list[str] = []
    small = np.zeros((10, 20), np.uint8)
    small[2:5, 3:9] = 255
    path = saved(tmp_path / "m.png", Image.fromarray(small))
    mask = read_mask(path, (60, 30), notes)
    assert torch.equal(mask[0, 0], torch.from_numpy(small.repeat(3, 0).repeat(3, 1) / 255).float())
    assert notes == ["the mask was scaled from 20×10 to the picture's 60×30."]
    with pytest.raises(BlendedError, match=r"the mask is 20×10 and the picture 30×30, a different aspect ratio"):
        read_mask(path, (30, 30), notes)


def test_the_transparent_part_is_the_mask() -> None:
    picture = pictures.Picture(RGB, np.ascontiguousarray(RGBA[..., 3]))
    mask = transparency(picture)
    assert mask.shape == (HEIGHT, WIDTH) and mask.dtype == np.float32
    assert (mask[0] == 1).all() and np.allclose(mask, 1 - RGBA[..., 3] / 255)
    # 127 of 255 is more transparent than not
    two = transparency(pictures.Picture(RGB[:1, :2], np.array([[127, 128]], np.uint8)))
    assert (two >= 0.5).ravel().tolist() == [True, False]
    for alpha in (None, np.full((HEIGHT, WIDTH), 255, np.uint8)):
        with pytest.raises(BlendedError, match="no mask was given and the picture has no transparent part"):
            transparency(pictures.Picture(RGB, alpha))


# --- values of more than 8 bits ---------------------------------------------------------------------------------------

SPOILERS = [1.02, 5.0, 300.0, 1e30, -3.0, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize("white", [1, 255, 65535])
def test_one_pixel_does_not_set_the_scale_of_all(tmp_path: Path, white: int, spoiler: float) -> None:
    values = (RNG.random((HEIGHT, WIDTH)) * white).astype(np.float32)
    expected = (values.astype(np.float64) / white * 255).round()
    values[3, 4] = spoiler * white
    others = np.ones_like(values, bool)
    others[3, 4] = False
    path = saved(tmp_path / "f.tiff", Image.fromarray(values))
    picture, notes = read_picture(path), []  # type: tuple[pictures.Picture, list[str]]
    mask = read_mask(path, (WIDTH, HEIGHT), notes)[0, 0].numpy() * 255
    assert np.array_equal(picture.rgb[..., 0][others], expected[others]) and np.allclose(mask[others], expected[others])
    assert picture.rgb[3, 4, 0] == round(float(mask[3, 4])) == (255 if spoiler > 0 else 0), "NaN and what is below 0 is black"
    told = f"1 of the {values.size} values of f.tiff are NaN, Inf or outside of 0..{white}, which its values were taken as"
    assert told in picture.notes[1] and told in notes[0]


def test_the_range_of_floating_point_values_is_that_of_most(tmp_path: Path) -> None:
    def read(values: Array) -> Array:
        return read_picture(saved(tmp_path / "f.tiff", Image.fromarray(values.astype(np.float32)))).rgb[..., 0]

    ramp = np.linspace(0, 1, 1000).reshape(20, 50)
    highlights = ramp.copy()
    highlights[:, 40:] += 9  # a fifth is brighter than white, as in a photo of high dynamic range
    assert np.array_equal(read(highlights)[:, :40], read(ramp)[:, :40]) and (read(highlights)[:, 40:] == 255).all()
    for white in (255, 65535):
        assert np.array_equal(read(ramp * white), read(ramp))
    assert read(np.zeros((4, 4))).max() == 0


def test_one_pixel_does_not_set_the_scale_of_a_mask_of_whole_numbers(tmp_path: Path) -> None:
    values = np.zeros((HEIGHT, WIDTH), np.uint16)
    values[2:9, 3:12] = 255
    values[4, 4] = 300
    mask = read_mask(saved(tmp_path / "m.png", Image.fromarray(values * 1)), (WIDTH, HEIGHT), [])
    assert torch.equal(mask[0, 0] > 0, torch.from_numpy(values > 0)) and float(mask[0, 0, 5, 5]) == 1
    values[4, 4] = 255
    mask = read_mask(saved(tmp_path / "m.png", Image.fromarray(values * 257)), (WIDTH, HEIGHT), [])
    assert torch.equal(mask[0, 0], torch.from_numpy(values > 0).float())


# --- masks that are not what they should be ---------------------------------------------------------------------------


def peak_and_notes(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> tuple[str, list[str]]:
    """(the error about an empty mask, or ''; the notes)."""
    notes: list[str] = []
    try:
        EditMask.of(read_mask(path, size, notes)).box()
    except BlendedError as error:
        return str(error), notes
    return "", notes


@pytest.mark.parametrize(("color", "peak"), [((255, 0, 0), "0.298"), ((0, 0, 255), "0.114"), ((127, 127, 127), "0.498"), ((0, 0, 0), "0")])
def test_an_empty_mask_is_told_with_its_real_peak(tmp_path: Path, color: tuple[int, int, int], peak: str) -> None:
    image = Image.new("RGB", (WIDTH, HEIGHT))
    image.paste(color, (3, 2, 9, 8))
    error, notes = peak_and_notes(saved(tmp_path / "m.png", image))
    assert f"its brightest pixel is {peak} " in error
    colored = len(set(color)) > 1
    assert notes == (
        ["the mask m.png is in color and counts by its brightness: of white, red has 30 %, green 59 % and blue 11 %. Paint in white."]
        if colored
        else []
    )


@pytest.mark.parametrize("kind", ["L", "P", "I;16", "I", "F"])
def test_a_mask_of_0_and_1_is_black_and_white(tmp_path: Path, kind: str) -> None:
    values = np.zeros((HEIGHT, WIDTH), {"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(kind, np.uint8))
    values[2:7, 3:9] = 1
    image = Image.fromarray(values)
    if kind == "P":
        image.putpalette([i // 3 for i in range(768)])
    error, notes = peak_and_notes(saved(tmp_path / "m.tiff", image))
    assert error == ""
    assert torch.equal(read_mask(tmp_path / "m.tiff", (WIDTH, HEIGHT))[0, 0], torch.from_numpy(values > 0).float())
    assert notes == ([] if kind == "F" else ["the mask m.tiff has the values 0 and 1 only; 1 is taken as white."])


def test_a_photo_given_as_mask_gets_a_note(tmp_path: Path) -> None:
    photo = render(Scene("lake", (Placed("cat", 0.3, 0.5, 0.6),), 3), 96, 64)
    for name in ("photo.png", "photo.jpg"):
        _, notes = peak_and_notes(saved(tmp_path / name, Image.fromarray(photo)), (96, 64))
        assert notes == [
            f"the mask {name} looks like a photo, not like a mask; it counts by its brightness. White should mark what may change."
        ]
    brush = Image.new("RGB", (96, 64))
    ImageDraw.Draw(brush).ellipse((20, 10, 70, 50), fill=(255, 40, 40))
    for name in ("brush.png", "brush.jpg"):
        _, notes = peak_and_notes(saved(tmp_path / name, brush.filter(ImageFilter.GaussianBlur(3))), (96, 64))
        assert not any("photo" in note for note in notes), "a painted and compressed mask with soft edges is none"


def test_of_a_clipspace_picture_the_transparent_part_is_the_mask(tmp_path: Path) -> None:
    photo = render(Scene("lake", (Placed("cat", 0.3, 0.5, 0.6),), 3), 96, 64)
    alpha = np.full((64, 96), 255, np.uint8)
    alpha[10:30, 20:60] = 0
    notes: list[str] = []
    path = saved(tmp_path / "clipspace-painted-masked.png", Image.fromarray(np.dstack([photo, alpha])))
    assert torch.equal(read_mask(path, (96, 64), notes)[0, 0], torch.from_numpy(alpha == 0).float())
    assert len(notes) == 1 and "its transparent part is the mask" in notes[0]


def test_a_mask_that_is_lost_when_it_is_scaled_says_so(tmp_path: Path) -> None:
    line = np.zeros((400, 400), np.uint8)
    line[201] = 255
    error, notes = peak_and_notes(saved(tmp_path / "m.png", Image.fromarray(line)), (100, 100))
    assert error and notes[-1].startswith("the brightest pixel of the mask, 1, was lost when it was scaled; 0 is left.")


def test_the_values_0_and_1_of_a_mask_tensor() -> None:
    values = (torch.rand(2, 1, 5, 5) > 0.5).float()
    found = from_labels(values / 255)
    assert found is not None and torch.equal(found, values)
    for other in (values, values * 0, values * 2 / 255, torch.full((1, 1, 2, 2), float("nan"))):
        assert from_labels(other) is None


# --- what cannot be read ----------------------------------------------------------------------------------------------


def broken(folder: Path, kind: str) -> Path:
    path = folder / "x.png"
    whole = png(RGB, 2, 8)
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(
            {
                "empty": b"", "text": b"this is no picture", "cut": whole[: len(whole) // 2], "head": whole[:20],
                "flipped": whole[:60] + bytes(255 - b for b in whole[60:-20]) + whole[-20:],
            }[kind]
        )  # fmt: skip
    return path


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "cut", "head", "flipped"])
def test_an_unreadable_file_is_an_error_with_its_name(tmp_path: Path, kind: str) -> None:
    path = broken(tmp_path, kind)
    words = {"missing": "does not exist", "folder": "is a folder", "empty": "not a picture", "text": "not a picture"}.get(
        kind, "picture|damaged"
    )
    with pytest.raises(BlendedError, match=rf"the picture .*x\.png .*({words}).*\.$"):
        read_picture(path)
    with pytest.raises(BlendedError, match=rf"the mask .*x\.png .*({words}).*\.$"):
        read_mask(path, (WIDTH, HEIGHT), [])


def test_a_picture_with_too_many_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "big.png", Image.fromarray(RGB))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(BlendedError, match="more pixels"):
        read_picture(path)


@pytest.mark.parametrize("name", ["scene.png", "scene.jpg", "scene.eps"])
@pytest.mark.parametrize(
    "head", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, 200) + bytes(18) + b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_no_program_runs_while_a_postscript_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, head: bytes) -> None:
    started: list[Any] = []

    def start(*command: Any, **_: Any) -> Any:
        started.append(command)
        raise OSError("not in this test")

    for module, function in ((subprocess, "Popen"), (os, "system"), (os, "fork"), (os, "posix_spawn"), (os, "popen")):
        monkeypatch.setattr(module, function, start, raising=False)
    path = tmp_path / name
    path.write_bytes(head + b"%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n" + bytes(400))
    with pytest.raises(BlendedError, match=r"is a PostScript file, which is a program, not a picture of pixels; give PNG, JPEG"):
        read_picture(path)
    with pytest.raises(BlendedError, match="is a PostScript file"):
        read_mask(path, (100, 100))
    assert started == []
    EpsImagePlugin.gs_binary = None
    with contextlib.suppress(OSError), Image.open(path) as image:
        image.load()
    assert started, "without a list of formats Pillow looks for Ghostscript"


def test_every_picture_is_opened_with_a_list_of_formats() -> None:
    root = Path(__file__).parent.parent
    calls = [line for folder in ("blended_core", "nodes") for file in (root / folder).rglob("*.py") for line in file.read_text("utf-8").splitlines()
             if "Image.open(" in line]  # fmt: skip
    assert len(calls) >= 3 and all("formats=" in line for line in calls), calls


def test_other_kinds_of_file_are_named(tmp_path: Path) -> None:
    for head, words in (
        (b"%PDF-1.7", "is a PDF file"),
        (b"<svg xmlns", "is an SVG file"),
        (b"\0\0\0\x18ftypheic", "perhaps HEIC"),
        (b"", "is empty"),
    ):
        (tmp_path / "x.png").write_bytes(head + bytes(40 if head else 0))
        with pytest.raises(BlendedError, match=words):
            read_picture(tmp_path / "x.png")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    pipe, places = (
        tmp_path / "pipe.png",
        [(tmp_path, "is a folder"), (tmp_path / ("x" * 300 + ".png"), "cannot be opened"), (tmp_path / "a\0b", "cannot")],
    )
    if hasattr(os, "mkfifo"):
        os.mkfifo(pipe)
        places.append((pipe, "is a device, a pipe or a socket"))
    if Path("/dev/zero").exists():
        places.append((Path("/dev/zero"), "is a device, a pipe or a socket"))
    said: list[str] = []

    def read_all() -> None:
        for path, _ in places:
            for read in (lambda: read_picture(path), lambda: read_mask(path, (4, 4)), lambda: request_of_report(path)):  # noqa: B023
                with contextlib.suppress(BlendedError):
                    read()
                    said.append("nothing was refused")
                try:
                    read()
                except BlendedError as error:
                    said.append(str(error))

    # In a thread: a read of the pipe would never return.
    reader = threading.Thread(target=read_all, daemon=True)
    reader.start()
    reader.join(60)
    assert not reader.is_alive() and len(said) == 3 * len(places)
    for i, (_, words) in enumerate(places):
        assert all(words in text and len(text) < 300 and text.isprintable() for text in said[3 * i : 3 * i + 3]), said[3 * i : 3 * i + 3]


def encodings() -> dict[str, bytes]:
    """A small picture in every format, with metadata where it has any."""
    flat = np.zeros((24, 20, 4), np.uint8)
    flat[4:12, 3:15] = (200, 90, 30, 255)
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    image = Image.fromarray(flat)
    floating = Image.fromarray(np.linspace(0, 1, 480, dtype=np.float32).reshape(24, 20))
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "png": (image, "PNG", {"exif": exif, "dpi": (300, 300), "icc_profile": b"a profile"}),
        "jpg": (image.convert("RGB"), "JPEG", {"exif": exif, "comment": b"hello"}),
        "webp": (image, "WEBP", {"exif": exif}),
        "tiff": (image.convert("RGB"), "TIFF", {"exif": exif}),
        "float.tiff": (floating, "TIFF", {}),
    }
    if features.check("avif"):
        kinds["avif"] = (image, "AVIF", {"exif": exif})
    out = {}
    for name, (picture, kind, options) in kinds.items():
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        out[name] = buffer.getvalue()
    return out


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what is damaged
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff", "float.tiff", "avif"])
def test_a_thousand_damaged_files_are_read_or_refused_with_a_sentence(tmp_path: Path, kind: str) -> None:
    whole = encodings().get(kind)
    if whole is None:
        pytest.skip("this Pillow cannot write AVIF files")
    rng, told = random.Random(kind), {"read": 0, "refused": 0}
    path = tmp_path / f"x.{kind}"
    for number in range(1000):
        path.write_bytes(mutated(whole, rng))
        try:
            picture = read_picture(path)
            if number % 10 == 0:
                write_picture(tmp_path / "out.png", for_format(picture, "png"))
            read_mask(path, picture.size, [])
            told["read"] += 1
        except BlendedError as error:
            assert str(error).endswith(".") and len(str(error)) < 500 and str(error).isprintable(), error
            told["refused"] += 1
    assert min(told.values()) > 10, told


def test_a_tiff_without_dimensions_and_a_damaged_avif_are_refused(tmp_path: Path) -> None:
    tiff = bytearray(encodings()["tiff"])
    start = struct.unpack_from("<I", tiff, 4)[0]
    for i in range(struct.unpack_from("<H", tiff, start)[0]):
        at = start + 2 + 12 * i
        if struct.unpack_from("<H", tiff, at)[0] in (256, 257):
            struct.pack_into("<H", tiff, at, 60000 + i)
    files = {"x.tiff": bytes(tiff)}
    if "avif" in encodings():
        avif = encodings()["avif"]
        files |= {"cut.avif": avif[: len(avif) // 2], "flipped.avif": avif[:-60] + bytes(255 - b for b in avif[-60:])}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BlendedError, match=rf"the picture .*{name} "):
            read_picture(tmp_path / name)


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [False, True])
def test_a_png_holds_what_was_written(tmp_path: Path, alpha: bool) -> None:
    path = tmp_path / "deep" / "er" / "out.png"
    text = {"blended-diffusion": '{"prompt": "a λ tree «ü» 🍄"}'}
    write_png(path, RGB, np.ascontiguousarray(RGBA[..., 3]) if alpha else None, text)
    with Image.open(path) as image:
        assert image.mode == ("RGBA" if alpha else "RGB")
        assert np.array_equal(np.array(image), RGBA if alpha else RGB)
        assert image.info["blended-diffusion"] == text["blended-diffusion"]
    again = read_picture(path)
    assert np.array_equal(again.rgb, RGB)


def test_files_are_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    moved: list[bytes] = []
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        moved.append(Path(source).read_bytes())
        assert path.read_bytes() == b"old", "until then a reader sees the old file"
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_bytes(path, b"new")
    assert moved == [b"new"] and path.read_bytes() == b"new"

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"newer")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"], "nothing half is left behind"


# --- metadata ---------------------------------------------------------------------------------------------------------


def photo_with_metadata(path: Path) -> Path:
    """A picture that its EXIF data turns, with everything that its format can hold."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    exif[0x8769] = {0x829A: (1, 250), 0xA002: WIDTH, 0xA003: HEIGHT}
    exif[0x8825] = {1: "N"}
    options: dict[str, Any] = {"exif": exif.tobytes(), "dpi": (300, 300), "icc_profile": PROFILE, "xmp": b'<x tiff:Orientation="6"/>'}
    if path.suffix == ".png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("Title", "a λ tree")
        text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
        text.add(b"gAMA", struct.pack(">I", 45455))
        text.add(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
        options |= {"pnginfo": text}
    elif path.suffix == ".jpg":
        options |= {"comment": b"a comment", "quality": 100, "subsampling": 0}
    elif path.suffix == ".webp":
        options |= {"lossless": True}
    return saved(path, Image.fromarray(RGB), **options)


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("target", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("source", ["png", "jpg", "webp", "tiff"])
def test_metadata_is_kept_in_every_format(tmp_path: Path, source: str, target: str) -> None:
    picture = for_format(read_picture(photo_with_metadata(tmp_path / f"s.{source}")), target)
    assert picture.size == (HEIGHT, WIDTH), "it was turned"
    out = tmp_path / f"o.{target}"
    write_picture(out, picture, target, {"blended-diffusion": '{"prompt": "λ"}'})
    with Image.open(out) as image:
        exif = image.getexif()
        assert exif[0x010F] == "Maker" and exif.get(0x0112, 1) == 1
        inner = exif.get_ifd(0x8769)
        assert inner[0x829A] == (1, 250) and (inner[0xA002], inner[0xA003]) == image.size
        assert exif.get_ifd(0x8825)[1] == "N" and image.info["icc_profile"] == PROFILE
        if target == "png":
            assert image.text["blended-diffusion"] == '{"prompt": "λ"}'
        else:
            assert inner[0x9286] == b"ASCII\0\0\0blended-diffusion: " + b'{"prompt": "\\u03bb"}'
        if source == target == "png":
            assert image.text["Title"] == "a λ tree" and image.info["gamma"] == 0.45455
            assert image.info["chromaticity"] == (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
        if source == target == "jpg":
            assert image.info["comment"] == b"a comment"
    again = read_picture(out)
    assert np.array_equal(again.rgb, picture.rgb) == (target != "jpg") and again.notes == []
    if source != "webp" and target != "webp":
        assert again.metadata.dpi == pytest.approx((300, 300), abs=0.01)
    if source != "tiff":
        assert again.metadata.xmp == b'<x tiff:Orientation="1"/>'
    assert ("jpg files are lossy" in " ".join(picture.notes)) == (target == "jpg")
    assert ("cannot hold the text entries and the gamma" in " ".join(picture.notes)) == (source == "png" and target != "png")


def test_the_resolution_survives_in_webp_as_exif_data(tmp_path: Path) -> None:
    picture = for_format(read_picture(saved(tmp_path / "s.png", Image.fromarray(RGB), dpi=(300, 150))), "webp")
    write_picture(tmp_path / "o.webp", picture, "webp")
    with Image.open(tmp_path / "o.webp") as image:
        assert [round(float(image.getexif()[tag])) for tag in (0x011A, 0x011B, 0x0128)] == [300, 150, 2]


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "tiff"])
def test_the_options_of_an_earlier_edit_are_replaced_and_a_persons_comment_is_not(tmp_path: Path, format: str) -> None:
    def about(path: Path) -> str:
        with Image.open(path) as image:
            return image.text["blended-diffusion"] if format == "png" else str(image.getexif().get_ifd(0x8769)[0x9286])

    write_picture(tmp_path / "a", pictures.Picture(RGB), format, {"blended-diffusion": "first"})
    write_picture(tmp_path / "b", for_format(read_picture(tmp_path / "a"), format), format, {"blended-diffusion": "second"})
    assert "first" in about(tmp_path / "a") and "second" in about(tmp_path / "b") and "first" not in about(tmp_path / "b")
    if format != "png":
        exif = Image.Exif()
        exif[0x8769] = {0x9286: b"ASCII\0\0\0my words"}
        path = saved(tmp_path / "c.webp", Image.fromarray(RGB), exif=exif.tobytes())
        write_picture(tmp_path / "d", for_format(read_picture(path), format), format, {"blended-diffusion": "third"})
        assert "my words" in about(tmp_path / "d")


def test_the_thumbnail_of_the_source_is_not_kept(tmp_path: Path) -> None:
    thumbnail = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(thumbnail, "JPEG")
    small = thumbnail.getvalue()
    # The first directory, and after it the one of the thumbnail, which Pillow cannot write.
    first = struct.pack("<HHHII", 1, 0x010F, 2, 4, int.from_bytes(b"abc\0", "little"))
    second = struct.pack("<HHHIIHHII", 2, 0x0201, 4, 1, 8 + 18 + 30, 0x0202, 4, 1, len(small)) + struct.pack("<I", 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + first + struct.pack("<I", 26) + second + small
    path = saved(tmp_path / "s.jpg", Image.fromarray(RGB), exif=exif)
    with Image.open(path) as image:
        assert image.getexif().get_ifd(ExifTags.IFD.IFD1), "the source has one"
    picture = read_picture(path)
    write_picture(tmp_path / "o.jpg", for_format(picture, "jpg"), "jpg")
    with Image.open(tmp_path / "o.jpg") as image:
        assert image.getexif()[0x010F] == "abc" and not image.getexif().get_ifd(ExifTags.IFD.IFD1)
    assert small[-40:] not in (tmp_path / "o.jpg").read_bytes()


def test_metadata_that_does_not_fit_is_left_out_with_a_note(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 100_000
    picture = read_picture(saved(tmp_path / "s.png", Image.fromarray(RGB), exif=exif))
    assert for_format(picture, "png").metadata.exif is not None
    less = for_format(picture, "jpg")
    assert less.metadata.exif is None and less.notes[-1] == "jpg files cannot hold the EXIF data of the picture; the results are without."
    write_picture(tmp_path / "o.jpg", less, "jpg", {"blended-diffusion": "x" * 100_000})
    assert read_picture(tmp_path / "o.jpg").size == (WIDTH, HEIGHT)
    clear = for_format(read_picture(saved(tmp_path / "a.png", Image.fromarray(RGBA))), "jpg")
    assert "jpg files have no transparency; it is left out." in clear.notes
    wide = pictures.Picture(np.zeros((1, 20_000, 3), np.uint8))
    with pytest.raises(BlendedError, match="20000×1 and a webp file holds at most 16383") as raised:
        for_format(wide, "webp")
    assert raised.value.options == ("format",)


def test_damaged_exif_data_does_not_spoil_a_picture(tmp_path: Path) -> None:
    picture = read_picture(saved(tmp_path / "s.jpg", Image.fromarray(RGB), exif=b"Exif\0\0II*\0" + b"\xff" * 40))
    assert picture.size == (WIDTH, HEIGHT) and picture.metadata.exif is None
