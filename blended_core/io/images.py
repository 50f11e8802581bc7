"""Picture files. 8-bit values are kept exactly, conversions are reported, and files are written completely or not at all.

torch is imported where a tensor is made, so that a file that cannot be used is refused before.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ..errors import BlendedError
from .atomic import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

UInt8 = NDArray[np.uint8]
OPAQUE = 255
ROUNDING = 0.01
"""How far values may lie outside 0..1 and are clamped. Beyond it they are of another range."""
_EXIF_ORIENTATION = 0x0112
_MODES = {"L": "grayscale", "LA": "grayscale", "La": "grayscale", "1": "black-and-white", "P": "palette", "PA": "palette", "CMYK": "CMYK",
          "YCbCr": "YCbCr", "LAB": "Lab", "HSV": "HSV", "RGBX": "RGBX", "RGBa": "premultiplied"}  # fmt: skip


@dataclass(repr=False)
class Picture:
    """A picture in 8 bits.

    Attributes:
        rgb: uint8 [H, W, 3]. alpha: uint8 [H, W], or None.
        notes: what was converted when the file was read.
        icc: the RGB color profile of the file, to be written with the result, or None.
    """

    rgb: UInt8
    alpha: UInt8 | None = None
    notes: list[str] = field(default_factory=list)
    icc: bytes | None = None

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

        return torch.from_numpy(self.rgb.copy()).permute(2, 0, 1)[None].float() / 255


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


@contextlib.contextmanager
def _opened(path: Path, what: str, option: str) -> Iterator[Image.Image]:
    if not path.exists():
        raise BlendedError(f"{what} {path} does not exist; check the path.", option)
    if path.is_dir():
        raise BlendedError(f"{what} {path} is a folder; give a picture file.", option)
    try:
        with Image.open(path) as image:
            image.load()
            yield image
    except UnidentifiedImageError:
        raise BlendedError(
            f"{what} {path} is not a picture file that Pillow can read; give PNG, JPEG, WebP, TIFF or BMP.", option
        ) from None
    except Image.DecompressionBombError:
        raise BlendedError(f"{what} {path} has more pixels than Pillow allows; scale it down first.", option) from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, BlendedError):
            raise
        raise BlendedError(f"{what} {path} could not be read ({error}); the file may be damaged or incomplete.", option) from None


def read_picture(path: str | Path) -> Picture:
    """Reads a picture in any format that Pillow supports.

    8-bit RGB and RGBA files keep every value. The EXIF rotation is applied. Other kinds are converted to 8-bit RGB, and ``notes`` says so.

    Raises:
        BlendedError: if there is no such file, or it cannot be read as a picture.
    """
    path, notes = Path(path), []
    name = path.name
    with _opened(path, "the picture", "image") as image:
        frames: int = getattr(image, "n_frames", 1)
        if frames > 1:
            notes.append(f"{name} has {frames} frames; the first is edited.")
        # Pillow converts 16-bit color to 8 bits without a warning; only the raw mode of its decoder shows it.
        deep = ";16" in _raw_mode(path)
        # A profile of a grayscale or CMYK file does not apply to the RGB file that is written.
        icc = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P", "PA") else None
        rotated = image.getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1)
        image = ImageOps.exif_transpose(image)
        if rotated:
            notes.append(f"{name} was rotated according to its EXIF data.")
        mode = image.mode
        if mode.startswith(("I", "F")):
            kind = "16-bit" if mode.startswith("I") else "floating-point"
            notes.append(f"{name} is a {kind} grayscale picture; it is edited as 8-bit RGB.")
            image = _eight_bit(image, dark=mode.startswith("I;16"))
        elif deep:
            notes.append(f"{name} has 16 bits per channel; it is edited with 8.")
        elif mode not in ("RGB", "RGBA"):
            notes.append(f"{name} is a {_MODES.get(mode, mode)} picture; it is edited as 8-bit RGB.")
        transparent = "A" in image.mode or "a" in image.mode or "transparency" in image.info
        pixels = np.array(image.convert("RGBA" if transparent else "RGB"))
    alpha = np.ascontiguousarray(pixels[..., 3]) if transparent else None
    return Picture(np.ascontiguousarray(pixels[..., :3]), alpha, notes, icc)


def _raw_mode(path: Path) -> str:
    with Image.open(path) as image:
        return " ".join(str(tile[3]) for tile in getattr(image, "tile", []))


def _eight_bit(image: Image.Image, dark: bool = False) -> Image.Image:
    """Grayscale with more bits as 8-bit grayscale. If all values fit in 8 bits, they are taken as 8-bit values, unless ``dark``."""
    values = np.array(image).astype(np.float64)
    highest = values.max(initial=0)
    peak = 1.0 if image.mode == "F" and highest <= 1 else 255.0 if highest <= 255 and not dark else 65535.0
    return Image.fromarray((values / peak * 255).round().clip(0, 255).astype(np.uint8))


def read_mask(path: str | Path, size: tuple[int, int], notes: list[str] | None = None) -> Tensor:
    """A mask file as [1, 1, H, W] float32 in 0..1, white = edit, scaled to ``size`` (width, height).

    Color files count by their brightness; a file of one color with a varying alpha channel, by its alpha. ``notes`` receives what was converted.

    Raises:
        BlendedError: if the file cannot be read, or its aspect ratio differs from that of the picture.
    """
    path, notes = Path(path), [] if notes is None else notes
    with _opened(path, "the mask", "mask") as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            image = _eight_bit(image)
        has_alpha = "A" in image.mode or "transparency" in image.info
        pixels = np.array(image.convert("RGBA"))
    gray = np.array(Image.fromarray(pixels[..., :3]).convert("L"))
    if has_alpha and np.ptp(pixels[..., 3]) > 0:
        if np.ptp(gray) == 0:
            gray = pixels[..., 3]
            notes.append(f"the mask {path.name} has one color; its alpha channel is used, opaque = edit.")
        else:
            gray = (gray.astype(np.uint16) * pixels[..., 3] // OPAQUE).astype(np.uint8)
    width, height = gray.shape[1], gray.shape[0]
    if (width, height) != size:
        if abs(width / height - size[0] / size[1]) > 0.02 * size[0] / size[1]:
            raise BlendedError(
                f"the mask is {width}×{height} and the picture {size[0]}×{size[1]}, a different aspect ratio; draw the mask over the picture.",
                option="mask",
            )
        notes.append(f"the mask was scaled from {width}×{height} to the picture's {size[0]}×{size[1]}.")
        gray = np.array(Image.fromarray(gray).resize(size, Image.Resampling.NEAREST))
    return _mask_tensor(gray.astype(np.float32) / OPAQUE)


def mask_from_alpha(picture: Picture) -> Tensor:
    """The transparent part of a picture as a mask [1, 1, H, W]. Raises BlendedError if nothing is transparent."""
    if picture.alpha is None or int(picture.alpha.min()) == OPAQUE:
        raise BlendedError(
            "no mask was given and the picture has no transparent part; give a mask that is white where the picture should change.",
            option="mask",
        )
    return _mask_tensor(1 - picture.alpha.astype(np.float32) / OPAQUE)


def _mask_tensor(values: NDArray[Any]) -> Tensor:
    import torch

    return torch.from_numpy(values)[None, None]


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
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise BlendedError(f"the pixels are {rgb.dtype} {tuple(rgb.shape)}; give uint8 (height, width, 3), for a tensor: to_uint8(tensor).")
    pixels = rgb if alpha is None else np.dstack([rgb, alpha])
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    extra: dict[str, Any] = {"icc_profile": icc} if icc else {}
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info, **extra)
    write_bytes(Path(path), buffer.getvalue())
