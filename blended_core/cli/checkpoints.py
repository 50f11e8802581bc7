"""The commands ``inspect`` and ``convert``, and what they share with ``edit``: overrides and the progress of the probe."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..adm.convert import convert as write_converted
from ..adm.describe import as_dict, as_table
from ..adm.load import Checkpoint, load_checkpoint
from ..adm.probe import ProbeOptions
from ..device import DeviceContext
from ..errors import BlendedError
from ..io.images import read_picture


def inspect(args: argparse.Namespace) -> int:
    """Prints the settings of a checkpoint as a table, or as JSON."""
    checkpoint = _load(args)
    if args.json:
        print(json.dumps(as_dict(checkpoint.detection, checkpoint.path), indent=1, ensure_ascii=False))
    else:
        print(as_table(checkpoint.detection, checkpoint.path))
    return 0


def convert(args: argparse.Namespace) -> int:
    """Writes a checkpoint's weights and settings to one file."""
    if args.target.suffix.lower() != ".safetensors":
        raise BlendedError(f"{args.target} does not end in .safetensors, the only format that convert writes; choose another name.")
    if args.target.exists() and not args.overwrite:
        raise BlendedError(f"{args.target} exists; choose another name, or add --overwrite.")
    if not args.target.absolute().parent.is_dir():
        raise BlendedError(f"the folder {args.target.absolute().parent} does not exist; create it first.")
    checkpoint = _load(args)
    size = write_converted(checkpoint.model, args.target, half=args.half)
    print(f"{checkpoint.path.name} → {args.target}: {size / 1e6:.1f} MB{' in half precision' if args.half else ''}, settings included")
    return 0


def _load(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint that a command names, in float32."""
    context = DeviceContext.choose(args.device or "auto", "fp32")
    picture = None if args.probe_picture is None else read_picture(args.probe_picture).tensor() * 2 - 1
    with context.autograd(), probe_options(picture) as probe:
        return load_checkpoint(
            context, args.file, parse_overrides(args.overrides or ()), probe=probe if args.probe else None, weights=args.ddpm_weights or ""
        )


@contextlib.contextmanager
def probe_options(picture: Tensor | None = None) -> Iterator[ProbeOptions]:
    """Options of the probe, with a progress bar; it is silent where stderr is not a terminal."""
    # Most checkpoints need no probe. With a delay the bar appears at the first forward pass.
    with tqdm(desc="probing settings", unit="forward", disable=None, dynamic_ncols=True, leave=False, delay=1e-3) as bar:

        def on_forward(done: int, expected: int) -> None:
            bar.total = expected
            bar.update(done - bar.n)

        yield ProbeOptions(picture, on_forward=on_forward)


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE arguments as a dictionary; values are JSON, or else text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise BlendedError(f"--set {pair!r} is not understood; write KEY=VALUE, for example --set num_heads=4.")
        try:
            values[key] = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, brackets without end
            values[key] = value
    return values
