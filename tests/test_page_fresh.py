"""What needs a page of its own: another renderer, a second page, a reload. Apart from test_page, since one thread drives one browser at a time."""

from __future__ import annotations

import json

import pytest

from .page import LISTEN, VUE, Page, needs_browser, opened
from .server import Server, needs_comfyui
from .test_page import BLUEPRINTS, TEMPLATES, template

pytestmark = [needs_comfyui, needs_browser, pytest.mark.slow]

SET_STEPS = "steps => { for (const n of window.app.graph.nodes) for (const w of n.widgets ?? []) if (w.name === 'steps') w.value = steps; }"
TEXT = "() => window.app.graph.nodes.find(n => n.type === 'BlendedLoadDDPM').widgets.find(w => w.name === 'shown_text')?.element.value"


def test_templates_can_be_read_in_a_window_of_1600_by_1000(comfyui: Server) -> None:
    with opened(comfyui.url, size=(1600, 1000)) as page:
        for name in TEMPLATES:
            page.load(template(name), name)
            page.fit()
            assert page.draws_text(), f"{name}: {page.scale():.2f}"


def test_nodes_do_not_touch_in_the_vue_renderer(comfyui: Server) -> None:
    with opened(comfyui.url, size=(1600, 1000), **VUE) as page:
        for name in TEMPLATES:
            page.load(template(name), name)
            page.fit()
            assert page.touching() == [], name


@pytest.mark.parametrize("settings", [{}, VUE], ids=["canvas", "vue"])
def test_a_node_shows_its_text_in_the_page_that_runs_and_again_after_a_reload(comfyui: Server, settings: dict[str, bool]) -> None:
    with opened(comfyui.url, **settings) as page:
        other = Page(comfyui.url, page.page.context.new_page(), page.settings)
        other.open()
        for each in (other, page):
            each.page.bring_to_front()
            each.load(template("Quick edit"), "Quick edit")
            each.page.evaluate(SET_STEPS, 2)
        assert page.page.evaluate(TEXT) is None
        assert page.run()["end"] == "success"
        assert "64 px" in page.page.evaluate(TEXT)
        assert other.page.evaluate(TEXT) is None, "the text went to another page"
        assert (page.touching() if settings else page.overlaps()) == []
        assert "shown_text" not in json.dumps([page.workflow(), page.prompt()])
        page.page.reload(wait_until="domcontentloaded")
        page.page.wait_for_function("() => window.app?.graph?.nodes?.some(n => n.type === 'BlendedLoadDDPM')")
        page.wait(3)
        assert page.page.evaluate(TEXT) is None
        assert page.run()["end"] == "success"
        assert "64 px" in page.page.evaluate(TEXT), "the node is cached, and its text is gone"
        assert page.complaints == []


def test_the_app_of_quick_edit_shows_its_settings_and_runs(comfyui: Server) -> None:
    with opened(comfyui.url) as page:
        page.load(template("Quick edit"), "Quick edit")
        page.page.evaluate(SET_STEPS, 2)
        page.command("Comfy.ToggleLinear")
        page.wait(2)
        if (skip := page.page.get_by_text("Skip", exact=True)).count():  # the page's own tour of apps
            skip.first.click()
        text = page.page.evaluate("() => document.body.innerText")
        assert all(word in text for word in ("background", "strength", "seed", "candidates")), text
        assert "guide_from" not in text
        assert page.page.evaluate("() => [...document.querySelectorAll('textarea')].some(e => e.value === 'a mushroom')")
        page.page.evaluate(LISTEN)
        page.page.get_by_role("button", name="Run", exact=True).last.click()
        assert page.ended()["end"] == "success"
        page.wait(2)
        assert page.page.evaluate("() => [...document.images].some(i => i.src.includes('quick_edit') && i.naturalWidth > 100)")
        assert page.complaints == []


def test_every_run_of_a_blueprint_takes_a_new_seed(comfyui: Server) -> None:
    with opened(comfyui.url) as page:
        page.add_by_search(BLUEPRINTS[0])
        seed = "() => window.app.graph.nodes[0].widgets.find(w => w.name === 'seed').value"
        before = page.page.evaluate(seed)
        page.page.evaluate(
            """() => {
              const app = window.app, LG = window.LiteGraph, node = app.graph.nodes[0];
              const scene = LG.createNode('BlendedDemoScene'), save = LG.createNode('PreviewImage');
              for (const n of [scene, save]) app.graph.add(n);
              scene.connect(0, node, node.inputs.findIndex(i => i.type === 'IMAGE'));
              scene.connect(1, node, node.inputs.findIndex(i => i.type === 'MASK'));
              node.connect(0, save, 0);
              node.widgets.find(w => w.name === 'steps').value = 2;
            }"""
        )
        assert page.run()["end"] == "success"
        assert page.page.evaluate(seed) != before
