"""The shelves of nodes. This release brings the engine, the library and the terminal; it registers no node yet."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io


class BlendedDiffusionExtension(ComfyExtension):
    """The pack as ComfyUI sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """No node in this release."""
        return []
