"""The edit: Algorithm 2 (blended diffusion), Algorithm 1 (local CLIP-guided diffusion), and what surrounds them.

``blended_diffusion`` and ``local_clip_guided_diffusion`` are the paper's loops, generators that yield every step, made of
``noise_background``, ``guided_step`` and ``blend``, which the graph nodes call one by one. ``edit_picture`` takes a whole picture
through region, batches, paste and scores. Source: Avrahami, Lischinski, Fried, CVPR 2022.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .clip.model import ClipModel, Prompt
from .device import DeviceContext
from .diffusion import DiffusionModel, ddim_step, ddpm_step, guided_x0, q_sample
from .errors import BlendedError, OutOfMemoryError
from .guidance import guided_prediction
from .losses import PerceptualDistance
from .mask import binary_mask, blend, final_paste, mask_at_level, mask_for_clip, soft_mask
from .memory import MemoryLimits, fewer_at_once, run_within_memory
from .options import PRESETS, EditOptions, GuidanceOptions
from .random import SeededRandom, Source
from .rank import RANKINGS, Score, background_error, ranking, seam_energy
from .region import Region, WholePicture, bounds, region_around
from .schedule import CLEAN, Schedule


@dataclass(frozen=True)
class Models:
    """The networks of an edit. ``clip`` may be None for removal, ``perceptual`` where D_bg is off.

    ``thrift`` is what memory allowed so far; it learns.
    """

    ddpm: DiffusionModel
    clip: ClipModel | None = None
    perceptual: PerceptualDistance | None = None
    context: DeviceContext = field(default_factory=DeviceContext)
    limits: MemoryLimits = field(default_factory=MemoryLimits)

    def __post_init__(self) -> None:
        first = next(self.ddpm.network.parameters(), None)
        if first is not None and first.device.type != self.context.device.type:
            raise BlendedError(
                f"the diffusion model is on {first.device} and the context says {self.context.device}; give the one it was loaded "
                "with: Models(…, context=context)."
            )


@dataclass(frozen=True)
class Step:
    """One denoised level of a batch.

    Attributes:
        images: indices of the candidates.
        level: index of the level reached; CLEAN after the last.
        done, total: steps.
        x: the sample at that level [B, C, H, W]; x0: x̂0 before it was noised again.
        clip_distance: mean distance of the views [B], or None.
        shift: root mean square by which guidance moved the step, in units of noise: of the step's own (DDPM), or of ε (DDIM);
            0 without guidance.
        broken: images whose gradient was not finite and was left out.
        gradient: that of minus the loss [B, C, H, W], or None without guidance.
    """

    images: tuple[int, ...]
    level: int
    done: int
    total: int
    x: Tensor
    x0: Tensor
    clip_distance: Tensor | None = None
    shift: float = 0.0
    broken: int = 0
    gradient: Tensor | None = None


def noise_background(
    source: Tensor, level: int, schedule: Schedule, draws: Source, images: Sequence[int], purpose: str = "background", shared: bool = False
) -> Tensor:
    """The source noised to a level, one draw for each image (or one for all); [1, C, H, W] in −1..1 → [B, C, H, W].

    ``purpose`` is 'start' for the beginning of an edit and 'background' for blending. At CLEAN it is the source itself.
    """
    if level == CLEAN:
        return source.expand(len(images), -1, -1, -1)
    who = [0] if shared else images
    noise = draws.noise(purpose, level, who, tuple(source.shape[1:])).to(source)
    return q_sample(source, level, noise, schedule).expand(len(images), -1, -1, -1)


def reference_index(index: int, schedule: Schedule) -> int:
    """The index that the reference code recovers from a timestep: exact for even respacing only (METHOD row 12).

    Its 1000 is the length of the processes that it was written for. Raises BlendedError where that leads out of a schedule.
    """
    timestep = torch.tensor(schedule.model_timestep(index), dtype=torch.float32)
    found = int((timestep * (len(schedule) / 1000)).long())
    if not 0 <= found < len(schedule):
        raise BlendedError(
            f"the reference code's look-up gives index {found} of {len(schedule)} for timestep {float(timestep):g}: it was made for "
            "processes of 1000 steps. Use index_lookup 'exact' (any preset but official)."
        )
    return found


def class_labels(
    model: DiffusionModel, choice: str | int, index: int, draws: Source, images: Sequence[int], device: torch.device
) -> Tensor | None:
    """Labels of a step as :meth:`UNet.forward` takes them.

    None for an unconditional model; for 'zero' an embedding of zeros [B, label_dim] float32; else class indices [B] int64.
    Raises BlendedError for a class that the model does not have.
    """
    if model.num_classes is None:
        return None
    if choice == "zero":
        return torch.zeros(len(images), model.label_dim, device=device)
    if choice == "random":
        return draws.labels(index, images, model.num_classes).to(device)
    if not isinstance(choice, int) or not 0 <= choice < model.num_classes:
        raise BlendedError(f"class {choice} does not exist; the model has classes 0 to {model.num_classes - 1}.")
    return torch.full((len(images),), choice, device=device)


def guided_step(
    models: Models,
    x: Tensor,
    index: int,
    schedule: Schedule,
    options: EditOptions,
    prompt: Prompt | None,
    mask: Tensor,
    draws: Source,
    images: Sequence[int],
    source: Tensor | None = None,
) -> Step:
    """x_{t−1} from x_t at ``index``: a prediction, its guidance, and a DDPM or DDIM step. Nothing is blended.

    Where memory runs out, the same is done with less at once (:mod:`~blended_core.memory`).

    Args:
        models, schedule, options, draws: the edit that this is a step of.
        x: [B, C, H, W] at ``index``; images: the candidates that its rows are.
        prompt: None or empty: no guidance.
        mask: [B or 1, 1, H, W], 1 = what CLIP sees.
        source: [B or 1, C, H, W] in −1..1, needed where D_bg is on.

    Returns:
        The step, its ``done`` and ``total`` left at 0.

    Raises:
        BlendedError: if a network is missing that the options need, the class does not exist, or memory does not do for one image.
    """
    guidance = options.guidance.at(index, len(schedule))
    guided = bool(prompt is not None and len(prompt)) and guidance is not None
    if guidance is None:
        guidance, prompt = options.guidance, None

    def work(rows: int, guidance: GuidanceOptions) -> list[Step]:
        now = replace(options, guidance=guidance)
        return [
            _step_of_rows(
                models, x[i : i + rows], index, schedule, now, prompt, _rows_of(mask, i, rows), draws, images[i : i + rows],
                None if source is None else _rows_of(source, i, rows),
            )
            for i in range(0, len(x), rows)
        ]  # fmt: skip

    return concat_steps(run_within_memory(work, len(x), guidance, models.limits, models.ddpm.network, models.context, guided))


def _rows_of(tensor: Tensor, first: int, count: int) -> Tensor:
    """The rows of some images; a single row is of all of them."""
    return tensor if len(tensor) == 1 else tensor[first : first + count]


def concat_steps(parts: Sequence[Step]) -> Step:
    """One step of those of parts of a batch."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def whole(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    count = sum(len(part.images) for part in parts)
    return replace(
        first,
        images=tuple(image for part in parts for image in part.images),
        x=torch.cat([part.x for part in parts]),
        x0=torch.cat([part.x0 for part in parts]),
        clip_distance=whole("clip_distance"),
        shift=(sum(len(part.images) * part.shift**2 for part in parts) / count) ** 0.5,
        broken=sum(part.broken for part in parts),
        gradient=whole("gradient"),
    )


def _step_of_rows(
    models: Models,
    x: Tensor,
    index: int,
    schedule: Schedule,
    options: EditOptions,
    prompt: Prompt | None,
    mask: Tensor,
    draws: Source,
    images: Sequence[int],
    source: Tensor | None,
) -> Step:
    guidance, model = options.guidance, models.ddpm
    labels = class_labels(model, options.class_choice, index, draws, images, x.device)
    guided = bool(prompt is not None and len(prompt))
    views = None
    if guided and guidance.views > 1 and guidance.scale > 0 and models.clip is not None:
        views = draws.views(index, images, guidance.views - 1, models.clip.image_size, guidance.symmetric_views)
    looked_up = reference_index(index, schedule) if options.index_lookup == "reference" else index
    result = guided_prediction(
        model, x, looked_up, schedule, guidance, clip=models.clip, prompt=prompt, mask=mask, source=source,
        perceptual=models.perceptual, views=views, labels=labels,
    )  # fmt: skip
    prediction = result.prediction
    if looked_up != index:
        with torch.no_grad():
            prediction = model.predict(x, index, schedule, labels)
    gradient, x0 = result.gradient, prediction.x0
    shift = 0.0
    if options.sampler == "ddpm":
        noise = draws.noise("step", index, images, tuple(x.shape[1:])).to(x) if index > 0 else torch.zeros_like(x)
        x_prev = ddpm_step(prediction, index, noise, gradient)
        if gradient is not None:
            shift = float(((0.5 * prediction.log_variance).exp() * gradient).square().mean().sqrt())
    else:
        if gradient is not None:
            # A step of the probability flow follows half of the score that a step of the random process follows (Song et al. 2021), and so half
            # of guidance; with the whole of it more edits are accepted (docs/quality.md).
            push = gradient * (2 / (1 + options.eta**2)) if options.ddim_guidance == "matched" else gradient
            shift = float(schedule.sqrt_one_minus_alphas_cumprod[index] * push.square().mean().sqrt())
            x0 = guided_x0(x, x0, index, schedule, push)
        noise_ddim = draws.noise("step", index, images, tuple(x.shape[1:])).to(x) if options.eta > 0 and index > 0 else None
        x_prev = ddim_step(x, x0, index, noise_ddim, schedule, options.eta)
    return Step(tuple(images), index - 1, 0, 0, x_prev, x0, result.clip_distance, shift, result.broken, gradient)


def blended_diffusion(
    models: Models, source: Tensor, mask: Tensor, prompt: Prompt | None, options: EditOptions, draws: Source, images: Sequence[int]
) -> Iterator[Step]:
    """Algorithm 2: every guided step is blended with the source noised to the same level.

    Args:
        models: the networks.
        source: [1, C, H, W] in −1..1; mask: [1, 1, H, W], binary, or soft if ``(options.mask_rule == "soft")``.
        prompt: None or empty: removal.
        options, draws, images: which candidates, and their randomness.

    Yields:
        A :class:`Step` for each level; ``x`` of the last one is the result.
    """
    schedule = models.ddpm.config.respaced(options.steps)
    start = schedule.start_index(options.strength)
    x = noise_background(source, start, schedule, draws, images, "start")
    seen = mask_for_clip(mask, (options.mask_rule == "soft"))
    for index in range(start, -1, -1):
        step = guided_step(models, x, index, schedule, options, prompt, seen, draws, images, source)
        level = index - 1 if options.background_level == "matched" else index
        background = noise_background(source, level, schedule, draws, images, shared=options.background_noise == "shared")
        x = blend(step.x, background, mask_at_level(mask, index, start, (options.mask_rule == "soft")))
        yield replace(step, x=x, done=start - index + 1, total=start + 1)


def local_clip_guided_diffusion(
    models: Models, source: Tensor, mask: Tensor, prompt: Prompt | None, options: EditOptions, draws: Source, images: Sequence[int]
) -> Iterator[Step]:
    """Algorithm 1: the background is only asked for, by the loss D_bg. Arguments and results as in Algorithm 2."""
    schedule = models.ddpm.config.respaced(options.steps)
    start = schedule.start_index(options.strength)
    x = noise_background(source, start, schedule, draws, images, "start")
    seen = mask_for_clip(mask, (options.mask_rule == "soft"))
    for index in range(start, -1, -1):
        step = guided_step(models, x, index, schedule, options, prompt, seen, draws, images, source)
        x = step.x
        yield replace(step, done=start - index + 1, total=start + 1)


def edit_steps(
    models: Models, source: Tensor, mask: Tensor, prompt: Prompt | None, options: EditOptions, draws: Source, images: Sequence[int]
) -> Iterator[Step]:
    """The loop that ``options.algorithm`` names."""
    loop = blended_diffusion if options.algorithm == "blended" else local_clip_guided_diffusion
    return loop(models, source, mask, prompt, options, draws, images)


def final_image(step: Step, options: EditOptions) -> Tensor:
    """The picture that an edit ends with, from its last step; [B, C, H, W], nominally −1..1."""
    return step.x0 if options.output == "x0" else step.x


@dataclass
class Candidate:
    """One result. ``edited`` [1, C, S, S] in −1..1 is the region at the model's size; rank 1 is the best."""

    index: int
    edited: Tensor
    score: Score
    rank: int = 0


@dataclass
class EditResult:
    """What an edit gives back.

    Attributes:
        candidates: best first.
        original, mask: the picture [1, C, H, W] in 0..1 and the mask as used [1, 1, H, W].
        region: what was cut out.
        source_distance: CLIP distance of the source's own region, or None.
        notes: sentences for the person.
        seconds: time of each part.
    """

    candidates: list[Candidate]
    original: Tensor
    mask: Tensor
    region: Region | WholePicture
    options: EditOptions
    source_distance: float | None
    notes: list[str]
    seconds: dict[str, float]

    def rank(self) -> None:
        """Sorts the candidates, best first, and numbers them."""
        order = ranking([c.score.clip_distance for c in self.candidates])
        self.candidates = [self.candidates[i] for i in order]
        for rank, candidate in enumerate(self.candidates, 1):
            candidate.rank = rank

    def picture(self, candidate: Candidate) -> Tensor:
        """A candidate at the original's size [1, C, H, W] in 0..1 on the CPU, pasted."""
        return paste(candidate.edited, self.original, self.mask, self.region, self.options)


def paste(edited: Tensor, original: Tensor, mask: Tensor, region: Region | WholePicture, options: EditOptions) -> Tensor:
    """Puts an edited region [B, C, S, S] in −1..1 back into the original [1, C, H, W] in 0..1."""
    values = (edited.to(original) + 1) / 2
    if isinstance(region, WholePicture) or not options.keeps_background:
        full = region.put_back(values, original)
        return (
            final_paste(full, original, mask, soft=(options.mask_rule == "soft"), feather=options.feather)
            if options.keeps_background
            else full.clamp(0, 1)
        )
    # The mask lies in the region, so nothing else of a large picture is computed; the feather looks a little beyond.
    around = region.inner().grown(options.feather + 1, region.width, region.height)
    part = original[around.slices]
    pasted = final_paste(
        region.within(around).put_back(values, part), part, mask[around.slices], soft=(options.mask_rule == "soft"), feather=options.feather
    )
    out = original.expand(len(pasted), -1, -1, -1).clone()
    out[around.slices] = pasted
    return out


def prepared_mask(mask: Tensor, options: EditOptions) -> Tensor:
    """The mask as the edit uses it: inverted and thresholded as the options say; [1, 1, H, W]."""
    if options.mask_rule == "soft":
        return soft_mask(mask, options.invert_mask)
    if options.mask_rule == "nonzero":
        return binary_mask(torch.where(mask > 0, 1.0, mask), options.invert_mask)
    return binary_mask(mask, options.invert_mask)


def choose_region(mask: Tensor, options: EditOptions, model: DiffusionModel) -> Region | WholePicture:
    """The part of the picture that an edit works on; an empty mask is a BlendedError."""
    if options.crop == "squash":
        bounds(mask, (options.mask_rule == "soft"))
        return WholePicture(int(mask.shape[-1]), int(mask.shape[-2]))
    return region_around(mask, model.image_size, options.context, (options.mask_rule == "soft"))


def edit_picture(
    picture: Tensor,
    mask: Tensor,
    prompt: Prompt | None,
    models: Models,
    options: EditOptions | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_candidate: Callable[[Candidate, EditResult], None] | None = None,
    on_start: Callable[[EditResult], None] | None = None,
) -> EditResult:
    """Edits a picture of any size inside its mask.

    Args:
        picture: [1, 3, H, W] in 0..1. It is not written to.
        mask: [1, 1, H, W] in 0..1, 1 = edit.
        prompt: from :meth:`ClipModel.prompt`; None or empty removes what the mask covers.
        models: the networks.
        options: default: the preset ``best``.
        on_step: called after every step of every batch.
        on_start: called once before the first step, with the result that will be filled: its region and mask are known.
        on_candidate: called for every finished candidate, before ranking; the result holds those finished so far.

    Returns:
        The candidates, best first. Outside the mask every picture equals the original bit for bit (Algorithm 2).

    Raises:
        BlendedError: for a mask of another size or an empty one, and for anything the options ask that cannot be.
    """
    options = options or PRESETS["best"]
    if picture.ndim != 4 or picture.shape[0] != 1 or picture.shape[1] != 3:
        raise BlendedError(f"the picture has shape {tuple(picture.shape)}; give one RGB picture, [1, 3, height, width].")
    if mask.ndim != 4 or mask.shape[:2] != (1, 1) or mask.shape[-2:] != picture.shape[-2:]:
        raise BlendedError(
            f"the mask has shape {tuple(mask.shape)} and the picture {tuple(picture.shape)}; give a mask [1, 1, height, width] of the same size."
        )
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name] = seconds.get(name, 0.0) + now - clock
        clock = now

    context = models.context
    with context.autograd():
        original, used = picture.detach().to("cpu", torch.float32).clone(), prepared_mask(mask.detach().cpu(), options)
        region = choose_region(used, options, models.ddpm)
        size = models.ddpm.image_size
        source = context.put(region.cut(original, size) * 2 - 1)
        region_mask = context.put(region.cut_mask(used, size, (options.mask_rule == "soft")))
        if not bool((region_mask > 0).any()):
            raise BlendedError(
                f"nothing of the mask is left when the whole picture is squashed to {size}×{size}; use the crop 'region' (--crop region)."
            )
        seen = mask_for_clip(region_mask, (options.mask_rule == "soft"))
        notes: list[str] = []
        guided = prompt is not None and len(prompt) > 0

        def distances(pictures: Tensor) -> list[float | None]:
            if not guided or models.clip is None or prompt is None:
                return [None] * len(pictures)
            score, clip = RANKINGS[options.ranking], models.clip

            def work(rows: int) -> Tensor:
                return torch.cat([score(part, seen, clip, prompt) for part in torch.split(pictures, rows)])

            at_once = min(models.limits.scored or models.limits.rows or len(pictures), len(pictures))
            try:
                scored, fitted = fewer_at_once(work, at_once, models.context, "pictures are scored")
            except OutOfMemoryError as error:
                # The pictures are there, or can still be made; an order of them is not worth losing them.
                if not any(UNSCORED in note for note in notes):
                    notes.append(f"{UNSCORED}: {error}")
                return [None] * len(pictures)
            if fitted < at_once:
                models.limits.scored = fitted
            return [float(d) if d.isfinite() else None for d in scored]

        lap("prepare")
        source_distance = distances(source)[0]
        result = EditResult([], original, used, region, options, source_distance, notes, seconds)
        lap("score")
        if on_start is not None:
            on_start(result)
        draws = SeededRandom(options.seed)
        strongest, broken = 0.0, 0
        for first in range(0, options.candidates, options.batch):
            images = range(first, min(first + options.batch, options.candidates))
            step = None
            for step in edit_steps(models, source, region_mask, prompt, options, draws, images):
                strongest, broken = max(strongest, step.shift), broken + step.broken
                if on_step is not None:
                    on_step(step)
            if step is None:
                continue
            edited = final_image(step, options)
            lap("diffusion")
            if guided and WITHOUT_UNET not in notes and models.limits.applied(options.guidance).gradient != options.guidance.gradient:
                notes.append(WITHOUT_UNET)
            scored = distances(edited)
            lap("score")
            for row, (index, distance) in enumerate(zip(images, scored, strict=True)):
                candidate = Candidate(index, edited[row : row + 1].float().cpu(), Score(distance, None, 0.0, 0.0))
                full = result.picture(candidate)
                candidate.score = Score(
                    distance,
                    None if distance is None or source_distance is None else source_distance - distance,
                    background_error(full, original, used, (options.mask_rule == "soft")),
                    seam_energy(full, used, (options.mask_rule == "soft")),
                )
                result.candidates.append(candidate)
                lap("paste and score")
                if on_candidate is not None:
                    on_candidate(candidate, result)
                    lap("write")
        result.rank()
        overflown = [str(c.index) for c in result.candidates if not c.edited.isfinite().all()]
        if overflown:
            notes.append(
                f"Candidate {', '.join(overflown)} holds values that are not numbers, which came from the networks; try --dtype fp32."
            )
        elif guided:
            notes += explain(models, source, region_mask, prompt, result, strongest, broken, distances)
        lap("rank")
    return result


WITHOUT_UNET = "Memory did not suffice for the gradient through the UNet; it was taken at x̂0, as you allowed."
UNSCORED = "Pictures without a score come last, in the order in which they were made"
NEGLIGIBLE_SHIFT = 0.01
NEGLIGIBLE_GAIN = 0.1


def explain(
    models: Models,
    source: Tensor,
    mask: Tensor,
    prompt: Prompt | None,
    result: EditResult,
    strongest: float,
    broken: int,
    distances: Callable[[Tensor], list[float | None]],
) -> list[str]:
    """Sentences about guidance that did nothing, or none.

    If the best candidate is hardly nearer to the prompt than the source was, or guidance hardly moved a step, one unguided
    candidate is made with the same draws and compared: what it reaches without the prompt is not the prompt's doing.
    """
    options, best = result.options, result.candidates[0]
    notes = []
    if broken:
        notes.append(
            f"The gradient of {broken} guided steps was not finite and was left out of them; with half precision try --dtype fp32."
        )
    gain, before = best.score.gain, result.source_distance
    idle = options.guidance.scale == 0 or strongest < NEGLIGIBLE_SHIFT
    if gain is None or before is None or (gain >= NEGLIGIBLE_GAIN * abs(before) and not idle):
        return notes
    (last,) = deque(edit_steps(models, source, mask, None, options, SeededRandom(options.seed), [best.index]), maxlen=1)
    unguided = distances(final_image(last, options))[0]
    if unguided is not None and best.score.clip_distance is not None and best.score.clip_distance < unguided - 0.02 * abs(before):
        return notes
    reasons = []
    schedule = models.ddpm.config.respaced(options.steps)
    levels = range(schedule.start_index(options.strength) + 1)
    if options.guidance.scale == 0:
        reasons.append("the guidance scale is 0")
    elif not any((at := options.guidance.at(index, len(schedule))) is not None and at.scale > 0 for index in levels):
        reasons.append(
            f"guidance works from {options.guidance.start:g} to {options.guidance.end:g} of the levels, and strength {options.strength:g} "
            "begins after that (raise --strength or --guide-to)"
        )
    elif strongest < NEGLIGIBLE_SHIFT:
        reasons.append(
            f"guidance never moved a step by more than {strongest:.2g} of its own noise (raise --guidance-scale, now {options.guidance.scale:g})"
        )
    if options.strength < 0.4:
        reasons.append(f"at strength {options.strength:g} little can change (raise it, 0.75 is usual)")
    share = float((mask > 0).float().mean())
    if share < 0.02:
        reasons.append(f"the mask covers {share:.1%} of what the model sees (lower --context or widen the mask)")
    if not reasons:
        reasons.append(
            "the model may not know how to draw this, or CLIP may not know these words; try other words, more candidates or another seed"
        )
    notes.append(
        f"Guidance changed nothing: CLIP's distance to the prompt was {before:.3f} before and is {best.score.clip_distance:.3f} now"
        + (f" ({unguided:.3f} without any prompt)" if unguided is not None else "")
        + ". Likely reason: "
        + "; ".join(reasons)
        + "."
    )
    return notes


def finished_frame(x0: Tensor, result: EditResult) -> Tensor:
    """A frame of an animation: x̂0 [1, C, S, S] in −1..1 over the original inside the region; [1, C, S, S] in 0..1."""
    size = x0.shape[-1]
    original = result.region.cut(result.original, size).clamp(0, 1)
    edited = ((x0 + 1) / 2).clamp(0, 1)
    if not result.options.keeps_background:
        return edited
    return final_paste(
        edited,
        original,
        result.region.cut_mask(result.mask, size, (result.options.mask_rule == "soft")),
        soft=(result.options.mask_rule == "soft"),
    )
