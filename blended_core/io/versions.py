"""Versions of this package and of the libraries that results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "open_clip_torch", "lpips", "kornia", "numpy", "safetensors", "pillow")


def own_version() -> str:
    """The installed version of this package, or 'unknown'."""
    return _version("blended-diffusion") or "unknown"


def library_versions() -> dict[str, str]:
    """The versions of Python and of the installed libraries."""
    found = {name: number for name in LIBRARIES if (number := _version(name)) is not None}
    return {"python": platform.python_version(), **found}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
