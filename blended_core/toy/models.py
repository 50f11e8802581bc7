"""Paths of the embedded networks. The loaders use them for the name 'embedded'."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).with_name("data")
DDPM, CLIP, LPIPS, JUDGE = (DATA / f"{name}.safetensors" for name in ("ddpm", "clip", "lpips", "judge"))
