"""The notation of respacing: which steps of a diffusion process are kept (Nichol & Dhariwal 2021). Needs no arrays, so that an option is checked at once."""

from __future__ import annotations

from .errors import BlendedError, short_repr

LOG_SNR = "logsnr"
"""Prefix of a respacing that is uniform in the logarithm of the signal-to-noise ratio."""


def space_timesteps(steps: int, respacing: str | int) -> list[int]:
    """The steps of a process that respacing keeps, ascending.

    Args:
        steps: length of the process that the network was trained on.
        respacing: a number (that many, evenly); ``'ddimN'`` (a whole stride that gives exactly N); or counts separated
            by commas, one for each equal section of the process, the least noisy section first. ``'logsnrN'`` needs the noise schedule too
            (:func:`~blended_core.schedule.log_snr_timesteps`).

    Raises:
        BlendedError: if the process cannot be divided in this way.
    """
    text = str(respacing).strip()
    if text.startswith("ddim"):
        count = step_count(text[4:], text)
        for stride in range(1, steps + 1):
            kept = range(0, steps, stride)
            if len(kept) == count:
                return list(kept)
        raise BlendedError(
            f"no whole stride takes exactly {short_repr(count)} of {steps} steps; use {short_repr(str(count))} instead.", option="steps"
        )
    counts = [step_count(part, text) for part in text.split(",")]
    kept_steps: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (1 if i < steps % len(counts) else 0)
        if count > size:
            raise BlendedError(
                f"respacing {short_repr(text)} takes {short_repr(count)} steps of a section of {size}; take at most {size}.", option="steps"
            )
        stride_f = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept_steps.append(start + round(position))
            position += stride_f
        start += size
    return sorted(set(kept_steps))


def check_respacing(respacing: str | int) -> None:
    """Raises BlendedError if a respacing has the wrong form; whether it fits a process is checked with the process."""
    text = str(respacing).strip()
    prefix = next((p for p in ("ddim", LOG_SNR) if text.startswith(p)), "")
    for part in [text[len(prefix) :]] if prefix else text.split(","):
        step_count(part, text)


def step_count(text: str, whole: str) -> int:
    """A number of steps in the text of a respacing; BlendedError, which shows the ``whole`` text, if it is none."""
    try:
        count = int(text)
    except ValueError:
        raise BlendedError(
            f"respacing {short_repr(whole)} has the wrong form; give a number (100), 'ddim25', 'logsnr20', or counts of sections ('50,25,10').",
            option="steps",
        ) from None
    if count < 1:
        raise BlendedError(f"respacing {short_repr(whole)} keeps {short_repr(count)} steps; keep at least 1.", option="steps")
    return count
