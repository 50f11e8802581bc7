"""Help pages and locales against the locked schema: nothing is missing, and nothing describes what no longer exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LOCK: dict[str, Any] = json.loads((ROOT / "schema.lock.json").read_text(encoding="utf-8"))
LANGUAGES = ("en", "ko")


def inputs(node: dict[str, Any]) -> list[str]:
    """Names of all inputs, those inside a dynamic choice as the page spells them: mode_steps."""
    out = []
    for group in node["input"].values():
        for name, spec in group.items():
            out.append(name)
            for option in spec.get("options", []):
                if isinstance(option, dict):
                    out += [f"{name}_{inner}" for g in option["inputs"].values() for inner in g]
    return out


def locale(language: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    return data


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_name_and_tooltip_is_there_and_no_other(language: str) -> None:
    texts = locale(language)
    assert sorted(texts) == sorted(LOCK)
    for name, node in LOCK.items():
        assert sorted(texts[name]["inputs"]) == sorted(inputs(node)), name
        assert sorted(texts[name]["outputs"]) == sorted(str(i) for i in range(len(node["output"]))), name
        assert texts[name]["display_name"] and texts[name]["description"]
        for part in (*texts[name]["inputs"].values(), *texts[name]["outputs"].values()):
            assert part["name"] and part["tooltip"], name


def test_the_english_names_are_those_of_the_schema() -> None:
    texts = locale("en")
    for name, node in LOCK.items():
        assert texts[name]["display_name"] == node["display_name"]
        assert [texts[name]["outputs"][str(i)]["name"] for i in range(len(node["output"]))] == node["output_name"]


def test_korean_is_korean() -> None:
    for name, node in locale("ko").items():
        for text in (
            node["display_name"],
            node["description"],
            *(p["tooltip"] for p in (*node["inputs"].values(), *node["outputs"].values())),
        ):
            assert re.search("[가-힣]", text), (name, text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_categories_are_translated(language: str) -> None:
    main = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))
    wanted = {part for node in LOCK.values() for part in node["category"].split("/")}
    assert set(main["nodeCategories"]) == wanted


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", sorted(LOCK))
def test_the_help_page_names_every_setting_of_the_node(name: str, language: str) -> None:
    page = (ROOT / "web" / "docs" / name / f"{language}.md").read_text(encoding="utf-8")
    texts = locale(language)[name]
    assert page.startswith(f"# {texts['display_name']}\n")
    rows = {cell.strip() for line in page.splitlines() if line.startswith("| ") for cell in line.split("|")[1].split(",")}
    spoken = {texts["inputs"][key]["name"] for key in inputs(LOCK[name])}
    header = {"setting", "설정", "setting (start)", "설정 (start)"}
    assert rows - header <= spoken, f"the page explains what the node does not have: {rows - header - spoken}"
    for key in inputs(LOCK[name]):
        assert texts["inputs"][key]["name"] in page, key


def test_there_is_no_page_of_a_node_that_is_gone() -> None:
    assert sorted(p.name for p in (ROOT / "web" / "docs").iterdir()) == sorted(LOCK)


@pytest.mark.parametrize("name", sorted(LOCK))
def test_the_help_page_shows_its_picture(name: str) -> None:
    # The page looks for pictures from the folder of all help pages, not from that of this one.
    for language in LANGUAGES:
        page = (ROOT / "web" / "docs" / name / f"{language}.md").read_text(encoding="utf-8")
        assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page) == [f"{name}/node.png"]
    assert (ROOT / "web" / "docs" / name / "node.png").stat().st_size < 60_000
