"""The commands ``inspect`` and ``convert``, and the progress of the probe, which ``edit`` shows too."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import BlendedError
from ..io.folder import claimed_path
from .messages import say
from .process import cache_folder
from .request import checkpoint_path, parse_overrides

if TYPE_CHECKING:
    from torch import Tensor

    from ..adm.load import Checkpoint
    from ..adm.probe import ProbeOptions


def inspect(args: argparse.Namespace) -> int:
    """Prints the settings of a checkpoint as a table, or as JSON."""
    checkpoint = _load(args)
    from ..adm.describe import as_dict, as_table

    if args.json:
        say(json.dumps(as_dict(checkpoint.detection, checkpoint.path), indent=1), limit=None)
    else:
        say(as_table(checkpoint.detection, checkpoint.path))
    return 0


def convert(args: argparse.Namespace) -> int:
    """Writes a checkpoint's weights and settings to one file."""
    if args.target.suffix.lower() != ".safetensors":
        raise BlendedError(f"{args.target} does not end in .safetensors, the only format that convert writes; choose another name.")
    if not args.target.absolute().parent.is_dir():
        raise BlendedError(f"the folder {args.target.absolute().parent} does not exist; create it first.")
    with claimed_path(args.target):
        if args.target.exists() and not args.overwrite:
            raise BlendedError(f"{args.target} exists; choose another name, or add --overwrite.")
        checkpoint = _load(args)
        from ..adm.convert import convert as write_converted

        size = write_converted(checkpoint.model, args.target, half=args.half)
    say(f"{checkpoint.path.name} → {args.target}: {size / 1e6:.1f} MB{' in half precision' if args.half else ''}, settings included")
    return 0


def _load(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint that a command names, in float32."""
    path, overrides = checkpoint_path(args.file), parse_overrides(args.overrides or ())
    from ..io.images import read_picture

    picture = None if args.probe_picture is None else read_picture(args.probe_picture)
    from ..adm.load import load_checkpoint
    from ..device import DeviceContext

    context = DeviceContext.choose(args.device or "auto", "fp32")
    with context.autograd(), probe_options(None if picture is None else picture.tensor() * 2 - 1) as probe:
        return load_checkpoint(context, path, overrides, probe=probe if args.probe else None, weights=args.ddpm_weights or "")


@contextlib.contextmanager
def probe_options(picture: Tensor | None = None) -> Iterator[ProbeOptions]:
    """Options of the probe, with a progress bar; it is silent where stderr is not a terminal."""
    from tqdm import tqdm

    from ..adm.probe import ProbeOptions

    # Most checkpoints need no probe. With a delay the bar appears at the first forward pass.
    with tqdm(desc="probing settings", unit="forward", disable=None, dynamic_ncols=True, leave=False, delay=1e-3) as bar:

        def on_forward(done: int, expected: int) -> None:
            bar.total = expected
            bar.update(done - bar.n)

        yield ProbeOptions(picture, on_forward=on_forward, cache=cache_folder())
