"""The weights in an archive of TorchScript, without its program.

Such an archive is a zip file: ``data.pkl`` describes the modules, ``data/`` holds the numbers, ``code/`` a program that PyTorch
would run while it loads. Here the description is unpickled with plain objects in the place of modules, tensors are built from the
numbers, and any other name in it is refused.
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

STORAGES = {
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "ShortStorage": torch.int16, "IntStorage": torch.int32,
    "LongStorage": torch.int64, "BoolStorage": torch.bool,
}  # fmt: skip
DEPTH = 32  # modules inside each other, at most


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of TorchScript: weights with a program."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        return False


def read_torchscript(path: Path, numbers: bool = True) -> dict[str, Tensor]:
    """The tensors of an archive, in the precision that they are stored in, by the names that its modules have.

    Args:
        path: the archive.
        numbers: False gives their shapes only, on the meta device.

    Raises:
        BlendedError: if it is damaged, or its description asks for more than tensors in modules.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            descriptions = [n for n in archive.namelist() if n.endswith("/data.pkl") and n.count("/") == 1]
            if len(descriptions) != 1:
                raise BlendedError(f"{path} is no whole archive of TorchScript (it has {len(descriptions)} descriptions); fetch it again.")
            with archive.open(descriptions[0]) as stream:
                root = _Description(stream, archive, descriptions[0].removesuffix("data.pkl"), numbers).load()
            return dict(_tensors(root, "", set()))
    except BlendedError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BlendedError(f"{path} is no whole archive of TorchScript ({first[:200]}); fetch it again.") from None


class _Module:
    """What stands in the archive for a module; its attributes are those of the module."""


class _Description(pickle.Unpickler):
    def __init__(self, stream: Any, archive: zipfile.ZipFile, root: str, numbers: bool) -> None:
        super().__init__(stream)
        self.archive, self.root, self.numbers = archive, root, numbers
        self.storages: dict[str, Tensor] = {}  # several tensors may be parts of one

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle":  # lists of numbers, and what type they have; nothing of it is a weight
            return _ignored
        raise BlendedError(f"this archive of TorchScript asks for {module}.{name}, which a set of weights does not need, so it is refused.")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isdecimal() or not isinstance(count, int) or count < 0:
            raise ValueError(f"{pid!r} is no storage")
        known = self.storages.get(key)
        if known is None or known.dtype != dtype or known.numel() != count:
            known = self.storages[key] = self._storage(key, dtype, count)
        return known

    def _storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        if not self.numbers:
            return torch.empty(count, dtype=dtype, device="meta")
        entry = self.archive.getinfo(f"{self.root}data/{key}")
        # PyTorch never compresses them, so that an entry cannot grow beyond what the file has.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != count * dtype.itemsize:
            raise ValueError(f"the numbers {key} are not as many as they should be")
        return torch.frombuffer(bytearray(self.archive.read(entry)), dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    reach = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else 0
    if offset < 0 or min((*size, *stride), default=0) < 0 or reach > storage.numel():
        raise ValueError("a tensor reaches beyond its numbers")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _ignored(*_: Any) -> None:
    return None


def _tensors(module: object, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Each module once, whatever refers to it."""
    if not isinstance(module, _Module) or id(module) in seen or prefix.count(".") > DEPTH:
        return
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _tensors(value, f"{prefix}{name}.", seen)
