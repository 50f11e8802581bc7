"""What a checkpoint is, for people and for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .detect import Detection
from .probe import group_of

DECIDED = {
    "shapes": "the shapes of the weights",
    "signature": "the family's signature",
    "metadata": "the file's metadata",
    "sidecar": "the .json beside it",
    "override": "you",
    "file": "the file's hash",
    "probe": "trying",
    "default": "a guess",
}
SURE = {
    "shapes": "certain",
    "metadata": "stated",
    "sidecar": "stated",
    "override": "stated",
    "signature": "a published family",
    "file": "a published file",
}


def how_sure(found: Detection, setting: str) -> str:
    """A few words about a setting: 'certain', '15.6 times better than v', 'not sure'."""
    source = found.sources[setting]
    if source == "probe" and found.probe is not None:
        margin = found.probe.margin_of(setting)
        if margin is None:
            return "the only one that fits"
        group = group_of(setting)
        words = f"{margin:.2f} times better than {found.probe.rivals[group]}, in {found.probe.agreement[group]:.0%} of the places"
        return f"{words}: hardly" if group in found.probe.unsure or found.probe.clueless else words
    if source in SURE:
        return SURE[source]
    return "not sure" if setting in found.guessed else "changes nothing here"


def as_dict(found: Detection, path: Path) -> dict[str, Any]:
    """Plain values: family, prefix, and for every setting its value, source and certainty."""
    probe = found.probe
    return {
        "file": str(path),
        "family": found.family,
        "prefix": found.prefix,
        "settings": {
            name: {"value": value, "decided_by": source, "sure": how_sure(found, name)} for name, (value, source) in found.settings.items()
        },
        "guessed": list(found.guessed),
        "probe": None
        if probe is None
        else {
            "margins": probe.margins,
            "agreement": probe.agreement,
            "rivals": probe.rivals,
            "error": probe.error,
            "blind": probe.blind,
            "forwards": probe.forwards,
            "seconds": probe.seconds,
        },
    }


def as_table(found: Detection, path: Path) -> str:
    """Columns for a terminal: setting, value, decided by, how sure."""
    rows = [("setting", "value", "decided by", "how sure")]
    rows += [(name, _text(value), DECIDED[source], how_sure(found, name)) for name, (value, source) in found.settings.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])).rstrip() for row in rows]
    lines.insert(1, "  ".join("─" * width for width in (*widths, 8)))
    head = [f"{path.name}: {found.family or 'an ADM network of no published family'}"]
    if found.prefix:
        head.append(f"weights under {found.prefix!r}")
    foot = []
    if found.probe is not None:
        did = f"{found.probe.forwards} passes of the network, {found.probe.seconds:.1f} s" if found.probe.forwards else "remembered"
        foot.append(f"tried out: {did}; the error of its noise is {found.probe.error:.4f}, of answering nothing {found.probe.blind:.3f}")
    if found.guessed:
        foot.append(f"guessed: {', '.join(found.guessed)}; state what you know with --set KEY=VALUE")
    return "\n".join([*head, "", *lines, *([""] if foot else []), *foot])


def summary(found: Detection) -> str:
    """Some lines for a narrow place, such as a node."""
    unet, process = found.unet, found.diffusion
    count = "1 head" if unet.num_heads == 1 else f"{unet.num_heads} heads"
    heads = count if unet.num_head_channels is None else f"heads of {unet.num_head_channels}"
    classes = f", {unet.num_classes} classes" if unet.num_classes else ""
    lines = [
        found.family or "an ADM of no published family",
        f"{unet.image_size} px, {unet.model_channels} channels × {', '.join(f'{m:g}' for m in unet.channel_mult)}{classes}",
        f"{process.schedule} {process.steps}, predicts {process.objective}, {heads}",
    ]
    if found.probe is not None:
        lines.append("found by trying: " + ", ".join(f"{group} ({margin:.2f}×)" for group, margin in found.probe.margins.items()))
    if found.guessed:
        lines.append(f"guessed: {', '.join(found.guessed)}")
    return "\n".join(lines)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(f"{v:g}" for v in value) or "none"
    return "none" if value is None else str(value)
