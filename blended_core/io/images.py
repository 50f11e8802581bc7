"""Picture files. 8-bit values are kept exactly, conversions are reported, and files are written completely or not at all.

torch is imported where a tensor is made, so that a file that cannot be used is refused before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..errors import BlendedError, reason
from .atomic import check_file, shown_path, write_bytes
from .formats import FAST
from .metadata import ORIENTATION, Metadata, encoded, fitted, metadata_of

if TYPE_CHECKING:
    from torch import Tensor

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
FloatArray = NDArray[np.float64]
READABLE = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM")
"""Formats of pixels, which Pillow decodes in its own process. It hands others, such as PostScript, to programs that execute what a file says."""
OTHER_KINDS = {
    b"%!PS": "a PostScript file, which is a program", b"\xc5\xd0\xd3\xc6": "a PostScript file, which is a program", b"%PDF": "a PDF file",
    b"<svg": "an SVG file", b"<?xml": "an XML file, perhaps SVG", b"<!DOC": "a web page", b"<html": "a web page",
}  # fmt: skip
OPAQUE = 255
ROUNDING = 0.01
"""How far values may lie outside 0..1 and are clamped. Beyond it they are of another range."""
FLOAT_SHARE, OVERFLOW_SHARE = 0.5, 0.01
"""Shares of the values above 0 that may be larger than 1, and larger than 255, before a file is taken to be of the next larger range."""
PHOTO_COLORS = 64
"""Colors of a picture, in steps of 16 of each channel, above which it is a photo: a mask has few, also with soft edges or compressed as JPEG."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_MODES = {"L": "grayscale", "LA": "grayscale", "La": "grayscale", "1": "black-and-white", "P": "palette", "PA": "palette", "CMYK": "CMYK",
          "YCbCr": "YCbCr", "LAB": "Lab", "HSV": "HSV", "RGBX": "RGBX", "RGBa": "premultiplied"}  # fmt: skip


@dataclass(repr=False)
class Picture:
    """A picture in 8 bits.

    Attributes:
        rgb: uint8 [H, W, 3]. alpha: uint8 [H, W], or None.
        notes: what was converted when the file was read.
        icc: the RGB color profile of the file, to be written with the result, or None.
        metadata: what else the file holds, to be written with the result.
    """

    rgb: UInt8
    alpha: UInt8 | None = None
    notes: list[str] = field(default_factory=list)
    icc: bytes | None = None
    metadata: Metadata = field(default_factory=Metadata)

    def __repr__(self) -> str:
        width, height = self.size
        return f"Picture({width}×{height}, {'RGB' if self.alpha is None else 'RGBA'})"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]

    def tensor(self) -> Tensor:
        """[1, 3, H, W] float32 in 0..1; each value is k/255, correctly rounded."""
        import torch

        return torch.from_numpy(self.rgb.copy()).to(torch.float32).div_(255).permute(2, 0, 1)[None]


def to_uint8(picture: Tensor) -> UInt8:
    """[1, 3, H, W] in 0..1 → [H, W, 3]; k/255 becomes k for each k.

    Raises:
        BlendedError: if the tensor has another shape or another range of values.
    """
    if picture.ndim != 4 or picture.shape[:2] != (1, 3):
        raise BlendedError(f"the picture has shape {tuple(picture.shape)}; give one RGB picture, [1, 3, height, width].")
    if not picture.is_floating_point():
        raise BlendedError(f"the picture has dtype {picture.dtype}; give floating-point values in 0..1, for 8-bit values: picture / 255.")
    low, high = float(picture.amin()), float(picture.amax())
    if low < -ROUNDING or high > 1 + ROUNDING:
        advice = "for values in −1..1: (picture + 1) / 2" if low < 0 else "for values in 0..255: picture / 255"
        raise BlendedError(f"the picture has values from {low:.3g} to {high:.3g}; give values in 0..1, {advice}.")
    scaled = (picture[0].permute(1, 2, 0).clamp(0, 1) * 255).round()
    out: UInt8 = scaled.byte().contiguous().numpy()
    return out


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    """A decoded file: the image, the raw mode of its decoder, the number of frames, and the EXIF orientation before decoding."""

    image: Image.Image
    raw_mode: str
    frames: int
    orientation: int


@contextlib.contextmanager
def _opened(path: Path, what: str, option: str) -> Iterator[_Opened]:
    """A picture file, open. Everything that fails in the block is the fault of the file, except a BlendedError."""
    check_file(path, what, option)
    try:
        with Image.open(path, formats=readable_formats()) as image:
            # Pillow converts 16-bit color to 8 bits without a warning; only the raw mode of its decoder shows it, which decoding forgets.
            raw_mode = " ".join(str(tile[3]) for tile in getattr(image, "tile", []))
            frames = _frames(image)
            # Decoding turns a TIFF file and forgets its orientation. Of a PNG file, asking for EXIF data decodes, and would swallow its errors.
            stored = _orientation(image) if image.format == "TIFF" else 0
            image.load()
            yield _Opened(image, raw_mode, frames, stored or _orientation(image))
    except BlendedError:
        raise
    except UnidentifiedImageError as error:
        raise BlendedError(f"{what} {shown_path(path)} {_kind_of_file(path)}; give PNG, JPEG, WebP, TIFF or BMP.", option) from error
    except Image.DecompressionBombError as error:
        raise BlendedError(f"{what} {shown_path(path)} has more pixels than Pillow allows; scale it down first.", option) from error
    except Exception as error:  # decoders raise nearly every kind for a damaged file
        raise BlendedError(
            f"{what} {shown_path(path)} could not be read ({reason(error)}); the file may be damaged or incomplete.", option
        ) from error


@lru_cache(maxsize=1)
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read: those of READABLE that it has."""
    Image.init()
    return tuple(name for name in READABLE if name in Image.OPEN)


def _kind_of_file(path: Path) -> str:
    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        return "is empty, not a picture"
    if name := next((name for start, name in OTHER_KINDS.items() if head.startswith(start)), None):
        return f"is {name}, not a picture of pixels"
    if head[4:8] == b"ftyp":
        return "is not a picture that this Pillow can read (perhaps HEIC, of a phone, or AVIF)"
    return "is not a picture file that Pillow can read"


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data does not spoil the pixels; metadata_of tells it
        return 1
    return value if value in _UPRIGHT else 1


def _frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # damaged frames after the first, which alone is used
        return 1
    finally:
        image.seek(0)


def _upright(opened: _Opened) -> Image.Image:
    """The image, turned as its EXIF data says. Pillow has already turned a TIFF file."""
    turned = opened.image.format == "TIFF" or opened.orientation == 1
    return opened.image if turned else opened.image.transpose(_UPRIGHT[opened.orientation])


def read_picture(path: str | Path) -> Picture:
    """Reads a picture: PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000 or PPM.

    8-bit RGB and RGBA files keep every value. The EXIF rotation is applied. Other kinds are converted to 8-bit RGB, and ``notes`` says so.
    Floating-point values are taken as 0..1, unless most of those above 0 are above 1; then as 0..255, unless more than one in a hundred is above
    that; then as 0..65535. What lies outside is clamped, and NaN becomes black, so no single pixel changes the brightness of the others.

    Raises:
        BlendedError: if there is no such file, or it cannot be read as a picture.
    """
    path, notes = Path(path), []
    name = path.name
    with _opened(path, "the picture", "image") as opened:
        if opened.frames > 1:
            notes.append(f"{name} has {opened.frames} frames; the first is edited.")
        # A profile of a grayscale or CMYK file does not apply to the RGB file that is written.
        icc = opened.image.info.get("icc_profile") if opened.image.mode in ("RGB", "RGBA", "P", "PA") else None
        image = _upright(opened)
        if opened.orientation != 1:
            notes.append(f"{name} was rotated according to its EXIF data.")
        metadata, damaged = metadata_of(opened.image, image.size, name)
        notes += damaged
        mode = image.mode
        if mode.startswith(("I", "F")):
            kind = "16-bit" if mode.startswith("I") else "floating-point"
            notes.append(f"{name} is a {kind} grayscale picture; it is edited as 8-bit RGB.")
            image = _eight_bit(image, name, notes, 65535 if ";16" in mode + opened.raw_mode else None)
        elif ";16" in opened.raw_mode:
            notes.append(f"{name} has 16 bits per channel; it is edited with 8.")
        elif mode not in ("RGB", "RGBA"):
            notes.append(f"{name} is a {_MODES.get(mode, mode)} picture; it is edited as 8-bit RGB.")
        transparent = "A" in image.mode or "a" in image.mode or "transparency" in image.info
        pixels = np.array(image.convert("RGBA" if transparent else "RGB"))
    alpha = np.ascontiguousarray(pixels[..., 3]) if transparent else None
    return Picture(np.ascontiguousarray(pixels[..., :3]), alpha, notes, icc if isinstance(icc, bytes) else None, metadata)


def _eight_bit(image: Image.Image, name: str, notes: list[str], white: int | None = None) -> Image.Image:
    """Grayscale with more bits, or of floating point, as 8-bit grayscale.

    ``white`` is the value of white, if the file says it. Otherwise it is chosen by the values, as :func:`read_picture` describes it.
    """
    with np.errstate(invalid="ignore"):  # a signaling NaN
        values = np.array(image).astype(np.float64)
    finite = np.isfinite(values)
    if white is None:
        white = _white_of(values[finite & (values > 0)], image.mode == "F")
    outside = int((~finite | (values < -ROUNDING * white) | (values > (1 + ROUNDING) * white)).sum())
    if outside:
        notes.append(
            f"{outside} of the {values.size} values of {name} are NaN, Inf or outside of 0..{white}, which its values were taken as; they were "
            "clamped, and NaN made black."
        )
    elif image.mode == "F" and white > 1:
        notes.append(f"the values of {name} were taken as 0..{white}.")
    scaled = np.nan_to_num(values, nan=0.0, posinf=white, neginf=0.0) / white * 255
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))


def _white_of(positive: FloatArray, floating: bool) -> int:
    if floating and (positive > 1).mean(dtype=np.float64) <= FLOAT_SHARE if positive.size else floating:
        return 1
    return 255 if not positive.size or (positive > 255).mean(dtype=np.float64) <= OVERFLOW_SHARE else 65535


def read_mask(path: str | Path, size: tuple[int, int], notes: list[str] | None = None) -> Tensor:
    """:func:`mask_values` as [1, 1, H, W]."""
    values = mask_values(path, size, notes)
    import torch

    return torch.from_numpy(values)[None, None]


def mask_values(path: str | Path, size: tuple[int, int], notes: list[str] | None = None) -> Float32:
    """A mask file as [H, W] float32 in 0..1, white = edit, scaled to ``size`` (width, height).

    Color files count by their brightness; a file of one color with a varying alpha channel, by its alpha; a color photo with a varying alpha
    channel, as ComfyUI's mask editor saves it, by its transparent part. A file of the values 0 and 1 is taken as black and white. Values of more
    than 8 bits are scaled as in :func:`read_picture`. ``notes`` receives what was converted.

    Raises:
        BlendedError: if the file cannot be read, or its aspect ratio differs from that of the picture.
    """
    path, notes = Path(path), [] if notes is None else notes
    name = path.name
    with _opened(path, "the mask", "mask") as opened:
        image = _upright(opened)
        if image.mode.startswith(("I", "F")):
            image = _eight_bit(image, name, notes)
        has_alpha = "A" in image.mode or "a" in image.mode or "transparency" in image.info
        pixels = np.array(image.convert("RGBA"))
    gray = np.array(Image.fromarray(pixels[..., :3]).convert("L"))
    colors = 0 if image.mode in ("1", "L", "LA") else _color_count(pixels)
    if has_alpha and np.ptp(pixels[..., 3]) > 0:
        if np.ptp(gray) == 0:
            gray = pixels[..., 3]
            notes.append(f"the mask {name} has one color; its alpha channel is used, opaque = edit.")
        elif colors > PHOTO_COLORS:
            gray = OPAQUE - pixels[..., 3]
            notes.append(
                f"the mask {name} is a color picture with transparency, as ComfyUI's mask editor saves it; its transparent part is the mask."
            )
        else:
            gray = (gray.astype(np.uint16) * pixels[..., 3] // OPAQUE).astype(np.uint8)
    elif colors > PHOTO_COLORS:
        notes.append(
            f"the mask {name} looks like a photo, not like a mask; it counts by its brightness. White should mark what may change."
        )
    elif colors and int(gray.max()) < 128:
        notes.append(
            f"the mask {name} is in color and counts by its brightness: of white, red has 30 %, green 59 % and blue 11 %. Paint in white."
        )
    if int(gray.max(initial=0)) == 1:
        gray = gray * np.uint8(OPAQUE)
        notes.append(f"the mask {name} has the values 0 and 1 only; 1 is taken as white.")
    width, height = gray.shape[1], gray.shape[0]
    if (width, height) != size:
        if abs(width / height - size[0] / size[1]) > 0.02 * size[0] / size[1]:
            raise BlendedError(
                f"the mask is {width}×{height} and the picture {size[0]}×{size[1]}, a different aspect ratio; draw the mask over the picture.",
                option="mask",
            )
        notes.append(f"the mask was scaled from {width}×{height} to the picture's {size[0]}×{size[1]}.")
        before = int(gray.max(initial=0))
        gray = np.array(Image.fromarray(gray).resize(size, Image.Resampling.NEAREST))
        if int(gray.max(initial=0)) < before:
            notes.append(
                f"the brightest pixel of the mask, {before / OPAQUE:.3g}, was lost when it was scaled; {gray.max(initial=0) / OPAQUE:.3g} is left. "
                "Draw the mask at the size of the picture."
            )
    values: Float32 = gray.astype(np.float32) / np.float32(OPAQUE)
    return values


def _color_count(pixels: UInt8) -> int:
    """The number of different colors, without grays, in steps of 16 of each channel."""
    coarse = (pixels[..., :3] >> 4).astype(np.uint16)
    used = np.flatnonzero(np.bincount((coarse[..., 0] << 8 | coarse[..., 1] << 4 | coarse[..., 2]).ravel(), minlength=1 << 12))
    channels = np.stack([used >> 8, used >> 4 & 15, used & 15])
    return int((np.ptp(channels, axis=0) > 1).sum())


def transparency(picture: Picture) -> Float32:
    """The transparent part of a picture as a mask [H, W]. Raises BlendedError if nothing is transparent."""
    if picture.alpha is None or int(picture.alpha.min()) == OPAQUE:
        raise BlendedError(
            "no mask was given and the picture has no transparent part; give a mask that is white where the picture should change.",
            option="mask",
        )
    values: Float32 = 1 - picture.alpha.astype(np.float32) / np.float32(OPAQUE)
    return values


# --- writing ----------------------------------------------------------------------------------------------------------


def write_png(
    path: str | Path, rgb: UInt8, alpha: UInt8 | None = None, text: dict[str, str] | None = None, icc: bytes | None = None
) -> None:
    """Writes a complete PNG file.

    Args:
        path: the file.
        rgb: uint8 [H, W, 3]. alpha: uint8 [H, W].
        text: text chunks. icc: color profile.

    Raises:
        BlendedError: if the pixels are not uint8 [H, W, 3].
    """
    write_picture(path, Picture(rgb, alpha, icc=icc), "png", text)


def write_picture(
    path: str | Path, picture: Picture, format: str = "png", text: Mapping[str, str] | None = None, png_compression: str = FAST
) -> None:
    """Writes a complete picture file with the metadata of the picture.

    Args:
        path: the file.
        picture: its metadata as :func:`for_format` returns it.
        format: png, jpg, webp or tiff.
        text: text about the picture, as :func:`~blended_core.io.metadata.encoded` writes it.
        png_compression: as in :func:`~blended_core.io.formats.png_options`.

    Raises:
        BlendedError: if the pixels are not uint8 [H, W, 3].
    """
    rgb = picture.rgb
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise BlendedError(f"the pixels are {rgb.dtype} {tuple(rgb.shape)}; give uint8 (height, width, 3), for a tensor: to_uint8(tensor).")
    pixels = rgb if picture.alpha is None else np.dstack([rgb, picture.alpha])
    write_bytes(Path(path), encoded(pixels, format, picture.metadata, picture.icc, text, png_compression))


def for_format(picture: Picture, format: str) -> Picture:
    """The picture with the metadata that a format can hold; its notes say what it cannot.

    Raises:
        BlendedError: if the format cannot hold a picture of this size.
    """
    metadata, icc, notes = fitted(picture.metadata, picture.icc, picture.size, picture.alpha is not None, format)
    return replace(picture, metadata=metadata, icc=icc, notes=picture.notes + notes)
