"""TorchScript archives: weights with a program, of which only the weights are read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .archive import is_torchscript as is_torchscript
from .open import open_weights


def read_torchscript(path: Path, values: bool = True) -> dict[str, Tensor]:
    """The tensors of an archive in their stored precision, under the names that its modules give them.

    Args:
        path: the archive.
        values: False reads only the shapes; the tensors are on the meta device.

    Raises:
        BlendedError: if it is damaged, or its description needs more than tensors in modules. The text does not name the file.
    """
    file = open_weights(path)
    if values:
        return {name: file.take(name) for name in file.tensors}
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in file.tensors.items()}
