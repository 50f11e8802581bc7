"""A custom node of the test server: Load Latent Test Bed stands where a checkpoint loader stands. conftest.py links it into ComfyUI."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from latent.model import EmptyTextEncoder, load_model, load_vae


class LoadLatentTestBed:
    """The outputs of core's Load Checkpoint."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Whether the network is given as a flow."""
        return {"required": {"flow": ("BOOLEAN", {"default": False})}}

    def load(self, flow: bool) -> tuple[Any, Any, Any]:
        """(MODEL, CLIP, VAE)."""
        return load_model(flow=flow), EmptyTextEncoder(), load_vae()


NODE_CLASS_MAPPINGS = {"LoadLatentTestBed": LoadLatentTestBed}
