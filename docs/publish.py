"""Prepares a clone for the ComfyUI registry: ``python docs/publish.py OWNER/NAME COMMIT CHANGELOG``.

Adds the addresses of the repository to pyproject.toml, because they depend on the fork that publishes, and writes the changes of this version from
CHANGELOG.md into the file CHANGELOG, which ``comfy node publish --changelog-file`` reads.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
USAGE = "python docs/publish.py OWNER/NAME COMMIT CHANGELOG"


def with_addresses(text: str, repository: str, commit: str) -> str:
    """The text of pyproject.toml with the addresses added to their tables."""
    home = f"https://github.com/{repository}"
    images = f"{home}/raw/{commit}/docs/images"
    added = {
        "[project.urls]\n": f'Repository = "{home}"\nDocumentation = "{home}/tree/{commit}/docs"\n"Bug Tracker" = "{home}/issues"\n',
        "[tool.comfy]\n": f'Icon = "{images}/icon.png"\nBanner = "{images}/banner.jpg"\n',
    }
    for table, lines in added.items():
        if text.count(table) != 1:
            raise SystemExit(f"pyproject.toml has {text.count(table)} tables {table.strip()}; there must be one.")
        text = text.replace(table, table + lines)
    return text


def version_of(pyproject: str) -> str:
    """The version in the text of pyproject.toml."""
    found = re.search(r'^version = "(\d+\.\d+\.\d+)"$', pyproject, re.MULTILINE)
    if found is None:
        raise SystemExit('pyproject.toml has no line version = "X.Y.Z".')
    return found[1]


def changes_of(changelog: str, version: str) -> str:
    """The section of a version in the text of CHANGELOG.md, without its heading."""
    found = re.search(rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if found is None or not found[1].strip():
        raise SystemExit(f"CHANGELOG.md has no entries for version {version}; add the section ## [{version}] before publishing.")
    return found[1].strip()


def main() -> None:
    """Command line."""
    if len(sys.argv) != 4 or not re.fullmatch(r"[\w.-]+/[\w.-]+", sys.argv[1]):
        raise SystemExit(f"usage: {USAGE}")
    pyproject = ROOT / "pyproject.toml"
    text = pyproject.read_text(encoding="utf-8")
    changes = changes_of((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version_of(text))
    Path(sys.argv[3]).write_text(changes + "\n", encoding="utf-8")
    pyproject.write_text(with_addresses(text, sys.argv[1], sys.argv[2]), encoding="utf-8")


if __name__ == "__main__":
    main()
