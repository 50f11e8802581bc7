"""The operations of a frozen encoder, as fast as torch can compute them on a CPU.

Where the weights need gradients, under autocast and on other devices, torch's own operations run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WIDE = 256
"""Width of a layer from which the choice of a matrix product matters."""


def quick_gelu(x: Tensor) -> Tensor:
    """x·σ(1.702 x), the activation of OpenAI's weights."""
    if x.dtype == torch.float16:  # 1.702 x can be beyond its range where the result is not
        return x * torch.sigmoid(1.702 * x)
    out: Tensor = _QuickGelu.apply(x)
    return out


class _QuickGelu(torch.autograd.Function):
    """silu(1.702 x) / 1.702, which stores x alone and makes one pass where the written formula makes several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(1.702 * x, inplace=True).div_(1.702)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = torch.ops.aten.silu_backward(gradient, 1.702 * x)
        return out


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q·kᵀ / √D)·v of tensors [B, heads, N, D]; with ``causal`` a token attends to those up to itself."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not causal:
        # The fused kernel multiplies small tiles, for which bfloat16 is no faster than float32. Whole matrices take 0.4 of its time.
        weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), -1)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Tensors [..., inputs] → [..., outputs]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``. In float32 on a CPU torch calls MKL for it; oneDNN, which it calls for convolutions, takes 0.92 of the time on an AMD EPYC."""
    if not _onednn_computes(x, weight, bias):
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


def _onednn_computes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32 or min(weight.shape) < WIDE:
        return False
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return (
        not torch.is_autocast_enabled("cpu")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"  # others were not measured
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class _Linear(torch.autograd.Function):
    """x·Wᵀ + b by oneDNN; has a gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _product(gradient, weight.t(), None), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
