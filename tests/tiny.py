"""Small networks for tests: real in kind, tiny in size, the same weights every time, nothing to download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blended_core.adm.unet import UNet, UNetConfig
from blended_core.augment import ViewParameters
from blended_core.clip.model import ClipModel
from blended_core.denoiser import DiffusionModel
from blended_core.diffusion import DiffusionConfig, predict_eps
from blended_core.random import SeededRandom
from blended_core.sample import Models

SIZE = 16
CONFIG = UNetConfig(
    image_size=SIZE, model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_downsampling=(2,), num_head_channels=16,
    out_channels=6,
)  # fmt: skip
CLIP_SIZE = 8
WIDTH = 12


def tiny_unet(**changes: Any) -> UNet:
    """A random ADM UNet whose zero-initialised layers are small and not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = UNet(replace(CONFIG, **changes))
        for parameter in unet.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return unet.eval().requires_grad_(False)


def tiny_model(process: DiffusionConfig | None = None, **changes: Any) -> DiffusionModel:
    """The random UNet with its process."""
    unet = tiny_unet(**changes)
    return DiffusionModel.from_unet(
        unet, process or DiffusionConfig(variance="learned_range" if unet.config.learn_sigma else "fixed_small")
    )


class Network(nn.Module):
    """A network made of a function of (x_t, timesteps)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.calls: list[int] = []

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        self.calls.append(len(x))
        return self.function(x, timesteps)


def gaussian_model(spread: float = 0.5) -> DiffusionModel:
    """The exact denoiser of a world whose pixels are independent and normal: a prior that can be steered anywhere."""
    process = DiffusionConfig(variance="fixed_small")
    alphas = torch.from_numpy(process.respaced(1000).alphas_cumprod).float()

    def eps(x: Tensor, timesteps: Tensor) -> Tensor:
        share = alphas[timesteps.round().long()].view(-1, 1, 1, 1)
        return (1 - share).sqrt() * x / (share * spread**2 + 1 - share)

    return DiffusionModel(Network(eps), process, SIZE)


def oracle_model(truth: Tensor, objective: str) -> DiffusionModel:
    """A model that knows the picture [1, 3, S, S] and says it as ``objective`` wants it."""
    process = DiffusionConfig(objective=objective, variance="fixed_small")
    whole = process.respaced(1000)

    def output(x: Tensor, timesteps: Tensor) -> Tensor:
        index = timesteps.round().long()
        eps = predict_eps(x, truth.expand_as(x), index, whole)
        if objective == "eps":
            return eps
        if objective == "x0":
            return truth.expand_as(x)
        signal = torch.from_numpy(np.sqrt(whole.alphas_cumprod[index.numpy()])).to(x).view(-1, 1, 1, 1)
        return signal * eps - (1 - signal**2).sqrt() * truth

    return DiffusionModel(Network(output), process, truth.shape[-1])


class TinyClip(nn.Module):
    """An image tower of two layers and a text tower that averages letters."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=2, padding=1)
        self.head = nn.Linear(16 * (CLIP_SIZE // 2) ** 2, WIDTH)
        self.letters = nn.Embedding(128, WIDTH)

    def encode_image(self, pictures: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.patches(pictures)).flatten(1))
        return out

    def encode_text(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.letters(tokens).mean(1)
        return out


class Letters:
    """A tokenizer: one token a letter, 0 for the start, the end and what follows."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 128 for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = [[0, *self.encode(t)[:8], *[0] * 10][:10] for t in texts]
        return torch.tensor(rows)


def tiny_clip() -> ClipModel:
    """The stand-in for CLIP."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = TinyClip().eval().requires_grad_(False)
    return ClipModel(network, Letters(), "tiny", (0.5, 0.45, 0.4), (0.27, 0.26, 0.28), CLIP_SIZE, 10)


def tiny_models(ddpm: DiffusionModel | None = None) -> Models:
    """Everything that an edit needs."""
    return Models(ddpm or tiny_model(), tiny_clip(), rough_perceptual)


def rough_perceptual(a: Tensor, b: Tensor) -> Tensor:
    """A differentiable distance for each image: of horizontal differences."""
    return ((a - b)[..., 1:] - (a - b)[..., :-1]).square().mean(dim=(1, 2, 3))


class Recorded:
    """Random numbers from a seed, with a record of the streams that were asked for."""

    def __init__(self, seed: int = 0) -> None:
        self.random = SeededRandom(seed)
        self.asked: list[tuple[str, int, tuple[int, ...]]] = []

    def noise(self, purpose: str, level: int, images: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        self.asked.append((purpose, level, tuple(images)))
        return self.random.noise(purpose, level, images, shape)

    def labels(self, level: int, images: Sequence[int], classes: int) -> Tensor:
        self.asked.append(("class", level, tuple(images)))
        return self.random.labels(level, images, classes)

    def views(self, level: int, images: Sequence[int], count: int, size: int, symmetric: bool) -> ViewParameters:
        self.asked.append(("views", level, tuple(images)))
        return self.random.views(level, images, count, size, symmetric)


def random_picture(height: int, width: int, seed: int = 0) -> Tensor:
    """[1, 3, height, width] of 8-bit values k/255."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return torch.from_numpy(values).permute(2, 0, 1)[None].float() / 255


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of every bit: −0 is not 0, and a NaN equals itself."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))
