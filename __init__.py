"""Blended Diffusion for ComfyUI: the door. Importing it costs nothing; ComfyUI calls the entry point."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes.extension import BlendedDiffusionExtension

WEB_DIRECTORY = "web"


async def comfy_entrypoint() -> BlendedDiffusionExtension:
    """What ComfyUI awaits after it has imported the pack."""
    from .nodes.extension import BlendedDiffusionExtension

    return BlendedDiffusionExtension()
