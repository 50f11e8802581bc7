"""How well CLIP ranks the candidates of an evaluation, against the number of views and the way that they are drawn.

    python -m benchmarks.ranking runs/quality

Scores the saved candidates of ``blended-diffusion evaluate`` again with the first 1, 2, 4 … 64 views of several sets: random numbers with several
seeds, Sobol sequences scrambled with several seeds, and the plain Sobol sequence. The first view of every set is not warped. Only edits of which the
judge accepted a part can be ranked well or badly, so the others are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blended_core.augment import ViewParameters, balanced_views, draw_views, warp_views
from blended_core.clip.model import ClipModel, load_clip
from blended_core.device import DeviceContext
from blended_core.edit import prepare
from blended_core.evaluation.metrics import Pair, load_candidates, rank_auc
from blended_core.io.atomic import write_bytes
from blended_core.losses import masked_view, prompt_distance
from blended_core.mask import EditMask
from blended_core.toy.models import SIDE
from blended_core.toy.world import demo_scene

COUNTS = (1, 2, 4, 8, 16, 32, 64)
SEEDS = 4
KINDS = ("random", "scrambled Sobol", "Sobol")
Scores = NDArray[np.float64]


def view_sets(seeds: int, size: int) -> Iterator[tuple[str, ViewParameters]]:
    """(kind, parameters of all but the first view)."""
    count = COUNTS[-1] - 1
    for seed in range(seeds):
        yield KINDS[0], draw_views(torch.Generator().manual_seed(seed), count, size)
        yield KINDS[1], balanced_views(count, size, seed)
    yield KINDS[2], balanced_views(count, size)


@torch.no_grad()
def distances(squares: Tensor, mask: Tensor, clip: ClipModel, text: str, seeds: int) -> dict[str, Scores]:
    """kind → the CLIP distance of every candidate [sets, numbers of views, candidates]; squares [B, 3, S, S] in −1..1, mask [1, 1, S, S]."""
    prompt = clip.prompt(text)
    view = masked_view(squares, mask, clip.image_size)
    first = prompt_distance(clip.encode_image(view), prompt)[None]
    found: dict[str, list[Scores]] = {kind: [] for kind in KINDS}
    for kind, parameters in view_sets(seeds, clip.image_size):
        warped = warp_views(view.repeat(len(parameters), 1, 1, 1), ViewParameters.interleave([parameters] * len(view)))
        each = torch.cat([first, prompt_distance(clip.encode_image(warped), prompt).view(len(parameters), -1)]).double()
        found[kind].append(np.stack([each[:count].mean(0).numpy() for count in COUNTS]))
    return {kind: np.stack(scores) for kind, scores in found.items()}


def rankable(folder: Path) -> Iterator[tuple[Tensor, Tensor, str, dict[str, Any]]]:
    """(squares, mask, prompt, saved result) of every edit of which the judge accepted a part."""
    for file in sorted((folder / "pairs").glob("*/*.json")):
        record = json.loads(file.read_text("utf-8"))
        case = Pair(**record["asked"]["pair"])
        tiles, accepted = load_candidates(folder, file.parent.name, case)
        if len(set(accepted)) < 2:
            continue
        scene, mask = demo_scene(case.background, case.seed)
        edit = prepare(as_tensor(scene[None]), EditMask.of(as_tensor(mask[None, ..., :1])), SIDE)
        squares = torch.cat([edit.region.cut(as_tensor(tile[None]), SIDE) for tile in tiles]) * 2 - 1
        yield squares, edit.mask.values, case.prompt, record


def as_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """[B, H, W, C] → [B, C, H, W] in 0..1."""
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255


def measure(folder: Path, clip: ClipModel, seeds: int) -> dict[str, Any]:
    """The figures of :func:`table`."""
    found: list[tuple[dict[str, Any], dict[str, Scores]]] = []
    for squares, mask, text, record in rankable(folder):
        found.append((record, distances(squares, mask, clip, text, seeds)))
    rows = {kind: [row(found, kind, place) for place in range(len(COUNTS))] for kind in KINDS}
    return {"edits": len(found), "candidates": sum(len(r["candidates"]) for r, _ in found), "seeds": seeds, "views": COUNTS, "rows": rows}


def row(found: list[tuple[dict[str, Any], dict[str, Scores]]], kind: str, place: int) -> dict[str, Any]:
    """Of one kind of set and one number of views: the AUC of each set, and the root mean square of a score's deviation between the sets.

    What a set adds to all candidates of an edit does not change their order and is subtracted.
    """
    aucs, squares = [], []
    for number in range(len(found[0][1][kind])):
        records = [with_distances(record, scores[kind][number, place]) for record, scores in found]
        aucs.append(rank_auc(records))
    for _, scores in found:
        values = scores[kind][:, place]
        relative = values - values.mean(1, keepdims=True)
        squares.append(relative.var(0, ddof=1) if len(relative) > 1 else np.zeros(relative.shape[1]))
    spread = float(np.sqrt(np.concatenate(squares).mean()))
    return {"auc": aucs, "spread": spread if len(aucs) > 1 else None}


def with_distances(record: Mapping[str, Any], values: Scores) -> dict[str, Any]:
    """A saved result with other distances."""
    return {"candidates": [{**c, "clip_distance": float(v)} for c, v in zip(record["candidates"], values, strict=True)]}


def table(figures: Mapping[str, Any]) -> str:
    """A Markdown table with one line for each number of views: mean AUC (lowest–highest), and the spread of a score."""
    head = [f"{kind}, AUC" for kind in KINDS] + [f"{kind}, spread" for kind in KINDS[:2]]
    lines = [f"| views | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for place, count in enumerate(figures["views"]):
        rows = [figures["rows"][kind][place] for kind in KINDS]
        cells = [f"{np.mean(r['auc']):.3f}" + (f" ({min(r['auc']):.3f}–{max(r['auc']):.3f})" if len(r["auc"]) > 1 else "") for r in rows]
        spreads = [f"{r['spread']:.4f}" for r in rows[:2]]
        lines.append(f"| {count} | {' | '.join(cells + spreads)} |")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranking", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of an evaluation, or its folder held-back")
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, help=f"number of sets of each kind that has a seed, at least 2 (default: {SEEDS})"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(args.folder, load_clip(DeviceContext()), args.seeds)
    if args.out is not None:
        write_bytes(args.out, json.dumps(figures, indent=1).encode() + b"\n")
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
