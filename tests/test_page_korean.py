"""The pack in ComfyUI's page in Korean; apart from the English page, since one thread drives one browser at a time."""

from __future__ import annotations

import pytest

from .page import needs_browser, opened
from .server import Server, needs_comfyui

pytestmark = [needs_comfyui, needs_browser, pytest.mark.slow]


def test_korean(comfyui: Server) -> None:
    with opened(comfyui.url, "ko") as page:
        (new,) = page.add_by_search("블렌디드 디퓨전 샘플러")
        assert new["type"] == "BlendedSampler" and new["title"] == "블렌디드 디퓨전 샘플러"
        assert {"이미지", "마스크"} <= set(new["inputs"])
        page.page.evaluate("() => { const n = window.app.graph.nodes[0]; window.app.canvas.selectNode(n); }")
        page.wait(1)
        page.page.locator("[data-testid=info-button], button:has(.lucide--info)").first.click()
        page.wait(2)
        assert "마스크" in page.page.locator("[data-testid=properties-panel]").inner_text()
        assert page.complaints == []
