"""Layers of a frozen network that keep for the way back what it cannot do without, and make the rest again.

Plain autograd keeps the input of every operation: of a residual block's normalisation, of its SiLU, and of its convolution, though the gradient of a
convolution's input needs only the weights. Here normalisation, scale and shift, and SiLU are one operation that keeps its input and two numbers a
group, and convolutions keep nothing but their size: less than half of the memory, and no more time, for the way back reads what it makes anew from
the cache.

The numbers are those of the plain layers up to rounding. The plain layers run where anything but the picture wants a gradient (training, a class
embedding that is searched for), under autocast, and where somebody has changed a layer: hooks, circular padding, a wrapper in its place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def stands_in(layer: nn.Module, *others: Tensor | None) -> bool:
    """Whether the functions below do what calling the layer would; ``others``: what else goes into it beside the picture."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if isinstance(layer, nn.GroupNorm):
        known = True
    else:
        known = type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and layer.groups == 1 and layer.dilation == (1, 1)
    if not known or not torch.is_grad_enabled():
        return known
    return not any(value is not None and value.requires_grad for value in (*layer.parameters(), *others))


def works_on(device: torch.device) -> bool:
    """Whether torch has the kernels there that are called below; elsewhere the plain layers run."""
    return device.type in ("cpu", "cuda")


def norm_silu(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, recompute: bool = True) -> Tensor:
    """silu(norm(x)·scale + shift), normalised in float32.

    Args:
        norm: its layer; x: [B, C, H, W].
        scale, shift: [B, C] each, or both None.
        recompute: False: as plain autograd has it.

    Returns:
        [B, C, H, W] in the type of ``x``.
    """
    turned = x.device.type == "cpu" and not x.is_contiguous()  # channels last, which torch's own layers keep and these would turn back
    if not recompute or turned or not works_on(x.device) or torch.is_autocast_enabled(x.device.type) or not stands_in(norm, scale, shift):
        h = norm(x)
        if scale is not None and shift is not None:
            h = torch.addcmul(shift.to(h.dtype)[:, :, None, None], h, scale.to(h.dtype)[:, :, None, None])
        return F.silu(h)
    weight, bias = norm.weight.expand(len(x), -1), norm.bias.expand(len(x), -1)
    if scale is not None and shift is not None:
        weight, bias = weight * scale, torch.addcmul(shift, bias, scale)
    # Every image has its own weights then. As groups of one wide image torch's kernel takes them all at once.
    out: Tensor = _NormSilu.apply(x, weight.reshape(-1), bias.reshape(-1), norm.num_groups, norm.eps)
    return out


class _NormSilu(torch.autograd.Function):
    """silu(GroupNorm(x)) with weights [B·C] of each image; the gradient of x alone, for which it is computed a second time."""

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
        found = torch.ops.aten.native_group_norm_backward(gradient.float(), wide, mean, rstd, weight, *sizes, [True, False, False])[0]
        return found.reshape(x.shape).to(x.dtype), None, None, None, None


def _wide(x: Tensor, groups: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """A batch laid out as the channels of one image, in float32, and what torch's kernels are told of it: images, channels, pixels, groups."""
    b, c, height, width = x.shape
    return x.float().reshape(1, b * c, height, width), (1, b * c, height * width, b * groups)


def convolve(layer: nn.Conv2d, x: Tensor, recompute: bool = True) -> Tensor:
    """``layer(x)``, without keeping x."""
    if not recompute or not works_on(x.device) or torch.is_autocast_enabled(x.device.type) or not stands_in(layer):
        out: Tensor = layer(x)
        return out
    out = _Convolve.apply(x, layer.weight, layer.bias, layer.stride, layer.padding)
    return out


class _Convolve(torch.autograd.Function):
    """A convolution with the gradient of its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        # Only the size of the input counts. On a CPU a tensor of repeated values would be written out, one that is never touched is not.
        size = gradient.new_empty(ctx.shape) if gradient.device.type == "cpu" else gradient.new_empty(1).expand(ctx.shape)
        like = gradient if gradient.shape == ctx.shape else size
        found = torch.ops.aten.convolution_backward(
            gradient, like, weight, None, ctx.stride, ctx.padding, [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
        return found, None, None, None, None
