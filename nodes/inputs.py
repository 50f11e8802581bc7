"""Sockets and inputs that several nodes share; inputs made from the library's declarations of options."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..blended_core.errors import BlendedError
from ..blended_core.options import EditOptions, declared

CATEGORY = "Blended Diffusion"
STEPS_CATEGORY = CATEGORY + "/steps"
DDPM = io.Custom("BLENDED_DDPM")
CLIP = io.Custom("BLENDED_CLIP")
PROMPT = io.Custom("BLENDED_PROMPT")
GUIDANCE = io.Custom("BLENDED_GUIDANCE")
REGION = io.Custom("BLENDED_REGION")


def from_option(kind: type[Any], option: str, name: str | None = None, **changes: Any) -> Any:
    """The input for an option of the library: its default, choices, limits and help text.

    Args:
        kind: the dataclass that declares the option, such as ``GuidanceOptions``.
        option: name of the option; ``name``: of the input, if it differs.
        changes: arguments of the input that differ from the declaration, such as ``default=4`` or ``advanced=True``. Inputs are optional unless
            ``optional=False``.
    """
    declaration, default = declared(kind)[option]
    values = {"default": default, "tooltip": declaration.help, "optional": True, **changes}
    default = values["default"]
    if declaration.choices:
        return io.Combo.Input(name or option, **{"options": list(declaration.choices), **values})
    if isinstance(default, bool):
        return io.Boolean.Input(name or option, **values)
    if isinstance(default, str):
        return io.String.Input(name or option, **values)
    low = declaration.low if declaration.node_low is None else declaration.node_low
    high = declaration.high if declaration.node_high is None else declaration.node_high
    number = io.Float if isinstance(default, float) else io.Int
    return number.Input(name or option, **{"min": low, "max": high, "step": declaration.step, **values})


def edit_option(option: str, name: str | None = None, **changes: Any) -> Any:
    """The input for an option of :class:`EditOptions`."""
    return from_option(EditOptions, option, name, **changes)


def steps(**changes: Any) -> io.Int.Input:
    """The number of steps. The option itself is a text, because it also takes a respacing."""
    tooltip = "Length of the whole diffusion process in steps. More steps are slower and finer."
    return io.Int.Input("steps", **{"max": 4000, "tooltip": tooltip, **changes})


def respacing() -> io.String.Input:
    """The option ``steps`` as a text, where a number is not enough."""
    tooltip = (
        "Replaces steps, in the notation of guided-diffusion: ddim25 (a constant stride), or 50,25,10 (sections, the least noisy first). logsnr20 is "
        "uniform in the logarithm of the signal-to-noise ratio."
    )
    return io.String.Input("respacing", default="", optional=True, advanced=True, tooltip=tooltip)


def parse_class(text: str) -> str | int:
    """'zero', 'random' or the number of a class; empty: 'zero'."""
    word = text.strip().lower() or "zero"
    return int(word) if word.isdecimal() and len(word) <= 20 else word  # Python refuses to read thousands of digits


def row_indices(count: int, rows: int, name: str) -> list[int]:
    """For each of ``rows`` images the index of the mask or image that belongs to it, if there is one for all, or one for each."""
    if count not in (1, rows):
        raise BlendedError(f"{count} {name} were given for {rows} images; give one for all, or one for each.")
    return [0] * rows if count == 1 else list(range(rows))
