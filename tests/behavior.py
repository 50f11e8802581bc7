"""The recorded behavior: pictures and scores of small edits, compared with what the code gives now.

``python -m tests.behavior`` compares and prints the largest difference of each edit; ``--record NAME…`` records those edits anew, which is right
only for a change that is meant to change their pictures. The edits go through the terminal, so the fixture knows no name inside the library.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOLDER = Path(__file__).parent / "behavior"
PICTURES, SCORES = FOLDER / "pictures.npz", FOLDER / "scores.json"
STEP_LOOP = "step_loop"
PRESET = ("--steps", "8", "--candidates", "2", "--batch", "2", "--seed", "3")
"""Of an edit with the guidance scale that the checkpoint recommends, and with the sampler of its preset."""
OWN_SCALE = (*PRESET, "--sampler", "ddpm")
SHORT = (*OWN_SCALE, "--guidance-scale", "1000")
PROMPT = ("--prompt", "a pumpkin")

EDITS: dict[str, tuple[str, ...]] = {
    "best": (*PROMPT, *PRESET),
    "fast": (*PROMPT, *PRESET, "--preset", "fast"),
    "dpmpp_noisy": (*PROMPT, *PRESET, "--eta", "0.5", "--steps", "logsnr8", "--tone-match", "off"),
    "ddpm": (*PROMPT, *SHORT),
    "ddpm_one_by_one": (*PROMPT, *SHORT, "--batch", "1", "--view-chunk", "3"),
    "ddpm_fast": (*PROMPT, *SHORT, "--preset", "fast"),
    "paper": (*PROMPT, *SHORT, "--preset", "paper"),
    "official": (*PROMPT, *SHORT, "--preset", "official", "--views", "4"),
    "official_sections": (*PROMPT, *SHORT, "--preset", "official", "--views", "2", "--steps", "4,3,2"),
    "official_local": (*PROMPT, *SHORT, "--preset", "official", "--views", "2", "--algorithm", "local", "--lambda", "1", "--steps", "5"),
    "gradient_unet": (*PROMPT, *SHORT, "--gradient", "unet", "--clip-input", "mixed", "--clamp", "0.05", "--views", "2", "--steps", "5"),
    "ddim": (*PROMPT, *SHORT, "--sampler", "ddim", "--eta", "0.5"),
    "ddim_score": (*PROMPT, *SHORT, "--sampler", "ddim", "--ddim-guidance", "score", "--steps", "ddim8"),
    "soft_mask": (*PROMPT, *SHORT, "--soft-mask"),
    "local": (*PROMPT, *SHORT, "--algorithm", "local"),
    "local_pasted": (*PROMPT, *SHORT, "--algorithm", "local", "--lambda", "300", "--enforce-background"),
    "inverted": (*PROMPT, *SHORT, "--invert-mask"),
    "feathered": (*PROMPT, *SHORT, "--feather", "6"),
    "removal": ("--prompt", "", *SHORT),
    "two_prompts": (*PROMPT, "--prompt", "an apple", "--prompt-weight", "1", "--prompt-weight", "-0.5", *SHORT),
    "class_zero": (*PROMPT, *SHORT, "--ddpm", "classes"),
    "class_random": (*PROMPT, *SHORT, "--ddpm", "classes", "--class", "random"),
    "class_three": (*PROMPT, *SHORT, "--ddpm", "classes", "--class", "3"),
    "own_scale": (*PROMPT, *OWN_SCALE),
    "own_scale_official": (*PROMPT, *OWN_SCALE, "--preset", "official", "--views", "4"),
}
"""The arguments of each edit, beside picture, mask and output; 'classes' stands for a small class-conditional network of random weights."""


def inputs(folder: Path) -> dict[str, Path]:
    """Writes the picture (92×76, a gradient with blocks), a hard and a soft mask, and the class-conditional network."""
    rows, columns = np.mgrid[0:76, 0:92]
    picture = np.stack([columns * 2.2 + 30, rows * 2.5 + 20, 200 - rows - columns], -1)
    picture[20:40, 10:30] = (210, 40, 60)
    picture[50:70, 55:85] = (30, 90, 220)
    distance = np.hypot((rows - 36) / 22, (columns - 48) / 26)
    hard = np.where(distance <= 1, 255, 0)
    soft = np.clip(1.5 - distance, 0, 1) * 255
    files = {}
    for name, pixels in {"picture": picture, "mask": hard, "soft": soft}.items():
        files[name] = folder / f"{name}.png"
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(files[name])
    files["classes"] = class_conditional(folder / "classes.safetensors")
    return files


def class_conditional(path: Path) -> Path:
    """A network of 16 px and five classes, in the layout of the published checkpoints, its settings in its metadata."""
    from safetensors.torch import save_file

    from .tiny import tiny_unet

    unet = tiny_unet(num_classes=5)
    about = {
        "unet": json.dumps(unet.config.to_dict()),
        "diffusion": json.dumps(
            {"schedule": "linear", "steps": 1000, "rescale_timesteps": True, "objective": "eps", "variance": "learned_range"}
        ),
    }
    save_file({name: value.contiguous() for name, value in unet.state_dict().items()}, path, about)
    return path


def edited(name: str, files: dict[str, Path], out: Path) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """One edit: its pictures [N, H, W, 3] in the order of the candidates' numbers, and their scores with the rank."""
    from blended_core.cli import main

    arguments = [str(files["classes"]) if value == "classes" else value for value in EDITS[name]]
    mask = files["soft" if name == "soft_mask" else "mask"]
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = main(
            ["edit", str(files["picture"]), "--mask", str(mask), "--out", str(out), "--device", "cpu", "--dtype", "fp32", *arguments]
        )
    if code != 0:
        raise AssertionError(f"{name} ended with {code}: {told.getvalue()}")
    report = json.loads((out / "report.json").read_text("utf-8"))
    candidates = sorted(report["candidates"], key=lambda candidate: int(candidate["candidate"]))
    pictures = np.stack([np.array(Image.open(out / candidate["file"]).convert("RGB")) for candidate in candidates])
    return pictures, [{"rank": candidate["rank"], **scores_of(candidate)} for candidate in candidates]


def scores_of(candidate: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of a candidate in a report."""
    names = ("clip_distance", "gain", "background_error", "seam_energy")
    scores: dict[str, Any] = candidate.get("score", candidate)
    return {name: scores[name] for name in names}


def recorded() -> tuple[dict[str, NDArray[np.uint8]], dict[str, list[dict[str, Any]]]]:
    """The fixture."""
    with np.load(PICTURES) as pictures:
        return {name: pictures[name] for name in pictures.files}, json.loads(SCORES.read_text("utf-8"))


def difference(name: str, pictures: NDArray[np.uint8], scores: list[dict[str, Any]]) -> tuple[int, float]:
    """The largest difference of a pixel, in 1/255, and of a score, to the fixture; infinity where one is missing or the ranks differ."""
    known, known_scores = recorded()
    if name not in known:
        return 255, math.inf
    pixel = int(np.abs(known[name].astype(int) - pictures.astype(int)).max())
    worst = 0.0
    for before, now in zip(known_scores[name], scores, strict=True):
        for key, value in before.items():
            if (value is None) != (now[key] is None):
                return pixel, math.inf
            worst = max(worst, 0.0 if value is None else abs(value - now[key]))
    return pixel, worst


def main() -> None:
    """Compares, or records."""
    import torch

    torch.set_num_threads(1)
    record = "--record" in sys.argv
    chosen = [name for name in sys.argv[1:] if name != "--record"]
    if record and not chosen:
        raise SystemExit(f"name the edits to record, of {', '.join(EDITS)}.")
    pictures, scores = recorded() if SCORES.exists() else ({}, {})
    with tempfile.TemporaryDirectory() as folder:
        files = inputs(Path(folder))
        for name in chosen or EDITS:
            made = edited(name, files, Path(folder, name))
            if record:
                pictures[name], scores[name] = made
            else:
                print(f"{name:20} pixels {difference(name, *made)[0]}/255, scores {difference(name, *made)[1]:.3g}")
    if record:
        FOLDER.mkdir(exist_ok=True)
        np.savez_compressed(PICTURES, **pictures)  # type: ignore[arg-type]
        SCORES.write_text(json.dumps(scores, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
