"""Picture files: read without losing a bit that can be kept, and said so where one cannot; written whole or not at all."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from ..errors import BlendedError
from .atomic import write_bytes

UInt8 = NDArray[np.uint8]
OPAQUE = 255
_EXIF_ORIENTATION = 0x0112
_MODES = {"L": "grey", "LA": "grey", "La": "grey", "1": "black and white", "P": "palette", "PA": "palette", "CMYK": "CMYK",
          "YCbCr": "YCbCr", "LAB": "Lab", "HSV": "HSV", "RGBX": "RGBX", "RGBa": "premultiplied"}  # fmt: skip


@dataclass
class Picture:
    """A picture as 8-bit numbers.

    ``rgb`` [H, W, 3] and ``alpha`` [H, W] or None are uint8; ``notes`` say what was converted on the way in; ``icc`` is the
    file's colour profile if it is one of RGB, passed on when the picture is written.
    """

    rgb: UInt8
    alpha: UInt8 | None = None
    notes: list[str] = field(default_factory=list)
    icc: bytes | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]

    def tensor(self) -> Tensor:
        """[1, 3, H, W] float32 in 0..1, every value k/255 exactly rounded."""
        return torch.from_numpy(self.rgb.copy()).permute(2, 0, 1)[None].float() / 255


def to_uint8(picture: Tensor) -> UInt8:
    """[1, 3, H, W] in 0..1 → [H, W, 3]; k/255 gives back k for every k."""
    scaled = (picture[0].permute(1, 2, 0).clamp(0, 1) * 255).round()
    out: UInt8 = scaled.to(torch.uint8).contiguous().numpy()
    return out


@contextlib.contextmanager
def _opened(path: Path, what: str) -> Iterator[Image.Image]:
    if not path.exists():
        raise BlendedError(f"{what} {path} does not exist; check the path.")
    if path.is_dir():
        raise BlendedError(f"{what} {path} is a folder; give a picture file in it.")
    try:
        with Image.open(path) as image:
            image.load()
            yield image
    except UnidentifiedImageError:
        raise BlendedError(f"{what} {path} is no picture that can be read; give a PNG, JPEG, WebP, TIFF or BMP file.") from None
    except Image.DecompressionBombError:
        raise BlendedError(f"{what} {path} has more pixels than Pillow opens; scale it down first.") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, BlendedError):
            raise
        raise BlendedError(f"{what} {path} could not be read ({error}); the file may be damaged or cut short.") from None


def read_picture(path: Path) -> Picture:
    """Reads a picture of any kind that Pillow knows.

    8-bit RGB and RGBA files keep every number. The EXIF rotation is applied. Others are converted to 8-bit RGB, and
    ``notes`` says so. Raises BlendedError where there is nothing to read.
    """
    notes: list[str] = []
    name = path.name
    with _opened(path, "the picture") as image:
        frames: int = getattr(image, "n_frames", 1)
        if frames > 1:
            notes.append(f"{name} holds {frames} frames; the first is edited.")
        # Pillow hands a 16-bit colour file over as 8-bit without a word; its decoder's raw mode still tells.
        deep = ";16" in _raw_mode(path)
        # A profile of greys or inks describes nothing in the RGB file that is written.
        icc = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P", "PA") else None
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1)
        image = ImageOps.exif_transpose(image)
        if turned:
            notes.append(f"{name} was turned upright as its EXIF data says.")
        mode = image.mode
        if mode.startswith(("I", "F")):
            notes.append(f"{name} is {'16-bit grey' if mode.startswith('I') else 'floating-point grey'}; it is edited as 8-bit RGB.")
            image = _eight_bit(image, dark=mode.startswith("I;16"))
        elif deep:
            notes.append(f"{name} has 16 bits a channel; it is edited with 8.")
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
    """Grey of more bits as 8-bit grey. Numbers that all fit 8 bits are taken to be so, unless ``dark``: then they are 16-bit black."""
    values = np.array(image).astype(np.float64)
    highest = values.max(initial=0)
    peak = 1.0 if image.mode == "F" and highest <= 1 else 255.0 if highest <= 255 and not dark else 65535.0
    return Image.fromarray((values / peak * 255).round().clip(0, 255).astype(np.uint8))


def read_mask(path: Path, size: tuple[int, int], notes: list[str]) -> Tensor:
    """A mask file as [1, 1, H, W] float32 in 0..1, white = edit, brought to ``size`` (width, height).

    Colour files count by their brightness; where a file is uniform in colour but not in alpha, by its alpha. Raises
    BlendedError if its shape does not fit the picture's.
    """
    with _opened(path, "the mask") as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            image = _eight_bit(image)
        has_alpha = "A" in image.mode or "transparency" in image.info
        pixels = np.array(image.convert("RGBA"))
    grey = np.array(Image.fromarray(pixels[..., :3]).convert("L"))
    if has_alpha and np.ptp(pixels[..., 3]) > 0:
        if np.ptp(grey) == 0:
            grey = pixels[..., 3]
            notes.append(f"the mask {path.name} is uniform in colour; its alpha is used, opaque = edit.")
        else:
            grey = (grey.astype(np.uint16) * pixels[..., 3] // OPAQUE).astype(np.uint8)
    if (grey.shape[1], grey.shape[0]) != size:
        width, height = grey.shape[1], grey.shape[0]
        if abs(width / height - size[0] / size[1]) > 0.02 * size[0] / size[1]:
            raise BlendedError(
                f"the mask is {width}×{height} and the picture {size[0]}×{size[1]}, another shape; draw the mask over the picture itself."
            )
        notes.append(f"the mask was scaled from {width}×{height} to the picture's {size[0]}×{size[1]}.")
        grey = np.array(Image.fromarray(grey).resize(size, Image.Resampling.NEAREST))
    return torch.from_numpy(grey.astype(np.float32) / OPAQUE)[None, None]


def mask_from_alpha(picture: Picture) -> Tensor:
    """[1, 1, H, W]: what is transparent is edited. Raises BlendedError if nothing is transparent."""
    if picture.alpha is None or int(picture.alpha.min()) == OPAQUE:
        raise BlendedError("no mask was given and the picture has no transparent part; add --mask FILE with white where it should change.")
    return torch.from_numpy(1 - picture.alpha.astype(np.float32) / OPAQUE)[None, None]


def write_png(path: Path, rgb: UInt8, alpha: UInt8 | None = None, text: dict[str, str] | None = None, icc: bytes | None = None) -> None:
    """Writes a PNG whole: into a file beside it that then takes its name."""
    pixels = rgb if alpha is None else np.dstack([rgb, alpha])
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    extra: dict[str, Any] = {"icc_profile": icc} if icc else {}
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info, **extra)
    write_bytes(path, buffer.getvalue())
