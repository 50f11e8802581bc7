"""Extending augmentations: warped views of the picture that CLIP sees (Avrahami et al. 2022, §4.3).

An image that minimizes the CLIP distance of one view alone is often an adversarial pattern. The gradient is averaged over random projective copies to
avoid that. Each view is an affine warp (±15°, shift of a tenth, edges repeated), then a perspective warp (corners inward by up to 35 %, black
outside), each with probability 0.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .device import upload

DEGREES = 15.0
TRANSLATE = 0.1
DISTORTION = 0.7
PROBABILITY = 0.7


@dataclass(frozen=True, repr=False)
class ViewParameters:
    """The parameters of R warped views, image fastest and view slowest (row = view · images + image).

    ``affine_gate`` and ``perspective_gate`` [R] bool: whether the warp is applied to the row. ``affine`` and
    ``perspective`` [R, 3, 3] float32: source pixel → destination pixel, pixel centers at whole numbers.
    """

    affine_gate: Tensor
    affine: Tensor
    perspective_gate: Tensor
    perspective: Tensor

    def __len__(self) -> int:
        return len(self.affine_gate)

    def __repr__(self) -> str:
        return f"ViewParameters({len(self)} rows)"

    def rows(self, start: int, stop: int) -> ViewParameters:
        """Consecutive rows."""
        return ViewParameters(
            self.affine_gate[start:stop], self.affine[start:stop], self.perspective_gate[start:stop], self.perspective[start:stop]
        )

    @classmethod
    def interleave(cls, images: Sequence[ViewParameters]) -> ViewParameters:
        """One set from the sets of several images, all of the same length."""

        def weave(name: str) -> Tensor:
            return torch.stack([getattr(p, name) for p in images], dim=1).flatten(0, 1)

        return cls(weave("affine_gate"), weave("affine"), weave("perspective_gate"), weave("perspective"))


def draw_views(generators: Sequence[torch.Generator] | torch.Generator, count: int, size: int, symmetric: bool = True) -> ViewParameters:
    """Parameters of ``count`` warped views of square pictures.

    Args:
        generators: one for each picture.
        count: number of views of each.
        size: side of the pictures in pixels.
        symmetric: shift along both axes; the reference shifts along y alone (docs/method.md, row 14).
    """
    if isinstance(generators, torch.Generator):
        generators = [generators]
    shapes = ((count,), (count,), (count, 2), (count,), (count, 4, 2))
    each = [[torch.rand(shape, generator=generator) for shape in shapes] for generator in generators]
    # All matrices in one call: solving for them takes a millisecond a call, whatever their number.
    return _views(*(torch.stack(drawn, 1).flatten(0, 1) for drawn in zip(*each, strict=True)), size=size, symmetric=symmetric)


def balanced_views(count: int, size: int, seed: int | None = None) -> ViewParameters:
    """Parameters of ``count`` warped views of square pictures that cover the range of warps evenly: a Sobol sequence, the same at every call.

    The sequence begins after its first point, which is the corner of the range, so that with the unwarped view there are count + 1. ``seed``: scrambles
    the sequence, to measure how much a score depends on the views.
    """
    engine = torch.quasirandom.SobolEngine(sum(_NUMBERS), scramble=seed is not None, seed=seed)  # type: ignore[no-untyped-call]
    points = engine.fast_forward(1).draw(count, dtype=torch.float32)  # type: ignore[no-untyped-call]
    affine_gate, turn, push, perspective_gate, pull = points.split(_NUMBERS, dim=1)
    return _views(affine_gate[:, 0], turn[:, 0], push, perspective_gate[:, 0], pull.view(-1, 4, 2), size=size)


_NUMBERS = (1, 1, 2, 1, 8)
"""Numbers in 0..1 that make a view: whether it turns and shifts, angle, shift along x and y, whether it has perspective, its corners."""


def _views(
    affine_gate: Tensor, turn: Tensor, push: Tensor, perspective_gate: Tensor, pull: Tensor, *, size: int, symmetric: bool = True
) -> ViewParameters:
    """Views from numbers in 0..1: [R], [R], [R, 2], [R], [R, 4, 2]."""
    angle = turn * (2 * DEGREES) - DEGREES
    shift = (push * (2 * TRANSLATE) - TRANSLATE) * size
    if not symmetric:
        shift[:, 0] = 0
    inwards = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    ends = corners(size) + pull * (DISTORTION * size / 2) * inwards
    return ViewParameters(
        affine_gate < PROBABILITY, affine_matrices(angle, shift, size), perspective_gate < PROBABILITY, perspective_matrices(ends, size)
    )


def corners(size: int) -> Tensor:
    """(x, y) of the corner pixels of a square picture, clockwise from the top left; [4, 2]."""
    last = size - 1.0
    return torch.tensor([[0.0, 0.0], [last, 0.0], [last, last], [0.0, last]])


def affine_matrices(angle: Tensor, shift: Tensor, size: int) -> Tensor:
    """A rotation about the center by ``angle`` [R] in degrees, then a shift [R, 2] in pixels; → [R, 3, 3]."""
    from kornia.geometry.transform import get_affine_matrix2d

    center = torch.full((len(angle), 2), (size - 1) / 2)
    matrices: Tensor = get_affine_matrix2d(shift, center, torch.ones(len(angle), 2), angle)
    return matrices


def perspective_matrices(ends: Tensor, size: int) -> Tensor:
    """The homography that takes the corners of a square picture to ``ends`` [R, 4, 2]; → [R, 3, 3]."""
    from kornia.geometry.transform import get_perspective_transform

    matrices: Tensor = get_perspective_transform(corners(size).repeat(len(ends), 1, 1), ends)
    return matrices


def warp_views(pictures: Tensor, parameters: ViewParameters) -> Tensor:
    """[R, C, S, S] → the same shape, each row warped as ``parameters`` says; rows whose gate is closed stay as they are."""
    from kornia.geometry.transform import warp_affine, warp_perspective

    size = (pictures.shape[2], pictures.shape[3])
    rows, matrices = _gated(parameters.affine_gate, parameters.affine[:, :2], pictures)
    if len(rows):
        warped = warp_affine(pictures[rows], matrices, size, align_corners=False, padding_mode="border")
        pictures = pictures.index_copy(0, rows, warped)
    rows, matrices = _gated(parameters.perspective_gate, parameters.perspective, pictures)
    if len(rows):
        warped = warp_perspective(pictures[rows], matrices, size, align_corners=False, padding_mode="zeros")
        pictures = pictures.index_copy(0, rows, warped)
    return pictures


def _gated(gate: Tensor, matrices: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The rows whose gate is open, and their matrices, on the device of the pictures; chosen on the CPU, so that nothing waits for the device."""
    rows = gate.nonzero().flatten()
    return upload(rows, pictures.device), upload(matrices[rows], pictures.device, pictures.dtype)
