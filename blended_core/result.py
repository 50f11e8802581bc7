"""The result of an edit: candidates, their pictures at the original's size, and a preview of one under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .errors import Note
from .mask import Box, EditMask, final_paste
from .options import EditOptions
from .rank import Score, ranking
from .region import PictureRegion, paste, pasted_part


@dataclass(repr=False)
class Candidate:
    """One result.

    Attributes:
        index: its number, from 0.
        edited: the region at the model's size [1, C, S, S] in −1..1.
        score: by which it is ranked, and measures of its background and seam.
        rank: 1 is the best.
        part: what :meth:`EditResult.part` returns, while ``on_candidate`` is called for it, so that the paste is computed once; later None.
    """

    index: int
    edited: Tensor
    score: Score
    rank: int = 0
    part: tuple[Box, Tensor] | None = None

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
    _shown: tuple[Tensor, EditMask] | None = field(default=None, init=False)

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

    def part(self, candidate: Candidate) -> tuple[Box, Tensor]:
        """The part of :meth:`picture` that can differ from the original: its box, and its pixels [1, C, h, w] in 0..1 on the CPU."""
        if candidate.part is not None:
            return candidate.part
        return pasted_part(candidate.edited, self.original, self.mask, self.region, self.options.feather, self.options.keeps_background)

    def preview(self, x0: Tensor) -> Tensor:
        """x̂0 [1, C, S, S] of a step over the original's region, [1, C, S, S] in 0..1."""
        size = x0.shape[-1]
        edited = ((x0 + 1) / 2).clamp(0, 1)
        if not self.options.keeps_background:
            return edited
        if self._shown is None or self._shown[0].shape[-1] != size:  # cut once: a preview follows every step
            self._shown = self.region.cut(self.original, size).clamp(0, 1), self.region.cut_mask(self.mask, size)
        return final_paste(edited, *self._shown)
