"""Layers of a frozen network that store little for the backward pass and compute the rest again.

Plain autograd stores the input of every operation: in a residual block of its normalization, its SiLU and its convolution, though the gradient with
respect to the input of a convolution needs only the weights. Here normalization, scale and shift, and SiLU are one operation that stores its input and
two numbers per group, and convolutions store only sizes. This takes less than half of the memory and no more time, because the backward pass reads the
recomputed values from the cache.

The results equal those of the plain layers up to rounding. The plain layers run where anything but the image needs a gradient (training, an optimized
class embedding), under autocast, and where a layer was changed: hooks, circular padding, a wrapper in its place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..device import normalizes_groups


def can_replace(layer: nn.Module, *others: Tensor | None) -> bool:
    """Whether the functions below compute what calling the layer would; ``others``: its inputs beside the image."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if isinstance(layer, nn.GroupNorm):
        known = True
    else:
        known = type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and layer.groups == 1 and layer.dilation == (1, 1)
    if not known or not torch.is_grad_enabled():
        return known
    return not any(value is not None and value.requires_grad for value in (*layer.parameters(), *others))


def norm_silu(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, recompute: bool = True) -> Tensor:
    """silu(norm(x)·scale + shift), normalized in float32.

    Args:
        norm: the normalization layer; x: [B, C, H, W].
        scale, shift: [B, C] each, or both None.
        recompute: False runs the plain layers.

    Returns:
        [B, C, H, W] in the dtype of ``x``.
    """
    channels_last = x.device.type == "cpu" and not x.is_contiguous()  # a layout that torch's own layers keep and these would not
    if (
        not recompute
        or channels_last
        or not normalizes_groups(x.device)
        or torch.is_autocast_enabled(x.device.type)
        or not can_replace(norm, scale, shift)
    ):
        h = norm(x)
        if scale is not None and shift is not None:
            h = torch.addcmul(shift.to(h.dtype)[:, :, None, None], h, scale.to(h.dtype)[:, :, None, None])
        return F.silu(h)
    weight, bias = norm.weight.expand(len(x), -1), norm.bias.expand(len(x), -1)
    if scale is not None and shift is not None:
        weight, bias = weight * scale, torch.addcmul(shift, bias, scale)
    # Every image has its own weights. Laid out as groups of one wide image, they need one call of torch's kernel.
    out: Tensor = _NormSilu.apply(x, weight.reshape(-1), bias.reshape(-1), norm.num_groups, norm.eps)
    return out


class _NormSilu(torch.autograd.Function):
    """silu(GroupNorm(x)) with weights [B·C]; has a gradient of x alone, for which it is computed a second time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        wide, sizes = _wide(x, groups)
        h, mean, rstd = torch.native_group_norm(wide, weight, bias, *sizes, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(h.reshape(x.shape).to(x.dtype), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wide, sizes = _wide(x, ctx.groups)
        h = torch.native_group_norm(wide, weight, bias, *sizes, ctx.eps)[0].to(x.dtype)
        gradient = torch.ops.aten.silu_backward(gradient.reshape(wide.shape), h)
        del h
        result = torch.ops.aten.native_group_norm_backward(gradient.float(), wide, mean, rstd, weight, *sizes, [True, False, False])[0]
        return result.reshape(x.shape).to(x.dtype), None, None, None, None


def _wide(x: Tensor, groups: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """A batch laid out as the channels of one image, in float32, and its sizes for torch's kernels: images, channels, pixels, groups."""
    b, c, height, width = x.shape
    # Both conversions in one copy.
    wide = x.to(torch.float32, memory_format=torch.contiguous_format).reshape(1, b * c, height, width)
    return wide, (1, b * c, height * width, b * groups)


def convolve(layer: nn.Conv2d, x: Tensor, recompute: bool = True) -> Tensor:
    """``layer(x)`` without storing x for the backward pass; ``recompute`` False calls the layer."""
    if not recompute or not normalizes_groups(x.device) or torch.is_autocast_enabled(x.device.type) or not can_replace(layer):
        out: Tensor = layer(x)
        return out
    out = _Convolve.apply(x, layer.weight, layer.bias, layer.stride, layer.padding)
    return out


class _Convolve(torch.autograd.Function):
    """A convolution that has a gradient of its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        # Only the size of the input matters. A CPU would materialize an expanded tensor; an empty one that is never read takes no memory.
        size = gradient.new_empty(ctx.shape) if gradient.device.type == "cpu" else gradient.new_empty(1).expand(ctx.shape)
        like = gradient if gradient.shape == ctx.shape else size
        result = torch.ops.aten.convolution_backward(
            gradient, like, weight, None, ctx.stride, ctx.padding, [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
        return result, None, None, None, None
