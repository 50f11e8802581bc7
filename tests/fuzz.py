"""Damaged and hostile checkpoint files: ``python -m tests.fuzz [--count 2000] [--seed 0]``.

Every file must load or give a BlendedError within seconds, without anything written. Otherwise the exit code is 1 and the file is kept.
"""

from __future__ import annotations

import argparse
import collections
import random
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from blended_core.adm.load import load_ddpm, may_be_checkpoint
from blended_core.device import DeviceContext
from blended_core.errors import BlendedError

from .tiny import CONFIG, tiny_unet

SLOW = 20.0  # seconds for one small file, on a busy machine
SETTINGS = {"image_size": CONFIG.image_size, "num_head_channels": 16, "schedule": "linear", "steps": 1000, "objective": "eps"}
SETTINGS |= {"use_new_attention_order": False}


def originals(folder: Path) -> list[Path]:
    """One network in every file format, and in a compressed file, which is refused."""
    state = {k: v.half() for k, v in tiny_unet(channel_mult=(1,), attention_downsampling=()).state_dict().items()}
    save_file(state, folder / "a.safetensors")
    torch.save(state, folder / "zip.pt")
    with zipfile.ZipFile(folder / "zip.pt") as whole, zipfile.ZipFile(folder / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.namelist():
            packed.writestr(entry, whole.read(entry))
    torch.save({"ema": state, "step": 3}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return sorted(folder.iterdir())


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A damaged copy of a file; half of the changes are at its beginning, where the structure is."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        reach = len(out) if rng.random() < 0.5 else min(len(out), 6000)
        if not reach:
            break
        at = rng.randrange(reach)
        span = rng.choice((1, 1, 2, 8, 64, 1000))
        match rng.randrange(6):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + span] = rng.randbytes(span)
            case 2:
                out[at : at + span] = b"\xff" * span
            case 3:
                del out[at : at + span]
            case 4:
                out[at:at] = rng.randbytes(span)
            case _:
                if rng.random() < 0.3:
                    del out[at:]
                else:
                    out[at : at + span] = bytes(span)
    return bytes(out)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng = random.Random(args.seed)
    told: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        whole.mkdir()
        sources = originals(whole)
        here = Path(name) / "here"
        here.mkdir()
        for number in range(args.count):
            source = rng.choice(sources)
            path = here / source.name
            path.write_bytes(mutated(source.read_bytes(), rng))
            begun = time.perf_counter()
            try:
                may_be_checkpoint(path)
                load_ddpm(DeviceContext(), path, SETTINGS, probe=None)
                told["loaded"] += 1
            except BlendedError as error:
                assert str(error).rstrip().endswith("."), error
                told["refused"] += 1
            except BaseException:
                kept = Path(tempfile.gettempdir()) / f"fuzz_{args.seed}_{number}_{source.name}"
                shutil.copy(path, kept)
                print(f"file {number}, kept as {kept}:", file=sys.stderr)
                raise
            took = time.perf_counter() - begun
            if took > SLOW or [p.name for p in here.iterdir()] != [path.name]:
                print(f"file {number} of seed {args.seed}: {took:.1f} s, left {[p.name for p in here.iterdir()]}", file=sys.stderr)
                return 1
            path.unlink()
    print(f"{args.count} files: {told['loaded']} loaded, {told['refused']} refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
