"""The command ``evaluate``."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path

from ..errors import BlendedError
from ..evaluation.rows import ROWS
from ..io.atomic import sha256, write_bytes
from ..io.folder import claimed_path, writable
from ..io.request import Request
from ..io.versions import own_version
from ..options import EditOptions
from ..toy.models import CLIP, DDPM, JUDGE, LPIPS
from .messages import message_of, say

NETWORKS = {"ddpm": DDPM, "clip": CLIP, "lpips": LPIPS, "judge": JUDGE}
MAX_PAIRS = 10_000
TABLE_SECONDS = 600.0
"""How long a process waits for another one that writes the table and the pictures of the folder."""
OUR_FILES = ("pairs", "evaluation.json", "held-back")
"""Names in the folder of an evaluation; a folder with others and none of these belongs to somebody else."""


def evaluate(args: argparse.Namespace) -> int:
    """Edits pairs of scene and object with several sets of options, and judges the results."""
    if unknown := sorted(set(args.only or ()) - set(ROWS)):
        raise BlendedError(f"unknown row {', '.join(unknown)}; known are {', '.join(ROWS)}.")
    if not 1 <= args.pairs <= MAX_PAIRS:
        raise BlendedError(f"--pairs is {args.pairs}; give 1 to {MAX_PAIRS}.")
    EditOptions(candidates=args.candidates)  # raises for a value outside its range, as the next line does
    Request("evaluate", "", None, (), (), threads=args.threads)
    _check_folder(args.out)
    out = args.out / "held-back" if args.held_back else args.out
    rows = {name: options for name, options in ROWS.items() if name in (args.only or ROWS)}
    # Two processes may measure different rows in one folder.
    with writable(out, ["pairs"]), contextlib.ExitStack() as claims:
        (out / "pairs").mkdir(exist_ok=True)
        for name in rows:
            claims.enter_context(claimed_path(out / "pairs" / name))
        return _evaluate(args, out, rows)


def _check_folder(out: Path) -> None:
    """Raises BlendedError if the folder holds files, and none of an evaluation."""
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    if names and not set(OUR_FILES) & set(names):
        raise BlendedError(
            f"{out} holds other files, such as {min(names)}; name a new folder, or that of an earlier evaluation.", option="out"
        )


def _evaluate(args: argparse.Namespace, out: Path, rows: Mapping[str, EditOptions]) -> int:
    import torch
    from tqdm import tqdm

    from ..adm.load import load_ddpm
    from ..clip.model import load_clip
    from ..device import DeviceContext
    from ..evaluation import metrics
    from ..evaluation.judge import Judge
    from ..evaluation.metrics import Pair, as_table, finished, pairs, removals
    from ..evaluation.plots import comparison, plot, row_sheet
    from ..io.results import as_json
    from ..perceptual import load_perceptual
    from ..sample import Models
    from .edit import precision_of

    if args.threads:
        torch.set_num_threads(args.threads)
    context = DeviceContext.choose(args.device or "auto", args.dtype or "auto")
    perceptual = load_perceptual(context, "embedded")
    models = Models(load_ddpm(context), load_clip(context), perceptual, context)
    networks = {name: sha256(file) for name, file in NETWORKS.items()} | {
        "precision": precision_of(context.dtype),
        "device": context.device.type,
    }
    shown = pairs(args.pairs, args.held_back)
    cases = [*shown, *removals(shown)]
    done = 0
    with tqdm(total=len(cases) * len(rows), unit="pair", disable=None, dynamic_ncols=True, leave=False) as bar:

        def on_pair(name: str, pair: Pair, already_measured: bool) -> None:
            bar.set_description(f"{name}: {pair.prompt}", refresh=False)
            if already_measured and not bar.disable:  # takes no time, so it must not count in the estimate of the time left
                bar.initial += 1
            bar.update()
            nonlocal done
            done += 1

        try:
            metrics.evaluate(out, models, perceptual, Judge(), dict(rows), cases, args.candidates, networks, on_pair=on_pair)
        except OSError as error:
            raise BlendedError(
                f"{message_of(error, args)} {done} of {len(cases) * len(rows)} pairs are finished in {out}, and the same command continues from there."
            ) from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; finished pairs are kept in {out}, and the same command continues from there.") from None
    with claimed_path(out / "evaluation.json", TABLE_SECONDS):
        table = finished(out, ROWS, cases, args.candidates, networks)  # includes the rows of earlier runs with the same settings
        about = {
            "pairs": len(shown),
            "candidates": args.candidates,
            "held_back": args.held_back,
            "networks": networks,
            "version": own_version(),
        }
        write_bytes(out / "evaluation.json", as_json({**about, "rows": table}, indent=2) + b"\n")
        write_bytes(out / "evaluation.md", f"{as_table(table)}\n".encode())
        plot(out / "evaluation.png", table)
        measured = [row["name"] for row in table]
        for name in measured:
            row_sheet(out / f"{name}.png", out, name, shown[:12])
        comparison(out / "comparison.png", out, measured, shown[:5])
    say(as_table(table))
    say(f"\nwritten: {out / 'evaluation.json'}, with a plot, and a sheet for each row")
    return 0
