"""The command ``evaluate``."""

from __future__ import annotations

import argparse

import torch
from tqdm import tqdm

from ..adm.load import load_ddpm
from ..clip.model import load_clip
from ..device import DeviceContext
from ..errors import BlendedError
from ..evaluation import metrics
from ..evaluation.judge import Judge
from ..evaluation.metrics import ROWS, Pair, as_table, finished, pairs
from ..evaluation.plots import comparison, plot, row_sheet
from ..io.atomic import sha256, write_bytes
from ..io.results import as_json
from ..io.versions import own_version
from ..perceptual import load_perceptual
from ..sample import Models
from ..toy.models import CLIP, DDPM, JUDGE, LPIPS
from .edit import precision_of

NETWORKS = {"ddpm": DDPM, "clip": CLIP, "lpips": LPIPS, "judge": JUDGE}


def evaluate(args: argparse.Namespace) -> int:
    """Edits pairs of scene and object with several sets of options, and judges the results."""
    if unknown := sorted(set(args.only or ()) - set(ROWS)):
        raise BlendedError(f"unknown row {', '.join(unknown)}; known are {', '.join(ROWS)}.")
    if args.pairs < 1 or args.candidates < 1:
        raise BlendedError(f"--pairs is {args.pairs} and --candidates is {args.candidates}; both must be at least 1.")
    if args.threads is not None and args.threads < 1:
        raise BlendedError(f"--threads is {args.threads}; give at least 1.")
    if args.out.exists() and not args.out.is_dir():
        raise BlendedError(f"--out {args.out} is a file; name a folder.")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = {name: options for name, options in ROWS.items() if name in (args.only or ROWS)}
    context = DeviceContext.choose(args.device or "auto", args.dtype or "auto")
    perceptual = load_perceptual(context, "embedded")
    models = Models(load_ddpm(context), load_clip(context), perceptual, context)
    networks = {name: sha256(file) for name, file in NETWORKS.items()} | {"precision": precision_of(context), "device": context.device.type}
    cases = pairs(args.pairs, args.held_back)
    out = args.out / "held-back" if args.held_back else args.out
    with tqdm(total=len(cases) * len(rows), unit="pair", disable=None, dynamic_ncols=True, leave=False) as bar:

        def on_pair(name: str, pair: Pair, already_measured: bool) -> None:
            bar.set_description(f"{name}: {pair.prompt}", refresh=False)
            if already_measured and not bar.disable:  # takes no time, so it must not count in the estimate of the time left
                bar.initial += 1
            bar.update()

        try:
            metrics.evaluate(out, models, perceptual, Judge(), rows, cases, args.candidates, networks, on_pair=on_pair)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; finished pairs are kept in {out}, and the same command continues from there.") from None
    table = finished(out, ROWS, cases, args.candidates, networks)  # includes the rows of earlier runs with the same settings
    about = {
        "pairs": len(cases),
        "candidates": args.candidates,
        "held_back": args.held_back,
        "networks": networks,
        "version": own_version(),
    }
    write_bytes(out / "evaluation.json", as_json({**about, "rows": table}, indent=2) + b"\n")
    write_bytes(out / "evaluation.md", f"{as_table(table)}\n".encode())
    plot(out / "evaluation.png", table)
    names = [row["name"] for row in table]
    for name in names:
        row_sheet(out / f"{name}.png", out, name, cases[:12])
    comparison(out / "comparison.png", out, names, cases[:5])
    print(as_table(table))
    print(f"\nwritten: {out / 'evaluation.json'}, with a plot, and a sheet for each row")
    return 0
