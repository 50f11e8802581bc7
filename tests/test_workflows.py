"""Templates and blueprints against the locked schema: they use only known nodes and inputs, and every node is in a template."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
LOCK: dict[str, Any] = json.loads((ROOT / "schema.lock.json").read_text(encoding="utf-8"))
TEMPLATES = sorted((ROOT / "workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
WORDS_ONLY = {"MarkdownNote"}


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def graphs(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """The graph and those inside its nodes."""
    return [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]


def slots(node: str) -> dict[str, Any]:
    """Every input of a node of the pack; those inside a choice as the page spells them: mode.steps."""
    out = {}
    for group in LOCK[node]["input"].values():
        for name, spec in group.items():
            out[name] = spec
            for option in spec.get("options", []):
                if isinstance(option, dict):
                    out |= {f"{name}.{inner}": s for g in option["inputs"].values() for inner, s in g.items()}
    return out


def complaints(workflow: dict[str, Any]) -> list[str]:
    """What in a workflow does not fit the schema, in words."""
    out = []
    for graph in graphs(workflow):
        inner = {s["id"] for s in workflow.get("definitions", {}).get("subgraphs", [])}
        nodes = {n["id"]: n for n in graph["nodes"]}
        for node in nodes.values():
            kind = node["type"]
            if not kind.startswith("Blended"):
                continue
            if kind not in LOCK:
                out.append(f"there is no node {kind}")
                continue
            known = slots(kind)
            for name in [i["name"] for i in node["inputs"]]:
                if name not in known:
                    out.append(f"{kind} has no input {name}")
            for name, value in node.get("widgets_values_named", {}).items():
                spec = known.get(name)
                if spec is None and name != "control_after_generate":
                    out.append(f"{kind} has no setting {name}")
                elif spec is not None:
                    choices = [o if isinstance(o, str) else o["key"] for o in spec.get("options", [])]
                    if choices and value not in choices:
                        out.append(f"{kind}.{name} is {value!r}, not one of {choices}")
                    if "min" in spec and not spec["min"] <= value <= spec["max"]:
                        out.append(f"{kind}.{name} is {value}, outside {spec['min']}…{spec['max']}")
            if [o["type"] for o in node["outputs"]] != LOCK[kind]["output"]:
                out.append(f"{kind} gives {LOCK[kind]['output']}, not {[o['type'] for o in node['outputs']]}")
        for raw in graph["links"]:
            link = (
                raw
                if isinstance(raw, dict)
                else dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), raw, strict=True))
            )
            for end in ("origin_id", "target_id"):
                if link[end] >= 0 and link[end] not in nodes and link[end] not in inner:
                    out.append(f"link {link['id']} has lost its {end}")
    return out


@pytest.mark.parametrize("path", [*TEMPLATES, *BLUEPRINTS], ids=lambda p: p.stem)
def test_it_fits_the_schema(path: Path) -> None:
    assert complaints(read(path)) == []


def test_the_check_sees_what_is_wrong() -> None:
    workflow = read(TEMPLATES[0])
    ours = next(n for n in workflow["nodes"] if n["type"] == "BlendedSampler")
    ours["widgets_values_named"] |= {"preset": "worst", "steps": -1, "gone": 1}
    ours["inputs"].append({"name": "lost", "type": "IMAGE", "link": None})
    workflow["links"].append([999, 998, 0, ours["id"], 0, "IMAGE"])
    assert sorted(complaints(workflow)) == [
        "BlendedSampler has no input lost",
        "BlendedSampler has no setting gone",
        "BlendedSampler.preset is 'worst', not one of ['best', 'fast', 'paper', 'official']",
        "BlendedSampler.steps is -1, outside 0…4000",
        "link 999 has lost its origin_id",
    ]


def test_every_node_is_in_a_template() -> None:
    used = {node["type"] for path in TEMPLATES for node in read(path)["nodes"]}
    assert set(LOCK) - used == set()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_a_template_has_a_thumbnail_and_words_and_needs_no_file(path: Path) -> None:
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and picture.size == (512, 512)
    assert path.with_suffix(".jpg").stat().st_size < 150_000
    nodes = read(path)["nodes"]
    assert [n for n in nodes if n["type"] in WORDS_ONLY]
    assert not [n for n in nodes if n["type"].startswith("LoadImage")], "red as soon as it is opened where the file is absent"
    for node in nodes:
        if node["type"] in ("BlendedLoadDDPM", "BlendedLoadCLIP"):
            assert "embedded" in node["widgets_values"]


def test_there_is_no_thumbnail_without_a_template() -> None:
    assert sorted(p.stem for p in (ROOT / "workflows").glob("*.jpg")) == [p.stem for p in TEMPLATES]
    assert {p.suffix for p in (ROOT / "workflows").iterdir()} == {".json", ".jpg"}


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.stem)
def test_a_blueprint_is_one_node_with_the_file_s_name(path: Path) -> None:
    workflow = read(path)
    (node,) = workflow["nodes"]
    (subgraph,) = workflow["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"] and node["title"] == subgraph["name"] == path.stem
    assert subgraph["description"] and subgraph["category"] == "Blended Diffusion"
    assert [i["name"] for i in node["inputs"]] == [i["name"] for i in subgraph["inputs"]]
    assert {"image", "images"} <= {i["name"] for i in subgraph["inputs"]} | {o["name"] for o in subgraph["outputs"]}
    assert not workflow["links"]


def test_the_readme_names_every_template_and_blueprint() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (*TEMPLATES, *BLUEPRINTS):
        assert path.stem in readme, path.stem


@pytest.mark.parametrize("path", [*TEMPLATES, *BLUEPRINTS], ids=lambda p: p.stem)
def test_every_node_names_its_package_and_version(path: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    name, version = (re.search(rf'^{key} = "(.+)"$', project, re.MULTILINE) for key in ("name", "version"))
    assert name is not None and version is not None
    workflow = read(path)
    subgraphs = {s["id"] for s in workflow.get("definitions", {}).get("subgraphs", [])}
    for graph in graphs(workflow):
        for node in graph["nodes"]:
            if node["type"] in WORDS_ONLY | subgraphs:
                continue
            told = node["properties"]["cnr_id"], node["properties"]["ver"]
            if node["type"] in LOCK:
                assert told == (name[1], version[1]), "run: python -m docs.make_workflows --packages"
            else:
                assert told[0] == "comfy-core" and re.fullmatch(r"\d+\.\d+\.\d+", told[1]), node["type"]


def test_the_list_of_nodes_is_that_of_the_pack() -> None:
    texts = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    listed = json.loads((ROOT / "node_list.json").read_text(encoding="utf-8"))
    assert listed == {name: texts[name]["description"] for name in LOCK}, "run: python -m docs.make_workflows --packages"


def test_the_app_of_quick_edit_shows_widgets_and_a_result_that_exist() -> None:
    workflow = read(ROOT / "workflows" / "Quick edit.json")
    nodes = {str(n["id"]): n for n in workflow["nodes"]}
    data = workflow["extra"]["linearData"]
    assert workflow["extra"]["linearMode"] is False, "it opens as a graph"
    assert [name for _, name in data["inputs"]] == ["background", "text", "strength", "seed", "candidates"]
    for node, name in data["inputs"]:
        assert name in nodes[node]["widgets_values_named"]
    assert [nodes[node]["type"] for node in data["outputs"]] == ["SaveImage"]


def test_blueprints_have_the_same_inputs_in_the_same_order() -> None:
    shared = ["image", "mask", "prompt", "checkpoint", "clip", "guidance_scale", "steps", "strength", "seed", "candidates"]
    whole_edits = [path for path in BLUEPRINTS if "BlendedSampler" in path.read_text(encoding="utf-8")]
    assert len(whole_edits) == 3
    for path in whole_edits:
        (subgraph,) = read(path)["definitions"]["subgraphs"]
        names = [i["name"].replace("object_mask", "mask") for i in subgraph["inputs"]]
        assert names[: len(shared)] == shared, path.stem
        assert [o["name"] for o in subgraph["outputs"]] == ["images", "scores"]
        (sampler,) = (n for n in subgraph["nodes"] if n["type"] == "BlendedSampler")
        assert sampler["widgets_values_named"]["control_after_generate"] == "randomize"


def test_the_blueprint_for_any_model_feeds_an_input_to_all_that_need_it() -> None:
    (subgraph,) = read(ROOT / "subgraphs" / "Cut, Sample, Paste (Blended Diffusion).json")["definitions"]["subgraphs"]
    kinds = {node["id"]: node["type"] for node in subgraph["nodes"]}
    fed: dict[str, set[tuple[str, str]]] = {}
    for link in subgraph["links"]:
        if link["origin_id"] not in kinds:
            name = subgraph["inputs"][link["origin_slot"]]["name"]
            node = next(n for n in subgraph["nodes"] if n["id"] == link["target_id"])
            fed.setdefault(name, set()).add((node["type"], node["inputs"][link["target_slot"]]["name"]))
    assert fed["image"] == {("BlendedCutRegion", "image"), ("BlendedPasteRegion", "original")}
    assert fed["vae"] == {("VAEEncode", "vae"), ("VAEDecode", "vae")}
    assert fed["model"] == {("BlendedNoiseModel", "model")} and fed["mask"] == {("BlendedCutRegion", "mask")}
    (paste,) = (n for n in subgraph["nodes"] if n["type"] == "BlendedPasteRegion")
    (sampler,) = (n for n in subgraph["nodes"] if n["type"] == "KSampler")
    assert paste["widgets_values_named"]["tone_match"] is True
    assert sampler["widgets_values_named"]["control_after_generate"] == "randomize"


def test_nothing_of_the_machine_that_saved_it_is_left() -> None:
    for path in (*TEMPLATES, *BLUEPRINTS):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/root/|/home/|/tmp/|localhost|127\.0\.0\.1", text), path
