"""Decisions of the calibration probe, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..diffusion import DiffusionConfig
from ..io.atomic import write_bytes
from .probe import PROBED_SETTINGS, ProbeResult
from .unet import UNetConfig

CACHE_FORMAT = 2
"""Part of every key; increased when the probe decides differently than before."""


def cache_file() -> Path:
    """``probes.json`` in ``$BLENDED_DIFFUSION_CACHE``, else in ``blended-diffusion`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = (
        os.environ.get("BLENDED_DIFFUSION_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blended-diffusion"
    )
    return Path(root) / "probes.json"


def cache_key(digest: str, unet: UNetConfig, process: DiffusionConfig, open_settings: Sequence[str]) -> str:
    """The key of a decision: the SHA-256 of the checkpoint, which settings were open, and the values of the others."""
    fixed = {k: v for k, v in {**unet.to_dict(), **process.to_dict()}.items() if k not in open_settings}
    text = json.dumps([CACHE_FORMAT, sorted(open_settings), fixed], sort_keys=True)
    return f"{digest}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def load_cached(key: str) -> ProbeResult | None:
    """An earlier decision; None if there is none or the file cannot be read."""
    try:
        result = ProbeResult.from_dict(json.loads(cache_file().read_text(encoding="utf-8"))[key])
        return replace(result, settings={k: v for k, v in result.settings.items() if k in PROBED_SETTINGS}, forwards=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def save_cached(key: str, result: ProbeResult) -> None:
    """Adds a decision to the file. If the folder cannot be written, nothing is saved and the next load probes again."""
    path = cache_file()
    try:
        try:
            cached = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            cached = {}
        cached = cached if isinstance(cached, dict) else {}
        write_bytes(path, json.dumps({**cached, key: result.to_dict()}, indent=1).encode())
    except OSError:
        return
