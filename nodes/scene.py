"""Demo Scene."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..blended_core.toy.world import BACKGROUNDS, OBJECTS, demo_scene
from . import inputs


class DemoScene(io.ComfyNode):
    """An image of the embedded models' toy world, and a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        side = {
            "default": 64,
            "min": 16,
            "max": 2048,
            "step": 8,
            "optional": True,
            "tooltip": "The embedded models were trained at 64 pixels.",
        }
        return io.Schema(
            node_id="BlendedDemoScene",
            display_name="Demo Scene",
            category=inputs.CATEGORY,
            description=(
                "A small scene of the kind that the embedded models were trained on, and a mask for an object in it. Use it to try the nodes "
                "without any model file."
            ),
            search_aliases=["test image", "example picture", "sample scene"],
            inputs=[
                io.Combo.Input(
                    "background", options=list(BACKGROUNDS), default="meadow", optional=True, tooltip="The landscape that the scene shows."
                ),
                io.Combo.Input(
                    "object",
                    options=["none", *OBJECTS],
                    default="none",
                    optional=True,
                    tooltip="An object under the mask, to be removed or replaced.",
                ),
                io.Int.Input("width", **side),
                io.Int.Input("height", **side),
                inputs.edit_option("seed", control_after_generate=True, tooltip="Seed of the clouds, hills and stars."),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The scene."),
                io.Mask.Output("mask", display_name="mask", tooltip="An ellipse in the middle of the scene."),
            ],
        )

    @classmethod
    def execute(cls, background: str = "meadow", object: str = "none", width: int = 64, height: int = 64, seed: int = 0) -> io.NodeOutput:
        scene, mask = demo_scene(background, seed, width, height, None if object == "none" else object)
        return io.NodeOutput(torch.from_numpy(scene)[None].float() / 255, torch.from_numpy(mask[None, :, :, 0].copy()).float() / 255)
