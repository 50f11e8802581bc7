"""Model folders of ComfyUI: models/ddpm and models/open_clip."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

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
    """Names of the files in a model folder; in models/ddpm only those that can be a diffusion model."""
    names: list[str] = folder_paths.get_filename_list(folder)
    if folder != DDPM_FOLDER:
        return names
    paths = {name: folder_paths.get_full_path(folder, name) for name in names}
    return [name for name, path in paths.items() if path is not None and _may_be_checkpoint(path, file_version(Path(path)))]


@lru_cache(maxsize=4096)
def _may_be_checkpoint(path: str, _version: str) -> bool:
    """Reads the header of a file once per version of the file, because the web page requests the list often."""
    return may_be_checkpoint(Path(path))


def first_path(folder: str) -> Path:
    """The first directory that is registered for a model folder."""
    return Path(folder_paths.folder_names_and_paths[folder][0][0])


def find_file(folder: str, name: str) -> Path:
    """The path of a listed file. Raises BlendedError, naming the directory, if the file no longer exists."""
    found = folder_paths.get_full_path(folder, name)
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
