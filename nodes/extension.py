"""The list of nodes that ComfyUI asks for."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import edit, glue, load, prompt, steps


class BlendedDiffusionExtension(ComfyExtension):
    """The pack as ComfyUI sees it."""

    async def on_load(self) -> None:
        """Makes the folders of models known."""
        glue.register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """In the order of the search menu."""
        return [
            edit.BlendedSampler,
            load.LoadDDPM,
            load.LoadCLIP,
            prompt.EncodePrompt,
            steps.NoiseBackground,
            steps.CLIPGuidanceStep,
            steps.BlendLatents,
            steps.DenoiseLoopStart,
            steps.DenoiseLoopEnd,
            steps.FinalPaste,
            prompt.GuidanceOptionsNode,
            edit.RankByCLIP,
            edit.DemoScene,
        ]
