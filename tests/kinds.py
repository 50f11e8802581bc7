"""Small ADM networks with different settings, trained for some minutes each and saved without metadata.

    python -m tests.kinds [--steps 400] [--keep DIR]

trains them (or reuses those of an earlier run), runs the calibration probe, and prints its decisions, margins and times. Exit code 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from blended_core.adm.load import load_checkpoint
from blended_core.adm.probe import attention_widths
from blended_core.adm.unet import UNet, UNetConfig
from blended_core.device import DeviceContext
from blended_core.diffusion import DiffusionConfig, q_sample
from blended_core.errors import BlendedWarning
from blended_core.toy.models import DDPM as EMBEDDED
from blended_core.toy.world import random_scene, render

SIDE = 16
BASE = UNetConfig(
    image_size=SIDE, model_channels=64, channel_mult=(1, 1), num_res_blocks=1, attention_downsampling=(1, 2), num_heads=1,
    use_scale_shift_norm=True,
)  # fmt: skip
LINEAR = DiffusionConfig()
KINDS: dict[str, tuple[UNetConfig, DiffusionConfig]] = {
    "1 head": (BASE, LINEAR),
    "4 heads": (replace(BASE, num_heads=4), LINEAR),
    "64-channel heads": (replace(BASE, channel_mult=(1, 2), num_head_channels=64), LINEAR),
    "new qkv order, 4 heads": (replace(BASE, num_heads=4, use_new_attention_order=True), LINEAR),
    "cosine": (replace(BASE, num_heads=4), DiffusionConfig("cosine")),
    "linear 4000, rescaled": (replace(BASE, num_heads=4), DiffusionConfig("linear", 4000, True)),
    "linear 4000, not rescaled": (replace(BASE, num_heads=4), DiffusionConfig("linear", 4000, False)),
    "v": (replace(BASE, num_heads=4), DiffusionConfig(objective="v")),
    "x0": (replace(BASE, num_heads=4), DiffusionConfig(objective="x0")),
}


def scenes(rng: np.random.Generator, count: int) -> torch.Tensor:
    """[count, 3, SIDE, SIDE] in −1..1."""
    pictures = np.stack([render(random_scene(rng, objects=1, centered=1.0, size=(0.6, 0.7)), SIDE, SIDE) for _ in range(count)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(config: UNetConfig, process: DiffusionConfig, steps: int, seed: int = 0) -> UNet:
    """A network after a short training."""
    torch.manual_seed(seed)
    unet = UNet(config)
    # The zero-initialized output of attention learns slowly; other initial values make heads matter within seconds.
    for name, parameter in unet.named_parameters():
        if name.endswith("proj_out.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3, weight_decay=0.0)
    schedule = process.respaced(process.steps)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20, 0.1 + 2 * (1 - step / steps))
        x0, index = scenes(rng, 16), torch.from_numpy(rng.integers(0, process.steps, 16))
        noise = torch.randn(x0.shape)
        x_t = q_sample(x0, index, noise, schedule)
        timesteps = torch.tensor([float(schedule.model_timestep(int(i))) for i in index])
        output = unet(x_t, timesteps)[:, :3]
        signal = torch.as_tensor(schedule.sqrt_alphas_cumprod[index.numpy()], dtype=torch.float32)[:, None, None, None]
        target = {"eps": noise, "x0": x0, "v": signal * noise - (1 - signal**2).sqrt() * x0}[process.objective]
        loss = F.mse_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return unet.eval()


def same_curve(a: DiffusionConfig, b: DiffusionConfig) -> bool:
    """Whether two processes have the same noise levels and timesteps, as 4000 rescaled steps and 1000 steps do."""
    first, second = a.respaced(a.steps), b.respaced(b.steps)
    for share in (0.1, 0.35, 0.6, 0.85):
        i, j = (int(share * s.steps) for s in (first, second))
        if abs(first.alphas_cumprod[i] - second.alphas_cumprod[j]) > 0.01 or abs(first.model_timestep(i) - second.model_timestep(j)) > 2:
            return False
    return True


def same_wiring(a: UNetConfig, b: UNetConfig) -> bool:
    """Whether two configurations use the weights in the same way."""
    widths = attention_widths(a)
    heads = [a.heads(w) for w in widths]
    order = a.use_new_attention_order == b.use_new_attention_order or max(heads) == 1
    return heads == [b.heads(w) for w in widths] and order


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--keep", type=Path, help="folder of the trained networks")
    parser.add_argument("--only", nargs="*", default=list(KINDS))
    args = parser.parse_args()
    warnings.simplefilter("ignore", BlendedWarning)
    wrong = 0
    print(f"{'kind':<28}{'decided':<58}{'margins':<44}{'passes':>7}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bare.safetensors"
        for name in [*args.only, "the embedded model"]:
            begun = time.perf_counter()
            if name in KINDS:
                config, process = KINDS[name]
                kept = args.keep / f"{name}.safetensors" if args.keep else None
                if kept and kept.is_file():
                    shutil.copy(kept, path)
                else:
                    save_file(train(config, process, args.steps).state_dict(), path)
                    if kept:
                        kept.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy(path, kept)
            else:
                truth = load_checkpoint(DeviceContext()).detection
                config, process = truth.unet, truth.diffusion
                save_file(load_file(EMBEDDED), path)
            trained = time.perf_counter() - begun
            found = load_checkpoint(DeviceContext(), path, {"image_size": config.image_size}).detection
            assert found.probe is not None
            right = (
                same_wiring(found.unet, config) and same_curve(found.diffusion, process) and found.diffusion.objective == process.objective
            )
            wrong += not right
            heads = (
                f"{found.unet.num_heads} heads" if found.unet.num_head_channels is None else f"{found.unet.num_head_channels}-channel heads"
            )
            decided = (
                f"{heads}, {'new' if found.unet.use_new_attention_order else 'old'} order, {found.diffusion.schedule} {found.diffusion.steps}"
                f"{'' if found.diffusion.rescale_timesteps else ' unscaled'}, {found.diffusion.objective}"
            )
            margins = ", ".join(f"{group} {margin:.3g}" for group, margin in found.probe.margins.items())
            print(
                f"{name:<28}{decided:<58}{margins:<44}{found.probe.forwards:>7}{found.probe.seconds:>9.2f}  "
                f"{'right' if right else 'WRONG'}  (trained {trained:.0f} s)",
                flush=True,
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
