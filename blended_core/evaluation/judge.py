"""The judge: a classifier of the masked part of an image of the embedded world. It evaluates edits and takes no part in guidance.

It is a convolutional network, trained independently of CLIP by :mod:`blended_core.training.judge`. Its input is the region with its
surroundings, and the mask. Its output is one of the objects of the world or "none". Half an object, a mixture of two objects, a
scrambled object and a blob in the colors of an object are "none".
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import BlendedError
from ..toy.models import JUDGE, SIDE
from ..toy.world import OBJECTS

NONE = "none"
ANSWERS = (*OBJECTS, NONE)
WIDTHS = (32, 64, 96, 128)
ACCEPTED = 0.5
"""The smallest probability at which the judge accepts an answer."""


class _ResidualBlock(nn.Module):
    """Two convolutions with a projection shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class JudgeNetwork(nn.Module):
    """Images in −1..1 concatenated with their masks [B, 4, 64, 64] → logits [B, 17] in the order of ANSWERS."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, WIDTHS[0], 5, 2, 2, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
        self.blocks = nn.Sequential(
            *(_ResidualBlock(a, b, 2) for a, b in itertools.pairwise(WIDTHS)), _ResidualBlock(WIDTHS[-1], WIDTHS[-1], 1)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(WIDTHS[-1] * 16, len(ANSWERS)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)))
        return logits


@dataclass(frozen=True)
class Verdict:
    """The most probable ``answer``, and the probability of every answer."""

    answer: str
    probabilities: dict[str, float]

    def accepts(self, name: str) -> bool:
        """Whether the answer is this object, with a probability of at least ACCEPTED."""
        return self.answer == name and self.probabilities[name] >= ACCEPTED


class Judge:
    """The judge with trained weights, on the CPU."""

    def __init__(self, file: Path = JUDGE) -> None:
        self.network = JudgeNetwork()
        self.network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(str(file)).items()})
        self.network.eval().requires_grad_(False)

    def __call__(self, pictures: Tensor, masks: Tensor) -> list[Verdict]:
        """Classifies regions.

        Args:
            pictures: [B, 3, S, S] in −1..1, the regions.
            masks: [B or 1, 1, S, S], 1 where the object should be.

        Raises:
            BlendedError: the shapes do not match.
        """
        count, side = len(pictures), pictures.shape[-1]
        if pictures.shape[1:] != (3, side, side) or masks.shape[1:] != (1, side, side) or len(masks) not in (1, count):
            raise BlendedError(
                f"the judge takes images [B, 3, S, S] and masks [B or 1, 1, S, S], not {tuple(pictures.shape)} and {tuple(masks.shape)}."
            )
        inputs = torch.cat([pictures.float().cpu(), masks.float().cpu().expand(len(pictures), -1, -1, -1)], 1)
        if inputs.shape[-1] != SIDE:
            inputs = F.interpolate(inputs, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        with torch.inference_mode():
            rows = self.network(inputs).softmax(1).tolist()
        return [Verdict(ANSWERS[max(range(len(row)), key=row.__getitem__)], dict(zip(ANSWERS, row, strict=True))) for row in rows]
