"""Help pages and locales against the locked schema: nothing is missing, and nothing describes what no longer exists."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LOCK: dict[str, Any] = json.loads((ROOT / "schema.lock.json").read_text(encoding="utf-8"))
# Every folder is held by the tests below. A new language also needs the characters of its script.
LANGUAGES = sorted(p.name for p in (ROOT / "locales").iterdir() if p.is_dir())
TRANSLATED = [language for language in LANGUAGES if language != "en"]
NUMBER = re.compile(r"(?<![A-Za-z0-9.])[−-]?\d+(?:\.\d+)?")
SCRIPTS = {"ko": "[가-힣]", "zh": "[一-鿿]", "ja": "[ぁ-ヿ一-鿿]"}


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


def page_of(name: str, language: str) -> str:
    return (ROOT / "web" / "docs" / name / f"{language}.md").read_text(encoding="utf-8")


def prose(node: dict[str, Any]) -> list[str]:
    """The texts of a node that are written in a language, in a fixed order: names may stay as they are (ddpm, eta)."""
    parts = [node[group][key]["tooltip"] for group in ("inputs", "outputs") for key in sorted(node[group])]
    return [node["display_name"], node["description"], *parts]


def test_the_languages_are_there() -> None:
    assert {"en", "ja", "ko", "zh"} <= set(LANGUAGES)
    for name in LOCK:
        wanted = {"node.png"} | {f"{language}.md" for language in LANGUAGES}
        assert {p.name for p in (ROOT / "web" / "docs" / name).iterdir()} == wanted, name


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


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_translation_is_in_its_script(language: str) -> None:
    for name, node in locale(language).items():
        for text in prose(node):
            assert re.search(SCRIPTS[language], text), (name, text)
        for line in page_of(name, language).splitlines():
            if line and not re.fullmatch(r"\|[-|]+\|", line):
                assert re.search(SCRIPTS[language], line), (name, line)


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_translation_has_the_numbers_and_values_of_the_english_text(language: str) -> None:
    english, translated = locale("en"), locale(language)
    for name in LOCK:
        pairs = list(zip(prose(english[name]), prose(translated[name]), strict=True))
        pairs.append((page_of(name, "en"), page_of(name, language)))
        for ours, theirs in pairs:
            missing = Counter(NUMBER.findall(ours)) - Counter(NUMBER.findall(theirs))
            assert not missing, (name, missing, theirs)
        # Names of sockets and settings are translated; values, files and commands are not.
        names = {part["name"] for node in english.values() for group in ("inputs", "outputs") for part in node[group].values()}
        values = set(re.findall("`([^`]+)`", pairs[-1][0])) - names
        assert values <= set(re.findall("`([^`]+)`", pairs[-1][1])), name


def test_chinese_is_simplified_with_full_width_punctuation() -> None:
    for name, node in locale("zh").items():
        for text in (*prose(node), page_of(name, "zh").replace("](", " ")):
            assert not re.findall(r"[一-鿿] ?[,.;:!?()]|[,;:!?()] ?[一-鿿]", text), (name, text)
            # GB 2312 holds the simplified characters and not the traditional ones that they replace.
            assert "".join(re.findall("[一-鿿]", text)).encode("gb2312"), (name, text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_categories_are_translated(language: str) -> None:
    main = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))
    wanted = {part for node in LOCK.values() for part in node["category"].split("/")}
    assert set(main["nodeCategories"]) == wanted


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", sorted(LOCK))
def test_the_help_page_names_every_setting_of_the_node(name: str, language: str) -> None:
    page = page_of(name, language)
    texts = locale(language)[name]
    assert page.startswith(f"# {texts['display_name']}\n")
    table = [line for line in page.splitlines() if line.startswith("| ")][1:]
    rows = {cell.strip() for line in table for cell in re.split("[,、]", line.split("|")[1])}
    spoken = {texts["inputs"][key]["name"] for key in inputs(LOCK[name])}
    assert rows <= spoken, f"the page explains what the node does not have: {rows - spoken}"
    for key in inputs(LOCK[name]):
        assert texts["inputs"][key]["name"] in page, key


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_help_warns_where_links_are_lost(language: str) -> None:
    """Of the one node whose inputs depend on a choice: its links can be had back by undo alone."""
    dynamic = [name for name, node in LOCK.items() if "COMFY_DYNAMICCOMBO" in json.dumps(node)]
    assert dynamic == ["BlendedNoiseBackground"]
    assert "Ctrl+Z" in page_of(dynamic[0], language)


def test_there_is_no_page_of_a_node_that_is_gone() -> None:
    assert sorted(p.name for p in (ROOT / "web" / "docs").iterdir()) == sorted(LOCK)


@pytest.mark.parametrize("name", sorted(LOCK))
def test_the_help_page_shows_its_picture(name: str) -> None:
    # The page looks for pictures from the folder of all help pages, not from that of this one.
    for language in LANGUAGES:
        page = page_of(name, language)
        assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page) == [f"{name}/node.png"]
    assert (ROOT / "web" / "docs" / name / "node.png").stat().st_size < 60_000
