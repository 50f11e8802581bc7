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
VERSIONS: list[tuple[Path, tuple[str, ...]]] = [(core, ()) for core in OTHER_CORES]
VERSIONS += [(COMFYUI, ("--front-end-root", str(page))) for page in OTHER_FRONTENDS]

pytestmark = [needs_comfyui, needs_browser, pytest.mark.slow, pytest.mark.skipif(not VERSIONS, reason=NOTHING)]


@pytest.fixture(scope="module", params=VERSIONS or [None], ids=lambda v: Path(v[1][1] if v[1] else v[0]).name if v else "none")
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of each version."""
    core, options = request.param
    with started(tmp_path_factory.mktemp("version"), *options, comfyui=core) as server:
        yield server


@pytest.fixture(scope="module", params=[{}, VUE], ids=["canvas", "vue"])
def page(version: Server, request: pytest.FixtureRequest) -> Iterator[Page]:
    """Its page, with both renderers."""
    with opened(version.url, **request.param) as page:
        yield page


def test_templates_load_and_can_be_read(page: Page) -> None:
    for name in TEMPLATES:
        page.load(template(name), name)
        page.fit()
        assert page.wrong() == [] and page.shown() == [] and page.overlaps() == [], name
        assert page.draws_text(), f"{name}: {page.scale()}"
        if page.settings.get("Comfy.VueNodes.Enabled"):
            assert page.touching() == [], name
    assert page.complaints == []


@pytest.mark.parametrize("name", ["Quick edit", "Six nodes step by step"])
def test_a_template_runs(page: Page, version: Server, name: str) -> None:
    page.load(template(name), name)
    outcome = version.run(shorter(page.prompt()))
    assert outcome.error is None and outcome.progress
    kinds: dict[str, Any] = {n["type"]: str(n["id"]) for n in template(name)["nodes"]}
    (before,) = version.pictures(outcome, kinds["PreviewImage"])
    for after in version.pictures(outcome, kinds["SaveImage"]):
        changed = (before.astype(int) != after.astype(int)).any(-1)
        assert 0.05 < changed.mean() < 0.5 and not changed[0].any() and not changed[:, 0].any()
    if kinds["BlendedLoadDDPM"] in outcome.executed:
        assert "64 px" in outcome.outputs[kinds["BlendedLoadDDPM"]]["text"][0]
