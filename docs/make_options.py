"""Writes docs/options.md from the declarations of the options: ``python docs/make_options.py``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from blended_core.cli.parser import GROUPS, flag_of  # noqa: E402
from blended_core.options import MAX_SEED, PRESETS, Option, declared  # noqa: E402

PAGE = ROOT / "docs" / "options.md"
INTRODUCTION = """# Options

Each option is declared once, in `blended_core/options.py` and, for networks and machine, in `blended_core/io/request.py`. This page, the arguments of
`blended-diffusion edit`, the inputs of the nodes and the validation come from these declarations. `python docs/make_options.py` writes this page.

- **Terminal**: the argument of `blended-diffusion edit`. `--set`, `--skip`, `--soft-mask` and the arguments for files are listed by its `--help`.
- **Library**: the name in `preset(name, …)`, `EditOptions` and `GuidanceOptions`. Networks and machine are arguments of the functions that load a
  network, and entries of `request` in `report.json`.
- **Node input**: the name of the input in ComfyUI. Options of guidance are inputs of *Guidance Options*, the others of *Blended Diffusion Sampler*, of
  the step nodes, or of the nodes that load a network.
- **Default**: the value in the preset `best`.
"""


def node_inputs() -> set[str]:
    """The names of all inputs of all nodes."""
    schema = json.loads((ROOT / "schema.lock.json").read_text("utf-8"))
    return {name for node in schema.values() for group in node["input"].values() for name in group}


def shown(value: Any) -> str:
    """A value as code, whole numbers without a fraction."""
    return "–" if value is None or value == "" else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def values_of(declaration: Option, default: Any) -> str:
    """The choices or the range of an option."""
    if declaration.choices:
        return ", ".join(f"`{choice}`" for choice in declaration.choices)
    if isinstance(default, bool):
        return "`True`, `False`"
    if declaration.low is None:
        return ""
    low = f"{'>' if declaration.above else '≥'} {declaration.low:g}"
    if declaration.high is None:
        return low
    return f"{low}, ≤ {'2⁶⁴ − 1' if declaration.high == MAX_SEED else f'{declaration.high:g}'}"


def page() -> str:
    """The text of docs/options.md."""
    inputs = node_inputs()
    tables: dict[str, list[str]] = {}
    for kind, heading in GROUPS:
        for name, (declaration, default) in declared(kind).items():
            flag, node = flag_of(name, declaration), declaration.node_input or name
            cells = [
                f"`{flag}`" if flag else "–",
                f"`{name}`",
                f"`{node}`" if node in inputs else "–",
                shown(default),
                values_of(declaration, default),
                declaration.help,
            ]
            tables.setdefault(declaration.group or heading, []).append(f"| {' | '.join(cells)} |")
    parts = [INTRODUCTION]
    for heading, rows in tables.items():
        head = ["| Terminal | Library | Node input | Default | Values | Meaning |", "|---|---|---|---|---|---|"]
        parts.append("\n".join([f"## {heading[0].upper()}{heading[1:]}", "", *head, *rows]) + "\n")
    return "\n".join([*parts, presets()])


def presets() -> str:
    """The table of the presets: the options that differ from ``best``."""
    flat = {name: {**asdict(options), **asdict(options.guidance)} for name, options in PRESETS.items()}
    names = [name for name in flat["best"] if name not in ("preset", "guidance") and len({str(flat[p][name]) for p in PRESETS}) > 1]
    rows = [f"| `{name}` | {' | '.join(shown(flat[p][name]) for p in PRESETS)} |" for name in names]
    head = [f"| Option | {' | '.join(f'`{name}`' for name in PRESETS)} |", f"|---|{'---|' * len(PRESETS)}"]
    return "\n".join(["## Presets", "", "Options without a row are the same in all presets.", "", *head, *rows]) + "\n"


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
