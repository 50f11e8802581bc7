"""Measures how visible the mask of an edit is, apart from the package's own scores.

    python -m benchmarks.tone_edge passes NAME=FILE …       one pass of each network on held-back photographs and on drawn grounds
    python -m benchmarks.tone_edge edits NAME=FILE …        unprompted edits of the same grounds, 4 candidates each
    python -m benchmarks.tone_edge edits --prompted …       edits with a prompt (``--clip FILE`` of the world's CLIP, ``--judge`` of its judge)

NAME=embedded measures the embedded network. Definitions, all in 1/255:

* tone: the ring of 4 pixels inside the mask is cut into 8 sectors. In each, the mean of (result − source) over the pixels of ground is
  taken for each channel; tone is the mean of its absolute value. Ground is where no channel differs by more than 48, so that the
  object itself does not count. A texture that is another one but of the same tone counts nothing.
* edge: the same for the outermost pixel of the mask.
* grain: how much more fine detail the ring's ground has than the source; noise that was left counts here, blur is negative.
* low: root mean square of the difference averaged over 8×8 pixels, inside the mask.
* lpips: the distance of the region's result to its source, by the embedded network, gray outside the mask.

Every figure is a mean over candidates; n is their number.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blended_core.adm.load import load_ddpm
from blended_core.clip.model import load_clip
from blended_core.denoiser import DiffusionModel
from blended_core.device import DeviceContext
from blended_core.diffusion import q_sample
from blended_core.edit import edit_picture
from blended_core.evaluation.judge import Judge
from blended_core.evaluation.judge2 import Judge2, Verdict2
from blended_core.options import preset
from blended_core.perceptual import load_perceptual
from blended_core.sample import Models
from blended_core.toy.world2 import SIDE, WORDS, draw_ground, photographs, random_ground
from blended_core.toy.world2_sources import HELD_BACK

LEVELS = (0, 50, 100, 200, 350, 500, 700)
SECTORS, RING, OBJECT = 8, 4, 48.0
PHOTOS, DRAWN = "held-back photographs", "drawn grounds"


def grounds(kind: str, count: int) -> list[np.ndarray]:
    """[64, 64, 3] in 0..1 each: crops of held-back photographs, or drawn grounds; always the same ones."""
    rng = np.random.default_rng((20, (PHOTOS, DRAWN).index(kind)))
    return [draw_ground(random_ground(rng, HELD_BACK, float(kind == PHOTOS))) for _ in range(count)]


def mask_of(number: int) -> np.ndarray:
    """[64, 64] bool: an ellipse about the middle, another one for each scene."""
    rng = np.random.default_rng((21, number))
    cx, cy = SIDE * rng.uniform(0.47, 0.53, 2)
    a, b = SIDE * rng.uniform(0.30, 0.38, 2)
    yy, xx = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    inside: np.ndarray = ((xx - cx) / a) ** 2 + ((yy - cy) / b) ** 2 <= 1
    return inside


def signed_by_sector(difference: np.ndarray, ring: np.ndarray, middle: tuple[float, float]) -> float | None:
    """Mean absolute value of the sectors' mean differences [H, W, 3] over ground; None where no sector holds enough of it."""
    ground = ring & (np.abs(difference).max(-1) <= OBJECT)
    yy, xx = np.nonzero(ring)
    sector = ((np.arctan2(yy - middle[0], xx - middle[1]) / (2 * np.pi) + 0.5) * SECTORS).astype(int) % SECTORS
    means = []
    for s in range(SECTORS):
        here = np.zeros_like(ring)
        here[yy[sector == s], xx[sector == s]] = True
        chosen = difference[here & ground]
        if len(chosen) >= 0.3 * here.sum() and len(chosen):
            means.append(np.abs(chosen.mean(0)).mean())
    return float(np.mean(means)) if means else None


def eroded(mask: np.ndarray, times: int) -> np.ndarray:
    """The mask without its outermost pixel, ``times`` over; beyond the picture counts as inside."""
    for _ in range(times):
        p = np.pad(mask, 1, constant_values=True)
        mask = mask & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    return mask


def tone_and_edge(result: np.ndarray, source: np.ndarray, mask: np.ndarray) -> tuple[float | None, float | None]:
    """Of pictures [H, W, 3] in 0..1 and a mask [H, W] bool."""
    difference = (result - source) * 255
    yy, xx = np.nonzero(mask)
    middle = float(yy.mean()), float(xx.mean())
    return signed_by_sector(difference, mask & ~eroded(mask, RING), middle), signed_by_sector(difference, mask & ~eroded(mask, 1), middle)


def grain(result: np.ndarray, source: np.ndarray, mask: np.ndarray) -> float:
    """How much more fine detail the ring's ground has than the source there: RMS of what differs from the mean of 3×3 pixels."""

    def detail(picture: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(picture).permute(2, 0, 1)[None] * 255
        found: np.ndarray = (x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1))[0].permute(1, 2, 0).numpy()
        return found

    # Without the outermost pixels, where an edge would count as detail.
    ring = eroded(mask, 1) & ~eroded(mask, RING + 2) & (np.abs(result - source).max(-1) * 255 <= OBJECT)
    if not ring.any():
        return 0.0
    return float(np.sqrt((detail(result)[ring] ** 2).mean()) - np.sqrt((detail(source)[ring] ** 2).mean()))


def low_frequency(result: np.ndarray, source: np.ndarray, mask: np.ndarray) -> float:
    """Root mean square over the mask of the difference averaged over 8×8 pixels."""
    difference = torch.from_numpy(result - source).permute(2, 0, 1)[None] * 255
    weight = torch.from_numpy(mask.astype(np.float32))[None, None]
    covered = F.avg_pool2d(weight, 8)
    means = F.avg_pool2d(difference * weight, 8) / covered.clamp(min=1e-6)
    chosen = (covered > 0.5).expand_as(means)
    return float(means[chosen].square().mean().sqrt())


def mean(values: list[float | None]) -> float:
    """Of those that are known."""
    return float(np.mean([v for v in values if v is not None]))


@torch.no_grad()
def passes(model: DiffusionModel, kind: str, count: int) -> dict[str, float]:
    """RMS and low-frequency RMS of x̂0 of one pass at each of LEVELS of 1000."""
    schedule = model.config.respaced("1000")
    x0 = torch.from_numpy(np.stack(grounds(kind, count))).permute(0, 3, 1, 2) * 2 - 1
    found = {}
    for level in LEVELS:
        index = torch.full((count,), level)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(level))
        wrong = (model.predict(q_sample(x0, index, noise, schedule), index, schedule).x0 - x0) * 127.5
        found[f"rms {level}"] = float(wrong.square().mean().sqrt())
        found[f"low {level}"] = float(F.avg_pool2d(wrong, 8).square().mean().sqrt())
    return found


def edits(
    models: Models, kind: str, count: int, candidates: int, judge: Judge | Judge2 | None, prompted: bool, steps: str
) -> tuple[dict[str, float], list[Tensor]]:
    """Figures of edits of ``count`` grounds, and their pictures."""
    perceptual = load_perceptual(models.context)
    rows: dict[str, list[float | None]] = {k: [] for k in ("tone", "edge", "grain", "low", "lpips", "background", "accepted", "intact")}
    sheets: list[Tensor] = []
    diversity = []
    begun = time.perf_counter()
    for number, ground in enumerate(grounds(kind, count)):
        mask = mask_of(number)
        source = torch.from_numpy(ground).permute(2, 0, 1)[None]
        area = torch.from_numpy(mask.astype(np.float32))[None, None]
        name = WORDS[number % len(WORDS)]
        prompt = models.clip.prompt(f"{'an' if name[0] in 'aeiou' else 'a'} {name}") if prompted and models.clip else None
        options = preset("best", steps=steps, scale=3000.0, candidates=candidates, batch=candidates, seed=number)
        result = edit_picture(source, area, prompt, models, options)
        pictures = torch.cat([result.picture(c) for c in sorted(result.candidates, key=lambda c: c.index)])
        sheets.append(torch.cat([source, pictures]))
        seen = models.context.put((pictures * 2 - 1) * area)
        truth = models.context.put((source * 2 - 1) * area)
        with torch.no_grad():
            rows["lpips"] += [float(perceptual(row[None], truth)) for row in seen]
            first, second = torch.triu_indices(len(seen), len(seen), 1)
            diversity.append(float(perceptual(seen[first], seen[second]).mean()))
        verdicts = judge(pictures * 2 - 1, area) if judge else []
        for row in pictures:
            edited = row.permute(1, 2, 0).numpy()
            tone, edge = tone_and_edge(edited, ground, mask)
            rows["tone"].append(tone)
            rows["edge"].append(edge)
            rows["grain"].append(grain(edited, ground, mask))
            rows["low"].append(low_frequency(edited, ground, mask))
            rows["background"].append(float(np.abs(edited - ground)[~mask].max()))
        rows["accepted"] += [float(v.accepts(name if prompted else "none")) for v in verdicts]
        rows["intact"] += [float(v.intact >= 0.5) for v in verdicts if isinstance(v, Verdict2)]
    found = {k: mean(v) for k, v in rows.items() if v}
    return {**found, "diversity": float(np.mean(diversity)), "n": float(len(rows["low"])), "seconds": time.perf_counter() - begun}, sheets


def write_sheet(path: Path, sheets: list[Tensor]) -> None:
    """One row for each ground: the source, then the candidates."""
    from PIL import Image

    rows = [torch.cat(list(sheet), 2) for sheet in sheets]
    picture = (torch.cat(rows, 1).permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    Image.fromarray(picture).resize((picture.shape[1] * 2, picture.shape[0] * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("passes", "edits"))
    parser.add_argument("networks", nargs="+", help="NAME=FILE, or embedded")
    parser.add_argument("--count", type=int, default=32, help="grounds of each kind (%(default)s)")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--steps", default="40")
    parser.add_argument("--prompted", action="store_true")
    parser.add_argument("--clip", type=Path, help="the world's CLIP, for --prompted")
    parser.add_argument("--judge", type=Path, help="the world's judge, or embedded for that of world 1")
    parser.add_argument("--grounds", choices=(PHOTOS, DRAWN), help="one kind alone")
    parser.add_argument("--out", type=Path, help="folder for figures.json and contact sheets")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    context = DeviceContext(torch.device("cpu"))
    judge = None if args.judge is None else Judge() if str(args.judge) == "embedded" else Judge2(args.judge)
    table: dict[str, dict[str, float]] = {}
    print(f"{len(photographs(HELD_BACK))} held-back photographs", flush=True)
    for network in args.networks:
        name, _, file = network.partition("=")
        model = load_ddpm(context, file or "embedded", probe=None)
        for kind in (args.grounds,) if args.grounds else (PHOTOS, DRAWN):
            if args.what == "passes":
                figures = {**passes(model, kind, args.count), "n": float(args.count)}
            else:
                models = Models(model, load_clip(context, str(args.clip or "embedded")) if args.prompted else None, None, context)
                figures, sheets = edits(models, kind, args.count, args.candidates, judge, args.prompted, args.steps)
                if args.out:
                    args.out.mkdir(parents=True, exist_ok=True)
                    write_sheet(args.out / f"{name}-{kind.split()[-1]}{'-prompted' if args.prompted else ''}.png", sheets[:16])
            table[f"{name}, {kind}"] = figures
            print(f"{name}, {kind}: " + "  ".join(f"{k} {v:.3g}" for k, v in figures.items()), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{args.what}.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
