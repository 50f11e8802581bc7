"""The embedded networks: their paths, which the loaders use for the name 'embedded', and what is known of them without reading them."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).with_name("data")
DDPM, CLIP, LPIPS, JUDGE = (DATA / f"{name}.safetensors" for name in ("ddpm", "clip", "lpips", "judge"))
SIDE = 64  # px, side of a training scene
GUIDANCE_SCALE = 3000.0  # that the diffusion model recommends; the presets hold the scale for models of photographs
