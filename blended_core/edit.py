"""The edit of a whole picture: region, batches of candidates, paste, scores.

:func:`edit_picture` does all of it. :func:`prepare` is the part before sampling, which the graph nodes share; :func:`~blended_core.region.pasted_part` the
part after it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import reference
from .clip.model import ClipModel, Prompt
from .diagnose import diagnose, nothing_finite, options_without_effect
from .errors import BlendedError, Note, OutOfMemoryError
from .losses import Loss
from .mask import EditMask
from .memory import run_in_parts
from .options import PRESETS, EditOptions
from .random import SeededRandom
from .rank import Score, background_error, clip_distance, clip_distance_of_views, seam_energy
from .region import PictureRegion, feather_notes, region_around
from .result import Candidate, EditResult
from .sample import Models, Step, edit_steps, final_image, with_batch, with_scale
from .timer import Timer

RANKINGS = {"views": clip_distance_of_views, "corrected": clip_distance, "reference": reference.clip_distance}
X0_INSTEAD_OF_NETWORK = Note(
    "Memory did not suffice for the gradient through the diffusion model; it was taken at x̂0, as the options allow.", option="gradient"
)
UNSCORED = "Pictures without a score come last, in the order in which they were made"
LOWEST_VALUE, HIGHEST_VALUE, HIGHEST_OF_MASK = -0.25, 16.0, 1.25
"""Of a picture and a mask in 0..1, with room for overshoot and a picture of high dynamic range; beyond these they were given in −1..1 or 0..255."""


@dataclass(frozen=True, eq=False, repr=False)
class PreparedEdit:
    """The input of the sampling loop.

    Attributes:
        region: the part of the picture that is edited.
        source: the region of each picture at the model's size [P, 3, S, S] in −1..1.
        mask: in the frame of the source.
    """

    region: PictureRegion
    source: Tensor
    mask: EditMask


def prepare(picture: Tensor, mask: EditMask, size: int, crop: str = "region", context: float = 1.6) -> PreparedEdit:
    """Cuts the region of an edit out of a picture and its mask.

    Args:
        picture: [P, 3, H, W] in 0..1; the model sees values outside that range, NaN and Inf as the nearest value in it. mask: [P or 1, 1, H, W].
        size: side in pixels that the model edits.
        crop, context: as in :class:`~blended_core.options.EditOptions`.

    Raises:
        BlendedError: if the mask is empty, or nothing of it is left at the model's size.
    """
    region = choose_region(mask, size, crop, context)
    return PreparedEdit(region, region.cut(visible(picture), size) * 2 - 1, region.cut_mask(mask, size))


def visible(picture: Tensor) -> Tensor:
    """A picture with its values limited to 0..1, and NaN as gray; the picture itself where that changes nothing."""
    low, high = _extremes(picture)  # both NaN if one value is
    return picture if low >= 0 and high <= 1 else picture.nan_to_num(0.5, 1.0, 0.0).clamp(0, 1)


def choose_region(mask: EditMask, size: int, crop: str = "region", context: float = 1.6) -> PictureRegion:
    """The part of a picture that an edit works on. Arguments and errors as for :func:`prepare`."""
    if crop == "region":
        return region_around(mask, size, context)
    mask.box()  # an empty mask is an error here too
    return reference.SquashedPicture(int(mask.values.shape[-1]), int(mask.values.shape[-2]))


def edit_picture(
    picture: Tensor,
    mask: Tensor,
    prompt: Prompt | str | None,
    models: Models,
    options: EditOptions | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_candidate: Callable[[Candidate, EditResult], None] | None = None,
    on_start: Callable[[EditResult], None] | None = None,
    losses: Sequence[Loss] = (),
) -> EditResult:
    """Edits a picture of any size inside its mask.

    Args:
        picture: [1, 3, H, W] in 0..1. It is not written to.
        mask: [1, 1, H, W] in 0..1, 1 = edit.
        prompt: a text, or the result of :meth:`ClipModel.prompt`; None or empty removes what the mask covers.
        models: the networks.
        options: default: the preset ``best``.
        on_step: called after every step of every batch.
        on_candidate: called for every finished candidate, before ranking; the result holds those finished so far.
        on_start: called once before the first step, with the result that will be filled: its region and mask are known.
        losses: further losses of guidance (docs/library.md).

    Returns:
        The candidates, best first. Outside the mask every picture equals the original bit for bit (Algorithm 2).

    Raises:
        BlendedError: for a picture or mask of the wrong kind, size or value range, an empty mask, and anything in the options that is impossible.
    """
    timer = Timer()
    options = options or PRESETS["best"]
    check_picture(picture, mask)
    context = models.context
    with context.autograd(), models.recorded() as models:
        if isinstance(prompt, str):
            prompt = _encoded(prompt, models.clip)
        notes: list[Note] = []
        prompt = _without_zero_weights(prompt, notes)
        options = replace(options, guidance=with_scale(options.guidance, models.ddpm))
        options = with_batch(options, models, prompt is not None and len(prompt) > 0)
        original = picture.detach().to("cpu", torch.float32).clone()
        used = EditMask.of(mask.detach().cpu(), options.mask_rule, options.invert_mask)
        prepared = prepare(original, used, models.ddpm.image_size, options.crop, options.context)
        source, region_mask = context.put(prepared.source), prepared.mask.with_values(context.put(prepared.mask.values))
        notes += [*_picture_notes(original), *used.notes]
        if options.keeps_background:
            notes += feather_notes(used, prepared.region, options.feather)
        background_pixels = used.outside_pixels
        timer.lap("prepare")
        scorer = _Scorer(models, prompt, region_mask.for_clip(), options.ranking, notes)
        notes += options_without_effect(options, models.ddpm, scorer.guided, bool(losses))
        result = EditResult([], original, used, prepared.region, options, scorer.distances(source)[0], notes, timer.seconds)
        timer.lap("score")
        if on_start is not None:
            on_start(result)
        random = SeededRandom(options.seed)
        strongest_shift, broken, dropped = 0.0, 0, []
        for first in range(0, options.candidates, options.batch):
            images = list(range(first, min(first + options.batch, options.candidates)))
            step = None
            for step in edit_steps(models, source, region_mask, prompt, options, random, images, losses):
                strongest_shift, broken = max(strongest_shift, float(step.shift)), broken + int(step.broken)
                if on_step is not None:
                    on_step(step)
                if not _finite_rows(step.x).any():
                    break
            if step is None:
                continue
            edited = final_image(step, options)
            timer.lap("diffusion")
            without_network = models.limits.applied(options.guidance).gradient != options.guidance.gradient
            if (scorer.guided or losses) and without_network and X0_INSTEAD_OF_NETWORK not in notes:
                notes.append(X0_INSTEAD_OF_NETWORK)
            finite = _finite_rows(edited) & _finite_rows(step.x)
            dropped += [index for index, whole in zip(images, finite, strict=True) if not whole]
            images, edited = [index for index, whole in zip(images, finite, strict=True) if whole], edited[finite]
            if not images:
                continue
            distances = scorer.distances(_delivered(result, edited))
            timer.lap("score")
            for row, (index, distance) in enumerate(zip(images, distances, strict=True)):
                candidate = Candidate(index, edited[row : row + 1].float().cpu(), Score(distance, None, None, 0.0))
                candidate.part = box, pasted = result.part(candidate)
                around = used.part(box)
                gain = None if distance is None or result.source_distance is None else result.source_distance - distance
                error = background_error(pasted, original[box.slices], around, background_pixels)
                candidate.score = Score(distance, gain, error, seam_energy(pasted, around), background_pixels)
                result.candidates.append(candidate)
                timer.lap("paste and score")
                if on_candidate is not None:
                    on_candidate(candidate, result)
                    timer.lap("write")
                candidate.part = None
        if dropped:
            found = nothing_finite(dropped, options, strongest_shift, context.dtype, scorer.guided)
            if not result.candidates:
                raise BlendedError(f"no candidate is finite, so there is no result: {found}", option=found.options)
            which = f"Candidate {dropped[0]} was" if len(dropped) == 1 else f"Candidates {', '.join(map(str, dropped))} were"
            notes.append(Note(f"{which} left out: {found}", option=found.options))
        result.rank()
        if scorer.guided:

            def unguided(index: int) -> float | None:
                (last,) = deque(edit_steps(models, source, region_mask, None, options, random, [index], losses), maxlen=1)
                return scorer.distances(_delivered(result, final_image(last, options)))[0]

            schedule = models.ddpm.config.respaced(options.steps)
            notes += diagnose(result, region_mask, schedule, strongest_shift, broken, context.dtype, unguided)
        timer.lap("rank")
    return result


def _finite_rows(batch: Tensor) -> Tensor:
    """Whether each image of [B, C, H, W] has finite values only, bool [B]."""
    return batch.isfinite().flatten(1).all(1)


def _delivered(result: EditResult, edited: Tensor) -> Tensor:
    """The region as the result will show it, [B, C, S, S] in −1..1. A feather or a soft mask mixes the edit with the original."""
    if not result.options.keeps_background or not (result.options.feather or result.mask.soft):
        return edited
    score = Score(None, None, None, 0.0)

    def cut(row: Tensor) -> Tensor:
        return result.region.cut(visible(result.picture(Candidate(0, row[None].float().cpu(), score))), edited.shape[-1]) * 2 - 1

    return torch.cat([cut(row) for row in edited]).to(edited)


def _without_zero_weights(prompt: Prompt | None, notes: list[Note]) -> Prompt | None:
    """The texts of a prompt that guide, those with another weight than 0; None if there are none."""
    if prompt is None or all(prompt.weights):
        return prompt
    texts = [repr(text) for text, weight in zip(prompt.texts, prompt.weights, strict=True) if not weight]
    kept = [i for i, weight in enumerate(prompt.weights) if weight]
    left = "" if kept else " No text is left, so the masked part is filled from its surroundings."
    notes.append(Note(f"The weight of {', '.join(texts)} is 0, which has no effect.{left}", option="weights"))
    if not kept:
        return None
    return Prompt(tuple(prompt.texts[i] for i in kept), tuple(prompt.weights[i] for i in kept), prompt.embeddings[kept])


def _picture_notes(picture: Tensor) -> list[Note]:
    """About values of a picture that are not finite."""
    if math.isfinite(sum(_extremes(picture))):
        return []
    count = int((~picture.isfinite()).sum())
    return [Note(f"{count} values of the picture are NaN or Inf. Outside the mask they stay; the model sees gray, black or white there.")]


def check_picture(picture: Tensor, mask: Tensor) -> None:
    """Raises BlendedError unless a picture is [1, 3, H, W] in 0..1 and its mask [1, 1, H, W] in 0..1."""
    for name, value, read in (("picture", picture, "read_picture(path).tensor()"), ("mask", mask, "read_mask(path, picture.size)")):
        if not isinstance(value, Tensor):
            raise BlendedError(f"the {name} is a {type(value).__name__}; give a tensor, for a file: {read}.")
        if value.dtype == torch.bool:
            raise BlendedError(f"the {name} has dtype torch.bool; give floating-point values in 0..1: {name}.float().")
        if not value.is_floating_point():
            raise BlendedError(
                f"the {name} has dtype {value.dtype}; give floating-point values in 0..1, for 8-bit values: {name}.float() / 255."
            )
    if picture.ndim != 4 or picture.shape[0] != 1 or picture.shape[1] != 3:
        raise BlendedError(f"the picture has shape {tuple(picture.shape)}; give one RGB picture, [1, 3, height, width].")
    if mask.ndim != 4 or mask.shape[:2] != (1, 1) or mask.shape[-2:] != picture.shape[-2:]:
        raise BlendedError(
            f"the mask has shape {tuple(mask.shape)} and the picture {tuple(picture.shape)}; give a mask [1, 1, height, width] of the same size."
        )
    check_range(picture, "picture")
    check_range(mask, "mask", HIGHEST_OF_MASK)


def check_range(values: Tensor, name: str, highest: float = HIGHEST_VALUE) -> None:
    """Raises BlendedError unless the finite values of a picture or a mask can be values in 0..1.

    Room is left for overshoot, and up to ``highest`` for high dynamic range. Whole numbers above 1 are 8-bit values however small they are.
    """
    finite = values.detach()
    low, high = _extremes(finite)
    if not math.isfinite(low + high):
        finite = finite.nan_to_num(0.0, 0.0, 0.0)
        low, high = _extremes(finite)
    if low < LOWEST_VALUE:
        raise BlendedError(f"the {name} has values from {low:.3g} to {high:.3g}; give 0..1, for a {name} in −1..1: ({name} + 1) / 2.")
    if high > highest or (high > 1 and bool((finite == finite.round()).all())):
        raise BlendedError(f"the {name} has values from {low:.3g} to {high:.3g}; give 0..1, for a {name} in 0..255: {name} / 255.")


def _extremes(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest value, both NaN if one value is; 0 without any. Needs no copy, as aminmax does of an image with channels last."""
    return (float(values.amin()), float(values.amax())) if values.numel() else (0.0, 0.0)


def _encoded(text: str, clip: ClipModel | None) -> Prompt | None:
    if not text.strip():
        return None
    if clip is None:
        raise BlendedError(
            f"the prompt {text!r} was given without a CLIP model to encode it; give Models(…, clip=load_clip(context)).", option="clip"
        )
    return clip.prompt(text)


class _Scorer:
    """CLIP distances of finished regions to the prompt, within memory."""

    def __init__(self, models: Models, prompt: Prompt | None, seen: Tensor, ranking: str, notes: list[Note]) -> None:
        self.models, self.prompt, self.seen, self.notes = models, prompt, seen, notes
        self.score = RANKINGS[ranking]

    @property
    def guided(self) -> bool:
        """Whether there is a prompt."""
        return self.prompt is not None and len(self.prompt) > 0

    def distances(self, pictures: Tensor) -> list[float | None]:
        """Of [B, 3, S, S] in −1..1; None where there is no prompt, or the distance is not finite or could not be computed."""
        clip, prompt, limits = self.models.clip, self.prompt, self.models.limits
        if clip is None or prompt is None or not len(prompt):
            return [None] * len(pictures)

        def work(rows: int) -> Tensor:
            return torch.cat([self.score(part, self.seen, clip, prompt) for part in torch.split(pictures, rows)])

        at_once = min(limits.scored or limits.rows or len(pictures), len(pictures))
        try:
            scored, fitted = run_in_parts(work, at_once, self.models.context, "pictures are scored", self.models.ddpm.graphs)
        except OutOfMemoryError as error:
            # The pictures exist, or can still be made; their order is not worth losing them.
            if not any(UNSCORED in note for note in self.notes):
                self.notes.append(Note(f"{UNSCORED}: {error}", error.options))
            return [None] * len(pictures)
        if fitted < at_once:
            limits.scored = fitted
        return [float(d) if d.isfinite() else None for d in scored]
