"""Weights in files of any model: names, shapes and tensors, read without running anything that a file may carry."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import BlendedError

ZIP = b"PK\x03\x04"
"""First bytes of a file of torch.save since PyTorch 1.6. The older format is a plain pickle, which cannot be memory-mapped."""
NAMES_BYTES = 1 << 23
"""Bytes at the beginning of a file that are searched for the names of its tensors."""
MAX_NESTING = 8
"""Levels of dictionaries and lists inside each other that are searched for tensors."""


@dataclass(frozen=True)
class WeightsFile:
    """An opened file.

    Attributes:
        path: the file.
        shapes: name → shape of every tensor.
        metadata: texts of the metadata of a safetensors file; empty for other files.
        take: name → tensor on the CPU. Each tensor can be taken once, because a file that had to be read completely releases it.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    take: Callable[[str], Tensor]


@contextlib.contextmanager
def file_errors(path: Path, option: str) -> Iterator[None]:
    """Puts the name of a file before the errors about it, and names the option that chose the file where an error names none."""
    try:
        yield
    except BlendedError as error:
        raise BlendedError(f"{path.name}: {error}", error.options or option) from None


def open_weights(path: Path, advice: str = "") -> WeightsFile:
    """Reads the names and shapes in a file; the format is determined from its first bytes, then from its name.

    Args:
        path: a safetensors file, or a file of torch.save in either of its formats: a state dict, or one inside dictionaries and lists. Names inside
            containers are joined by dots: 'ema.module.out.2.bias'.
        advice: a sentence about which file to use instead, for files without a state dict.

    Raises:
        BlendedError: if the file is absent, damaged, holds no tensors, or could only be read by running code. The text does not name the file.
    """
    if (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file():
        raise BlendedError(f"it is a folder in the layout of the diffusers library, not a checkpoint file. {advice}")
    if path.is_dir():
        raise BlendedError(f"{path} is a folder; give the checkpoint file in it.")
    if not path.exists():
        raise BlendedError(f"there is no file {path}; check the name.")
    try:
        with path.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise BlendedError(f"the file cannot be read: {error.strerror or error}.") from None
    if not start:
        raise BlendedError("the file is empty; download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise BlendedError("it is a Git LFS pointer, not the weights; download them with `git lfs pull`.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise BlendedError(
            "it is a web page, not a checkpoint: the server answered the download with an error or a form; download it again."
        )
    if path.suffix.lower() == ".safetensors" or start[8:9] == b"{":
        return _open_safetensors(path)
    return _open_torch(path, start, advice)


def raw_names(path: Path) -> bytes | None:
    """Bytes that contain the names of the tensors in a file, at most :data:`NAMES_BYTES`; None if they cannot be located. Reads no tensor."""
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
            if path.suffix.lower() == ".safetensors":
                return stream.read(min(int.from_bytes(start, "little"), NAMES_BYTES))
            if not start.startswith(ZIP):
                return start + stream.read(NAMES_BYTES)
            with zipfile.ZipFile(stream) as archive:
                pickles = [n for n in archive.namelist() if n.endswith("data.pkl")]
                with archive.open(pickles[0]) as inner:
                    return inner.read(NAMES_BYTES)
    except (OSError, ValueError, IndexError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        return None


def read_sidecar(path: Path) -> dict[str, Any]:
    """The JSON object in FILE.json beside FILE.pt; empty if there is no such file.

    Raises:
        BlendedError: if it cannot be read or is not a JSON object.
    """
    sidecar = path.with_suffix(".json")
    if sidecar == path or not sidecar.is_file():
        return {}
    try:
        text = sidecar.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BlendedError(f"its sidecar {sidecar.name} cannot be read ({first_line(error)}); fix or remove it.") from None
    return json_object(text, f"its sidecar {sidecar.name}")


def json_object(text: str, name: str) -> dict[str, Any]:
    """Parses a JSON object; ``name`` is the subject of the error if it is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BlendedError(f"{name} is not valid JSON ({first_line(error)}); fix or remove it.") from None
    if not isinstance(value, dict):
        raise BlendedError(f"{name} must be a JSON object of settings, not a {type(value).__name__}; fix or remove it.")
    return value


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without a final period; at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


def _open_safetensors(path: Path) -> WeightsFile:
    try:
        file: Any = safe_open(str(path), framework="pt", device="cpu")
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = file.metadata() or {}
    except Exception as error:  # safetensors raises its own exceptions, and others for what a damaged header claims
        raise BlendedError(f"it is not a complete safetensors file ({first_line(error)}); download it again.") from None

    def take(key: str) -> Tensor:
        try:
            tensor: Tensor = file.get_tensor(key)
        except Exception as error:  # as above
            raise BlendedError(f"{key} cannot be read ({first_line(error)}); download the file again.") from None
        return tensor

    return WeightsFile(path, shapes, metadata, take)


def _open_torch(path: Path, start: bytes, advice: str) -> WeightsFile:
    try:
        # weights_only: an unpickler that builds tensors and plain containers, and refuses everything else.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle formats
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(ZIP))
    except Exception as error:  # a damaged or malicious pickle can raise nearly anything
        raise BlendedError(_unreadable(start, error, advice)) from None
    tensors = _flatten(content)
    if not tensors and isinstance(content, Mapping) and "param_groups" in content:
        raise BlendedError("it is the state of an optimizer, not a network. Use the file with the weights, usually in the same folder.")
    if not tensors:
        raise BlendedError(f"it holds no tensors, only a {type(content).__name__}. {advice}")
    del content  # so that taking a tensor frees its memory
    return WeightsFile(path, {key: tuple(value.shape) for key, value in tensors.items()}, {}, tensors.pop)


def _unreadable(start: bytes, error: Exception, advice: str) -> str:
    """Why torch.load refused a file that starts with these bytes."""
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "it does not fit into memory, or is damaged and claims an absurd size; free memory or download it again."
    match = re.search(r"GLOBAL ([\w.]+)", text)
    name = match[1].rstrip(".") if match else ""
    if name.startswith(("torch_utils.", "dnnlib.")) or b"torch_utils.persistence" in start:
        return f"it is a pickle with program code in the format of EDM and StyleGAN (torch_utils), which is not run here. {advice}"
    cut = any(whole.startswith(name) for whole in ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch.FloatStorage"))
    if (name and not cut) or (start[:1] == b"\x80" and "Unsupported operand" in text):
        run = f"run {name}" if name else "build objects"
        return (
            f"it holds more than tensors: reading it would {run}, which a malicious file could misuse, so it is refused. If you trust the file, "
            "save its state dict alone, preferably as safetensors, and use that."
        )
    # PyTorch's own text explains how to turn the protection off, so it is not repeated.
    reason = "its pickle is damaged" if "Weights only load failed" in text else first_line(error)
    return f"it is not a complete PyTorch checkpoint ({reason}); download it again, or use a .safetensors or .pt file."


def _flatten(content: object) -> dict[str, Tensor]:
    """All tensors in nested dictionaries and lists, with their keys joined by dots. Each container is visited once, however often it is referenced."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()

    def visit(item: object, name: str, depth: int) -> None:
        if isinstance(item, Tensor):
            tensors.setdefault(name, item)
        elif isinstance(item, (Mapping, list, tuple)) and id(item) not in seen and depth <= MAX_NESTING:
            seen.add(id(item))
            pairs = item.items() if isinstance(item, Mapping) else enumerate(item)
            for key, value in pairs:
                visit(value, f"{name}.{key}" if depth else str(key), depth + 1)

    visit(content, "", 0)
    return tensors
