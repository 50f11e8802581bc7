"""The pack in other versions of ComfyUI (``COMFYUI_PATHS``) and of its page (``COMFYUI_FRONTENDS``). README states which were tried."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .page import VUE, Page, needs_browser, opened
from .server import COMFYUI, OTHER_CORES, OTHER_FRONTENDS, Server, needs_comfyui, started
from .test_page import TEMPLATES, shorter, template

NOTHING = "neither COMFYUI_PATHS nor COMFYUI_FRONTENDS names another version, so the pack was tried in one version only"
# The older ones with the renderer that is their default: their Vue renderers draw nodes higher than the later ones.
VERSIONS: list[tuple[Path, str | None, dict[str, bool]]] = [(core, None, {}) for core in OTHER_CORES]
VERSIONS += [(COMFYUI, str(page), settings) for page in OTHER_FRONTENDS for settings in ({}, VUE)]


def name_of(version: Any) -> str:
    """The name of a version in the list of tests."""
    if version is None:
        return "none"
    core, frontend, settings = version
    return f"{core.name} {frontend or ''} {'vue' if settings else ''}".strip().replace("/", "_")


pytestmark = [needs_comfyui, needs_browser, pytest.mark.slow, pytest.mark.skipif(not VERSIONS, reason=NOTHING)]


@pytest.fixture(scope="module", params=VERSIONS or [None], ids=name_of)
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Page]]:
    """A server of each version, and its page."""
    core, frontend, settings = request.param
    options = () if frontend is None else ("--front-end-root", frontend)
    with started(tmp_path_factory.mktemp("version"), *options, comfyui=core) as server, opened(server.url, **settings) as page:
        yield server, page


def test_templates_load_and_can_be_read(version: tuple[Server, Page]) -> None:
    _, page = version
    for name in TEMPLATES:
        page.load(template(name), name)
        page.fit()
        assert page.wrong() == [] and page.shown() == [], name
        if page.settings.get("Comfy.VueNodes.Enabled"):
            assert page.touching() == [], name
        else:
            assert page.overlaps() == [], name
            assert page.draws_text(), f"{name}: {page.scale()}"
    assert page.complaints == []


@pytest.mark.parametrize("name", ["Quick edit", "Six nodes step by step"])
def test_a_template_runs(version: tuple[Server, Page], name: str) -> None:
    server, page = version
    page.load(template(name), name)
    outcome = server.run(shorter(page.prompt()))
    assert outcome.error is None and outcome.progress
    kinds: dict[str, Any] = {n["type"]: str(n["id"]) for n in template(name)["nodes"]}
    (before,) = server.pictures(outcome, kinds["PreviewImage"])
    for after in server.pictures(outcome, kinds["SaveImage"]):
        changed = (before.astype(int) != after.astype(int)).any(-1)
        assert 0.05 < changed.mean() < 0.5 and not changed[0].any() and not changed[:, 0].any()
    if kinds["BlendedLoadDDPM"] in outcome.executed:
        assert "64 px" in outcome.outputs[kinds["BlendedLoadDDPM"]]["text"][0]
