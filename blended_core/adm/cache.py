"""Decisions of the calibration probe, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from ..diffusion import DiffusionConfig
from ..io.atomic import write_bytes
from .probe import PROBED_SETTINGS, ProbeResult
from .unet import UNetConfig

CACHE_FORMAT = 2
"""Part of every key; increased when the probe decides differently than before."""
LOCK_SECONDS = 10.0
"""How long a decision waits for other processes that write the file; longer than a write takes."""


def cache_file(folder: Path | None = None) -> Path:
    """``probes.json`` in a folder, by default the cache folder of this system and user: ``~/.cache/blended-diffusion`` on Linux.

    Raises FileNotFoundError if no folder was given and the user has none.
    """
    if folder is None:
        try:
            folder = user_cache_path("blended-diffusion", appauthor=False)
        except RuntimeError:  # of newer versions of platformdirs; older ones return the path with the ~
            folder = Path("~")
        if not folder.is_absolute():
            raise FileNotFoundError("the user has no home folder")
    return folder / "probes.json"


def cache_key(digest: str, unet: UNetConfig, process: DiffusionConfig, open_settings: Sequence[str]) -> str:
    """The key of a decision: the SHA-256 of the checkpoint, which settings were open, and the values of the others."""
    fixed = {k: v for k, v in {**unet.to_dict(), **process.to_dict()}.items() if k not in open_settings}
    text = json.dumps([CACHE_FORMAT, sorted(open_settings), fixed], sort_keys=True)
    return f"{digest}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def load_cached(key: str, folder: Path | None = None) -> ProbeResult | None:
    """An earlier decision; None if there is none or the file cannot be read."""
    try:
        result = ProbeResult.from_dict(json.loads(cache_file(folder).read_text(encoding="utf-8"))[key])
        return replace(result, settings={k: v for k, v in result.settings.items() if k in PROBED_SETTINGS}, forwards=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def save_cached(key: str, result: ProbeResult, folder: Path | None = None) -> None:
    """Adds a decision to the file. If the folder cannot be written, nothing is saved and the next load probes again."""
    try:
        path = cache_file(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may add a decision at the same time.
        with FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS):
            try:
                cached = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                cached = {}
            cached = cached if isinstance(cached, dict) else {}
            write_bytes(path, json.dumps({**cached, key: result.to_dict()}, indent=1).encode())
    except (OSError, Timeout, NotImplementedError):
        return
