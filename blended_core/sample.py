"""The sampling loops: Algorithm 2 (blended diffusion), Algorithm 1 (local CLIP-guided diffusion), and the steps that they are made of.

``blended_diffusion`` and ``local_clip_guided_diffusion`` are generators that yield every step. They are made of ``noise_background``, ``guided_step``
and ``blend``, which the graph nodes call one by one. Source: Avrahami, Lischinski, Fried, CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .clip.model import ClipModel, Prompt
from .denoiser import DiffusionModel
from .device import DeviceContext, upload
from .diffusion import ddim_step, ddpm_step, dpmpp_2m_step, guided_x0, q_sample
from .errors import BlendedError
from .guidance import Guidance, GuidedPrediction
from .losses import BackgroundLoss, ClipLoss, Distance, Loss, PerceptualDistance, RangeLoss, StepInput, cosine_distance, spherical_distance
from .mask import EditMask, blend
from .memory import USUAL_BATCH, GuidedWork, MemoryLimits, fitting_batch, memory_needed, run_within_memory
from .options import EditOptions, GuidanceOptions
from .random import RandomSource
from .reference import BatchBackgroundLoss, Deviations, MixedInput, unclamped_distance
from .schedule import CLEAN, Schedule
from .tone import acts_at, tone_shift

DISTANCES: dict[str, Distance] = {
    "spherical": spherical_distance, "cosine": cosine_distance, "spherical_unclamped": unclamped_distance,
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Models:
    """The networks of an edit. ``clip`` may be None for removal, ``perceptual`` where the background loss is off.

    ``limits`` holds what memory has allowed so far; it changes during an edit.
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
                f"the diffusion model is on {first.device} and the context is for {self.context.device}; give the context that it was loaded "
                "with: Models(…, context=context).",
                option="device",
            )

    def __repr__(self) -> str:
        return f"Models({self.ddpm}, clip={self.clip}, on {self.context.device})"

    @contextmanager
    def recorded(self) -> Iterator[Models]:
        """The networks of one edit: the diffusion model as CUDA graphs, where the context asks for them, until the edit ends."""
        if not self.context.cuda_graphs:
            yield self
            return
        ddpm = self.ddpm.recorded()
        try:
            yield replace(self, ddpm=ddpm)
        finally:
            if ddpm.graphs is not None:
                ddpm.graphs.clear()


@dataclass(frozen=True, repr=False)
class Step:
    """One denoised level of a batch.

    Attributes:
        images: numbers of the candidates.
        level: index of the level reached; CLEAN after the last step.
        done, total: number of steps.
        x: the sample at that level [B, C, H, W]; x0: x̂0 of the step.
        clip_distance: mean distance of the views [B], or None.
        shift: root mean square by which guidance moved the step, in units of noise: of the step's own (DDPM), or of ε (DDIM); 0 without guidance.
        broken: number of images whose gradient was not finite and was left out. It and ``shift`` are numbers, and tensors on the device in a step that
            nothing has waited for yet (``guided_step(…, wait=False)``).
        gradient: of minus the losses [B, C, H, W], or None without guidance.
    """

    images: tuple[int, ...]
    level: int
    done: int
    total: int
    x: Tensor
    x0: Tensor
    clip_distance: Tensor | None = None
    shift: float | Tensor = 0.0
    broken: int | Tensor = 0
    gradient: Tensor | None = None

    def settled(self) -> Step:
        """The step with its numbers on the CPU; waits for the device."""
        return replace(self, shift=float(self.shift), broken=int(self.broken))

    def __repr__(self) -> str:
        return f"Step({self.done} of {self.total}, candidates {list(self.images)}, level {self.level})"


def noise_background(
    source: Tensor, level: int, schedule: Schedule, random: RandomSource, images: Sequence[int], purpose: str = "background"
) -> Tensor:
    """The source noised to a level, with noise of its own for each image; [B or 1, C, H, W] in −1..1 → [B, C, H, W].

    ``purpose`` is 'start' for the beginning of an edit and 'background' for blending. At CLEAN it is the source itself.
    """
    if level == CLEAN:
        return source.expand(len(images), -1, -1, -1)
    noise = upload(random.noise(purpose, level, images, tuple(source.shape[1:])), source.device, source.dtype)
    return q_sample(source, level, noise, schedule)


def class_labels(model: DiffusionModel, choice: str | int, step: StepInput) -> Tensor | None:
    """Labels of a step as the network takes them.

    Returns:
        None for an unconditional model; for 'zero' an embedding of zeros [B, label_dim] float32; else class indices [B] int64.

    Raises:
        BlendedError: for a class that the model does not have.
    """
    if model.num_classes is None:
        return None
    if choice == "zero":
        return torch.zeros(len(step.images), model.label_dim, device=step.x.device)
    if choice == "random":
        return upload(step.random.labels(step.index, step.images, model.num_classes), step.x.device)
    return torch.full((len(step.images),), model.class_index(choice), device=step.x.device)


def step_noise(step: StepInput) -> Tensor:
    """The noise of a step, [B, C, H, W]."""
    return upload(step.random.noise("step", step.index, step.images, tuple(step.x.shape[1:])), step.x.device, step.x.dtype)


@dataclass(frozen=True)
class DDPM:
    """A step of the random process (Ho et al. 2020), its mean moved by Σ·g (Dhariwal & Nichol 2021, Algorithm 1)."""

    def step(self, guided: GuidedPrediction, step: StepInput, previous: Tensor | None = None) -> tuple[Tensor, Tensor, float | Tensor]:
        """(x_{t−1}, x̂0, how far guidance moved it)."""
        prediction, gradient = guided.prediction, guided.gradient
        noise = step_noise(step) if step.index > 0 else step.x
        shift = 0.0 if gradient is None else ((0.5 * prediction.log_variance).exp() * gradient).square().mean().sqrt()
        return ddpm_step(prediction, step.index, noise, gradient), prediction.x0, shift


@dataclass(frozen=True)
class DDIM:
    """A step of DDIM (Song et al. 2021), its ε moved by g (Dhariwal & Nichol 2021, Algorithm 2).

    ``eta``: 0 is deterministic, 1 has the noise of DDPM. ``matched``: guidance moves it as far as a DDPM step. A step of the probability flow follows
    half of the score that a step of the random process follows, and so half of guidance; with the whole of it more edits are accepted
    (docs/quality.md).
    """

    eta: float = 0.0
    matched: bool = True

    def step(self, guided: GuidedPrediction, step: StepInput, previous: Tensor | None = None) -> tuple[Tensor, Tensor, float | Tensor]:
        """(x_{t−1}, guided x̂0, how far guidance moved it)."""
        x0, shift = self.target(guided, step)
        return ddim_step(step.x, x0, step.index, self.noise(step), step.levels, self.eta), x0, shift

    def target(self, guided: GuidedPrediction, step: StepInput) -> tuple[Tensor, float | Tensor]:
        """(guided x̂0, how far guidance moved ε)."""
        if guided.gradient is None:
            return guided.prediction.x0, 0.0
        gradient = guided.gradient * (2 / (1 + self.eta**2)) if self.matched else guided.gradient
        shift = gradient.square().mean().sqrt() * float(step.levels.sqrt_one_minus_alphas_cumprod[step.index])
        return guided_x0(step.x, guided.prediction.x0, step.index, step.levels, gradient), shift

    def noise(self, step: StepInput) -> Tensor | None:
        """The noise of a step, or None where it has none."""
        if self.eta == 0 or step.index == 0:
            return None
        return step_noise(step)


@dataclass(frozen=True)
class DPMSolver(DDIM):
    """A step of DPM-Solver++(2M) (Lu et al. 2022), its x̂0 moved as that of DDIM. It extrapolates x̂0 from two levels."""

    def step(self, guided: GuidedPrediction, step: StepInput, previous: Tensor | None = None) -> tuple[Tensor, Tensor, float | Tensor]:
        """(x_{t−1}, guided x̂0, how far guidance moved it); ``previous``: guided x̂0 of the next noisier level."""
        x0, shift = self.target(guided, step)
        return dpmpp_2m_step(step.x, x0, previous, step.index, self.noise(step), step.levels, self.eta), x0, shift


def sampler_of(options: EditOptions) -> DDPM | DDIM:
    """The sampler that options name."""
    if options.sampler == "ddpm":
        return DDPM()
    kind = DDIM if options.sampler == "ddim" else DPMSolver
    return kind(options.eta, options.ddim_guidance == "matched")


def with_scale(options: GuidanceOptions, model: DiffusionModel) -> GuidanceOptions:
    """The options with the guidance scale that they mean for a model, where they give none."""
    return replace(options, scale=options.scale_for(model.guidance_scale, model.image_size))


def with_batch(options: EditOptions, models: Models, prompted: bool) -> EditOptions:
    """The options with the batch size that fits into free memory, where they leave it open."""
    if options.batch:
        return options
    guidance = options.guidance
    if prompted and guidance.needs_perceptual and guidance.background_loss == "reference":
        # This loss averages over the batch, so the result must not depend on free memory.
        return replace(options, batch=USUAL_BATCH)
    context, clip = models.context, models.clip if prompted else None
    image = memory_needed(models.ddpm, clip, models.ddpm.image_size**2, options.guidance, context.dtype.itemsize, context.device)
    return replace(options, batch=fitting_batch(context.free_bytes(), image, options.candidates))


def guidance_from(options: GuidanceOptions, models: Models, prompt: Prompt | None, losses: Sequence[Loss] = ()) -> Guidance:
    """The guidance that options describe, toward a prompt.

    Args:
        options: of the step. models: the networks that its losses need.
        prompt: None or empty: none of the options' losses.
        losses: further losses, whatever the prompt.

    Raises:
        BlendedError: if a network is missing that a loss needs.
    """
    chosen: list[Loss] = []
    if prompt is not None and len(prompt):
        if models.clip is None:
            raise BlendedError(
                "a prompt was given without a CLIP model to measure the distance to it; give Models(…, clip=…).", option="clip"
            )
        scale = options.scale_for(models.ddpm.guidance_scale, models.ddpm.image_size)
        chosen = losses_from(options, models.clip, models.perceptual, prompt, scale)
    return Guidance((*chosen, *losses), options.gradient == "unet", None, options.reference_size, options.clamp)


def losses_from(
    options: GuidanceOptions, clip: ClipModel, perceptual: PerceptualDistance | None, prompt: Prompt, scale: float
) -> list[Loss]:
    """The losses that options describe, toward a prompt; ``scale`` is the weight of the CLIP loss.

    Raises:
        BlendedError: if a network is missing that a loss needs.
    """
    chosen: list[Loss] = []
    if scale > 0:
        distance = DISTANCES[options.distance]
        chosen.append(ClipLoss(clip, prompt, scale, options.views, options.view_chunk, distance, options.symmetric_views))
    if options.needs_perceptual:
        if perceptual is None:
            raise BlendedError("the background loss needs an LPIPS network; give Models(…, perceptual=…).", option="lpips")
        chosen.append(
            BackgroundLoss(perceptual, options.background_scale)
            if options.background_loss == "paper"
            else BatchBackgroundLoss(perceptual, options.lpips_scale, options.l2_scale)
        )
    if options.clip_input == "mixed":
        chosen = [MixedInput(loss) for loss in chosen]
    if options.range_scale > 0:
        chosen.append(RangeLoss(options.range_scale))
    return chosen


def deviations_of(options: EditOptions) -> Deviations:
    """Where options deviate from Algorithm 2."""
    return Deviations(options.background_level == "one_off", options.background_noise == "shared", options.index_lookup == "reference")


def guided_step(
    models: Models,
    x: Tensor,
    index: int,
    schedule: Schedule,
    options: EditOptions,
    prompt: Prompt | None,
    mask: Tensor,
    random: RandomSource,
    images: Sequence[int],
    source: Tensor | None = None,
    losses: Sequence[Loss] = (),
    previous: Tensor | None = None,
    wait: bool = True,
    inside: Tensor | None = None,
) -> Step:
    """x_{t−1} from x_t at ``index``: a prediction, its guidance, and a step of the sampler. Nothing is blended.

    When memory runs out, the same is computed in smaller parts (:mod:`~blended_core.memory`).

    Args:
        models, schedule, options, random: of the edit that this is a step of.
        x: [B, C, H, W] at ``index``; images: number of the candidate in each row.
        prompt: None or empty: no guidance but that of ``losses``.
        mask: [B or 1, 1, H, W], 1 = the part that CLIP sees.
        source: [B or 1, C, H, W] in −1..1, needed where the background loss is on, and for ``inside``.
        losses: further losses of guidance.
        previous: x̂0 of the step before [B, C, H, W], which a multistep sampler extrapolates from; None at the first step.
        wait: for the device. False only queues the work, so that the CPU can draw random numbers meanwhile.
        inside: bool [B or 1, 1, H, W], what blending will take of this step; the option ``tone_match`` needs it. None: nothing is blended.

    Returns:
        The step, its ``done`` and ``total`` left at 0.

    Raises:
        BlendedError: if a network is missing that the options need, the class does not exist, or memory does not suffice for one image.
    """
    active = options.guidance.at(index, len(schedule))
    if active is None:
        prompt = None
    guidance = active or options.guidance
    prompted = prompt is not None and len(prompt) > 0

    def work(rows: int, guidance: GuidanceOptions) -> list[Step]:
        steps = []
        for first in range(0, len(x), rows):
            part = slice(first, first + rows)
            own_source = source if source is None or len(source) == 1 else source[part]
            own_inside = inside if inside is None or len(inside) == 1 else inside[part]
            inputs = StepInput(
                x[part], index, schedule, images[part], random, mask if len(mask) == 1 else mask[part], own_source
            )  # fmt: skip
            own_previous = None if previous is None else previous[part]
            steps.append(_step(models, inputs, options, guidance_from(guidance, models, prompt, losses), own_previous, own_inside))
        return steps

    description = GuidedWork(
        len(x), guidance, models.ddpm.network,
        guided=prompted or bool(losses),
        views=prompted and guidance.uses_clip,
        whole_batch=prompted and guidance.needs_perceptual and guidance.background_loss == "reference",
        graphs=models.ddpm.graphs,
    )  # fmt: skip
    step = concat_steps(run_within_memory(work, description, models.limits, models.context))
    return step.settled() if wait else step


def _step(
    models: Models, inputs: StepInput, options: EditOptions, guidance: Guidance, previous: Tensor | None, inside: Tensor | None
) -> Step:
    labels = class_labels(models.ddpm, options.class_choice, inputs)
    guided = deviations_of(options).predict(guidance, models.ddpm, inputs, labels)
    if inside is not None and inputs.source is not None and acts_at(options.tone_match, inputs.index, inputs.levels):
        correction = tone_shift(guided.prediction.x0, inputs.source, inside)
        guided = replace(guided, prediction=guided.prediction.moved(correction, inputs.index, inputs.levels))
    x, x0, shift = sampler_of(options).step(guided, inputs, previous)
    return Step(tuple(inputs.images), inputs.index - 1, 0, 0, x, x0, guided.values.get("clip"), shift, guided.broken, guided.gradient)


def concat_steps(parts: Sequence[Step]) -> Step:
    """One step from the steps of parts of a batch."""
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


def blended_diffusion(
    models: Models,
    source: Tensor,
    mask: EditMask,
    prompt: Prompt | None,
    options: EditOptions,
    random: RandomSource,
    images: Sequence[int],
    losses: Sequence[Loss] = (),
) -> Iterator[Step]:
    """Algorithm 2: every guided step is blended with the source noised to the same level.

    Args:
        models: the networks.
        source: [1, C, H, W] in −1..1. mask: [1, 1, H, W].
        prompt: None or empty: removal.
        options, random, images: which candidates, and their random numbers.
        losses: further losses of guidance.

    Yields:
        A :class:`Step` for each level, the noisiest first; ``x`` of the last one is the result.
    """
    schedule = models.ddpm.config.respaced(options.steps)
    deviations, seen = deviations_of(options), mask.for_clip()
    start = schedule.start_index(options.strength)
    x = noise_background(source, start, schedule, random, images, "start")
    previous = None
    for index in range(start, -1, -1):
        weights = mask.at_level(index, start)
        step = guided_step(
            models, x, index, schedule, options, prompt, seen, random, images, source, losses, previous, wait=False, inside=weights > 0
        )
        previous = step.x0
        background = noise_background(source, deviations.background_index(index), schedule, random, deviations.background_images(images))
        x = blend(step.x, background, weights)
        yield replace(step, x=x, done=start - index + 1, total=start + 1).settled()


def local_clip_guided_diffusion(
    models: Models,
    source: Tensor,
    mask: EditMask,
    prompt: Prompt | None,
    options: EditOptions,
    random: RandomSource,
    images: Sequence[int],
    losses: Sequence[Loss] = (),
) -> Iterator[Step]:
    """Algorithm 1: nothing is blended, only the background loss keeps the background. Arguments and results as for Algorithm 2."""
    schedule, seen = models.ddpm.config.respaced(options.steps), mask.for_clip()
    start = schedule.start_index(options.strength)
    x = noise_background(source, start, schedule, random, images, "start")
    previous = None
    for index in range(start, -1, -1):
        step = guided_step(models, x, index, schedule, options, prompt, seen, random, images, source, losses, previous, wait=False)
        previous = step.x0
        x = step.x
        yield replace(step, done=start - index + 1, total=start + 1).settled()


def edit_steps(
    models: Models,
    source: Tensor,
    mask: EditMask,
    prompt: Prompt | None,
    options: EditOptions,
    random: RandomSource,
    images: Sequence[int],
    losses: Sequence[Loss] = (),
) -> Iterator[Step]:
    """The loop that ``options.algorithm`` names."""
    loop = blended_diffusion if options.algorithm == "blended" else local_clip_guided_diffusion
    return loop(models, source, mask, prompt, options, random, images, losses)


def final_image(step: Step, options: EditOptions) -> Tensor:
    """The image that an edit ends with, from its last step; [B, C, H, W], nominally −1..1."""
    return step.x0 if options.output == "x0" else step.x
