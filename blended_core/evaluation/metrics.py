"""Quality of edits on the embedded world. A pair is an empty scene and an object to add; the judge decides whether the result shows the
object. Some scenes contain the object, and the edit removes it; the true ground is known. A row is a set of options. Every row edits the same
pairs with the same seeds.

A run has a folder. The result of each pair and row is saved as soon as it is finished, so that a run can be stopped and resumed.
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
from ..options import EditOptions
from ..rank import clip_distance
from ..result import EditResult
from ..sample import Models, Step
from ..toy.models import SIDE
from ..toy.world import BACKGROUNDS, OBJECTS, demo_scene
from .ground import ground_error, tone_and_edge
from .judge import NONE, Judge
from .rows import CANDIDATES

FORMAT = 3  # version of the saved files; increase it when their meaning changes
FIFTH = 0.2
PAIR_LISTS = {False: (20220624, 1000), True: (20220626, 5001)}
"""held_back → (seed of the order, seed of the first scene). A held-back list can be used once: after a look at its results, choose new seeds."""


ADD, REMOVE = "add", "remove"
REMOVED_SHARE = 4
"""Of so many pairs one is edited the other way round too."""


@dataclass(frozen=True)
class Pair:
    """A scene with a mask, and an object. ``task``: ADD the object to the empty scene, or REMOVE it with a prompt that names the background."""

    number: int
    background: str
    seed: int
    name: str
    task: str = ADD

    @property
    def prompt(self) -> str:
        """'an apple', or 'an empty meadow'."""
        if self.task == REMOVE:
            return f"an empty {self.background}"
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    def options(self, options: EditOptions) -> EditOptions:
        """Those of a row, for this pair. A removal keeps nothing of what the mask covers."""
        return replace(options, strength=1.0) if self.task == REMOVE else options


def pairs(count: int, held_back: bool = False) -> list[Pair]:
    """The first pairs of one of two lists, one for choosing options and one held back for the report. The lists have no scene in common.

    All objects and backgrounds are equally frequent, in random order.
    """
    order, first = PAIR_LISTS[held_back]
    rng = np.random.default_rng(order)
    out: list[Pair] = []
    while len(out) < count:
        names, backgrounds = rng.permutation(list(OBJECTS)), rng.permutation(len(OBJECTS))
        for name, index in zip(names, backgrounds, strict=True):
            background = list(BACKGROUNDS)[int(index) % len(BACKGROUNDS)]
            out.append(Pair(len(out), background, first + 2 * len(out), str(name)))
    return out[:count]


def removals(cases: Iterable[Pair]) -> list[Pair]:
    """For every fourth pair, the same scene with the object in it, to be removed."""
    return [replace(case, task=REMOVE) for case in list(cases)[::REMOVED_SHARE]]


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
    """Edits every pair with the options of every row and measures the results.

    Args:
        out: folder of the run. Saved results with the same pair, options and networks are reused, also those of another row.
        models, perceptual, judge: the networks of the edit, of the diversity and of the verdicts.
        rows, cases: name → options; the pairs. ``candidates`` replaces the number in the options.
        networks: identifies the networks, for example by the hashes of their files. Results of other networks are not reused.
        on_step, on_pair: called after every step, and after every pair with (row, pair, whether the saved result was reused).

    Returns:
        The rows of ``evaluation.json``; see :func:`summary`.
    """
    clip = models.clip
    if clip is None:
        raise BlendedError("an evaluation needs a CLIP model.", option="clip")
    for case in cases:
        for name, options in rows.items():
            options = _with_candidates(options, candidates)
            file, key = record_path(out, name, case), _cache_key(case, options, networks)
            cached = load_record(file, key) is not None or _copy_from_other_row(file, key)
            if not cached:
                record, strip = _edit_and_measure(models, clip, perceptual, judge, case, options, on_step)
                write_png(file.with_suffix(".png"), strip)
                write_bytes(file, json.dumps({"asked": key, **record}, indent=1).encode())
            if on_pair is not None:
                on_pair(name, case, cached)
    return finished(out, rows, cases, candidates, networks)


def finished(
    out: Path, rows: Mapping[str, EditOptions], cases: Sequence[Pair], candidates: int, networks: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The summaries of the rows for which the folder has the results of all pairs, with these options and networks."""
    table = []
    for name, options in rows.items():
        options = _with_candidates(options, candidates)
        records = [load_record(record_path(out, name, case), _cache_key(case, options, networks)) for case in cases]
        known = [r for r in records if r is not None]
        if len(known) == len(cases):
            table.append(summary(name, known))
    return table


def _with_candidates(options: EditOptions, candidates: int) -> EditOptions:
    return replace(options, candidates=candidates, batch=min(candidates, options.batch))


def _cache_key(case: Pair, options: EditOptions, networks: Mapping[str, str] | None) -> dict[str, Any]:
    """What a saved result depends on. Only a result with the same key is reused."""
    return {"format": FORMAT, "pair": vars(case), "options": options.to_dict(), "networks": dict(networks or {})}


def record_path(out: Path, row: str, case: Pair) -> Path:
    """The file with the result of a pair."""
    return out / "pairs" / row / (f"{case.number:03}{'' if case.task == ADD else '-removed'}.json")


def load_record(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The saved result, or None if it or its image is missing or its key differs."""
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and found.get("asked") == json.loads(json.dumps(key)) and file.with_suffix(".png").is_file()
    return found if same else None


def _copy_from_other_row(file: Path, key: dict[str, Any]) -> bool:
    """Copies the result of another row with the same key, since rows may have equal options. False if there is none."""
    for other in sorted(file.parents[1].glob(f"*/{file.name}")):
        if load_record(other, key) is not None:
            write_bytes(file.with_suffix(".png"), other.with_suffix(".png").read_bytes())
            write_bytes(file, other.read_bytes())
            return True
    return False


def _edit_and_measure(
    models: Models,
    clip: ClipModel,
    perceptual: PerceptualDistance,
    judge: Judge,
    case: Pair,
    options: EditOptions,
    on_step: Callable[[Step], None] | None,
) -> tuple[dict[str, Any], UInt8]:
    """(result, image of all candidates side by side, best first)."""
    scene, mask = demo_scene(case.background, case.seed, name=None if case.task == ADD else case.name)
    empty, _ = demo_scene(case.background, case.seed)
    picture = torch.from_numpy(scene).permute(2, 0, 1)[None].float() / 255
    mask_image = torch.from_numpy(mask[..., 0]).float()[None, None] / 255
    start = time.perf_counter()
    result = edit_picture(picture, mask_image, clip.prompt(case.prompt), models, case.options(options), on_step=on_step)
    seconds = time.perf_counter() - start
    finished = torch.cat([result.picture(c) for c in result.candidates])
    strip = np.concatenate([to_uint8(row[None]) for row in finished], 1)
    squares, inside = _regions(finished, result)
    ground, _ = _regions(torch.from_numpy(empty).permute(2, 0, 1)[None].float() / 255, result)
    before, within = (ground + 1) / 2, inside > 0
    if case.task != ADD:
        errors = ground_error((squares + 1) / 2, before, within)
        return {
            "task": case.task,
            "seconds": seconds / len(finished),
            "candidates": [
                {"candidate": c.index, "ground_rmse": a, "ground_low": b} for c, (a, b) in zip(result.candidates, errors, strict=True)
            ],
        }, strip
    verdicts = judge(squares, inside)
    one_view = clip_distance(models.context.put(squares), models.context.put(inside), clip, clip.prompt(case.prompt))
    tones = tone_and_edge((squares + 1) / 2, before, within)
    return {
        "task": case.task,
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
                "tone": tone,
                "edge": edge,
            }
            for c, verdict, one, (tone, edge) in zip(result.candidates, verdicts, one_view, tones, strict=True)
        ],
    }, strip


def _regions(pictures: Tensor, result: EditResult) -> tuple[Tensor, Tensor]:
    """The regions of images [B, 3, H, W] in 0..1, as −1..1 at the size of the judge, and the mask of the region."""
    cut = torch.cat([result.region.cut(row[None], SIDE) for row in pictures])
    return cut * 2 - 1, result.region.cut_mask(EditMask.of(result.mask.values), SIDE).values


@torch.no_grad()
def diversity(squares: Tensor, mask: Tensor, perceptual: PerceptualDistance) -> float | None:
    """Mean LPIPS distance of two candidates inside the mask, gray outside; None for a single candidate."""
    masked = squares * mask
    first, second = torch.triu_indices(len(masked), len(masked), 1)
    return float(perceptual(masked[first], masked[second]).mean()) if len(first) else None


# --- the table --------------------------------------------------------------------------------------------------------


def summary(name: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table.

    - ``batch_precision``: share of all candidates that the judge accepts.
    - ``best_precision``: share of pairs whose first candidate the judge accepts.
    - ``top_fifth``, ``bottom_fifth``: share accepted among the best and the worst ranked fifth of each pair, rounded up.
    - ``rank_auc``: :func:`rank_auc`; ``one_view_auc``: the same for a ranking by the unwarped view of the pasted region alone.
    - ``tone``, ``edge``: :func:`~.ground.tone_and_edge`; ``ground_rmse``, ``ground_low``: :func:`~.ground.ground_error` of removals.
    - ``by_rank``: share accepted at each rank. ``background_error_max`` is a maximum, all others are means.
    """
    removed = [c for r in records if r["task"] != ADD for c in r["candidates"]]
    records = [r for r in records if r["task"] == ADD]
    candidates = [c for r in records for c in r["candidates"]]
    firsts = [r["candidates"][0] for r in records]
    top, bottom = ([c["accepted"] for r in records for c in _fifth(r["candidates"], end)] for end in (False, True))
    return {
        "name": name,
        "pairs": len(records),
        "candidates": len(candidates),
        "batch_precision": _mean(c["accepted"] for c in candidates),
        "best_precision": _mean(c["accepted"] for c in firsts),
        "nothing": _mean(c["answer"] == NONE for c in candidates),
        "background_error": _mean(c["background_error"] for c in candidates),
        "background_error_max": max((c["background_error"] for c in candidates), default=0.0),
        "diversity": _mean(r["diversity"] for r in records if r["diversity"] is not None),
        "tone": _mean(c["tone"] for c in candidates if c["tone"] is not None),
        "edge": _mean(c["edge"] for c in candidates if c["edge"] is not None),
        "ground_rmse": _mean(c["ground_rmse"] for c in removed),
        "ground_low": _mean(c["ground_low"] for c in removed),
        "clip_gain": _mean(c["gain"] for c in candidates if c["gain"] is not None),
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


def _fifth(ranked: Sequence[dict[str, Any]], end: bool) -> Sequence[dict[str, Any]]:
    """The best ranked fifth of the candidates of a pair, or with ``end`` the worst, rounded up."""
    count = math.ceil(FIFTH * len(ranked))
    return ranked[-count:] if end else ranked[:count]


def rank_auc(records: Sequence[dict[str, Any]], by: str = "clip_distance") -> float | None:
    """The probability that an accepted candidate ranks before a rejected one of the same pair (chance: ½); None without such candidates."""
    wins = []
    for record in records:
        known = [c for c in record["candidates"] if c[by] is not None]
        accepted_distances, rejected_distances = ([c[by] for c in known if c["accepted"] is accepted] for accepted in (True, False))
        wins += [1.0 if a < b else 0.5 if a == b else 0.0 for a in accepted_distances for b in rejected_distances]
    return _mean(wins)


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with one line per row."""
    columns = (
        ("row", "name", "{}"), ("batch precision", "batch_precision", "{:.1%}"), ("best precision", "best_precision", "{:.1%}"),
        ("background error", "background_error", "{:.4f}"), ("diversity", "diversity", "{:.3f}"), ("tone", "tone", "{:.1f}"), ("edge", "edge", "{:.1f}"),
        ("ground kept", ("ground_rmse", "ground_low"), "{:.1f}"), ("CLIP gain", "clip_gain", "{:.3f}"), ("top / bottom fifth", ("top_fifth", "bottom_fifth"), "{:.0%}"), ("rank AUC", "rank_auc", "{:.2f}"),
        ("s / candidate", "seconds", "{:.1f}"),
    )  # fmt: skip

    def cell(row: dict[str, Any], key: str | tuple[str, ...], form: str) -> str:
        if isinstance(key, tuple):
            return " / ".join(cell(row, part, form) for part in key)
        return "–" if row.get(key) is None else form.format(row[key])

    lines = [[title for title, _, _ in columns], *([cell(row, key, form) for _, key, form in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def load_candidates(out: Path, row: str, case: Pair) -> tuple[list[UInt8], list[bool]]:
    """The images [S, S, 3] of the candidates of a pair, best first, and whether the judge accepted each."""
    file = record_path(out, row, case)
    accepted = [bool(c["accepted"]) for c in json.loads(file.read_text("utf-8"))["candidates"]]
    with Image.open(file.with_suffix(".png"), formats=("PNG",)) as image:
        return list(np.split(np.asarray(image.convert("RGB")), len(accepted), 1)), accepted
