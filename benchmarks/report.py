"""The results as a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .encoder import ENCODER_TARGET
from .large import TARGETS as LARGE_TARGETS
from .measure import Ratio
from .reference import REFERENCE_TARGETS
from .start import FIRST
from .start import TARGETS as START_TARGETS
from .step import TARGETS

# A bar of the plot: (network, figure), ratio or number, the value of the unit length, and the target.
Target = tuple[float, str]
Row = tuple[tuple[str, str], Any, float, Target | None]
NOT_MEASURED = "Not measured yet."
ONE_THREAD = ("reference", "encoder")
"""Parts that always run with one thread."""
TEXT, LIGHT, NEUTRAL, MET, MISSED = (30, 34, 40), (222, 226, 232), (92, 125, 190), (54, 140, 84), (190, 70, 60)


PROFILES = {
    "profile of an exact step": "operations",
    "the same with open_clip's image encoder": "operations_open_clip",
    "of the floor, spent above it": "above_the_floor",
}
"""Row of the table → key of a step."""


def profile_text(shares: dict[str, float]) -> str:
    """Operations and their shares, such as 'mm 22.3%, addmm 20.4%'."""
    return ", ".join(f"{name.removeprefix('aten::')} {share:.1%}" for name, share in shares.items())


def as_text(values: dict[str, Any]) -> str:
    """A ratio from JSON as text, such as '1.67 (1.56–1.70)'."""
    return str(Ratio(**values))


def table(results: dict[str, Any]) -> str:
    """A Markdown table of all figures and their targets."""
    lines = ["| what | network | figure (quartiles) | to reach |", "|---|---|---|---|"]
    for name, value, target in figures(results):
        network, what = name
        text = as_text(value) if isinstance(value, dict) else f"{value:.2f}"
        lines.append(f"| {what} | {network} | {text} | {'' if target is None else f'{sign(target[1])} {target[0]:g}'} |")
    for step in results.get("steps", []):
        memory = ", ".join(f"{variant} {mib:.0f}" for variant, mib in step["memory_mib"].items())
        lines.append(f"| peak memory of tensors, MiB | {step['network']} | {memory} | |")
        for what, key in PROFILES.items():
            if key in step:
                lines.append(f"| {what} | {step['network']} | {profile_text(step[key])} | |")
        if "attention" in step:
            lines.append(f"| attention of an exact step | {step['network']} | {', '.join(step['attention'])} | |")
        for variant, gap in step["difference"].items():
            lines.append(
                f"| difference to the plain path: {variant} | {step['network']} | x {gap['x']:.1e}, gradient {gap['gradient']:.1e} | ≤ 1e-4, 1e-3 |"
            )
    for kind, memory in results.get("growth", {}).get("views_memory_mib", {}).items():
        text = ", ".join(f"{n}: {mib:.1f}" for n, mib in memory.items())
        lines.append(f"| peak memory by views, {kind}, MiB | small | {text} | |")
    for process in results.get("process", []):
        text = ", ".join(f"{variant} {mib:.0f}" for variant, mib in process["memory_mib"].items())
        lines.append(f"| largest memory of the process, MiB | {process['network']} | {text} | |")
    large = results.get("large", {})
    for case, found in large.get("cases", {}).items():
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["stages"].items() if seconds >= 0.05)
        lines.append(f"| whole edit, {case} | embedded | {as_text(found['seconds'])} s: {stages}; {found['memory_mib']:.0f} MiB | |")
    for name, found in large.get("png", {}).items():
        lines.append(f"| PNG file of 6000×4000, compression {name} | | {as_text(found['seconds'])} s, {found['mib']:.1f} MiB | |")
    return "\n".join(lines)


def networks_table(entries: list[dict[str, Any]], targets: dict[tuple[str, str], Target]) -> str:
    """A Markdown table with a row for every ratio and a column for every network; a target follows its figure."""
    rows = list(dict.fromkeys(what for entry in entries for what in entry["ratios"]))
    lines = [f"| | {' | '.join(entry['network'] for entry in entries)} |", "|---" * (len(entries) + 1) + "|"]
    for what in rows:
        cells = []
        for entry in entries:
            target = targets.get((entry["network"], what))
            cell = as_text(entry["ratios"][what]) if what in entry["ratios"] else "–"
            cells.append(cell if target is None else f"{cell}; to reach {sign(target[1])} {target[0]:g}")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reference_table(results: dict[str, Any]) -> str:
    """Ratios to the published code, and the profile of every variant."""
    entries = results.get("reference", [])
    if not entries:
        return NOT_MEASURED
    lines = ["| network | variant | largest shares of its time |", "|---|---|---|"]
    lines += [f"| {e['network']} | {variant} | {profile_text(shares)} |" for e in entries for variant, shares in e["operations"].items()]
    return networks_table(entries, REFERENCE_TARGETS) + "\n\n" + "\n".join(lines)


def encoder_table(results: dict[str, Any]) -> str:
    """Ratios to open_clip's encoder, and the profile of every encoder."""
    entries = results.get("encoder", {}).get("encoders", [])
    if not entries:
        return NOT_MEASURED
    lines = ["| network | encoder | largest shares of its time |", "|---|---|---|"]
    lines += [f"| {e['network']} | {variant} | {profile_text(shares)} |" for e in entries for variant, shares in e["operations"].items()]
    return networks_table(entries, encoder_targets(entries)) + "\n\n" + "\n".join(lines)


def encoder_targets(entries: list[dict[str, Any]]) -> dict[tuple[str, str], Target]:
    """The target of the encoder in float32, for every network."""
    return {(entry["network"], "float32 / open_clip"): ENCODER_TARGET for entry in entries}


def machine_table(results: dict[str, Any]) -> str:
    """What every part was measured on."""
    lines = ["| part | processor | bfloat16 | threads | torch |", "|---|---|---|---|---|"]
    for part, machine in results.get("machines", {}).items():
        half = {True: "yes", False: "no"}.get(machine.get("bfloat16"), "not recorded")
        threads = 1 if part.startswith(ONE_THREAD) else machine["threads"]
        lines.append(f"| {part} | {machine['device']} | {half} | {threads} | {machine['torch']} |")
    return "\n".join(lines)


def sign(which: str) -> str:
    """The sign of a target: 'least' → ≥, 'most' → ≤."""
    return "≥" if which == "least" else "≤"


def figures(results: dict[str, Any]) -> list[tuple[tuple[str, str], Any, tuple[float, str] | None]]:
    """((network, figure), ratio or number, target) in the order of the table."""
    out: list[tuple[tuple[str, str], Any, tuple[float, str] | None]] = []
    for step in results.get("steps", []):
        for what, value in (step["ratios"] | step["memory_ratios"]).items():
            out.append(((step["network"], what), value, TARGETS.get((step["network"], what))))
    for n, value in results.get("growth", {}).get("batch", {}).items():
        out.append((("small", f"time an image, batch {n} / batch 1"), value, (1.0, "most") if n != "1" else None))
    for n, value in results.get("growth", {}).get("views", {}).items():
        out.append((("small", f"time, {n} views / 1"), value, None))
    edit = results.get("edit", {})
    for n, value in edit.get("steps", {}).items():
        out.append((("small", f"steps, picture of {n} px / 256"), value, (1.1, "most") if n == "4096" else None))
    for n, value in edit.get("cut and paste", {}).items():
        out.append((("small", f"cut, paste and score, picture of {n} px / 256"), value, None))
    if edit:
        out.append((("small", "cut, paste and score a pixel, 4096 px / 2048"), edit["a pixel, 4096 / 2048"], (1.1, "most")))
    for what, value in results.get("large", {}).get("bars", {}).items():
        out.append((("embedded", f"6000×4000: {what}"), value, (LARGE_TARGETS[what], "most")))
    for process in results.get("process", []):
        for what, value in process["ratios"].items():
            out.append(((process["network"], f"x̂0 step, {what}"), value, None))
        out.append(((process["network"], "x̂0 step, freed memory kept / given back"), process["kept"], None))
    load = results.get("load", {})
    for name, value in load.get("ratios", {}).items():
        out.append(
            (("full", f"loading as {name} / reading the file from the system's cache"), value, (1.2, "most") if name == "float32" else None)
        )
    for name, value in load.get("memory_over_float32_weights", {}).items():
        out.append((("full", f"largest memory while loading as {name} / weights in float32"), value, (1.1, "most")))
    for which, of in results.get("start", {}).get("quartiles", {}).items():
        for name, value in of.items():
            target = (START_TARGETS[name], "most") if which == FIRST and name in START_TARGETS else None
            out.append(((which, f"CPU seconds, {name}"), value, target))
    return out


def compared_figures(results: dict[str, Any]) -> list[tuple[tuple[str, str], Any, Target | None]]:
    """The figures of the parts reference and encoder, as :func:`figures`."""
    encoders = results.get("encoder", {}).get("encoders", [])
    parts = [(results.get("reference", []), REFERENCE_TARGETS), (encoders, encoder_targets(encoders))]
    return [
        ((entry["network"], what), value, targets.get((entry["network"], what)))
        for entries, targets in parts
        for entry in entries
        for what, value in entry["ratios"].items()
    ]


def meets_target(value: Any, target: tuple[float, str]) -> bool:
    """Whether a number, or the median of a ratio, meets its target."""
    number = value["median"] if isinstance(value, dict) else value
    return bool(number >= target[0] if target[1] == "least" else number <= target[0])


def plot(path: Path, results: dict[str, Any]) -> None:
    """Plots the times of a step relative to the floor, and all figures with a target relative to the target."""
    rows = [*compared_figures(results), *figures(results)]
    times: list[Row] = [(name, value, 1.0, None) for name, value, _ in rows if isinstance(value, dict) and name[1].endswith("/ floor")]
    targets: list[Row] = [(name, value, target[0], target) for name, value, target in rows if target is not None]
    groups = {"time of a step, relative to the floor": times, "figures with a target, relative to the target": targets}
    height, left, width = 30, 520, 1220
    image = Image.new("RGB", (width, 40 + sum(56 + height * len(group) for group in groups.values())), "white")
    draw = ImageDraw.Draw(image)
    font, top = ImageFont.load_default(14), 16
    for title, group in groups.items():
        draw.text((16, top), title, TEXT, font=ImageFont.load_default(18))
        top += 38
        largest = max([1.0, *((value["high"] if isinstance(value, dict) else value) / whole for _, value, whole, _ in group)])
        scale = (width - left - 210) / largest
        for (network, what), value, whole, target in group:
            ends = (value["low"], value["median"], value["high"]) if isinstance(value, dict) else (value, value, value)
            low, middle, high = (left + end / whole * scale for end in ends)
            color = NEUTRAL if target is None else MET if meets_target(value, target) else MISSED
            draw.text((left - 12, top + 12), f"{network}: {what}", TEXT, font=font, anchor="rm")
            draw.rectangle((left, top + 3, middle, top + 21), color)
            if high > low:
                draw.line((low, top + 12, high, top + 12), TEXT, 2)
            draw.line((left + scale, top - 3, left + scale, top + 27), TEXT, 2)
            text = f"{ends[1]:.2f}" + (f"  (at {target[1]} {target[0]:g})" if target else "")
            draw.text((width - 190, top + 12), text, TEXT, font=font, anchor="lm")
            top += height
        top += 18
    image.save(path)
