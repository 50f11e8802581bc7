"""Writes the tables and the plot of docs/benchmarks.md from docs/benchmarks.json.

    python -m benchmarks.document [runs/benchmarks/benchmarks.json ...]

Given results replace those of the same parts and networks in docs/benchmarks.json first, so parts can be measured in separate runs. The text around the
tables is written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from blended_core.io.atomic import write_bytes

from .report import encoder_table, machine_table, plot, reference_table, table

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLES = {"reference": reference_table, "encoder": encoder_table, "figures": table, "machines": machine_table}


def merged(record: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """A record with the parts of a run in place of its own; in lists, with the entries of the same networks in place of its own.

    The machine of a run is noted for each of its parts.
    """
    result = {**record, "machines": dict(record.get("machines", {}))}
    for part, value in run.items():
        if part == "machine":
            continue
        if isinstance(value, list):
            new = {entry["network"]: entry for entry in value}
            old = {entry["network"]: entry for entry in record.get(part, [])}
            result[part] = list({**old, **new}.values())
            for network in new:
                result["machines"][f"{part}, {network}"] = run["machine"]
        else:
            result[part] = value
            result["machines"][part] = run["machine"]
    return result


def with_tables(text: str, results: dict[str, Any]) -> str:
    """A document with new tables between its comments ``<!-- NAME -->`` and ``<!-- end -->``."""
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        count = text.count(start)
        if count != 1:
            raise ValueError(f"the document has {count} comments <!-- {name} -->; it needs one.")
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{make(results)}\n\n{end}{rest.partition(end)[2]}"
    return text


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.document", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="*", help="results of python -m benchmarks to take over")
    args = parser.parse_args()
    record = json.loads((DOCS / "benchmarks.json").read_text("utf-8"))
    for run in args.runs:
        record = merged(record, json.loads(run.read_text("utf-8")))
    page = with_tables((DOCS / "benchmarks.md").read_text("utf-8"), record)
    write_bytes(DOCS / "benchmarks.json", json.dumps(record, indent=1).encode() + b"\n")
    write_bytes(DOCS / "benchmarks.md", page.encode())
    plot(DOCS / "images" / "benchmarks.png", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
