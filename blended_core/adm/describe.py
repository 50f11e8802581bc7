"""How the settings of a checkpoint were decided, as a table, as plain values, and as a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..weights.sets import MAX_LISTED, MAX_NAME_SHOWN, WeightSet
from .detect import Detection
from .probe import group_of

SOURCES = {
    "shapes": ("the shapes of the weights", "certain"),
    "signature": ("the family's signature", "a published family"),
    "metadata": ("the file's metadata", "stated"),
    "sidecar": ("the .json beside it", "stated"),
    "override": ("you", "stated"),
    "file": ("the file's hash", "a published file"),
    "probe": ("the probe", ""),
    "default": ("a guess", ""),
}
"""Source of a setting → (who decided it, how certain it is, where the source determines that)."""


def certainty(detection: Detection, setting: str) -> str:
    """How certain a setting is, in a few words: 'certain', '15.60 times better than v, in 100% of the cells', 'not sure'."""
    source, probe = detection.sources[setting], detection.probe
    if source == "probe" and probe is not None:
        group = group_of(setting)
        if group not in probe.margins:
            return "the only possible value"
        words = f"{probe.margins[group]:.2f} times better than {probe.rivals[group]}, in {probe.agreement[group]:.0%} of the cells"
        return f"{words}: unsure" if group in probe.unsure or probe.uninformative else words
    return SOURCES[source][1] or ("not sure" if setting in detection.guessed else "no effect here")


def as_dict(detection: Detection, path: Path) -> dict[str, Any]:
    """Plain values: family, prefix, the sets of weights, for every setting its value, source and certainty, and the result of the probe."""
    return {
        "file": str(path),
        "family": detection.family,
        "prefix": detection.prefix,
        "weights": [
            {"name": s.name, "averaged": s.averaged, "complete": s.complete, "tensors": len(s.names), "used": s == detection.weights}
            for s in detection.sets
        ],
        "settings": {
            name: {"value": value, "decided_by": source, "sure": certainty(detection, name)}
            for name, (value, source) in detection.settings.items()
        },
        "guessed": list(detection.guessed),
        "probe": None if detection.probe is None else {k: v for k, v in detection.probe.to_dict().items() if k != "settings"},
    }


def as_table(detection: Detection, path: Path) -> str:
    """A table for a terminal: setting, value, decided by, how sure."""
    rows = [("setting", "value", "decided by", "how sure")]
    rows += [(name, _text(value), SOURCES[source][0], certainty(detection, name)) for name, (value, source) in detection.settings.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])).rstrip() for row in rows]
    lines.insert(1, "  ".join("─" * width for width in (*widths, 8)))
    head = [f"{path.name}: {detection.family or 'an ADM network of no published family'}"]
    if len(detection.sets) > 1:
        head.append(f"{len(detection.sets)} sets of weights:")
        head += [f"  {_described(s)}{', used' if s == detection.weights else ''}" for s in detection.sets[:MAX_LISTED]]
        head += [f"  and {len(detection.sets) - MAX_LISTED} more"] if len(detection.sets) > MAX_LISTED else []
    elif detection.prefix:
        head.append(f"weights under {detection.prefix[:MAX_NAME_SHOWN]!r}")
    foot = []
    if (probe := detection.probe) is not None:
        effort = f"{probe.forwards} forward passes, {probe.seconds:.1f} s" if probe.forwards else "cached"
        foot.append(f"calibration probe: {effort}; error of the predicted noise {probe.error:.4f}, trivial error {probe.trivial_error:.3f}")
    if detection.guessed:
        foot.append(f"guessed: {', '.join(detection.guessed)}")
    return "\n".join([*head, "", *lines, *([""] if foot else []), *foot])


def summary(detection: Detection) -> str:
    """At most five lines, for narrow places such as a node."""
    unet, process = detection.unet, detection.diffusion
    count = "1 head" if unet.num_heads == 1 else f"{unet.num_heads} heads"
    heads = count if unet.num_head_channels is None else f"heads of {unet.num_head_channels}"
    classes = f", {unet.num_classes} classes" if unet.num_classes else ""
    used = f"; weights {detection.weights.name[:MAX_NAME_SHOWN]}, one of {len(detection.sets)} sets" if len(detection.sets) > 1 else ""
    lines = [
        (detection.family or "an ADM network of no published family") + used,
        f"{unet.image_size} px, {unet.model_channels} channels × {', '.join(f'{m:g}' for m in unet.channel_mult)}{classes}",
        f"{process.schedule} {process.steps}, predicts {process.objective}, {heads}",
    ]
    if detection.guidance_scale is not None:
        lines[-1] += f", guidance scale {detection.guidance_scale:g}"
    if detection.probe is not None:
        margins = ", ".join(f"{group} ({margin:.2f}×)" for group, margin in detection.probe.margins.items())
        lines.append(f"decided by the probe: {margins}")
    if detection.guessed:
        lines.append(f"guessed: {', '.join(detection.guessed)}")
    return "\n".join(lines)


def _described(weights: WeightSet) -> str:
    """'ema.module (averaged), 210 tensors'."""
    averaged = " (averaged)" if weights.averaged else ""
    return f"{weights.name[:MAX_NAME_SHOWN]}{averaged}, {len(weights.names)} tensors{'' if weights.complete else ', incomplete'}"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(f"{v:g}" for v in value) or "none"
    return "none" if value is None else str(value)
