"""The judge of world 2: what the masked part of a picture shows, and whether the ground in it is intact. It measures edits and never guides one.

A convolutional network, trained apart from CLIP by :mod:`blended_core.training.judge2`. It sees the region with its surroundings and
the mask beside them. Half an object, two mixed, a scrambled one and a blob of the right colors are none. The ground is not intact
where the mask shows: a tone of its own, a blur, patches, another ground.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import BlendedError
from ..toy.world2 import SIDE, WORDS
from .judge import ACCEPTED, WIDTHS, JudgeNetwork
from .world2_cases import NONE

ANSWERS = (*WORDS, NONE)
WINDOW, ENOUGH = 9, 0.2
"""Side of the window that :func:`contrasts` compares in, and the share of it that must lie on either side of the edge."""


class Judge2Network(JudgeNetwork):
    """Pictures in −1..1 beside their masks [B, 4, 64, 64] → logits [B, 18]: those of ANSWERS, and that the ground is intact."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(WIDTHS[-1] * 16, len(ANSWERS)))
        self.edge = nn.Sequential(nn.Conv2d(7, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU())
        self.intact = nn.Sequential(nn.Linear(12 + 2 * 32 + WIDTHS[-1], 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        last = self.blocks(self.stem(x))
        across = contrasts(x)
        near = across[:, 6:]
        share = near.sum((2, 3)).clamp(min=1)
        means = (across[:, :6] * near).sum((2, 3)) / share
        sizes = (across[:, :6].abs() * near).sum((2, 3)) / share
        seen = self.edge(across)
        pooled = torch.cat([means, sizes, seen.mean((2, 3)), seen.amax((2, 3)), last.mean((2, 3))], 1)
        return torch.cat([self.head(last), self.intact(pooled)], 1)


def contrasts(x: Tensor) -> Tensor:
    """What differs across the edge of the mask: pictures beside masks [B, 4, H, W] → [B, 7, H, W].

    At each pixel the mean color inside the mask is compared with that outside it, in a window of 9 pixels (three channels), and so is
    the strength of fine detail (three channels, in logarithms). The last channel is 1 where the window holds enough of both.
    """
    picture, inside = x[:, :3], x[:, 3:]
    detail = (picture - F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, 1)).abs()

    def window(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, WINDOW, 1, WINDOW // 2, count_include_pad=False)

    both = torch.cat([picture, detail], 1)
    covered, free = window(inside), window(1 - inside)
    within, beyond = window(both * inside) / covered.clamp(min=1e-3), window(both * (1 - inside)) / free.clamp(min=1e-3)
    near = ((covered > ENOUGH) & (free > ENOUGH)).float()
    tone = 4 * (within[:, :3] - beyond[:, :3])
    fine = 0.5 * (torch.log(within[:, 3:] + 0.01) - torch.log(beyond[:, 3:] + 0.01))
    return torch.cat([tone * near, fine * near, near], 1)


@dataclass(frozen=True)
class Verdict2:
    """What the judge sees: its first ``answer``, the probability of each, and that of an intact ground."""

    answer: str
    probabilities: dict[str, float]
    intact: float

    def accepts(self, name: str) -> bool:
        """Whether it shows that object for sure."""
        return self.answer == name and self.probabilities[name] >= ACCEPTED


class Judge2:
    """The trained network."""

    def __init__(self, file: Path) -> None:
        self.network = Judge2Network()
        self.network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(str(file)).items()})
        self.network.eval().requires_grad_(False)

    def __call__(self, pictures: Tensor, masks: Tensor) -> list[Verdict2]:
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
        if side != SIDE:
            seen = F.interpolate(seen, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        with torch.inference_mode():
            logits = self.network(seen)
            rows, intact = logits[:, : len(ANSWERS)].softmax(1).tolist(), logits[:, len(ANSWERS)].sigmoid().tolist()
        return [
            Verdict2(ANSWERS[max(range(len(row)), key=row.__getitem__)], dict(zip(ANSWERS, row, strict=True)), whole)
            for row, whole in zip(rows, intact, strict=True)
        ]
