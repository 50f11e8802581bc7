"""Makes ``workflows/`` and ``subgraphs/``: ``uv run python -m docs.make_workflows [NAME…]``. Requires ComfyUI and Chromium.

The graphs are defined in docs/graphs.py. The page of ComfyUI builds, saves, reloads and runs each of them; the thumbnail shows the results.
``--shots DIR`` saves a screenshot after each run. ``--url`` uses a running server. ``--packages`` needs neither: it writes the version of the pack
into the present files, and ``node_list.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from tests.page import Page, opened
from tests.server import started

from .graphs import BLUEPRINTS, NODE_SCREENSHOTS, SDXL, TEMPLATES, Blueprint, Graph

ROOT = Path(__file__).parent.parent
THUMBNAIL = 512
SHOWN_IN_README = {"Six nodes step by step": "six_nodes.png", "Many results ranked": "ranked.png"}
INSET = 168
GAP = 76
"""Between two nodes of a column, in units of the canvas: a title (30), and up to 34 that a node is higher in the Vue renderer."""
PAGE_ONLY = {"MarkdownNote"}
"""Node types that no package brings."""

BUILD = """async ({stacks, nodes, links, groups, gap}) => {
  const app = window.app, LG = window.LiteGraph, made = {};
  await app.loadGraphData({nodes: [], links: [], groups: [], version: 0.4, last_node_id: 0, last_link_id: 0}, true, true, null);
  const set = (node, name, value) => {
    const widget = node.widgets.find(w => w.name === name);
    if (!widget) throw new Error(`${node.type} has no widget ${name}; it has ${node.widgets.map(w => w.name)}`);
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
  };
  for (const [name, spec] of Object.entries(nodes)) {
    const node = made[name] = LG.createNode(spec.type);
    if (!node) throw new Error(`no node ${spec.type}`);
    app.graph.add(node);
    if (spec.title) node.title = spec.title;
    if (spec.color) { node.color = spec.color[0]; node.bgcolor = spec.color[1]; }
    for (const [widget, value] of Object.entries(spec.values)) set(node, widget, value);
  }
  await new Promise(r => setTimeout(r, 300));
  for (const [from, output, to, input] of links) {
    const o = made[from].outputs.findIndex(s => s.name === output), i = made[to].inputs.findIndex(s => s.name === input);
    if (o < 0) throw new Error(`${from} has no output ${output}; it has ${made[from].outputs.map(s => s.name)}`);
    if (i < 0) throw new Error(`${to} has no input ${input}; it has ${made[to].inputs.map(s => s.name)}`);
    if (!made[from].connect(o, made[to], i)) throw new Error(`${from}.${output} does not fit ${to}.${input}`);
  }
  await new Promise(r => setTimeout(r, 300));
  let x = 0;
  for (const stack of stacks) {
    const width = Math.max(...stack.flatMap(([, names]) => names.map(n => nodes[n].width)));
    let top = 0;
    for (const [title, names] of stack) {
      let y = top, end = top;
      for (const name of names) {
        const node = made[name], least = node.computeSize()[1];
        node.setSize([width, Math.max(least, nodes[name].height)]);
        node.pos = [x, y];
        end = y + node.size[1];
        y = end + gap;
      }
      if (title) {
        const group = new LG.LGraphGroup(title);
        group.pos = [x - 20, top - 80]; group.size = [width + 40, end - top + 120]; group.color = groups[title] ?? '#3f5159';
        app.graph.add(group);
      }
      top = end + (title ? 140 : 100);
    }
    x += width + 80;
  }
  await new Promise(r => setTimeout(r, 300));
  return Object.fromEntries(Object.entries(made).map(([name, node]) => [name, node.id]));
}"""

CONVERT_TO_SUBGRAPH = """async ({inside, inputs, outputs, title, description}) => {
  const app = window.app, rest = () => new Promise(r => setTimeout(r, 300));
  const {subgraph, node} = app.graph.convertToSubgraph(new Set(inside.map(id => app.graph.getNodeById(id))));
  await rest();
  // The page exposes what was connected and some widgets, in its own order.
  for (const outer of [...subgraph.inputs]) subgraph.removeInput(outer);
  for (const outer of [...subgraph.outputs]) subgraph.removeOutput(outer);
  for (const [id, name, label] of inputs) {
    const inner = subgraph.getNodeById(id), input = inner.inputs.find(i => i.name === name);
    subgraph.addInput(label, String(input.type)).connect(input, inner);
  }
  for (const [id, name, label] of outputs) {
    const inner = subgraph.getNodeById(id), output = inner.outputs.find(o => o.name === name);
    subgraph.addOutput(label, String(output.type)).connect(output, inner);
  }
  subgraph.name = node.title = title;
  subgraph.description = description;
  for (const other of [...app.graph.nodes]) if (other !== node) app.graph.remove(other);
  for (const group of [...app.graph.groups]) app.graph.remove(group);
  await rest();
  node.setSize([360, node.computeSize()[1]]);
  node.pos = [0, 0];
  await rest();
}"""


def without_machine_data(workflow: dict[str, Any]) -> dict[str, Any]:
    """Removes the data of the machine that saved the workflow."""
    workflow.pop("id", None)
    extra = workflow.get("extra", {})
    workflow["extra"] = {"ds": extra["ds"]} if "ds" in extra else {}
    return workflow


def name_packages(workflow: dict[str, Any], core: str | None = None) -> None:
    """Names the package and its version in every node, as ComfyUI-Manager does in the page. ``core``: a new version of ComfyUI."""
    for graph in (workflow, *workflow.get("definitions", {}).get("subgraphs", [])):
        subgraphs = {s["id"] for s in workflow.get("definitions", {}).get("subgraphs", [])}
        for node in graph["nodes"]:
            if node["type"].startswith("Blended"):
                node["properties"] |= {"cnr_id": package("name"), "ver": package("version")}
            elif core is not None and node["type"] not in PAGE_ONLY | subgraphs:
                node["properties"] |= {"cnr_id": "comfy-core", "ver": core}


def package(key: str) -> str:
    """The name or the version of the project."""
    found = re.search(rf'^{key} = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def write_workflow(workflow: dict[str, Any], path: Path) -> None:
    """Writes a template or a blueprint."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(workflow, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_packages() -> None:
    """Writes the version of the pack into the templates and blueprints, and ``node_list.json``, which ComfyUI-Manager reads."""
    for path in sorted((*(ROOT / "workflows").glob("*.json"), *(ROOT / "subgraphs").glob("*.json"))):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        name_packages(workflow)
        write_workflow(workflow, path)
    texts = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    nodes = {name: texts[name]["description"] for name in sorted(texts)}
    (ROOT / "node_list.json").write_text(json.dumps(nodes, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def core_version(url: str) -> str:
    """The version of a running ComfyUI."""
    with urllib.request.urlopen(f"{url}/system_stats", timeout=60) as answer:
        return str(json.loads(answer.read())["system"]["comfyui_version"])


def app_mode(graph: Graph, ids: dict[str, int]) -> dict[str, Any]:
    """What the App mode of the page shows of a graph, as the page saves it. Empty if the graph has none."""
    if not graph.app:
        return {}
    inputs = [[str(ids[entry[0]]), entry[1]] for entry in graph.app if isinstance(entry, tuple)]
    outputs = [str(ids[entry]) for entry in graph.app if isinstance(entry, str)]
    return {"linearMode": False, "linearData": {"inputs": inputs, "outputs": outputs}}


def build(page: Page, graph: Graph) -> dict[str, int]:
    """Builds the graph in the page. Returns name → node id."""
    spec = {
        "stacks": [[[column.title, list(column.nodes)] for column in stack] for stack in graph.stacks()],
        "nodes": {
            name: {
                "type": n.type, "title": n.title, "values": n.values, "width": n.width, "height": n.height, "color": n.color,
            }
            for name, n in graph.nodes().items()
        },
        "links": graph.links(),
        "groups": graph.colors,
        "gap": GAP,
    }  # fmt: skip
    ids = dict(page.page.evaluate(BUILD, spec))
    if graph.overlap_free and (over := page.overlaps()):
        raise SystemExit(f"{graph.name}: {over}")
    return ids


def download(url: str, file: dict[str, str]) -> Image.Image:
    """Downloads an image that a node shows."""
    query = urllib.parse.urlencode({k: file[k] for k in ("filename", "subfolder", "type")})
    with urllib.request.urlopen(f"{url}/view?{query}", timeout=60) as answer:
        return Image.open(io.BytesIO(answer.read())).convert("RGB")


def center_crop(picture: Image.Image, side: int) -> Image.Image:
    """The center square of an image, resized."""
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    return picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BICUBIC)


def thumbnail(after: list[Image.Image], before: Image.Image | None, path: Path) -> None:
    """Writes the thumbnail: one result or a grid of results, and the source image in a corner."""
    card = Image.new("RGB", (THUMBNAIL, THUMBNAIL), (24, 24, 27))
    across = 1 if len(after) == 1 else 2
    gap = 0 if across == 1 else 6
    side = (THUMBNAIL - gap * (across - 1)) // across
    rows = -(-len(after) // across)
    for i, picture in enumerate(after):
        top = (THUMBNAIL - rows * side - gap * (rows - 1)) // 2
        card.paste(center_crop(picture, side), (i % across * (side + gap), top + i // across * (side + gap)))
    if before is not None:
        frame = ImageDraw.Draw(card)
        at = THUMBNAIL - INSET - 18
        frame.rounded_rectangle((14, at - 4, 14 + INSET + 7, at + INSET + 3), 8, fill=(250, 249, 246))
        card.paste(center_crop(before, INSET), (18, at))
    card.save(path, quality=90)


def output_images(page: Page, ids: dict[str, int], name: str) -> list[Image.Image]:
    """The images that a node shows after a run."""
    return [download(page.url, f) for f in page.outputs()[str(ids[name])]["images"]]


CENTER_NODE = """async ([id, left, top]) => {
  const app = window.app, node = app.graph.getNodeById(id), ds = app.canvas.ds;
  app.canvas.deselectAll();
  ds.scale = 1;
  ds.offset[0] = left - node.pos[0]; ds.offset[1] = top - node.pos[1];
  app.canvas.setDirty(true, true);
  await new Promise(r => setTimeout(r, 1200));
  return [node.size[0], node.size[1]];
}"""


def node_screenshot(page: Page, number: int, path: Path) -> None:
    """Writes a screenshot of a node and the ends of its links, for its help page."""
    left, top, beside, above = 420, 180, 64, 76
    width, height = page.page.evaluate(CENTER_NODE, [number, left, top])
    box = page.page.locator("canvas#graph-canvas").bounding_box()
    clip = {"x": box["x"] + left - beside, "y": box["y"] + top - above, "width": width + 2 * beside, "height": height + above + 36}
    path.parent.mkdir(parents=True, exist_ok=True)
    taken = Image.open(io.BytesIO(page.page.screenshot(clip=clip))).convert("RGB")
    taken.quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)


def clear_cache(url: str) -> None:
    """Clears the cache of the server, so that the next run executes all nodes."""
    body = json.dumps({"unload_models": True, "free_memory": True}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/free", body, {"Content-Type": "application/json"}), timeout=60).close()
    time.sleep(2)


def make_template(page: Page, graph: Graph, shots: Path | None) -> None:
    """Builds, saves, reloads and runs a template, and writes its thumbnail."""
    ids = build(page, graph)
    page.fit()
    workflow = without_machine_data(page.workflow())
    workflow["extra"] |= app_mode(graph, ids)
    name_packages(workflow, core_version(page.url))
    page.load(workflow, graph.name)
    page.fit()
    if wrong := page.wrong() + page.shown():
        raise SystemExit(f"{graph.name}: {wrong}")
    if graph.stand_in is not None:
        screenshots(page, graph, ids, shots)
    shown = graph if graph.stand_in is None else graph.stand_in
    ids = ids if shown is graph else build(page, shown)
    clear_cache(page.url)
    end = page.run(timeout=900)
    if end["end"] != "success" or not end["previews"]:
        raise SystemExit(f"{graph.name}: {end}")
    screenshots(page, shown, ids, shots)
    folder = ROOT / "workflows"
    folder.mkdir(exist_ok=True)
    after = [picture for name in shown.after for picture in output_images(page, ids, name)[: shown.images_per_node]]
    thumbnail(after, output_images(page, ids, shown.before)[0] if shown.before else None, folder / f"{graph.name}.jpg")
    write_workflow(workflow, folder / f"{graph.name}.json")
    print(f"{graph.name}: {len(workflow['nodes'])} nodes, {end['previews']} previews")


def screenshots(page: Page, graph: Graph, ids: dict[str, int], shots: Path | None) -> None:
    """Writes the screenshots of a graph and of its nodes, as the page shows them now."""
    page.fit()
    if shots is not None:
        page.screenshot(shots / f"{graph.name}.png")
    if graph.name in SHOWN_IN_README:
        taken = Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")
        taken.quantize(256, dither=Image.Dither.NONE).save(ROOT / "docs" / "images" / SHOWN_IN_README[graph.name], optimize=True)
    for kind, (where, name) in NODE_SCREENSHOTS.items():
        if where is graph:
            node_screenshot(page, ids[name], ROOT / "web" / "docs" / kind / "node.png")


def make_blueprint(page: Page, blueprint: Blueprint, shots: Path | None) -> None:
    """Builds the graph, converts its inner part to a subgraph and saves it."""
    graph = blueprint.graph
    ids = build(page, graph)
    sides = {"inputs": blueprint.inputs, "outputs": blueprint.outputs}
    spec = {side: [[ids[name], slot, label] for name, slot, label in slots] for side, slots in sides.items()}
    page.page.evaluate(
        CONVERT_TO_SUBGRAPH,
        {**spec, "inside": [ids[name] for name in blueprint.inside], "title": graph.name, "description": blueprint.description},
    )
    page.fit()
    if shots is not None:
        page.screenshot(shots / f"blueprint {graph.name}.png")
    workflow = without_machine_data(page.workflow())
    workflow["extra"] = {}
    workflow["definitions"]["subgraphs"][0]["category"] = "Blended Diffusion"
    name_packages(workflow, core_version(page.url))
    write_workflow(workflow, ROOT / "subgraphs" / f"{graph.name}.json")
    print(f"blueprint {graph.name}: {len(workflow['definitions']['subgraphs'][0]['nodes'])} nodes")


def open_page(url: str) -> contextlib.AbstractContextManager[Page]:
    """Opens a new page, so that screenshots show no tabs of other graphs, without the minimap."""
    return opened(url, size=(1800, 1000), **{"Comfy.Minimap.Visible": False})


@contextlib.contextmanager
def server(url: str | None) -> Iterator[str]:
    """The given address of a server, or that of a new server."""
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory() as folder:
        # A name to choose: nothing loads it, because a graph with it has a stand-in that runs.
        checkpoint = Path(folder) / "models" / "checkpoints" / SDXL
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
        with started(Path(folder)) as own:
            yield own.url


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="templates and blueprints to make (default: all)")
    parser.add_argument("--url", help="address of a running ComfyUI with the pack")
    parser.add_argument("--shots", type=Path, help="folder for screenshots")
    parser.add_argument("--packages", action="store_true", help="write only the version of the pack and node_list.json")
    args = parser.parse_args()
    if args.packages:
        write_packages()
        return
    with server(args.url) as url:
        for graph in TEMPLATES:
            if not args.names or graph.name in args.names:
                with open_page(url) as page:
                    make_template(page, graph, args.shots)
        for blueprint in BLUEPRINTS:
            if not args.names or blueprint.graph.name in args.names:
                with open_page(url) as page:
                    make_blueprint(page, blueprint, args.shots)


if __name__ == "__main__":
    main()
