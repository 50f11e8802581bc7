"""Model folders of ComfyUI: models/ddpm and models/open_clip."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths

from ..blended_core.adm.load import may_be_checkpoint
from ..blended_core.errors import BlendedError, one_line

DDPM_FOLDER, CLIP_FOLDER = "ddpm", "open_clip"
EXTENSIONS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin"}


def register_folders() -> None:
    """Registers the model folders; folders that another pack or extra_model_paths.yaml registered under the same names are kept."""
    for name in (DDPM_FOLDER, CLIP_FOLDER):
        paths, extensions = folder_paths.folder_names_and_paths.get(name, ([], set()))
        own = str(Path(folder_paths.models_dir) / name)
        folder_paths.folder_names_and_paths[name] = (paths if own in paths else [*paths, own], set(extensions) | EXTENSIONS)


def list_files(folder: str) -> list[str]:
    """Names of the files in a model folder; in models/ddpm only those that can be a diffusion model.

    Never raises: the schema of a node depends on it, and without schemas ComfyUI refuses every workflow. A file that cannot be judged is listed; the
    error follows when it is loaded.
    """
    try:
        names: list[str] = folder_paths.get_filename_list(folder)
    except Exception as error:
        logging.warning("Blended Diffusion: the folder models/%s cannot be listed: %s", folder, error)
        return []
    return [name for name in names if folder != DDPM_FOLDER or _is_listed(name)]


def _is_listed(name: str) -> bool:
    try:
        path = folder_paths.get_full_path(DDPM_FOLDER, name)
        return path is not None and _may_be_checkpoint(path, file_version(Path(path)))
    except Exception:  # deleted in this moment, in a folder without permission, …
        return True


@lru_cache(maxsize=4096)
def _may_be_checkpoint(path: str, _version: str) -> bool:
    """Reads the header of a file once per version of the file, because the web page requests the list often."""
    return may_be_checkpoint(Path(path))


def first_path(folder: str) -> Path:
    """The first directory that is registered for a model folder."""
    return Path(folder_paths.folder_names_and_paths[folder][0][0])


def find_file(folder: str, name: str) -> Path:
    """The path of a file inside a model folder. Raises BlendedError, naming the directory, if it no longer exists.

    The answer to a name that leads out of the folder is the same, whether there is such a file or not.
    """
    outside = any(kind(name).anchor or ".." in kind(name).parts for kind in (PurePosixPath, PureWindowsPath))
    found = None if outside else folder_paths.get_full_path(folder, name)
    if found is None:
        raise BlendedError(f"{name!r} is not in {first_path(folder)}; put the file there and press R to refresh, or choose another file.")
    return Path(found)


def check_file(folder: str, name: str) -> bool | str:
    """True if the file exists, else an error message, as ComfyUI's ``validate_inputs`` expects them."""
    try:
        return find_file(folder, name).is_file()
    except BlendedError as error:
        return one_line(error)


def file_version(*paths: Path) -> str:
    """A text that changes when one of the files is overwritten, so that the node that loads it runs again."""
    return "/".join(f"{s.st_mtime_ns}.{s.st_size}" for s in (p.stat() for p in paths if p.is_file()))
