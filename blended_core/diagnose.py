"""Sentences for the user about an edit: guidance without visible effect, options without effect, values that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch

from .denoiser import DiffusionModel
from .errors import Note
from .mask import EditMask
from .options import PRESETS, EditOptions, GuidanceOptions, preset
from .result import EditResult
from .sample import with_scale
from .schedule import Schedule

NEGLIGIBLE_SHIFT = 0.01
"""Of a step, in units of its own noise."""
EXCESSIVE_SHIFT = 1e3
"""Of a step, in units of its own noise: what the network gets then is no noisy image any more."""
NEGLIGIBLE_GAIN = 0.1
"""Of the CLIP distance, as a share of the source's."""
NEGLIGIBLE_DIFFERENCE = 0.02
"""Between two CLIP distances, as a share of the source's: of a guided and an unguided candidate, or of a candidate and the source."""
LOW_STRENGTH = 0.4
SMALL_MASK = 0.02
"""As a share of the region."""
NOT_OF_CLIP = {"gradient", "clamp", "reference_size", "x0_if_needed"}
"""Options of guidance that act on any loss, also one that a script adds."""


def options_without_effect(options: EditOptions, model: DiffusionModel, prompted: bool, losses: bool = False) -> list[Note]:
    """Notes about options that differ from those of their preset and change nothing in this edit.

    Args:
        options: of the edit. model: the diffusion model.
        prompted: whether there is a prompt. losses: whether there are losses beside those of the options.
    """
    guidance = options.guidance
    guidance_names = tuple(f.name for f in fields(GuidanceOptions) if not (losses and f.name in NOT_OF_CLIP))
    reference_loss = guidance.needs_perceptual and guidance.background_loss == "reference"
    blended_away = options.algorithm == "blended" and guidance.gradient == "x0" and guidance.clamp is None
    causes: list[tuple[bool, str, Sequence[str]]] = [
        (options.sampler == "ddpm", "only the samplers ddim and dpmpp-2m use it", ("eta", "ddim_guidance")),
        (options.crop == "squash", "the crop squash takes the whole picture", ("context",)),
        (not options.keeps_background, "the original is not restored outside the mask", ("feather",)),
        (options.keeps_background and options.feather == 1, "the pixels at the edge of the mask have the whole edit already", ("feather",)),
        (options.algorithm == "blended" and bool(options.enforce_background), "Algorithm 2 always does it", ("enforce_background",)),
        (options.algorithm == "local", "Algorithm 1 blends nothing", ("tone_match",)),
        (model.num_classes is None, "the diffusion model is not class-conditional", ("class_choice",)),
        (not prompted, "there is no prompt", (*guidance_names, "ranking")),
        (prompted and blended_away, "Algorithm 2 replaces all that this loss changes, which lies outside the mask", ("background_scale",)),
        (
            prompted and not reference_loss,
            "only preset official uses it, with a background scale above 0",
            ("lpips_scale", "l2_scale"),
        ),
        (prompted and guidance.gradient == "x0", "the gradient is taken at x̂0 anyway", ("x0_if_needed",)),
        (
            prompted and 0 < guidance.start <= 1 - options.strength,
            f"an edit of strength {options.strength:g} starts after it",
            ("start",),
        ),
    ]  # fmt: skip
    name = options.preset if options.preset in PRESETS else "best"
    usual = preset(name, algorithm=options.algorithm, sampler=options.sampler)
    usual_guidance = with_scale(usual.guidance, model)
    found = []
    for holds, reason, names in causes:
        if not holds:
            continue
        given = {}
        for option in names:
            now, of_preset, plain = (
                (guidance, usual_guidance, GuidanceOptions()) if hasattr(guidance, option) else (options, usual, EditOptions())
            )
            # Options that nobody touched have the values of the preset, or of an unchanged GuidanceOptions.
            if (value := getattr(now, option)) not in (getattr(of_preset, option), getattr(plain, option)):
                given[option] = value
        if given:
            texts = ", ".join(f"{option} {value:g}" if type(value) is float else f"{option} {value}" for option, value in given.items())
            found.append(Note(f"{texts} {'has' if len(given) == 1 else 'have'} no effect: {reason}.", option=list(given)))
    return found


def nothing_finite(indices: Sequence[int], options: EditOptions, strongest_shift: float, dtype: torch.dtype, guided: bool) -> Note:
    """Why candidates have NaN or Inf, and what to do.

    Args:
        indices: numbers of the candidates. options: of the edit, with a guidance scale.
        strongest_shift: as for :func:`diagnose`. dtype: of the network. guided: whether there was a prompt.
    """
    what = f"NaN or Inf in {len(indices)} of {options.candidates}"
    if guided and not strongest_shift < EXCESSIVE_SHIFT:
        return Note(
            f"{what}, because guidance moved a step by {strongest_shift:.2g} times its own noise; lower the guidance scale, now "
            f"{options.guidance.scale:g}.",
            option="scale",
        )
    if dtype != torch.float32:
        return Note(f"{what}, which the network produced in {str(dtype).removeprefix('torch.')}; use fp32.", option="dtype")
    return Note(
        f"{what}, which the network produced in float32; its weights may be damaged, or its settings wrong.", option=("ddpm", "overrides")
    )


def diagnose(
    result: EditResult,
    region_mask: EditMask,
    schedule: Schedule,
    strongest_shift: float,
    broken: int,
    dtype: torch.dtype,
    unguided: Callable[[int], float | None],
) -> list[Note]:
    """Notes about guidance that had no effect, or none.

    If the best candidate is hardly nearer to the prompt than the source was, or guidance hardly moved a step, one unguided candidate is made with the
    same random numbers and compared: what it reaches without the prompt is not the effect of the prompt.

    Args:
        result: the ranked candidates. region_mask: at the model's size. schedule: of the edit.
        strongest_shift: largest :attr:`~blended_core.sample.Step.shift` of all steps. broken: number of gradients that were not finite.
        dtype: of the network.
        unguided: number of a candidate → CLIP distance of the same candidate made without a prompt.
    """
    options, best, before = result.options, result.candidates[0], result.source_distance
    notes = []
    if broken:
        advice, option = ("lower the guidance scale", "scale") if dtype == torch.float32 else ("use fp32", "dtype")
        notes.append(Note(f"The gradient of {broken} guided steps was not finite and was left out; {advice}.", option=option))
    gain, distance = best.score.gain, best.score.clip_distance
    idle = options.guidance.scale == 0 or strongest_shift < NEGLIGIBLE_SHIFT
    if gain is None or before is None or distance is None or (gain >= NEGLIGIBLE_GAIN * abs(before) and not idle):
        return notes
    without = unguided(best.index)
    negligible = NEGLIGIBLE_DIFFERENCE * abs(before)
    effective = without is not None and distance < without - negligible
    if effective and gain > -negligible:
        return notes
    if gain < -negligible:
        verdict = "The result is further from the prompt than the source image"
    elif gain > negligible:
        verdict = "Guidance had no effect beyond that of an edit without prompt" if without is not None else "Guidance had little effect"
    else:
        verdict = "Guidance had no effect"
    reasons = list(_reasons(result, region_mask, schedule, strongest_shift))
    if effective and not reasons:
        reasons = [("the source image shows much of it already; edit another part, or change the prompt", ())]
    texts = [text for text, _ in reasons] or [
        "the model may not be able to draw this, or CLIP may not know these words; try other words, more candidates or another seed"
    ]
    compared = "" if without is None else f", {without:.3f} without any prompt"
    notes.append(
        Note(
            f"{verdict}: the CLIP distance to the prompt was {before:.3f} before the edit and is {distance:.3f} now (gain {gain:+.3f}{compared}). "
            f"Likely reason: {'; '.join(texts)}.",
            option=list(dict.fromkeys(option for _, options in reasons for option in options)),
        )
    )
    return notes


def _reasons(result: EditResult, region_mask: EditMask, schedule: Schedule, strongest_shift: float) -> list[tuple[str, tuple[str, ...]]]:
    """(reason, the options that it is about)."""
    options, guidance = result.options, result.options.guidance
    found: list[tuple[str, tuple[str, ...]]] = []
    active = [guidance.at(index, len(schedule)) for index in range(schedule.start_index(options.strength) + 1)]
    if guidance.scale == 0:
        found.append(("the guidance scale is 0", ("scale",)))
    elif not any(at is not None and at.uses_clip for at in active):
        found.append(
            (
                f"guidance acts from {guidance.start:g} to {guidance.end:g} of the levels, and strength {options.strength:g} begins after that: "
                "raise the strength or the end of guidance",
                ("strength", "end"),
            )
        )
    elif strongest_shift < NEGLIGIBLE_SHIFT:
        found.append(
            (
                f"guidance never moved a step by more than {strongest_shift:.2g} of its own noise: raise the guidance scale, now {guidance.scale:g}",
                ("scale",),
            )
        )
    if options.strength < LOW_STRENGTH:
        found.append((f"at strength {options.strength:g} little can change: raise it (default 0.75)", ("strength",)))
    share = float(region_mask.inside.float().mean())
    if share < SMALL_MASK:
        found.append((f"the mask covers {share:.1%} of the region that the model sees: lower the context or widen the mask", ("context",)))
    return found
