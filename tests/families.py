"""Published families of ADM checkpoints as files: ``python -m tests.families [--full]``.

Prints for each family what is detected in files with its names and shapes, under every prefix; with --full also two networks of full size with
random weights, written and loaded value for value (3 GB of disk, 6 GB of memory). Exit code 1 if a detection is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from blended_core.adm.detect import Detection
from blended_core.adm.load import inspect_checkpoint, load_checkpoint
from blended_core.adm.unet import UNet, UNetConfig
from blended_core.device import DeviceContext
from blended_core.diffusion import DiffusionConfig
from blended_core.errors import BlendedWarning

M256, M512 = (1, 1, 2, 2, 4, 4), (0.5, 1, 1, 2, 2, 4, 4)
LINEAR, COSINE, LONG = DiffusionConfig(), DiffusionConfig("cosine"), DiffusionConfig("cosine", 4000)
PREFIXES = ("", "module.", "model.", "diffusion_model.", "model.diffusion_model.", "_orig_mod.", "_orig_mod.ema.", "ema.module.")
FULL = ("openai 256 uncond", "p2 ffhq")


def adm(size: int, channels: int, mult: tuple[float, ...], blocks: int, pixels: tuple[int, ...], **rest: Any) -> UNetConfig:
    """A row of the table of families; attention in pixels, as in the published command lines."""
    options = {"resblock_updown": True, "use_scale_shift_norm": True, **rest}
    return UNetConfig(
        image_size=size, model_channels=channels, channel_mult=mult, num_res_blocks=blocks,
        attention_downsampling=tuple(size // p for p in pixels), **options,
    )  # fmt: skip


ALL, PLAIN = (32, 16, 8), {"resblock_updown": False}
FAMILIES = {
    "openai 256 uncond": (adm(256, 256, M256, 2, ALL, num_head_channels=64), LINEAR),
    "openai 256 cond": (adm(256, 256, M256, 2, ALL, num_head_channels=64, num_classes=1000), LINEAR),
    "openai 512 cond": (adm(512, 256, M512, 2, ALL, num_head_channels=64, num_classes=1000), LINEAR),
    "512 uncond fine-tune": (adm(512, 256, M512, 2, ALL, num_head_channels=64), LINEAR),
    "openai 128 cond": (adm(128, 256, (1, 1, 2, 3, 4), 2, ALL, num_heads=4, num_classes=1000), LINEAR),
    "openai 64 cond": (
        adm(64, 192, (1, 2, 3, 4), 3, ALL, num_head_channels=64, use_new_attention_order=True, num_classes=1000),
        COSINE,
    ),
    "portrait 512": (adm(512, 128, M512, 2, ALL, num_heads=4), LINEAR),
    "ukiyo-e 256": (adm(256, 128, M256, 2, ALL, num_heads=4), LINEAR),
    "pixel art, iddpm lsun": (adm(256, 128, M256, 2, (16,), num_heads=1, resblock_updown=False, use_scale_shift_norm=False), LINEAR),
    "p2 ffhq": (adm(256, 128, M256, 1, (16,), num_head_channels=64), LINEAR),
    "iddpm imagenet 64": (adm(64, 128, (1, 2, 3, 4), 3, (16, 8), num_heads=4, **PLAIN), LONG),
    "iddpm imagenet 64 cond": (adm(64, 192, (1, 2, 3, 4), 3, (16, 8), num_heads=4, num_classes=1000, **PLAIN), LONG),
    "iddpm cifar": (adm(32, 128, (1, 2, 2, 2), 3, (16, 8), num_heads=4, **PLAIN), LONG),
}
ODD = {  # of no family: only the shapes determine the settings
    "pooled": UNetConfig(32, 64, (1, 2, 4), 2, (4,), resblock_updown=False, conv_resample=False, num_heads=1),
    "one level": UNetConfig(8, 32, (1,), 2, (1,), num_heads=1),
    "half first": UNetConfig(32, 64, (0.5, 1, 2), 1, (1, 4), num_heads=4, resblock_updown=True, use_scale_shift_norm=True),
    "fixed variance": UNetConfig(16, 32, (1, 2), 3, (), out_channels=3, num_heads=4, use_scale_shift_norm=True),
    "five classes": UNetConfig(16, 32, (1, 3), 1, (2,), num_classes=5, num_heads=1),
}


def table(config: UNetConfig, prefix: str = "") -> dict[str, tuple[int, ...]]:
    with torch.device("meta"), mock.patch.object(torch.nn.Embedding, "reset_parameters"):  # slow on the meta device
        return {prefix + k: tuple(v.shape) for k, v in UNet(config).state_dict().items()}


def hollow_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes a safetensors file in half precision with all names and shapes, whose values are a hole that takes no space on disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def whole_file(path: Path, config: UNetConfig, prefix: str = "") -> dict[str, Tensor]:
    """Writes a network of random weights in half precision, as safetensors or as torch.save does; returns the weights."""
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.randn(shape, generator=generator).mul_(0.02).half() for k, shape in table(config).items()}
    named = {prefix + k: v for k, v in state.items()}
    if path.suffix == ".safetensors":
        save_file(named, path)
    else:
        torch.save(named, path)
    return state


def same(found: Detection, true: tuple[UNetConfig, DiffusionConfig]) -> list[str]:
    """The differences between a detection and the true settings."""
    truth = {**true[0].to_dict(), **true[1].to_dict()}
    return [f"{name} {value} instead of {truth[name]}" for name, (value, _) in found.settings.items() if value != truth[name]]


def in_short(unet: UNetConfig, process: DiffusionConfig) -> str:
    """One line."""
    heads = f"{unet.num_heads} heads" if unet.num_head_channels is None else f"heads of {unet.num_head_channels}"
    mult = ",".join(f"{m:g}" for m in unet.channel_mult)
    pixels = ",".join(str(unet.image_size // d) for d in reversed(unet.attention_downsampling))
    words = [f"{unet.image_size} px", f"{unet.model_channels}×{mult}", f"{unet.num_res_blocks} blocks", f"attention {pixels}", heads]
    words += ["new order"] * unet.use_new_attention_order + ["updown"] * unet.resblock_updown + ["scale-shift"] * unet.use_scale_shift_norm
    words += [f"{unet.num_classes} classes"] * (unet.num_classes is not None)
    return ", ".join([*words, f"{process.schedule} {process.steps}"])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help=f"also write and load {' and '.join(FULL)} whole")
    args = parser.parse_args()
    warnings.simplefilter("ignore", BlendedWarning)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        print(f"{'true family':<24}{'parameters':>10}  {'prefixes':<9}{'left to probe':<14}found")
        for name, true in {**FAMILIES, **dict.fromkeys(ODD)}.items():
            config, process = true or (ODD[name], None)
            right, found = 0, None
            for prefix in PREFIXES:
                shapes = table(config, prefix)
                hollow_file(path, shapes)
                found = inspect_checkpoint(path)
                facts = same(found, true) == [] if true else found.unet == config
                right += facts and found.prefix == prefix
            assert found is not None
            wrong += right < len(PREFIXES)
            parameters = sum(torch.Size(s).numel() for s in shapes.values()) / 1e6
            left = "all of them" if process is None else ", ".join(found.guessed) or "nothing"
            print(
                f"{name:<24}{parameters:>8.1f} M  {right}/{len(PREFIXES):<7}{left:<14}{in_short(found.unet, found.diffusion)}", flush=True
            )
        for name in FULL if args.full else ():
            config, process = FAMILIES[name]
            for suffix in (".safetensors", ".pt"):
                path = Path(folder) / f"whole{suffix}"
                state = whole_file(path, config, "module.")
                size = path.stat().st_size
                begun = time.perf_counter()
                checkpoint = load_checkpoint(DeviceContext(), path)
                took = time.perf_counter() - begun
                loaded = checkpoint.model.network.state_dict()
                equal = loaded.keys() == state.keys() and all(torch.equal(loaded[k], v.float()) for k, v in state.items())
                settings = same(checkpoint.detection, (config, process))
                wrong += not equal or bool(settings)
                verdict = "equal value for value" if equal else "OTHER VALUES"
                print(
                    f"{name}, whole, {suffix}: {size / 1e9:.2f} GB, loaded in {took:.1f} s, {verdict}, settings {settings or 'true'}",
                    flush=True,
                )
                path.unlink()
                del checkpoint, loaded, state
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
