"""ComfyUI's real web page in a headless Chromium, used as a person uses it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ABSENT = "no Chromium was found on the path or by CHROMIUM, so the pack was not tried in the web page"
SWITCHES = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--force-color-profile=srgb", "--hide-scrollbars")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=ABSENT)

# What a first visit would ask, answered beforehand: the tour, news, and how the mouse moves the canvas.
SETTINGS: dict[str, Any] = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Release.Status": "skipped",
    "Comfy.Release.Version": "999.0.0",
    "Comfy.Canvas.NavigationMode": "standard",
    "Comfy.Canvas.LeftMouseClickBehavior": "select",
    "Comfy.Canvas.MouseWheelScroll": "panning",
}

VUE = {"Comfy.VueNodes.Enabled": True}
SEARCH = ".comfy-vue-node-search-container input, [role=dialog] input[role=combobox]"

READY = """() => window.app?.graph && window.app.canvas && window.app.extensionManager && window.app.vueAppReady !== false
  && Object.keys(window.LiteGraph?.registered_node_types ?? {}).some(type => type.startsWith('Blended'))"""

SHOWN = """() => {
  const visible = e => e.getBoundingClientRect().width > 0;
  const texts = selector => [...document.querySelectorAll(selector)].filter(visible).map(e => e.innerText.trim()).filter(Boolean);
  return [...texts('[role=dialog]:not([data-side]):not(.p-popover), [role=alertdialog], .p-dialog'),
          ...texts('.p-toast-message-error, .p-toast-message-warn'), ...texts('[data-testid=error-overlay]')];
}"""

LISTEN = """() => {
  const api = window.comfyAPI.api.api, run = window.__run = {end: null, previews: 0, error: null};
  window.__unlisten?.();
  const on = {b_preview_with_metadata: () => run.previews++, execution_success: () => run.end ??= 'success',
    execution_interrupted: () => run.end = 'interrupted',
    execution_error: e => { run.end = 'error'; run.error = e.detail.exception_message; }};
  for (const [name, f] of Object.entries(on)) api.addEventListener(name, f);
  window.__unlisten = () => { for (const [name, f] of Object.entries(on)) api.removeEventListener(name, f); };
}"""

WRONG = """() => {
  const wrong = [];
  const walk = (graph, path) => {
    for (const node of graph.nodes) {
      const name = path + node.title;
      if (!(node.type in window.LiteGraph.registered_node_types)) wrong.push(`${name}: ${node.type} is not known`);
      if (node.has_errors) wrong.push(`${name}: red`);
      for (const widget of node.widgets ?? []) {
        const values = widget.type === 'combo' ? widget.options.values : undefined;
        const list = typeof values === 'function' ? values(widget, node) : values;
        if (Array.isArray(list) && !list.includes(widget.value)) wrong.push(`${name}.${widget.name}: ${widget.value} is not in its list`);
        if (widget.type === 'number' && typeof widget.value !== 'number') wrong.push(`${name}.${widget.name}: ${widget.value} is no number`);
      }
      if (node.subgraph) walk(node.subgraph, name + '/');
    }
    for (const link of graph.links.values()) {
      if (link.origin_id < 0 || link.target_id < 0) continue;
      const from = graph.getNodeById(link.origin_id), to = graph.getNodeById(link.target_id);
      const output = from?.outputs[link.origin_slot], input = to?.inputs[link.target_slot];
      if (!output || !input || input.link !== link.id) wrong.push(`${path}link ${link.id} has lost an end`);
      else if (!window.LiteGraph.isValidConnection(output.type, input.type)) wrong.push(`${path}link ${link.id}: ${output.type} into ${input.type}`);
    }
  };
  walk(window.app.graph, '');
  return wrong;
}"""

NEW = """() => window.app.graph.nodes.map(n => ({id: n.id, type: n.type, title: n.title, inner: n.subgraph ? n.subgraph.nodes.length : 0,
  inputs: (n.inputs ?? []).map(i => i.label ?? i.localized_name ?? i.name)}))"""

OVERLAPS = """() => {
  const boxes = window.app.graph.nodes.map(n => ({name: n.title, x: n.pos[0], y: n.pos[1] - 30, w: n.size[0], h: n.size[1] + 30}));
  const out = [];
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
    if (a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h) out.push(`${a.name} over ${b.name}`); }));
  return out;
}"""

# In the renderer that draws nodes as HTML (Nodes 2.0) a node is as high as its parts, not as its saved size.
TOUCHING = """least => {
  const scale = window.app.canvas.ds.scale, out = [];
  const boxes = [...document.querySelectorAll('[data-node-id]')].map(e => [window.app.graph.getNodeById(e.dataset.nodeId)?.title, e.getBoundingClientRect()]);
  if (boxes.length !== window.app.graph.nodes.length) return [`${boxes.length} of ${window.app.graph.nodes.length} nodes are drawn`];
  boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
    const across = Math.max(p.left, q.left) - Math.min(p.right, q.right), down = Math.max(p.top, q.top) - Math.min(p.bottom, q.bottom);
    if (Math.max(across, down) / scale < least) out.push(`${a} and ${b}: ${Math.round(Math.max(across, down) / scale)}`); }));
  return out;
}"""


class Page:
    """An opened page. ``page`` is Playwright's own."""

    def __init__(self, url: str, page: Any, settings: dict[str, Any]) -> None:
        self.url, self.page, self.settings = url, page, settings
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))
        page.on("response", self._answered)

    def _answered(self, response: Any) -> None:
        path = urllib.parse.urlsplit(response.url).path
        # The server says 404 for a style sheet and for settings that a person never made.
        if response.status >= 400 and response.url.startswith(self.url) and "userdata" not in path and not path.endswith("user.css"):
            self.complaints.append(f"{response.status} {path}")

    def _route(self, route: Any) -> None:
        """Only the server answers; this page's settings come from here and are not kept there."""
        request = route.request
        if not request.url.startswith((self.url, "data:", "blob:")):
            route.abort("blockedbyclient")
        elif "/api/settings" not in request.url:
            route.continue_()
        elif request.method == "POST":
            route.fulfill(status=200, body="")
        else:
            route.fulfill(json={**route.fetch().json(), **self.settings})

    def open(self) -> None:
        """Loads the page and waits until it can be used."""
        self.page.route("**/*", self._route)
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY)
        with contextlib.suppress(Exception):  # translations and blueprints are still on their way
            self.page.wait_for_load_state("networkidle", timeout=10_000)
        self.wait(1)

    def wait(self, seconds: float) -> None:
        """Lets the page draw."""
        self.page.wait_for_timeout(seconds * 1000)

    def command(self, name: str) -> None:
        """One of the page's commands, as its menus call them."""
        self.page.evaluate("name => { window.app.extensionManager.command.execute(name); }", name)

    def load(self, workflow: dict[str, Any], name: str = "workflow") -> None:
        """Opens a workflow (not an API prompt) from its JSON."""
        # As text: Playwright would turn what is undefined into null, which the page refuses.
        self.page.evaluate(
            "async ([text, name]) => { await window.app.loadGraphData(JSON.parse(text), true, true, name); }", [json.dumps(workflow), name]
        )
        self.wait(0.8)

    def clear(self) -> None:
        """An empty graph."""
        self.load({"nodes": [], "links": [], "groups": [], "version": 0.4, "last_node_id": 0, "last_link_id": 0})

    def add_by_search(self, words: str) -> list[dict[str, Any]]:
        """On an empty canvas: double-clicks, types, presses Enter; the nodes that came."""
        self.clear()
        width, height = self.page.viewport_size["width"], self.page.viewport_size["height"]
        box = self.search_box(width // 2, height // 2)
        box.type(words, delay=10)
        self.wait(1.5)
        box.press("Enter")
        self.wait(1)
        if self.page.evaluate("() => window.app.canvas.state?.ghostNodeId != null"):  # the new node hangs on the mouse
            self.page.mouse.click(width // 2, height // 3)
            self.wait(0.5)
        self.page.keyboard.press("Escape")
        self.wait(0.5)
        return list(self.page.evaluate(NEW))

    def fit(self) -> None:
        """The whole graph in view."""
        self.command("Comfy.Canvas.FitView")
        self.wait(0.8)

    def shown(self) -> list[str]:
        """Texts of all dialogs, warnings and errors that lie over the page."""
        return list(self.page.evaluate(SHOWN))

    def wrong(self) -> list[str]:
        """What is wrong with the graph as it stands: unknown or red nodes, lost links, values that no list holds."""
        return list(self.page.evaluate(WRONG))

    def overlaps(self) -> list[str]:
        """Nodes that lie over each other."""
        return list(self.page.evaluate(OVERLAPS))

    def touching(self, least: float = 8) -> list[str]:
        """Nodes with less space than ``least`` units of the canvas between them; for a page with the Vue renderer (:data:`VUE`)."""
        return list(self.page.evaluate(TOUCHING, least))

    def draws_text(self) -> bool:
        """Whether the zoom is large enough for the canvas to draw titles and texts."""
        return not self.page.evaluate("() => window.app.canvas.low_quality")

    def scale(self) -> float:
        """The zoom."""
        return float(self.page.evaluate("() => window.app.canvas.ds.scale"))

    def search_box(self, x: float, y: float) -> Any:
        """The text box of the search for nodes, opened by a double click. On a busy machine the page may take it for two single clicks."""
        from playwright.sync_api import TimeoutError as NotInTime

        for _ in range(5):
            self.page.mouse.dblclick(x, y)
            with contextlib.suppress(NotInTime):
                return self.page.wait_for_selector(SEARCH, timeout=15_000)
            self.page.keyboard.press("Escape")
        raise AssertionError("a double click on the canvas did not open the search for nodes")

    def found(self, words: str) -> str:
        """The text of the results when these words are typed into the search for nodes."""
        self.clear()
        width, height = self.page.viewport_size["width"], self.page.viewport_size["height"]
        box = self.search_box(width // 2, height // 2)
        box.type(words, delay=10)
        self.wait(1.5)
        text = self.page.evaluate(
            "() => [...document.querySelectorAll('[role=option], [data-testid=result-item]')].map(e => e.innerText).join('|')"
        )
        self.page.keyboard.press("Escape")
        self.wait(0.3)
        return str(text)

    def workflow(self) -> dict[str, Any]:
        """The graph as the page saves it."""
        return dict(json.loads(self.page.evaluate("() => JSON.stringify(window.app.graph.serialize())")))

    def prompt(self) -> dict[str, Any]:
        """The graph as the page sends it to the server."""
        return dict(json.loads(self.page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)")))

    def outputs(self) -> dict[str, Any]:
        """What the nodes show, by node id."""
        return dict(self.page.evaluate("() => JSON.parse(JSON.stringify(window.app.nodeOutputs ?? {}))"))

    def press_run(self) -> None:
        """The blue button."""
        self.page.evaluate(LISTEN)
        group = self.page.locator("[data-testid=queue-button]").first
        (group if group.evaluate("e => e.tagName") == "BUTTON" else group.locator("button").first).click()

    def ended(self, timeout: float = 300) -> dict[str, Any]:
        """Waits for the end of a run: {end, previews, error}."""
        self.page.wait_for_function("() => window.__run.end !== null", timeout=timeout * 1000)
        self.wait(1.5)
        return dict(self.page.evaluate("() => window.__run"))

    def run(self, timeout: float = 300) -> dict[str, Any]:
        """Presses Run and waits."""
        self.press_run()
        return self.ended(timeout)

    def screenshot(self, path: Path) -> None:
        """What a person sees now."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path))


@contextlib.contextmanager
def opened(url: str, language: str = "en", size: tuple[int, int] = (1600, 1000), scale: float = 1.0, **settings: Any) -> Iterator[Page]:
    """The page at ``url`` in a fresh profile, in a language of the page."""
    from playwright.sync_api import sync_playwright

    profile = tempfile.mkdtemp(prefix="page_")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch_persistent_context(
                profile,
                executable_path=CHROMIUM,
                args=list(SWITCHES),
                viewport={"width": size[0], "height": size[1]},
                device_scale_factor=scale,
                timeout=120_000,
            )
            browser.set_default_timeout(120_000)
            page = Page(url, browser.pages[0], {**SETTINGS, "Comfy.Locale": language, **settings})
            page.open()
            yield page
            browser.close()
    finally:
        shutil.rmtree(profile, ignore_errors=True)
