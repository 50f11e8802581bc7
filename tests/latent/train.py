"""Trains the latent test bed on the embedded world with one command, on one core, in about an hour. ComfyUI's environment runs it:

    OMP_NUM_THREADS=1 PYTHONPATH=.:$COMFYUI $COMFYUI/.venv/bin/python -m tests.latent.train --out runs/latent

First the autoencoder, then the UNet on latents that are computed once. The same command resumes. It writes ``autoencoder.safetensors`` and
``unet.safetensors`` in half precision; copied to ``tests/latent/data``, they are the test bed. Minutes are processor time.

The decoder is trained with noise on the latents, so that it forgives the errors of the UNet, and on latents that were reduced to half,
against reduced pictures: latents that shrink like pictures have less detail that only the decoder understands, and a diffusion model
learns them faster (Kouzelis et al., "EQ-VAE", 2025). The UNet predicts v, and two kinds of auxiliary heads train its inner layers, as in
:mod:`blended_core.training.ddpm`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blended_core.io.atomic import replacing
from blended_core.training.ddpm import CLASS_WEIGHT, CLASSES, COARSE_WEIGHT, Muon, batch_of_scenes, head_input

sys.argv, ARGUMENTS = [sys.argv[0], "--cpu"], sys.argv[1:]  # ComfyUI reads the command line when it is imported
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
from .networks import CHANNELS, CONTEXT, Autoencoder, initialize, new_unet  # noqa: E402

SCENES = 32768
"""Latents that the UNet is trained on."""
LATENT_NOISE = 0.2
"""Largest standard deviation of the noise on latents of variance 1 when the decoder is trained."""


def alphas_cumprod() -> Tensor:
    """ᾱ of Stable Diffusion's schedule, [1000]."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).float()


class Training:
    """Networks in training, with the state from which they resume: Muon for the matrices, AdamW for the rest, averaged weights."""

    def __init__(self, path: Path, networks: nn.ModuleDict, trained: str, minutes: float) -> None:
        self.path, self.networks, self.trained, self.minutes = path, networks, networks[trained], minutes
        matrices = [p for m in self.trained.modules() if isinstance(m, nn.Conv2d | nn.Linear) for p in m.parameters() if p.ndim > 1]
        chosen = {id(p) for p in matrices}
        self.others = [p for p in networks.parameters() if id(p) not in chosen]
        self.rates = (0.02, 1e-3)
        self.optimizers = Muon(matrices, self.rates[0]), torch.optim.AdamW(self.others, self.rates[1], betas=(0.9, 0.98), weight_decay=0.0)
        self.average = {k: v.detach().clone() for k, v in self.trained.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        if path.exists():
            state = torch.load(path, weights_only=True)
            networks.load_state_dict(state["networks"])
            self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def save(self) -> None:
        """Writes the state."""
        state = {"networks": self.networks.state_dict(), "average": self.average, "step": self.step, "seconds": self.seconds}
        with replacing(self.path) as part:
            torch.save({**state, "optimizers": [o.state_dict() for o in self.optimizers]}, part)

    def run(self, losses: Callable[[np.random.Generator], dict[str, Tensor]], every: int = 200) -> None:
        """Trains until the minutes are used. ``losses`` draws a batch; the sum of what it returns is minimized."""
        shown: dict[str, float] = {}
        last = time.process_time()
        while (progress := self.seconds / (60 * self.minutes)) < 1:
            factor = min(1.0, (self.step + 1) / 100, max(0.01, (1 - progress) / 0.6))
            for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
            torch.manual_seed(self.step)
            parts = losses(np.random.default_rng((7, self.step)))
            torch.stack(list(parts.values())).sum().backward()
            nn.utils.clip_grad_norm_(self.others, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            decay = min(0.998, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for k, v in self.trained.state_dict().items():
                    self.average[k].lerp_(v, 1 - decay)
            for k, v in parts.items():
                shown[k] = v.item() if k not in shown else 0.98 * shown[k] + 0.02 * v.item()
            now = time.process_time()
            self.seconds, last = self.seconds + now - last, now
            if self.step % every == 0:
                print(f"step {self.step} {self.seconds / 60:.1f} min", *(f"{k} {v:.4f}" for k, v in shown.items()), flush=True)
                self.save()
        self.save()


def save_half(weights: dict[str, Tensor], path: Path, **metadata: Any) -> None:
    """Writes weights in half precision. The metadata are JSON."""
    with replacing(path) as part:
        save_file({k: v.half().contiguous() for k, v in weights.items()}, str(part), {k: json.dumps(v) for k, v in metadata.items()})


def gradients(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighboring pixels, down and across."""
    return pictures.diff(dim=-2), pictures.diff(dim=-1)


def train_autoencoder(out: Path, minutes: float, batch: int) -> Autoencoder:
    """Trains the autoencoder, or reads it if that is done."""
    network = Autoencoder().to(memory_format=torch.channels_last)
    initialize(network)
    training = Training(out / "autoencoder.pt", nn.ModuleDict({"autoencoder": network}), "autoencoder", minutes)

    def difference(made: Tensor, pictures: Tensor) -> Tensor:
        edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(made), gradients(pictures), strict=True))
        return F.mse_loss(made, pictures) + 0.5 * F.l1_loss(made, pictures) + 0.5 * edges

    def losses(rng: np.random.Generator) -> dict[str, Tensor]:
        pictures = batch_of_scenes(rng, batch)[0].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latent = network.encoder(pictures).float()
            noisy = latent + LATENT_NOISE * torch.rand(batch, 1, 1, 1) * torch.randn_like(latent)
            made = network.decoder(noisy).float()
            reduced = network.decoder(F.avg_pool2d(latent, 2)).float()
        spread = (latent.var((0, 2, 3)) - 1).square().mean() + latent.mean((0, 2, 3)).square().mean()
        return {
            "pictures": difference(made, pictures),
            "reduced": 0.25 * difference(reduced, F.avg_pool2d(pictures, 2)),
            "spread": 0.01 * spread,
        }

    training.run(losses)
    network.load_state_dict(training.average)
    save_half(training.average, out / "autoencoder.safetensors", trained_steps=training.step)
    return network.requires_grad_(False)


def latents_of_scenes(out: Path, autoencoder: Autoencoder) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(latents of variance 1 [N, 4, 16, 16] in half precision, class of each object [N], the latent format's numbers), computed once."""
    path = out / "latents.safetensors"
    if not path.exists():
        rng, latents, labels, colors = np.random.default_rng(1), [], [], []
        for _ in range(SCENES // 64):
            pictures, classes = batch_of_scenes(rng, 64)
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                latents.append(autoencoder.encode(pictures.contiguous(memory_format=torch.channels_last)).contiguous().half())
            labels.append(classes)
            if len(colors) < 16:
                colors.append(F.avg_pool2d(pictures, 4))
        every = torch.cat(latents)
        scale = 1 / every.float().std()
        known = every[: 64 * len(colors)].float().permute(0, 2, 3, 1).reshape(-1, CHANNELS) * scale
        known = torch.cat([known, torch.ones(len(known), 1)], 1)
        fitted = torch.linalg.lstsq(known, torch.cat(colors).permute(0, 2, 3, 1).reshape(-1, 3)).solution
        save_file({"latents": (every * scale).half(), "labels": torch.cat(labels), "scale": scale, "rgb": fitted.contiguous()}, str(path))
    data = load_file(str(path))
    rgb = data["rgb"].tolist()
    return data["latents"], data["labels"], {"scale_factor": float(data["scale"]), "rgb_factors": rgb[:CHANNELS], "rgb_bias": rgb[CHANNELS]}


class Heads(nn.Module):
    """The class of the object from the middle of the UNet, the reduced latent from the first layer of each coarser resolution."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        blocks = {"middle": unet.middle_block[-1], "4": unet.output_blocks[0][0], "8": unet.output_blocks[2][0]}
        for name, block in blocks.items():
            block.register_forward_hook(lambda _module, _given, output, name=name: self.features.update({name: output}))
        unet(torch.zeros(1, CHANNELS, 16, 16), torch.zeros(1), context=torch.zeros(1, 1, CONTEXT))
        width = {name: output.shape[1] for name, output in self.features.items()}
        self.kind = nn.Sequential(head_input(width["middle"]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width["middle"], CLASSES))
        self.reduced = nn.ModuleDict(
            {side: nn.Sequential(head_input(width[side]), nn.Conv2d(width[side], CHANNELS, 1)) for side in ("4", "8")}
        )

    def forward(self, latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy of the class, mean squared error of the reduced latents) for the latest pass of the UNet."""
        errors: Iterable[Tensor] = (
            F.mse_loss(head(self.features[side].float()), F.adaptive_avg_pool2d(latents, int(side))) for side, head in self.reduced.items()
        )
        return F.cross_entropy(self.kind(self.features["middle"].float()), labels), torch.stack(list(errors)).mean()


def train_unet(out: Path, autoencoder: Autoencoder, minutes: float, batch: int) -> None:
    """Trains the UNet on the latents of the autoencoder."""
    latents, labels, numbers = latents_of_scenes(out, autoencoder)
    unet = new_unet()
    initialize(unet)
    heads = Heads(unet)
    training = Training(out / "unet.pt", nn.ModuleDict({"unet": unet, "heads": heads}), "unet", minutes)
    cumulative, context = alphas_cumprod(), torch.zeros(batch, 1, CONTEXT)

    def losses(rng: np.random.Generator) -> dict[str, Tensor]:
        chosen = torch.as_tensor(rng.integers(len(latents), size=batch))
        x0 = latents[chosen].float()
        t = torch.as_tensor(((np.arange(batch) + rng.uniform(size=batch)) / batch * 1000).astype(np.int64))
        a, b = (v[t].sqrt()[:, None, None, None] for v in (cumulative, 1 - cumulative))
        noise = torch.randn_like(x0)
        with torch.autocast("cpu", torch.bfloat16):
            v = unet(a * x0 + b * noise, t.float(), context=context).float()
            kind, reduced = heads(x0, labels[chosen])
        return {"v": F.mse_loss(v, a * noise - b * x0), "class": CLASS_WEIGHT * kind, "reduced": COARSE_WEIGHT * reduced}

    def save() -> None:
        save_half(training.average, out / "unet.safetensors", trained_steps=training.step, **numbers)

    saved = training.save
    training.save = lambda: (saved(), save())[0]  # type: ignore[method-assign]
    training.run(losses)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/latent"))
    parser.add_argument("--autoencoder-minutes", type=float, default=12)
    parser.add_argument("--minutes", type=float, default=50, help="of the UNet (default: %(default)s)")
    args = parser.parse_args(ARGUMENTS)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    autoencoder = train_autoencoder(args.out, args.autoencoder_minutes, batch=16)
    train_unet(args.out, autoencoder, args.minutes, batch=32)


if __name__ == "__main__":
    main()
