"""Adds the addresses of the published repository to pyproject.toml: ``python docs/addresses.py OWNER/NAME COMMIT``.

The registry requires the addresses of the repository, the icon and the banner. They depend on the fork that publishes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
USAGE = "python docs/addresses.py OWNER/NAME COMMIT"


def with_addresses(text: str, repository: str, commit: str) -> str:
    """The text of pyproject.toml with the addresses added to their tables."""
    raw = f"https://raw.githubusercontent.com/{repository}/{commit}/docs/images"
    added = {
        "[project.urls]\n": f'Repository = "https://github.com/{repository}"\n',
        "[tool.comfy]\n": f'Icon = "{raw}/icon.png"\nBanner = "{raw}/banner.jpg"\n',
    }
    for table, lines in added.items():
        if text.count(table) != 1:
            raise SystemExit(f"pyproject.toml has {text.count(table)} tables {table.strip()}; there must be one.")
        text = text.replace(table, table + lines)
    return text


def main() -> None:
    """Command line."""
    if len(sys.argv) != 3 or not re.fullmatch(r"[\w.-]+/[\w.-]+", sys.argv[1]):
        raise SystemExit(f"usage: {USAGE}")
    text = PYPROJECT.read_text(encoding="utf-8")
    PYPROJECT.write_text(with_addresses(text, sys.argv[1], sys.argv[2]), encoding="utf-8")


if __name__ == "__main__":
    main()
