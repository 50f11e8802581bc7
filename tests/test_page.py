"""Templates, blueprints, search, help and errors in ComfyUI's real web page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from .page import Page, needs_browser, opened
from .server import ROOT, Server, needs_comfyui

pytestmark = [needs_comfyui, needs_browser, pytest.mark.slow]
TEMPLATES = sorted(p.stem for p in (ROOT / "workflows").glob("*.json"))
BLUEPRINTS = sorted(p.stem for p in (ROOT / "subgraphs").glob("*.json") if "BlendedSampler" in p.read_text(encoding="utf-8"))
OWN_MODEL = "CLIP guidance on your own model"
"""The template that needs a checkpoint; test_latent_model runs it with another loader."""
PACK = "blended-diffusion"  # the folder's name in this test's ComfyUI
FEW = 6


@pytest.fixture(scope="module")
def page(comfyui: Server) -> Iterator[Page]:
    """One page for the tests of this file, in English."""
    with opened(comfyui.url, size=(1800, 1000)) as page:
        yield page


def template(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return data


def shape(workflow: dict[str, Any]) -> Any:
    """What must survive being saved and loaded: nodes with their values, and who is wired to whom."""
    nodes = sorted((n["id"], n["type"], n.get("title"), json.dumps(n.get("widgets_values"))) for n in workflow["nodes"])
    return nodes, sorted(tuple(link[1:]) for link in workflow["links"])


def shorter(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with few steps."""
    for node in prompt.values():
        for name in ("steps", "mode.steps"):
            if name in node["inputs"]:
                node["inputs"][name] = FEW
    return prompt


def test_the_page_opens_without_a_complaint(page: Page) -> None:
    page.clear()  # ComfyUI's own first workflow asks for models that are not here
    page.page.evaluate("() => document.querySelector('[data-testid=error-overlay-dismiss]')?.click()")
    page.wait(0.5)
    assert page.shown() == []
    assert page.complaints == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_loads_clean_saves_the_same_and_runs(page: Page, comfyui: Server, name: str) -> None:
    page.load(template(name), name)
    if name == OWN_MODEL:
        assert page.overlaps() == [] and page.wrong() and all(complaint.startswith("Load Checkpoint") for complaint in page.wrong())
        assert shape(page.workflow()) == shape(template(name))
        return
    assert page.wrong() == [] and page.shown() == [] and page.overlaps() == []
    saved = page.workflow()
    assert shape(saved) == shape(template(name))
    page.load(saved, name)
    assert shape(page.workflow()) == shape(saved)

    outcome = comfyui.run(shorter(page.prompt()))
    assert outcome.error is None and outcome.previews and outcome.progress
    shows = [str(n["id"]) for n in template(name)["nodes"] if n["type"] in ("SaveImage", "PreviewImage", "MaskPreview")]
    for node in shows:
        assert all(picture.std() > 1 for picture in comfyui.pictures(outcome, node)), node
    assert page.complaints == []


def test_a_template_is_opened_from_the_browser_and_run(page: Page, comfyui: Server) -> None:
    page.clear()
    page.command("Comfy.BrowseTemplates")
    dialog = page.page.locator("[role=dialog], .p-dialog").first
    dialog.get_by_text(PACK, exact=True).first.click()
    dialog.get_by_text("Quick edit", exact=True).first.click()
    page.page.wait_for_function("() => window.app.graph.nodes.length > 5")
    page.wait(2)
    assert page.wrong() == [] and page.shown() == []
    page.page.evaluate(
        "steps => { for (const n of window.app.graph.nodes) for (const w of n.widgets ?? []) if (w.name === 'steps') w.value = steps; }",
        FEW,
    )
    end = page.run()
    assert end["end"] == "success" and end["previews"] >= FEW * 0.75 and page.shown() == []
    by_type = {n["type"]: str(n["id"]) for n in page.workflow()["nodes"]}
    outputs = page.outputs()
    files = outputs[by_type["SaveImage"]]["images"]
    assert len(files) == 4
    before = np.array(_open(comfyui, outputs[by_type["PreviewImage"]]["images"][0])).astype(int)
    for file in files:
        after = np.array(_open(comfyui, file)).astype(int)
        changed = (before != after).any(-1)
        assert 0.1 < changed.mean() < 0.5 and not changed[0].any() and not changed[:, 0].any()
    assert "CLIP distance" in json.dumps(outputs[by_type["PreviewAny"]])


def _open(server: Server, file: dict[str, str]) -> Any:
    from PIL import Image

    return Image.open(server.folder / file["type"] / file["subfolder"] / file["filename"])


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("CLIP Guidance Step", "BlendedCLIPGuidanceStep"),
        ("text-driven editing", "BlendedSampler"),
        ("restore unmasked pixels", "BlendedFinalPaste"),
    ],
)
def test_a_node_is_found_by_its_name_and_its_aliases(page: Page, words: str, kind: str) -> None:
    new = page.add_by_search(words)
    assert [n["type"] for n in new] == [kind]


@pytest.mark.parametrize(
    ("words", "node"),
    [
        ("outpaint", "Blended Diffusion Sampler"),
        ("edit image", "Blended Diffusion Sampler"),
        ("erase", "Blended Diffusion Sampler"),
        ("fill", "Blended Diffusion Sampler"),
        ("pixel diffusion", "Blended Diffusion Sampler"),
        ("pixel diffusion", "Load DDPM"),
        ("negative prompt", "Encode Prompt"),
    ],
)
def test_words_of_a_person_find_a_node(page: Page, words: str, node: str) -> None:
    assert node in page.found(words)


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_found_by_search_and_runs(page: Page, comfyui: Server, name: str) -> None:
    (new,) = page.add_by_search(name)
    assert new["title"] == name and new["inner"]
    page.page.evaluate(
        """([id, steps]) => {
          const app = window.app, LG = window.LiteGraph, node = app.graph.getNodeById(id);
          const scene = LG.createNode('BlendedDemoScene'), save = LG.createNode('PreviewImage');
          for (const n of [scene, save]) app.graph.add(n);
          scene.widgets.find(w => w.name === 'object').value = 'mushroom';
          scene.connect(0, node, node.inputs.findIndex(i => i.type === 'IMAGE'));
          scene.connect(1, node, node.inputs.findIndex(i => i.type === 'MASK'));
          node.connect(0, save, 0);
          node.widgets.find(w => w.name === 'steps').value = steps;
        }""",
        [new["id"], FEW],
    )
    assert page.wrong() == []
    prompt = page.prompt()
    (sampler,) = [n for n in prompt.values() if n["class_type"] == "BlendedSampler"]
    assert sampler["inputs"]["steps"] == FEW, "the outer setting does not reach the node inside"
    outcome = comfyui.run(prompt)
    assert outcome.error is None
    (shown,) = [k for k, n in prompt.items() if n["class_type"] == "PreviewImage"]
    assert len(comfyui.pictures(outcome, shown)) == 4


def test_the_blueprint_for_any_model_runs_with_a_model_and_changes_nothing_outside(page: Page, comfyui: Server) -> None:
    (new,) = page.add_by_search("Cut, Sample, Paste (Blended Diffusion)")
    page.page.evaluate(
        """([id, steps]) => {
          const app = window.app, LG = window.LiteGraph, node = app.graph.getNodeById(id);
          const [ddpm, model, scene, save] = ['BlendedLoadDDPM', 'BlendedDDPMAsModel', 'BlendedDemoScene', 'PreviewImage'].map(type => LG.createNode(type));
          for (const n of [ddpm, model, scene, save]) app.graph.add(n);
          const input = name => node.inputs.findIndex(i => i.name === name);
          ddpm.connect(0, model, 0);
          scene.connect(0, node, input('image'));
          scene.connect(1, node, input('mask'));
          ['model', 'positive', 'negative', 'vae'].forEach((name, slot) => model.connect(slot, node, input(name)));
          node.connect(0, save, 0);
          for (const [name, value] of [['steps', steps], ['size', 64], ['cfg', 1]]) node.widgets.find(w => w.name === name).value = value;
        }""",
        [new["id"], FEW],
    )
    assert page.wrong() == []
    prompt = page.prompt()
    (scene,) = [k for k, n in prompt.items() if n["class_type"] == "BlendedDemoScene"]
    prompt["before"] = {"class_type": "PreviewImage", "inputs": {"images": [scene, 0]}}
    prompt["mask"] = {"class_type": "MaskPreview", "inputs": {"mask": [scene, 1]}}
    outcome = comfyui.run(prompt)
    assert outcome.error is None, outcome.error
    (shown,) = [k for k, n in prompt.items() if n["class_type"] == "PreviewImage" and k != "before"]
    before, after, mask = (comfyui.pictures(outcome, name)[0] for name in ("before", shown, "mask"))
    changed = (before != after).any(-1)
    assert changed.any() and not changed[mask[..., 0] < 128].any()


def test_the_help_page_is_ours_and_has_its_picture(page: Page) -> None:
    page.add_by_search("Blended Diffusion Sampler")
    page.page.evaluate("() => { const n = window.app.graph.nodes[0]; window.app.canvas.selectNode(n); }")
    page.wait(1)
    page.page.locator("[data-testid=info-button], button:has(.lucide--info)").first.click()
    page.wait(2)
    text = page.page.locator("[data-testid=properties-panel]").inner_text()
    assert "Edits the masked part of an image" in text and "mask_edges" in text
    pictures = page.page.evaluate(
        "() => [...document.querySelectorAll('[data-testid=properties-panel] img')].map(i => [i.getAttribute('src'), i.naturalWidth])"
    )
    assert pictures and all(width > 100 for _, width in pictures), pictures
    assert page.complaints == []


def test_an_error_is_shown_with_our_sentence(page: Page) -> None:
    page.load(template("Quick edit"), "Quick edit")
    page.page.evaluate(
        """() => {
          const app = window.app, sampler = app.graph.nodes.find(n => n.type === 'BlendedSampler');
          const mask = window.LiteGraph.createNode('SolidMask');
          app.graph.add(mask);
          mask.widgets.find(w => w.name === 'value').value = 0;
          mask.connect(0, sampler, sampler.inputs.findIndex(i => i.name === 'mask'));
        }"""
    )
    end = page.run()
    assert end["end"] == "error" and end["error"].startswith("the MASK is empty")
    assert page.shown()
    page.page.locator("[data-testid=error-overlay-see-errors]").first.click()
    page.wait(1)
    assert "the MASK is empty" in page.page.locator("[data-testid=properties-panel]").inner_text()


def test_cancel_in_the_page_and_then_a_normal_run(page: Page) -> None:
    page.load(template("Quick edit"), "Quick edit")
    page.press_run()
    page.page.wait_for_function("() => window.__run.previews > 1", timeout=120_000)
    page.command("Comfy.Interrupt")
    assert page.ended()["end"] == "interrupted"
    page.page.evaluate(
        "steps => { for (const n of window.app.graph.nodes) for (const w of n.widgets ?? []) if (w.name === 'steps') w.value = steps; }",
        FEW,
    )
    assert page.run()["end"] == "success"
