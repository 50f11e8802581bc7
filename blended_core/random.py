"""Randomness: every draw has a name, so it depends on nothing but the name.

A draw is made on the CPU by a generator whose state comes from (seed, what the draw is for, step, image index). It does
not depend on the batch, on the device, or on the order of the draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .augment import ViewParameters, draw_views
from .errors import BlendedError

MAX_SEED = 2**64 - 1


class Source(Protocol):
    """What the loop needs of randomness; tests replay recorded draws through it."""

    def noise(self, purpose: str, step: int, images: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Standard normal [len(images), *shape]."""
        ...

    def labels(self, step: int, images: Sequence[int], classes: int) -> Tensor:
        """Class indices [len(images)], int64."""
        ...

    def views(self, step: int, images: Sequence[int], count: int, size: int, symmetric: bool) -> ViewParameters:
        """Parameters of ``count`` warped views of every image."""
        ...


@dataclass(frozen=True)
class SeededRandom:
    """SeededRandom from a seed (0 … 2⁶⁴−1)."""

    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise BlendedError(f"the seed is {self.seed}; give a whole number from 0 to {MAX_SEED}.")

    def generator(self, purpose: str, step: int, image: int) -> torch.Generator:
        """The generator of one named draw."""
        name = f"{self.seed}/{purpose}/{step}/{image}".encode()
        state = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
        return torch.Generator().manual_seed(state & (2**63 - 1))

    def noise(self, purpose: str, step: int, images: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Standard normal [len(images), *shape] float32."""
        return torch.stack([torch.randn(shape, generator=self.generator(purpose, step, i)) for i in images])

    def labels(self, step: int, images: Sequence[int], classes: int) -> Tensor:
        """Uniform class indices [len(images)]."""
        rows = [torch.randint(0, classes, (1,), generator=self.generator("class", step, i)) for i in images]
        return torch.cat(rows)

    def views(self, step: int, images: Sequence[int], count: int, size: int, symmetric: bool) -> ViewParameters:
        """Views of every image, each from a generator of its own."""
        return draw_views([self.generator("views", step, i) for i in images], count, size, symmetric)
