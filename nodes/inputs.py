"""Inputs that several nodes have, and what their values mean."""

from __future__ import annotations

from comfy_api.latest import io

from ..blended_core.errors import BlendedError
from ..blended_core.random import MAX_SEED as MAX_SEED


def context() -> io.Float.Input:
    """How much of the surroundings is edited along."""
    return io.Float.Input(
        "context",
        default=1.6,
        min=1.0,
        max=16.0,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip="Side of the square that is edited over the mask's. More surroundings fit the edit in better and leave it fewer pixels.",
    )


def respacing() -> io.String.Input:
    """Sections of steps, where a number is not enough."""
    return io.String.Input(
        "respacing",
        default="",
        optional=True,
        advanced=True,
        tooltip="Instead of steps, guided-diffusion's way to say it: ddim25, or 50,25,10 (sections, the clean end first).",
    )


def samplers() -> tuple[io.Combo.Input, io.Float.Input]:
    """DDPM or DDIM, and the noise of the latter."""
    return (
        io.Combo.Input(
            "sampler",
            options=["ddpm", "ddim"],
            default="ddpm",
            optional=True,
            advanced=True,
            tooltip="ddpm draws noise at every step, as the paper does. ddim is deterministic and needs fewer steps.",
        ),
        io.Float.Input(
            "eta",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="Noise of ddim: 0 none, 1 as much as ddpm.",
        ),
    )


def class_choice(default: str) -> io.String.Input:
    """What a class-conditional model is told; an empty default leaves it to the preset."""
    return io.String.Input(
        "class_choice",
        default=default,
        optional=True,
        advanced=True,
        tooltip="Of a class-conditional model: zero (no class), random (a new one every step), or the number of a class."
        + ("" if default else " Empty: as the preset."),
    )


def class_of(choice: str) -> str | int:
    """'zero', 'random' or a number."""
    word = choice.strip().lower() or "zero"
    return int(word) if word.isdecimal() else word


def feather(advanced: bool | None = None) -> io.Int.Input:
    """A soft edge inside the mask."""
    return io.Int.Input(
        "feather",
        default=0,
        min=0,
        max=512,
        optional=True,
        advanced=advanced,
        tooltip="Pixels over which the edit fades in, inwards from the mask's edge: the outside stays untouched.",
    )


def rows_from(count: int, wanted: int, what: str) -> list[int]:
    """Which of ``count`` masks or pictures belongs to each of ``wanted``: one for all, or one for each."""
    if count not in (1, wanted):
        raise BlendedError(f"{count} {what} do not fit {wanted} pictures; give one for all, or one for each.")
    return [0] * wanted if count == 1 else list(range(wanted))
