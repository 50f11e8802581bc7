"""Settings of a checkpoint that somebody states: names, types, and whether they agree with the shapes of the weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from ..diffusion import MAX_STEPS, OBJECTIVES, VARIANCES, DiffusionConfig
from ..errors import LONGEST_VALUE, BlendedError, short_repr
from ..schedule import BETAS
from .unet import MAX_IMAGE_SIZE, UNetConfig

MAX_NUMBER = 1 << 20
"""The largest number that a setting can have: more than any network, and small enough for everything that is computed from it."""


def _whole(value: Any, most: int = MAX_NUMBER) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)) or not 1 <= int(value) <= most:
        raise ValueError
    return int(value)


def _optional(value: Any) -> int | None:
    """A whole number; None, 'none' and guided-diffusion's −1 mean that there is none."""
    return None if str(value).strip().lower() in ("none", "null", "", "-1") else _whole(value)


def _flag(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return words[str(value).strip().lower()]


def _choice(*choices: str) -> tuple[Callable[[Any], str], str]:
    """The conversion and the requirement of a setting with fixed values."""

    def convert(value: Any) -> str:
        if not isinstance(value, str) or value.strip() not in choices:
            raise ValueError
        return value.strip()

    return convert, f"{', '.join(choices[:-1])} or {choices[-1]}"


def _numbers(value: Any) -> tuple[float, ...]:
    parts = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    numbers = tuple(float(part) for part in parts)
    if any(not 0 <= n <= MAX_NUMBER for n in numbers):
        raise ValueError
    return tuple(int(n) if n == int(n) else n for n in numbers)


def _scale(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not 0 < number <= MAX_GUIDANCE_SCALE:
        raise ValueError
    return number


MAX_GUIDANCE_SCALE = 1e6
WHOLE = (_whole, f"a whole number, at least 1 and at most {MAX_NUMBER}")
STEPS = (partial(_whole, most=MAX_STEPS), f"a whole number, at least 1 and at most {MAX_STEPS}")
OPTIONAL = (_optional, f"a whole number, at least 1 and at most {MAX_NUMBER}, or none")
FLAG = (_flag, "true or false")
SETTINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "image_size": (partial(_whole, most=MAX_IMAGE_SIZE), f"a whole number of pixels, at least 1 and at most {MAX_IMAGE_SIZE}"),
    "steps": STEPS,
    **dict.fromkeys(("model_channels", "num_res_blocks", "in_channels", "out_channels", "num_heads"), WHOLE),
    "channel_mult": (_numbers, "numbers separated by commas"),
    "attention_downsampling": (_numbers, "whole numbers separated by commas"),
    **dict.fromkeys(("num_classes", "num_head_channels", "num_heads_upsample"), OPTIONAL),
    **dict.fromkeys(("resblock_updown", "use_scale_shift_norm", "conv_resample", "use_new_attention_order", "rescale_timesteps"), FLAG),
    "schedule": _choice(*BETAS),
    "objective": _choice(*OBJECTIVES),
    "variance": _choice(*VARIANCES),
    "guidance_scale": (_scale, f"a number above 0 and at most {MAX_GUIDANCE_SCALE:g}"),
    # Flags of guided-diffusion that state the same in another way.
    "num_channels": WHOLE,
    "diffusion_steps": STEPS,
    "attention_resolutions": (_numbers, "whole numbers of pixels separated by commas"),
    "noise_schedule": _choice(*BETAS),
    **dict.fromkeys(("learn_sigma", "class_cond", "predict_xstart", "sigma_small"), FLAG),
}
"""Name → (conversion, what a value must be), of every setting that can be stated."""
OWN = [field.name for kind in (UNetConfig, DiffusionConfig) for field in fields(kind)]
"""The names that do not come from guided-diffusion, for errors, which all names are too many for."""
RENAMED = {"num_channels": "model_channels", "noise_schedule": "schedule", "diffusion_steps": "steps"}
IGNORED = {"dropout", "use_checkpoint", "use_fp16", "timestep_respacing", "use_kl", "rescale_learned_sigmas"}
"""Flags of guided-diffusion that do not describe the weights."""
POWERS_OF_TWO = {2**i for i in range(32)}


def read_settings(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Stated settings under this package's names, converted to their types; values may be texts, as on a command line.

    Args:
        given: by the names of :class:`UNetConfig` and :class:`DiffusionConfig`, or by guided-diffusion's flags: num_channels, attention_resolutions
            (in pixels), learn_sigma, class_cond, noise_schedule, diffusion_steps, predict_xstart, sigma_small. They may be grouped under 'unet' and
            'diffusion'.
        source: 'override', 'metadata' or 'sidecar', for errors.

    Returns:
        The settings; attention_resolutions, class_cond and sigma_small unchanged, because their meaning depends on the network
        (:func:`resolve_settings`).

    Raises:
        BlendedError: for an unknown name, a value of the wrong type, or two different values for one setting.
    """
    flat: dict[str, Any] = {}
    for name, value in given.items():
        flat.update(value if name in ("unet", "diffusion") and isinstance(value, Mapping) else {name: value})
    stated: dict[str, Any] = {}
    for name, value in flat.items():
        if name in IGNORED or (name == "channel_mult" and value == ""):  # '' asks for the default of the image size
            continue
        if name not in SETTINGS:
            similar = difflib.get_close_matches(str(name)[:LONGEST_VALUE], SETTINGS)
            known = f"similar names are {', '.join(similar)}" if similar else f"known are {', '.join(OWN)}"
            raise _error(source, f"sets {short_repr(name)}, which is not a setting; {known}. Correct or remove it.")
        convert, requirement = SETTINGS[name]
        try:
            new = convert(value)
        except (ValueError, TypeError, KeyError, OverflowError):
            raise _error(source, f"sets {name} to {short_repr(value)}; it must be {requirement}.") from None
        target = RENAMED.get(name, name)
        if name == "learn_sigma":
            target, new = "out_channels", 6 if new else 3
        elif name == "predict_xstart":
            if not new and "objective" in flat:  # the objective may be v
                continue
            target, new = "objective", "x0" if new else "eps"
        if stated.get(target, new) != new:
            raise _error(source, f"sets {target} twice, to {stated[target]!r} and to {new!r}; remove one of them.")
        stated[target] = new
    # A stated number of heads takes precedence over a number of channels per head from a weaker source.
    if "num_heads" in stated:
        stated.setdefault("num_head_channels", None)
    return stated


def resolve_settings(stated: Mapping[str, Any], facts: Mapping[str, Any], image_size: int, source: str) -> dict[str, Any]:
    """Stated settings with the flags that depend on the network replaced by this package's settings.

    Args:
        stated: from :func:`read_settings`.
        facts: the settings that the shapes determine.
        image_size: in pixels.
        source: as for :func:`read_settings`.

    Raises:
        BlendedError: if a statement contradicts the shapes.
    """
    out = dict(stated)
    small = out.pop("sigma_small", None)
    if small is not None and facts["out_channels"] == facts["in_channels"]:  # a learned variance does not use it
        out.setdefault("variance", "fixed_small" if small else "fixed_large")
    conditional = out.pop("class_cond", None)
    if conditional is not None and conditional != (facts["num_classes"] is not None):
        raise _contradiction(source, "class_cond", str(conditional), f"{facts['num_classes'] or 'no'} classes")
    resolutions = out.pop("attention_resolutions", None)
    if resolutions is not None:
        if any(r < 1 for r in resolutions):
            raise _error(source, f"sets attention_resolutions to {short_repr(resolutions)}; they are pixels, at least 1.")
        out.setdefault("attention_downsampling", tuple(image_size // r for r in resolutions))
    for name in facts.keys() & out.keys():
        claim = out[name]
        if name == "attention_downsampling":  # a factor that the network never reaches has no effect
            claim = tuple(sorted(d for d in set(claim) if d < 2 ** len(facts["channel_mult"]) and d in POWERS_OF_TWO))
        if claim != facts[name]:
            pixels = f" ({resolutions} pixels of {image_size})" if resolutions is not None and name == "attention_downsampling" else ""
            raise _contradiction(source, name, f"{out[name]}{pixels}", repr(facts[name]))
        out[name] = facts[name]
    return out


def _contradiction(source: str, name: str, claim: str, fact: str) -> BlendedError:
    return _error(
        source, f"states that {name} is {claim[:LONGEST_VALUE]}, but the shapes of the weights show {fact}; correct or remove it."
    )


def _error(source: str, text: str) -> BlendedError:
    return BlendedError(f"the {source} {text}", option="overrides" if source == "override" else ())
