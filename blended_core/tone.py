"""Tone matching: a correction of x̂0 inside the mask that makes it continue the source image across the edge of the mask.

Outside the mask the source is known, so the error of the network's own x̂0 is known there. The membrane (Pérez, Gangnet, Blake, "Poisson Image Editing",
2003) carries it into the mask: the f with ∇²f = 0 inside that equals the error at the edge. docs/method.md has the equations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask import Box
from .schedule import Schedule

LIMIT = 16 * 2 / 255
"""Largest correction in −1..1, 16 of 255: more is a part of an object that the network changed, not a tone."""
LATE = 0.25
"""ᾱ from which on a level counts as late."""
CYCLES = 4
"""Multigrid cycles; each leaves about a quarter of the error of the solution."""
DAMPING = (0.56, 1.39)
"""Of two Jacobi sweeps, the reciprocal roots of the Chebyshev polynomial that damps eigenvalues of 0.5 to 2 most."""
COARSE_WEIGHT = 0.45
"""Of the links between coarse pixels: a correction that is constant over 2×2 pixels has about twice the energy of a smooth one."""
COARSEST = 64
"""Pixels of the grid that is solved directly."""


def acts_at(choice: str, index: int, schedule: Schedule) -> bool:
    """Whether the option ``tone_match`` acts on the step at ``index``: 'end' on the last one, 'late' on the last levels."""
    return choice != "off" and (index == 0 or (choice == "late" and float(schedule.alphas_cumprod[index]) >= LATE))


def tone_shift(x0: Tensor, source: Tensor, inside: Tensor) -> Tensor:
    """What to add to x̂0, so that inside the mask it continues the source.

    Args:
        x0: x̂0 of the network, nothing of it pasted or guided, [B, C, H, W] in −1..1.
        source: [B or 1, C, H, W] in −1..1.
        inside: bool [B or 1, 1, H, W], the pixels that are not known.

    Returns:
        [B, C, H, W], at most :data:`LIMIT`; 0 outside, and everywhere for an image of which nothing is known.
    """
    error = (source - x0).nan_to_num(0.0, 0.0, 0.0).clamp(-LIMIT, LIMIT)
    return membrane(error, inside).clamp(-LIMIT, LIMIT)


def membrane(values: Tensor, inside: Tensor) -> Tensor:
    """The solution of ∇²f = 0 inside with the given values around it.

    The equation is that of the grid: a pixel inside is the mean of its neighbors, up to four of them, as the border of the image is no edge of the mask.
    Multigrid solves it: damped Jacobi sweeps, and coarser grids that link blocks of 2×2 pixels.

    Args:
        values: [B, C, H, W]; used where not inside. inside: bool [B or 1, 1, H, W].

    Returns:
        [B, C, H, W]; 0 outside, and everywhere for an image that is inside as a whole.
    """
    inside = inside & ~inside.flatten(1).all(1)[:, None, None, None]
    box = _box_around(inside)
    if box is None:
        return torch.zeros_like(values)
    height, width = values.shape[-2:]
    inside, values = inside[box.slices], values[box.slices]
    free, known = inside.to(values), (~inside).to(values)
    grid = _Grid.of(free[..., 1:] * free[..., :-1], free[..., 1:, :] * free[..., :-1, :], _neighbors(known) * free)
    load = _neighbors(values * known) * free
    # Around its mean, so that a constant is exact.
    mean = load.sum((2, 3), keepdim=True) / grid.links.sum((2, 3), keepdim=True).clamp(min=1.0)
    load = load - mean * grid.links
    solution = grid.cycle(load)
    for _ in range(CYCLES - 1):
        solution = grid.cycle(load, solution)
    return F.pad((solution + mean) * free, (box.left, width - box.right, box.top, height - box.bottom))


def _box_around(inside: Tensor) -> Box | None:
    """The box of everything inside and its neighbors; None if nothing is inside."""
    any_inside = inside.flatten(0, 1).any(0)
    rows, columns = any_inside.any(1).nonzero().flatten(), any_inside.any(0).nonzero().flatten()
    if not len(rows):
        return None
    box = Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return box.grown(1, int(any_inside.shape[1]), int(any_inside.shape[0]))


def _neighbors(values: Tensor) -> Tensor:
    """The sum over the four neighbors of each pixel."""
    padded = F.pad(values, (1, 1, 1, 1))
    return padded[..., 1:-1, 2:] + padded[..., 1:-1, :-2] + padded[..., 2:, 1:-1] + padded[..., :-2, 1:-1]


def _blocks(values: Tensor) -> Tensor:
    """Sums over blocks of 2×2 pixels."""
    padded = F.pad(values, (0, values.shape[-1] % 2, 0, values.shape[-2] % 2))
    return F.avg_pool2d(padded, 2, divisor_override=1)


class _Grid:
    """The equation Σ weight·(f − neighbor) + links·f = load on one grid, and the coarser ones.

    Attributes:
        right, below: weights of the links to the next pixel [M, 1, H, W − 1] and [M, 1, H − 1, W]; links: to known values [M, 1, H, W].
    """

    def __init__(self, right: Tensor, below: Tensor, links: Tensor) -> None:
        self.right, self.below, self.links = right, below, links
        self.diagonal = links.clone()
        for total, weights in (
            (self.diagonal[..., 1:], right), (self.diagonal[..., :-1], right), (self.diagonal[..., 1:, :], below), (self.diagonal[..., :-1, :], below),
        ):  # fmt: skip
            total += weights
        self.free = self.diagonal > 0
        inverse = torch.where(self.free, 1 / self.diagonal, 0.0)
        self.damped = [inverse * factor for factor in DAMPING]
        self.coarser: _Grid | None = None
        self.inverse: Tensor | None = None

    @classmethod
    def of(cls, right: Tensor, below: Tensor, links: Tensor) -> _Grid:
        """A grid with all that are coarser."""
        grid = cls(right, below, links)
        height, width = links.shape[-2:]
        if height * width <= COARSEST:
            grid.inverse = grid._inverted()
            return grid
        across, down = right[..., 1::2], below[..., 1::2, :]  # the links that leave a block
        across = F.pad(across, (0, 0, 0, height % 2))
        down = F.pad(down, (0, width % 2))
        across = COARSE_WEIGHT * (across[..., ::2, :] + across[..., 1::2, :])
        down = COARSE_WEIGHT * (down[..., ::2] + down[..., 1::2])
        grid.coarser = cls.of(across, down, _blocks(links))
        return grid

    def _inverted(self) -> Tensor:
        """The inverse of the matrix of the equation [M, HW, HW]."""
        height, width = self.links.shape[-2:]
        count = height * width
        units = torch.eye(count, device=self.links.device).view(1, count, height, width).expand(len(self.links), -1, -1, -1)
        matrix = -self.residual(units, torch.zeros_like(units)).flatten(2)
        matrix = matrix + torch.diag_embed((~self.free).flatten(1).to(matrix))
        # On the CPU: not every accelerator has double precision.
        inverse: Tensor = torch.linalg.inv(matrix.double().cpu())
        return inverse.to(self.links)

    def residual(self, f: Tensor, load: Tensor) -> Tensor:
        """The load less what f gives."""
        left = torch.addcmul(load, self.diagonal, f, value=-1)
        left[..., 1:].addcmul_(self.right, f[..., :-1])
        left[..., :-1].addcmul_(self.right, f[..., 1:])
        left[..., 1:, :].addcmul_(self.below, f[..., :-1, :])
        left[..., :-1, :].addcmul_(self.below, f[..., 1:, :])
        return left

    def cycle(self, load: Tensor, f: Tensor | None = None) -> Tensor:
        """A better solution: sweeps, the correction of the coarser grid, and the same sweeps backward."""
        if self.inverse is not None:
            return torch.matmul(load.flatten(2), self.inverse).view(load.shape)
        assert self.coarser is not None
        first, second = self.damped
        f = load * first if f is None else torch.addcmul(f, first, self.residual(f, load))
        f = torch.addcmul(f, second, self.residual(f, load))
        correction = self.coarser.cycle(_blocks(self.residual(f, load)))
        correction = F.interpolate(correction, scale_factor=2.0, mode="nearest")[..., : f.shape[-2], : f.shape[-1]]
        f = torch.addcmul(f, self.free.to(f), correction)
        f = torch.addcmul(f, second, self.residual(f, load))
        return torch.addcmul(f, first, self.residual(f, load))
