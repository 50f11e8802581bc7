"""Rebuilds the pictures of world 2 from the packages that they come from.

    python -m blended_core.training.world2_pictures --photographs PACKAGES --drawings SETS

PACKAGES is a folder with one folder for each unpacked Debian package (``dpkg-deb -x FILE.deb PACKAGES/NAME``); SETS is a folder with
one folder for each unpacked emoji set, by its name in :data:`DESIGNS`, that holds ``package/icons.json``. Drawings are rendered by
``rsvg-convert`` (Debian's librsvg2-bin). The results are committed, so only who changes the world needs the packages.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..toy.world2 import DATA, SPRITE_SIDE
from ..toy.world2_sources import DESIGNS, DRAWINGS, PHOTOGRAPHS, Photograph

SHORT_SIDE = 256
LONGEST = 1.6
"""Of the short side; what is beyond is cut off evenly."""
QUALITY = 86


def source_file(root: Path, photograph: Photograph) -> Path:
    """The file in the unpacked package; of a folder, the largest picture."""
    path = root / photograph.package / photograph.path
    return max(path.iterdir(), key=lambda p: p.stat().st_size) if path.is_dir() else path


def small(picture: Image.Image) -> Image.Image:
    """The middle of a picture at SHORT_SIDE pixels of its short side."""
    width, height = picture.size
    short = min(width, height)
    w, h = min(width, round(short * LONGEST)), min(height, round(short * LONGEST))
    left, top = (width - w) // 2, (height - h) // 2
    size = round(w * SHORT_SIDE / short), round(h * SHORT_SIDE / short)
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS, (left, top, left + w, top + h))


def drawing(icons: dict[str, Any], name: str) -> Image.Image:
    """One drawing, cropped to what is visible and centered in a transparent square of SPRITE_SIDE pixels."""
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    w, h = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {w} {h}" '
        f'width="{4 * SPRITE_SIDE}" height="{4 * SPRITE_SIDE}">{icon["body"]}</svg>'
    )
    done = subprocess.run(["rsvg-convert", "--format", "png"], input=svg.encode(), capture_output=True, check=True)
    picture = Image.open(BytesIO(done.stdout), formats=("PNG",)).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        raise SystemExit(f"the drawing {name} is empty")
    visible = picture.crop(box)
    scale = SPRITE_SIDE / max(visible.size)
    # Premultiplied, so that no color of a transparent pixel reaches the outline.
    visible = (
        visible.convert("RGBa")
        .resize((round(visible.width * scale), round(visible.height * scale)), Image.Resampling.LANCZOS)
        .convert("RGBA")
    )
    square = Image.new("RGBA", (SPRITE_SIDE, SPRITE_SIDE))
    square.paste(visible, ((SPRITE_SIDE - visible.width) // 2, (SPRITE_SIDE - visible.height) // 2))
    return square


def notice() -> str:
    """The text of LICENSES.md: every picture with its origin, author and license."""
    lines = [
        "# Licenses of the pictures of world 2",
        "",
        "The photographs are scaled down and cropped; each keeps the license of its original, which is not that of this project's code.",
        "They are used to train and to measure the embedded models and are not needed to run the nodes. The originals are in Debian,",
        "in the packages named here; the license texts are in `/usr/share/common-licenses` of Debian and at",
        "<https://creativecommons.org/licenses/>. `blended_core/training/world2_pictures.py` makes these files from the packages.",
        "",
        "| file | Debian package | original | author | license | split |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| photographs/{p.file} | {p.package} | {p.path} | {p.author} | {p.license} | {p.split} |" for p in PHOTOGRAPHS]
    lines += [
        "",
        "`sprites.webp` has one row for each word and one column for each emoji set:",
        "",
        "| column | set | author | license |",
        "|---|---|---|---|",
    ]
    lines += [f"| {i + 1} | {d.name} | {d.author} | {d.license} |" for i, d in enumerate(DESIGNS)]
    lines += ["", "The drawings are scaled, cropped to what is visible, and stored with a small loss.", ""]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="folder of unpacked Debian packages; without it the photographs stay")
    parser.add_argument("--drawings", type=Path, help="folder of unpacked emoji sets; without it the sprites stay")
    args = parser.parse_args()
    (DATA / "photographs").mkdir(parents=True, exist_ok=True)
    if args.photographs:
        for photograph in PHOTOGRAPHS:
            picture = small(Image.open(source_file(args.photographs, photograph), formats=("JPEG", "PNG", "WEBP")))
            picture.save(DATA / "photographs" / photograph.file, quality=QUALITY, optimize=True, subsampling=0)
    if args.drawings:
        sheet = Image.new("RGBA", (SPRITE_SIDE * len(DESIGNS), SPRITE_SIDE * len(DRAWINGS)))
        for column, design in enumerate(DESIGNS):
            folder = args.drawings / design.package.rsplit("/", 1)[-1] / "package"
            icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
            for row, name in enumerate(DRAWINGS.values()):
                sheet.paste(drawing(icons, name), (column * SPRITE_SIDE, row * SPRITE_SIDE))
        sheet.save(DATA / "sprites.webp", quality=92, alpha_quality=100, method=6, exact=False)
    (DATA / "LICENSES.md").write_text(notice(), encoding="utf-8")
    sizes = sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file())
    print(f"{DATA}: {len(PHOTOGRAPHS)} photographs, {len(DRAWINGS)} × {len(DESIGNS)} drawings, {sizes / 1024:.0f} kB in all")


if __name__ == "__main__":
    main()
