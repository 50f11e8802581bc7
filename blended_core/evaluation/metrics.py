"""How good edits are, measured where the truth is known: pairs of a scene and an object of the embedded world, and the judge's word on
whether the object is there. Rows are ways to edit; every row edits the same pairs with the same seeds.

A run is a folder. Each pair of each row is written as it is finished, and a run that was stopped goes on from there.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..clip.model import ClipModel
from ..edit import edit_picture
from ..errors import BlendedError
from ..io.atomic import write_bytes
from ..io.images import UInt8, to_uint8, write_png
from ..losses import PerceptualDistance
from ..mask import EditMask
from ..options import PRESETS, EditOptions, preset
from ..rank import clip_distance
from ..result import EditResult
from ..sample import Models, Step
from ..toy.world import BACKGROUNDS, GUIDANCE_SCALE, OBJECTS, SIDE, demo_scene
from .judge import NONE, Judge

FORMAT = 2  # of the files of a pair; raised when they mean something else
STEPS = "40"
CANDIDATES, PAIRS = 8, 50
FIFTH = 0.2
REFERENCE = 256
LISTS = {False: (20220624, 1000), True: (20220626, 5001)}
"""The seed of the order, and the first of the scenes', of the two lists. A held-back list that was looked at before the end is used up: give the next one another."""


def _row(name: str, **changes: Any) -> EditOptions:
    return preset(name, **{"scale": GUIDANCE_SCALE, "steps": STEPS, **changes})


ROWS: dict[str, EditOptions] = {
    "best": _row("best"),
    "paper": _row("paper"),
    # Its losses are not brought to a size: this weight pushes as hard as the others' at the model's 64 px.
    "official": _row("official", scale=GUIDANCE_SCALE / (REFERENCE / SIDE) ** 2),
    "local-100": _row("best", algorithm="local", background_scale=100.0),
    "local-1000": _row("best", algorithm="local", background_scale=1000.0),
    "local-10000": _row("best", algorithm="local", background_scale=10000.0),
    "no-augmentation": _row("best", views=1),
    "naive-paste": _row("best", algorithm="local", background_scale=0.0, enforce_background=True),
    "x0-gradient": _row("best", gradient="x0"),
    "unet-gradient": _row("best", gradient="unet"),
    "ddim-10": _row("best", sampler="ddim", steps="ddim10"),
    "ddim-20": _row("best", sampler="ddim", steps="ddim20"),
    "ddim-25": _row("best", sampler="ddim", steps="ddim25"),
    "ddim-30": _row("best", sampler="ddim", steps="ddim30"),
    "ddim-50": _row("best", sampler="ddim", steps="ddim50"),
    "guide-to-0.8": _row("best", end=0.8),
    "guide-from-0.2": _row("best", start=0.2),
    "early-views-2": _row("best", early_views=2),
    "half-steps": _row("best", steps=str(int(STEPS) // 2)),
    "fast": _row("fast", steps=str(round(int(STEPS) * int(PRESETS["fast"].steps) / int(PRESETS["best"].steps)))),
}
"""Name → options. ``local-λ`` is Algorithm 1; ``naive-paste`` is it without D_bg, the background put back at the end. ``fast`` has as large
a part of the steps as its preset has of those of ``best``."""


@dataclass(frozen=True)
class Pair:
    """An empty scene with a mask, and the object that should come into it."""

    number: int
    background: str
    seed: int
    name: str

    @property
    def prompt(self) -> str:
        """'an apple'."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


def pairs(count: int, held_back: bool = False) -> list[Pair]:
    """The first pairs of one of two lists that share no scene: the one to choose options by, and the one to report with.

    Objects and backgrounds come equally often, in an order that looks like chance.
    """
    order, first = LISTS[held_back]
    rng = np.random.default_rng(order)
    out: list[Pair] = []
    while len(out) < count:
        names, grounds = rng.permutation(list(OBJECTS)), rng.permutation(len(OBJECTS))
        for name, ground in zip(names, grounds, strict=True):
            background = list(BACKGROUNDS)[int(ground) % len(BACKGROUNDS)]
            out.append(Pair(len(out), background, first + 2 * len(out), str(name)))
    return out[:count]


def evaluate(
    out: Path,
    models: Models,
    perceptual: PerceptualDistance,
    judge: Judge,
    rows: dict[str, EditOptions],
    cases: Sequence[Pair],
    candidates: int = CANDIDATES,
    networks: Mapping[str, str] | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_pair: Callable[[str, Pair, bool], None] | None = None,
) -> list[dict[str, Any]]:
    """Edits every pair by every row, pair by pair, and measures.

    Args:
        out: the run's folder; what it holds of the same pairs, options and networks is taken over, of another row too.
        models: the networks to edit with; perceptual: for diversity; judge: for the verdicts.
        rows: name → options; ``candidates`` replaces their number.
        networks: what tells them from others, such as their files' hashes; measurements with others are made anew.
        on_step: after every step; on_pair: after every pair, with True if it was taken over.

    Returns:
        The rows of ``evaluation.json``, as :func:`summary` has them.
    """
    clip = models.clip
    if clip is None:
        raise BlendedError("an evaluation needs a CLIP; give one.")
    for case in cases:
        for name, options in rows.items():
            options = _with_candidates(options, candidates)
            file, asked = record_of(out, name, case), _asked(case, options, networks)
            taken_over = recorded(file, asked) is not None or _copied(file, asked)
            if not taken_over:
                record, strip = _edited(models, clip, perceptual, judge, case, options, on_step)
                write_png(file.with_suffix(".png"), strip)
                write_bytes(file, json.dumps({"asked": asked, **record}, indent=1).encode())
            if on_pair is not None:
                on_pair(name, case, taken_over)
    return finished(out, rows, cases, candidates, networks)


def finished(
    out: Path, rows: Mapping[str, EditOptions], cases: Sequence[Pair], candidates: int, networks: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The summaries of those rows that a run's folder holds whole, of these pairs, options and networks."""
    table = []
    for name, options in rows.items():
        options = _with_candidates(options, candidates)
        records = [recorded(record_of(out, name, case), _asked(case, options, networks)) for case in cases]
        known = [r for r in records if r is not None]
        if len(known) == len(cases):
            table.append(summary(name, known))
    return table


def _with_candidates(options: EditOptions, candidates: int) -> EditOptions:
    return replace(options, candidates=candidates, batch=min(candidates, options.batch))


def _asked(case: Pair, options: EditOptions, networks: Mapping[str, str] | None) -> dict[str, Any]:
    """What a measurement is of; another one is not taken over."""
    return {"format": FORMAT, "pair": vars(case), "options": options.to_dict(), "networks": dict(networks or {})}


def record_of(out: Path, row: str, case: Pair) -> Path:
    """Where what was measured of a pair is kept."""
    return out / "pairs" / row / f"{case.number:03}.json"


def recorded(file: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """An earlier measurement of the same, with its picture; None otherwise."""
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and found.get("asked") == json.loads(json.dumps(asked)) and file.with_suffix(".png").is_file()
    return found if same else None


def _copied(file: Path, asked: dict[str, Any]) -> bool:
    """Takes over what another row measured of the same: two names may be given to the same options."""
    for other in sorted(file.parents[1].glob(f"*/{file.name}")):
        if recorded(other, asked) is not None:
            write_bytes(file.with_suffix(".png"), other.with_suffix(".png").read_bytes())
            write_bytes(file, other.read_bytes())
            return True
    return False


def _edited(
    models: Models,
    clip: ClipModel,
    perceptual: PerceptualDistance,
    judge: Judge,
    case: Pair,
    options: EditOptions,
    on_step: Callable[[Step], None] | None,
) -> tuple[dict[str, Any], UInt8]:
    """(what was measured, the candidates side by side, best first)."""
    scene, mask = demo_scene(case.background, case.seed)
    picture = torch.from_numpy(scene).permute(2, 0, 1)[None].float() / 255
    area = torch.from_numpy(mask[..., 0]).float()[None, None] / 255
    begun = time.perf_counter()
    result = edit_picture(picture, area, clip.prompt(case.prompt), models, options, on_step=on_step)
    seconds = time.perf_counter() - begun
    finished = torch.cat([result.picture(c) for c in result.candidates])
    squares, inside = _squares(finished, result)
    verdicts = judge(squares, inside)
    prompt = clip.prompt(case.prompt)
    one_view = clip_distance(models.context.put(squares), models.context.put(inside), clip, prompt)
    return {
        "seconds": seconds / len(finished),
        "source_distance": result.source_distance,
        "diversity": diversity(models.context.put(squares), models.context.put(inside), perceptual),
        "candidates": [
            {
                "candidate": c.index,
                **c.score.to_dict(),
                "one_view_distance": float(one) if one.isfinite() else None,
                "answer": verdict.answer,
                "probability": verdict.probabilities[case.name],
                "accepted": verdict.accepts(case.name),
            }
            for c, verdict, one in zip(result.candidates, verdicts, one_view, strict=True)
        ],
    }, np.concatenate([to_uint8(row[None]) for row in finished], 1)


def _squares(pictures: Tensor, result: EditResult) -> tuple[Tensor, Tensor]:
    """The region of finished pictures [B, 3, H, W] in 0..1, in −1..1 at the judge's size, and its mask."""
    cut = torch.cat([result.region.cut(row[None], SIDE) for row in pictures])
    return cut * 2 - 1, result.region.cut_mask(EditMask.of(result.mask.values), SIDE).values


@torch.no_grad()
def diversity(squares: Tensor, mask: Tensor, perceptual: PerceptualDistance) -> float | None:
    """Mean LPIPS distance of two candidates inside the mask, grey outside; None for a single one."""
    seen = squares * mask
    first, second = torch.triu_indices(len(seen), len(seen), 1)
    return float(perceptual(seen[first], seen[second]).mean()) if len(first) else None


# --- what a row comes to ----------------------------------------------------------------------------------------------


def summary(name: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table.

    ``batch_precision``: share of all candidates that the judge accepts. ``best_precision``: share of pairs whose first
    candidate it accepts. ``top_fifth`` and ``bottom_fifth``: share accepted among the best and the worst ranked fifth of each pair, rounded up to whole candidates. ``rank_auc``:
    how often, of two candidates of one pair of which one is accepted, that one has the smaller CLIP distance (½ is chance);
    ``one_view_auc``: the same if all were ranked by the one view that is not warped, of the pasted square.
    ``by_rank``: share accepted at each rank. The others are means; ``background_error_max`` is the largest.
    """
    every = [c for r in records for c in r["candidates"]]
    firsts = [r["candidates"][0] for r in records]
    top, bottom = ([c["accepted"] for r in records for c in _share(r["candidates"], end)] for end in (False, True))
    return {
        "name": name,
        "pairs": len(records),
        "candidates": len(every),
        "batch_precision": _mean(c["accepted"] for c in every),
        "best_precision": _mean(c["accepted"] for c in firsts),
        "nothing": _mean(c["answer"] == NONE for c in every),
        "background_error": _mean(c["background_error"] for c in every),
        "background_error_max": max((c["background_error"] for c in every), default=0.0),
        "diversity": _mean(r["diversity"] for r in records if r["diversity"] is not None),
        "seam_energy": _mean(c["seam_energy"] for c in every),
        "clip_gain": _mean(c["gain"] for c in every if c["gain"] is not None),
        "top_fifth": _mean(top),
        "bottom_fifth": _mean(bottom),
        "rank_auc": rank_auc(records),
        "one_view_auc": rank_auc(records, "one_view_distance"),
        "by_rank": [_mean(c["accepted"] for c in rank) for rank in zip(*(r["candidates"] for r in records), strict=True)],
        "seconds": _mean(r["seconds"] for r in records),
    }


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return float(np.mean(numbers)) if numbers else None


def _share(ranked: Sequence[dict[str, Any]], end: bool) -> Sequence[dict[str, Any]]:
    """The best or the worst fifth of one pair's candidates, rounded up."""
    count = math.ceil(FIFTH * len(ranked))
    return ranked[-count:] if end else ranked[:count]


def rank_auc(records: Sequence[dict[str, Any]], by: str = "clip_distance") -> float | None:
    """The probability that CLIP puts an accepted candidate before a rejected one of the same pair; None without such couples."""
    wins = []
    for record in records:
        known = [c for c in record["candidates"] if c[by] is not None]
        good, bad = ([c[by] for c in known if c["accepted"] is accepted] for accepted in (True, False))
        wins += [1.0 if a < b else 0.5 if a == b else 0.0 for a in good for b in bad]
    return _mean(wins)


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """For a terminal and for documents: Markdown, one line a row."""
    columns = (
        ("row", "name", "{}"), ("batch precision", "batch_precision", "{:.1%}"), ("best precision", "best_precision", "{:.1%}"),
        ("background error", "background_error", "{:.4f}"), ("diversity", "diversity", "{:.3f}"), ("seam", "seam_energy", "{:.4f}"),
        ("CLIP gain", "clip_gain", "{:.3f}"), ("top / bottom fifth", "", ""), ("rank AUC", "rank_auc", "{:.2f}"),
        ("s / candidate", "seconds", "{:.1f}"),
    )  # fmt: skip

    def cell(row: dict[str, Any], key: str, form: str) -> str:
        if not key:
            return f"{cell(row, 'top_fifth', '{:.0%}')} / {cell(row, 'bottom_fifth', '{:.0%}')}"
        return "–" if row[key] is None else form.format(row[key])

    lines = [[title for title, _, _ in columns], *([cell(row, key, form) for _, key, form in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def strip_of(out: Path, row: str, case: Pair) -> tuple[list[UInt8], list[bool]]:
    """A pair's candidates, best first [S, S, 3], and which the judge accepted."""
    file = record_of(out, row, case)
    accepted = [bool(c["accepted"]) for c in json.loads(file.read_text("utf-8"))["candidates"]]
    with Image.open(file.with_suffix(".png")) as image:
        return list(np.split(np.asarray(image.convert("RGB")), len(accepted), 1)), accepted
