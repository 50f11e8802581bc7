"""Counts the pixels outside a mask that pasting nodes change, in a real ComfyUI.

    python -m benchmarks.exactness --crop-and-stitch /path/to/ComfyUI-Inpaint-CropAndStitch

ComfyUI is found by COMFYUI_PATH or in the home folder. One picture goes through Load Image, the nodes with their defaults, and Save Image; the edit is
its negative, so every pixel that is pasted differs. The saved PNG file is compared with the picture. Without ``--crop-and-stitch``, the rows of that
pack are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blended_core.io.atomic import write_bytes
from tests.server import FOLDERS, ROOT, Prompt, Server, started

RECORD = ROOT / "docs" / "exactness.json"
WIDTH, HEIGHT = 768, 512
GRAY = 5
"""2 % of 255."""
MASKS = {"binary": "black and white mask", "half": "the same mask at half the size", "gray": "the same mask with 2 % gray instead of black"}
NODES = {
    "ImageCompositeMasked": "*Image Composite Masked* of the ComfyUI core",
    "InpaintStitchImproved": "*Inpaint Crop* and *Inpaint Stitch* (ComfyUI-Inpaint-CropAndStitch {version})",
    "InpaintStitchImproved, blend 0": "the same nodes with `mask_blend_pixels` 0 instead of 32",
    "BlendedFinalPaste": "*Final Paste*",
}
Pixels = NDArray[np.uint8]


def picture() -> Pixels:
    """Random values, [H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def masks() -> dict[str, Pixels]:
    """The masks of :data:`MASKS`: an ellipse whose edge lies on even coordinates, so that half the size shows the same shape."""
    y, x = np.mgrid[: HEIGHT // 2, : WIDTH // 2]
    half = np.uint8(255) * (((x - 190) / 97) ** 2 + ((y - 125) / 61) ** 2 <= 1).astype(np.uint8)
    full = half.repeat(2, axis=0).repeat(2, axis=1)
    return {"binary": full, "half": half, "gray": np.maximum(full, np.uint8(GRAY))}


def graph(node: str, mask: str, known: dict[str, Any]) -> Prompt:
    """A prompt that pastes the negative of picture.png through a mask and saves the result as node 'save'."""

    def call(kind: str, **given: Any) -> dict[str, Any]:
        """A node with the default of every widget that is not given."""
        declared = {k: v for group in ("required", "optional") for k, v in known[kind]["input"].get(group, {}).items()}
        widgets = {k: default_of(v) for k, v in declared.items() if k not in given and has_widget(v)}
        return {"class_type": kind, "inputs": {**widgets, **given}}

    nodes = {
        "picture": call("LoadImage", image="picture.png"),
        "mask": call("LoadImageMask", image=mask, channel="red"),
        "edit": call("ImageInvert", image=["picture", 0]),
    }
    kind, _, variant = node.partition(", ")
    if kind == "ImageCompositeMasked":
        nodes["paste"] = call(kind, destination=["picture", 0], source=["edit", 0], mask=["mask", 0])
    elif kind == "InpaintStitchImproved":
        blend = {"mask_blend_pixels": 0} if variant == "blend 0" else {}
        nodes["crop"] = call("InpaintCropImproved", image=["picture", 0], mask=["mask", 0], **blend)
        nodes["edit"] = call("ImageInvert", image=["crop", 1])
        nodes["paste"] = call(kind, stitcher=["crop", 0], inpainted_image=["edit", 0])
    else:
        nodes["paste"] = call(kind, edited=["edit", 0], original=["picture", 0], mask=["mask", 0])
    return {**nodes, "save": call("SaveImage", images=["paste", 0])}


def has_widget(declared: list[Any]) -> bool:
    """Whether an input of object_info is a widget with a value of its own."""
    return isinstance(declared[0], list) or (len(declared) > 1 and "default" in declared[1])


def default_of(declared: list[Any]) -> Any:
    """The default of a widget; of a list without one, its first entry."""
    return declared[1]["default"] if len(declared) > 1 and "default" in declared[1] else declared[0][0]


def measure(server: Server) -> dict[str, dict[str, int | str]]:
    """Node → mask → pixels changed outside, of those nodes that the server has; the error as text where a node refuses its inputs."""
    known = server.get("/object_info")
    original, drawn = picture(), masks()
    outside = drawn["binary"] == 0
    server.put("picture.png", original)
    for name, pixels in drawn.items():
        server.put(f"{name}.png", np.stack([pixels] * 3, axis=-1))
    counts: dict[str, dict[str, int | str]] = {}
    for node in NODES:
        if node.partition(", ")[0] not in known:
            continue
        counts[node] = {}
        for name in MASKS:
            outcome = server.run(graph(node, f"{name}.png", known))
            if outcome.error is not None:
                counts[node][name] = outcome.sentence
                continue
            (saved,) = server.pictures(outcome, "save")
            changed = (saved != original).any(axis=-1)
            if not changed[~outside].all():
                print(f"{node}, {name}: {(~changed[~outside]).sum()} pixels inside are unchanged", file=sys.stderr)
            counts[node][name] = int(changed[outside].sum())
    return counts


def table(record: dict[str, Any]) -> str:
    """A Markdown table of a record."""
    lines = ["| nodes | " + " | ".join(MASKS.values()) + " |", "|---|" + "---|" * len(MASKS)]
    for node, counts in record["changed"].items():
        cells = [f"{counts[name]:,}" if isinstance(counts[name], int) else "refused" for name in MASKS]
        lines.append(f"| {NODES[node].format(version=record['crop_and_stitch'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exactness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crop-and-stitch", type=Path, help="a clone of ComfyUI-Inpaint-CropAndStitch")
    parser.add_argument("--out", type=Path, default=RECORD, help="file of the figures (default: docs/exactness.json)")
    args = parser.parse_args()
    version = ""
    with tempfile.TemporaryDirectory() as folder:
        if args.crop_and_stitch is not None:
            pack = args.crop_and_stitch.resolve(strict=True)
            text = (pack / "pyproject.toml").read_text(encoding="utf-8")
            version = next(line.split('"')[1] for line in text.splitlines() if line.startswith("version"))
            for name in FOLDERS:
                (Path(folder) / name).mkdir()
            (Path(folder) / "custom_nodes" / "crop-and-stitch").symlink_to(pack, target_is_directory=True)
        with started(Path(folder)) as server:
            system = server.get("/system_stats")["system"]
            changed = measure(server)
    outside = int((masks()["binary"] == 0).sum())
    record = {
        "comfyui": system["comfyui_version"],
        "crop_and_stitch": version,
        "pixels": WIDTH * HEIGHT,
        "outside": outside,
        "changed": changed,
    }
    write_bytes(args.out, json.dumps(record, indent=1).encode() + b"\n")
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
