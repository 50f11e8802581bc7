"""The result of an edit: candidates, their pictures at the original's size, and a preview of one under way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .errors import Note
from .mask import EditMask, final_paste
from .options import EditOptions
from .rank import Score, ranking
from .region import PictureRegion, paste


@dataclass(repr=False)
class Candidate:
    """One result. ``edited`` [1, C, S, S] in −1..1 is the region at the model's size; rank 1 is the best."""

    index: int
    edited: Tensor
    score: Score
    rank: int = 0

    def __repr__(self) -> str:
        distance = self.score.clip_distance
        return f"Candidate({self.index}, rank {self.rank}, CLIP distance {'none' if distance is None else f'{distance:.3f}'})"


@dataclass(repr=False)
class EditResult:
    """The result of an edit.

    Attributes:
        candidates: best first.
        original: the picture [1, C, H, W] in 0..1; mask: as the edit used it, [1, 1, H, W].
        region: what was cut out.
        source_distance: CLIP distance of the source's own region, or None.
        notes: sentences for the user.
        seconds: time of each part of the edit.
    """

    candidates: list[Candidate]
    original: Tensor
    mask: EditMask
    region: PictureRegion
    options: EditOptions
    source_distance: float | None
    notes: list[Note]
    seconds: dict[str, float]

    def __repr__(self) -> str:
        height, width = self.original.shape[-2:]
        return f"EditResult({len(self.candidates)} candidates of a {width}×{height} picture, preset {self.options.preset!r})"

    def rank(self) -> None:
        """Sorts the candidates, best first, and numbers them."""
        order = ranking([c.score.clip_distance for c in self.candidates])
        self.candidates = [self.candidates[i] for i in order]
        for rank, candidate in enumerate(self.candidates, 1):
            candidate.rank = rank

    def picture(self, candidate: Candidate) -> Tensor:
        """A candidate pasted into the original, [1, C, H, W] in 0..1 on the CPU."""
        return paste(candidate.edited, self.original, self.mask, self.region, self.options.feather, self.options.keeps_background)

    def preview(self, x0: Tensor) -> Tensor:
        """x̂0 [1, C, S, S] of a step over the original's region, [1, C, S, S] in 0..1."""
        size = x0.shape[-1]
        edited = ((x0 + 1) / 2).clamp(0, 1)
        if not self.options.keeps_background:
            return edited
        return final_paste(edited, self.region.cut(self.original, size).clamp(0, 1), self.region.cut_mask(self.mask, size))
