"""Copying tensors from a file into a network that was built without memory for its weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import BlendedError

CHUNK_VALUES = 2**18
"""Values that are checked and copied together. They stay in the processor's cache, so the check takes almost no time."""
RANDOM_INITIALIZERS = frozenset({"normal_", "uniform_", "kaiming_uniform_"})
"""Functions that the layers of torch call for random initial values."""
INITIALIZERS = RANDOM_INITIALIZERS | {"zero_", "fill_"}
"""Functions that the layers of torch and of this library call for their initial values."""


class SkipInitialization(TorchFunctionMode):
    """Leaves out initial values, which a file replaces: on the meta device they would import a compiler, which takes seconds.

    Args:
        names: of the functions that do nothing.
    """

    def __init__(self, names: frozenset[str] = INITIALIZERS) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.names:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def copy_finite(tensor: Tensor, name: str, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """A copy of a tensor that does not depend on its file.

    Args:
        tensor: of floating-point numbers.
        name: for errors.
        dtype: of the copy.
        channels_last: memory layout of a copy with four dimensions.

    Raises:
        BlendedError: if the tensor is not dense and floating-point, has NaN or infinite values, or values beyond the range of ``dtype``.
    """
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
        raise BlendedError(
            f"{name} is not a dense floating-point tensor ({tensor.dtype}); quantized files are not supported: use the original file."
        )
    values = tensor.detach()
    if values.ndim == 0:
        return copy_finite(values[None], name, dtype, False)[0]
    layout = torch.channels_last if channels_last and values.ndim == 4 else torch.contiguous_format
    out = torch.empty(values.shape, dtype=dtype, memory_format=layout)
    low, high = 0.0, 0.0
    rows = max(1, CHUNK_VALUES * len(values) // max(1, values.numel()))
    for begin in range(0, len(values), rows):
        chunk = slice(begin, begin + rows)
        # float64 stays: a value that is too large for float32 is not infinite.
        part = values[chunk] if values.dtype == torch.float64 else values[chunk].to(torch.float32)
        # The extremes reveal NaN and infinity in one vectorized pass over values that the copy is about to read.
        smallest, largest = (float(v) for v in part.aminmax())
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            count = int((~values.to(torch.float32).isfinite()).sum())
            raise BlendedError(
                f"{count} of the {values.numel()} values of {name} are not finite (NaN or infinite); the file is damaged: download it again."
            )
        low, high = min(low, smallest), max(high, largest)
        out[chunk].copy_(part)
    if max(-low, high) > torch.finfo(dtype).max:
        raise BlendedError(f"{name} has values up to {max(-low, high):.3g}, too large for {dtype}; use bf16 or fp32.", option="dtype")
    return out
