"""Picture files: what is kept, what is converted with a note, and what is an error."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from blended_core.errors import BlendedError
from blended_core.io import images as pictures
from blended_core.io.atomic import write_bytes
from blended_core.io.images import mask_from_alpha, read_mask, read_picture, to_uint8, write_png

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
    for name, options in (("photo.jpg", {"quality": 100}), ("photo.png", {})):
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
    mask = mask_from_alpha(picture)
    assert mask.shape == (1, 1, HEIGHT, WIDTH)
    assert torch.equal(mask[0, 0, 0], torch.ones(WIDTH)) and torch.allclose(mask[0, 0], 1 - torch.from_numpy(RGBA[..., 3]).float() / 255)
    # 127 of 255 is more transparent than not
    two = mask_from_alpha(pictures.Picture(RGB[:1, :2], np.array([[127, 128]], np.uint8)))
    assert (two >= 0.5).flatten().tolist() == [True, False]
    for alpha in (None, np.full((HEIGHT, WIDTH), 255, np.uint8)):
        with pytest.raises(BlendedError, match="no mask was given and the picture has no transparent part"):
            mask_from_alpha(pictures.Picture(RGB, alpha))


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
