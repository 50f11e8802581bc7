"""Why guidance had no visible effect on an edit, in sentences for the user."""

from __future__ import annotations

from collections.abc import Callable

from .errors import Note
from .mask import EditMask
from .result import EditResult
from .schedule import Schedule

NEGLIGIBLE_SHIFT = 0.01
"""Of a step, in units of its own noise."""
NEGLIGIBLE_GAIN = 0.1
"""Of the CLIP distance, as a share of the source's."""
NEGLIGIBLE_DIFFERENCE = 0.02
"""Between a guided and an unguided candidate, as a share of the source's CLIP distance."""
LOW_STRENGTH = 0.4
SMALL_MASK = 0.02
"""As a share of the region."""


def diagnose(
    result: EditResult,
    region_mask: EditMask,
    schedule: Schedule,
    strongest_shift: float,
    broken: int,
    unguided: Callable[[int], float | None],
) -> list[Note]:
    """Notes about guidance that had no effect, or none.

    If the best candidate is hardly nearer to the prompt than the source was, or guidance hardly moved a step, one unguided candidate is made with the
    same random numbers and compared: what it reaches without the prompt is not the effect of the prompt.

    Args:
        result: the ranked candidates. region_mask: at the model's size. schedule: of the edit.
        strongest_shift: largest :attr:`~blended_core.sample.Step.shift` of all steps. broken: number of gradients that were not finite.
        unguided: number of a candidate → CLIP distance of the same candidate made without a prompt.
    """
    options, best, before = result.options, result.candidates[0], result.source_distance
    notes = []
    if broken:
        notes.append(
            Note(
                f"The gradient of {broken} guided steps was not finite and was left out; if the model runs in half precision, use fp32.",
                option="dtype",
            )
        )
    gain, distance = best.score.gain, best.score.clip_distance
    idle = options.guidance.scale == 0 or strongest_shift < NEGLIGIBLE_SHIFT
    if gain is None or before is None or distance is None or (gain >= NEGLIGIBLE_GAIN * abs(before) and not idle):
        return notes
    without = unguided(best.index)
    if without is not None and distance < without - NEGLIGIBLE_DIFFERENCE * abs(before):
        return notes
    reasons = list(_reasons(result, region_mask, schedule, strongest_shift))
    texts = [text for text, _ in reasons] or [
        "the model may not be able to draw this, or CLIP may not know these words; try other words, more candidates or another seed"
    ]
    compared = "" if without is None else f" ({without:.3f} without any prompt)"
    notes.append(
        Note(
            f"Guidance had no effect: the CLIP distance to the prompt was {before:.3f} before the edit and is {distance:.3f} now{compared}. Likely "
            f"reason: {'; '.join(texts)}.",
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
    elif not any(at is not None and at.scale > 0 for at in active):
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
