"""The judge: what the masked part of a picture of the embedded world shows. It measures edits and never guides one.

A convolutional network, trained apart from CLIP by :mod:`blended_core.training.judge`. It sees the region with its surroundings and
the mask beside them, and answers one of the world's objects or none. Half an object, two mixed, a scrambled one and a blob of
the right colours are none.
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
from ..toy.models import JUDGE
from ..toy.world import OBJECTS, SIDE

NONE = "none"
ANSWERS = (*OBJECTS, NONE)
WIDTHS = (32, 64, 96, 128)
ACCEPTED = 0.5
"""The probability from which on an answer counts."""


class _Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class JudgeNetwork(nn.Module):
    """Pictures in −1..1 beside their masks [B, 4, 64, 64] → logits [B, 17], in the order of ANSWERS."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, WIDTHS[0], 5, 2, 2, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
        self.blocks = nn.Sequential(*(_Block(a, b, 2) for a, b in itertools.pairwise(WIDTHS)), _Block(WIDTHS[-1], WIDTHS[-1], 1))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(WIDTHS[-1] * 16, len(ANSWERS)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)))
        return logits


@dataclass(frozen=True)
class Verdict:
    """What the judge sees: its first ``answer``, and the probability of each."""

    answer: str
    probabilities: dict[str, float]

    def accepts(self, name: str) -> bool:
        """Whether it shows that object for sure."""
        return self.answer == name and self.probabilities[name] >= ACCEPTED


class Judge:
    """The trained network."""

    def __init__(self, file: Path = JUDGE) -> None:
        self.network = JudgeNetwork()
        self.network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(str(file)).items()})
        self.network.eval().requires_grad_(False)

    def __call__(self, pictures: Tensor, masks: Tensor) -> list[Verdict]:
        """Judges regions.

        Args:
            pictures: [B, 3, S, S] in −1..1, squares around the masks.
            masks: [B or 1, 1, S, S], 1 where the object should be.

        Raises:
            BlendedError: for other shapes.
        """
        count, side = len(pictures), pictures.shape[-1]
        if pictures.shape[1:] != (3, side, side) or masks.shape[1:] != (1, side, side) or len(masks) not in (1, count):
            raise BlendedError(
                f"the judge takes pictures [B, 3, S, S] and masks [B or 1, 1, S, S], not {tuple(pictures.shape)} and {tuple(masks.shape)}."
            )
        seen = torch.cat([pictures.float().cpu(), masks.float().cpu().expand(len(pictures), -1, -1, -1)], 1)
        if seen.shape[-1] != SIDE:
            seen = F.interpolate(seen, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        with torch.inference_mode():
            rows = self.network(seen).softmax(1).tolist()
        return [Verdict(ANSWERS[max(range(len(row)), key=row.__getitem__)], dict(zip(ANSWERS, row, strict=True))) for row in rows]
