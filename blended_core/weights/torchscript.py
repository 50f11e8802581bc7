"""The weights in a TorchScript archive, read without its program.

A TorchScript archive is a zip file: ``data.pkl`` describes the modules, ``data/`` holds the values, ``code/`` a program that PyTorch would run while
loading. Here the description is unpickled with plain objects in place of modules, and tensors are built from the values. Any other name in the
description is refused.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BlendedError
from .open import first_line

STORAGES = {
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "ShortStorage": torch.int16, "IntStorage": torch.int32,
    "LongStorage": torch.int64, "BoolStorage": torch.bool,
}  # fmt: skip
MAX_MODULE_NESTING = 32


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: weights with a program."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        return False


def read_torchscript(path: Path, values: bool = True) -> dict[str, Tensor]:
    """The tensors of an archive in their stored precision, under the names that its modules give them.

    Args:
        path: the archive.
        values: False reads only the shapes; the tensors are on the meta device.

    Raises:
        BlendedError: if it is damaged, or its description needs more than tensors in modules. The text does not name the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            descriptions = [n for n in archive.namelist() if n.endswith("/data.pkl") and n.count("/") == 1]
            if len(descriptions) != 1:
                raise ValueError(f"{len(descriptions)} files data.pkl instead of 1")
            with archive.open(descriptions[0]) as stream:
                root = _Unpickler(stream, archive, descriptions[0].removesuffix("data.pkl"), values).load()
            return dict(_tensors(root, "", set()))
    except BlendedError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        raise BlendedError(f"it is not a complete TorchScript archive ({first_line(error)}); download it again.") from None


class _Module:
    """Takes the place of a module in the archive and has the same attributes."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, archive: zipfile.ZipFile, root: str, values: bool) -> None:
        super().__init__(stream)
        self.archive, self.root, self.values = archive, root, values
        self.storages: dict[str, Tensor] = {}  # several tensors may share one

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle":  # typed lists of numbers, which are never weights
            return _ignored
        raise BlendedError(f"this TorchScript archive asks for {module}.{name}, which weights do not need, so it is refused.")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isdecimal() or not isinstance(count, int) or count < 0:
            raise ValueError(f"{pid!r} is not a storage")
        known = self.storages.get(key)
        if known is None or known.dtype != dtype or known.numel() != count:
            known = self.storages[key] = self._storage(key, dtype, count)
        return known

    def _storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        if not self.values:
            return torch.empty(count, dtype=dtype, device="meta")
        entry = self.archive.getinfo(f"{self.root}data/{key}")
        # PyTorch never compresses values. An uncompressed entry cannot be larger than the file.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != count * dtype.itemsize:
            raise ValueError(f"storage {key} does not have the declared size")
        return torch.frombuffer(bytearray(self.archive.read(entry)), dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else 0
    if offset < 0 or min((*size, *stride), default=0) < 0 or end > storage.numel():
        raise ValueError("a tensor exceeds its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _ignored(*_: Any) -> None:
    return None


def _tensors(module: object, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name; each module is visited once, however often it is referenced."""
    if not isinstance(module, _Module) or id(module) in seen or prefix.count(".") > MAX_MODULE_NESTING:
        return
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _tensors(value, f"{prefix}{name}.", seen)
