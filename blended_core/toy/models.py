"""Where the embedded networks lie. The loaders resolve the name 'embedded' by this module."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).with_name("data")
DDPM, CLIP, LPIPS, JUDGE = (DATA / f"{name}.safetensors" for name in ("ddpm", "clip", "lpips", "judge"))
