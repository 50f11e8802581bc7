"""Named random streams: every random number depends on nothing but the name of its stream.

A stream is a generator on the CPU whose state comes from (seed, purpose, level, image index) and, where an edit needs them, a window and a visit.
So the numbers depend neither on the batch size, nor on the device, nor on the order in which they are drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .augment import ViewParameters, draw_views
from .errors import BlendedError
from .options import MAX_SEED as MAX_SEED


class RandomSource(Protocol):
    """The random numbers that sampling needs; tests replay recorded ones through it."""

    def noise(self, purpose: str, level: int, images: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Standard normal [len(images), *shape]."""
        ...

    def labels(self, level: int, images: Sequence[int], classes: int) -> Tensor:
        """Class indices [len(images)], int64."""
        ...

    def views(self, level: int, images: Sequence[int], count: int, size: int, symmetric: bool) -> ViewParameters:
        """Parameters of ``count`` warped views of every image."""
        ...


@dataclass(frozen=True)
class SeededRandom:
    """Random numbers from a seed (0 … 2⁶⁴−1).

    ``window`` distinguishes parts of one picture that are edited separately, ``visit`` repeated passes over one level. None, the default, is not a
    part of the name.
    """

    seed: int
    window: int | None = None
    visit: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise BlendedError(f"seed is {self.seed}; give a whole number from 0 to {MAX_SEED}.", option="seed")

    def at(self, window: int | None = None, visit: int | None = None) -> SeededRandom:
        """The streams of a window or a visit."""
        return replace(self, window=window, visit=visit)

    def generator(self, purpose: str, level: int, image: int) -> torch.Generator:
        """The generator of one stream."""
        name = f"{self.seed}/{purpose}/{level}/{image}"
        name += "" if self.window is None else f"/window={self.window}"
        name += "" if self.visit is None else f"/visit={self.visit}"
        state = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        return torch.Generator().manual_seed(state & (2**63 - 1))

    def noise(self, purpose: str, level: int, images: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Standard normal [len(images), *shape] float32."""
        return torch.stack([torch.randn(shape, generator=self.generator(purpose, level, i)) for i in images])

    def labels(self, level: int, images: Sequence[int], classes: int) -> Tensor:
        """Uniform class indices [len(images)]."""
        return torch.cat([torch.randint(0, classes, (1,), generator=self.generator("class", level, i)) for i in images])

    def views(self, level: int, images: Sequence[int], count: int, size: int, symmetric: bool) -> ViewParameters:
        """Views of every image, each from a generator of its own."""
        return draw_views([self.generator("views", level, i) for i in images], count, size, symmetric)
