"""The command as a person runs it, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blended_core.cli import main


def run(*arguments: object) -> int:
    """The exit code of a command line."""
    return main([str(a) for a in arguments])


def report_of(out: Path) -> dict[str, Any]:
    """The report in a result folder, which must be strict JSON."""
    report: dict[str, Any] = json.loads(
        (out / "report.json").read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    return report
