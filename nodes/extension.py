"""The entry point for ComfyUI: the folders and the nodes of the pack."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import folders, guidance, load, loop, model, paste, prompt, rank, sampler, scene, steps


class BlendedDiffusionExtension(ComfyExtension):
    """The pack as ComfyUI sees it."""

    async def on_load(self) -> None:
        """Registers the model folders."""
        folders.register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes, in the order of the search menu."""
        return [
            sampler.BlendedSampler,
            load.LoadDDPM,
            load.LoadCLIP,
            prompt.EncodePrompt,
            steps.NoiseBackground,
            steps.CLIPGuidanceStep,
            steps.BlendLatents,
            loop.DenoiseLoopStart,
            loop.DenoiseLoopEnd,
            paste.FinalPaste,
            prompt.GuidanceOptionsNode,
            rank.RankByCLIP,
            scene.DemoScene,
            model.DDPMAsModel,
            guidance.CLIPGuidanceModel,
        ]
