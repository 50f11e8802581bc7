"""The ADM UNet: the network of improved-diffusion and guided-diffusion.

Parameter names and shapes are those of the published checkpoints, so their state dicts load with ``strict=True``. Sources: Nichol & Dhariwal,
"Improved Denoising Diffusion Probabilistic Models" (2021); Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import BlendedError
from .recompute import convolve, norm_silu

GROUPS = 32
"""Of every group normalization in both code bases."""
MAX_IMAGE_SIZE = 4096
"""Side in pixels that a network can be said to be trained at: an edit works on images of this size."""


@dataclass(frozen=True)
class UNetConfig:
    """The architecture of a network.

    Attributes:
        image_size: side in pixels that the network was trained at.
        channel_mult: channels of each resolution as multiples of ``model_channels``.
        attention_downsampling: downsampling factors (2, 4, 8 …) of the resolutions with attention, as in the constructors of guided-diffusion. Its
            command lines count in pixels instead: ``attention_resolutions`` of 32,16,8 at 256 px is 8,16,32 here.
        num_head_channels: channels of an attention head; takes precedence over ``num_heads``.
        num_heads_upsample: heads in the output half where ``num_heads`` counts; None: the same as ``num_heads``.

    Raises:
        BlendedError: for values that no network can have.
    """

    image_size: int = 256
    model_channels: int = 256
    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    num_res_blocks: int = 2
    attention_downsampling: tuple[int, ...] = (8, 16, 32)
    in_channels: int = 3
    out_channels: int = 6
    num_classes: int | None = None
    num_heads: int = 1
    num_head_channels: int | None = None
    num_heads_upsample: int | None = None
    resblock_updown: bool = False
    use_scale_shift_norm: bool = False
    conv_resample: bool = True
    use_new_attention_order: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(int(m) if m == int(m) else float(m) for m in self.channel_mult))
        object.__setattr__(self, "attention_downsampling", tuple(sorted(int(d) for d in self.attention_downsampling)))
        if not self.channel_mult:
            raise BlendedError("channel_mult is empty: give one multiplier for each resolution, e.g. (1, 2, 4).")
        if self.model_channels < 1 or self.num_res_blocks < 1 or self.in_channels < 1 or self.image_size < 1:
            raise BlendedError(
                f"model_channels {self.model_channels}, num_res_blocks {self.num_res_blocks}, in_channels "
                f"{self.in_channels} and image_size {self.image_size} must all be at least 1."
            )
        if self.image_size > MAX_IMAGE_SIZE:
            raise BlendedError(f"image_size is {self.image_size}; it must be at most {MAX_IMAGE_SIZE} pixels.")
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise BlendedError(
                f"out_channels is {self.out_channels}; with {self.in_channels} input channels it must be "
                f"{self.in_channels} (fixed variance) or {2 * self.in_channels} (learned variance)."
            )
        for multiplier in self.channel_mult:
            channels = int(multiplier * self.model_channels)
            if channels < 1 or channels % GROUPS:
                raise BlendedError(
                    f"multiplier {multiplier} of {self.model_channels} channels gives {channels}; every resolution needs a "
                    f"multiple of {GROUPS} channels."
                )
        if self.num_classes is not None and self.num_classes < 1:
            raise BlendedError(f"num_classes is {self.num_classes}; give the number of classes, or None.")

    @property
    def downsampling(self) -> int:
        """The factor between the input and the smallest resolution; height and width of the input must be multiples of it."""
        return int(2 ** (len(self.channel_mult) - 1))

    @property
    def learn_sigma(self) -> bool:
        """Whether the second half of the output channels is the interpolation coefficient of the learned variance."""
        return self.out_channels == 2 * self.in_channels

    def heads(self, channels: int, upsample: bool = False) -> int:
        """Number of attention heads of a block with that many channels; BlendedError if they do not divide it."""
        if self.num_head_channels is not None:
            heads, rest = divmod(channels, self.num_head_channels)
            if rest or not heads:
                raise BlendedError(f"num_head_channels is {self.num_head_channels}, which does not divide a block of {channels} channels.")
            return heads
        heads = self.num_heads_upsample if upsample and self.num_heads_upsample is not None else self.num_heads
        if heads < 1 or channels % heads:
            raise BlendedError(f"{heads} attention heads do not divide a block of {channels} channels.")
        return heads

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a sidecar file or in safetensors metadata."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNetConfig:
        """The inverse of :meth:`to_dict`; BlendedError for unknown names."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise BlendedError(f"unknown UNet setting {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
        return cls(**values)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding, cosines first; ``timesteps`` [B], fractional or not → [B, dim] float32."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


class GroupNorm32(nn.GroupNorm):
    """GroupNorm that computes in float32 in every precision of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == torch.float32:
            return super().forward(input)
        return super().forward(input.float()).to(input.dtype)


class Upsample(nn.Module):
    """Nearest ×2, followed by a 3×3 convolution if ``use_conv``."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None
        self.recompute = True

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.conv is None else convolve(self.conv, x, self.recompute)


class Downsample(nn.Module):
    """A 3×3 convolution of stride 2 if ``use_conv``, else 2×2 average pooling."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op: nn.Module = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)
        self.recompute = True

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.op, nn.Conv2d):
            return convolve(self.op, x, self.recompute)
        out: Tensor = self.op(x)
        return out


class ResBlock(nn.Module):
    """Residual block conditioned on the time embedding; ``resample``: 'up', 'down' or ''."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int, scale_shift: bool, resample: str = "") -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.resample: nn.Module | None = None
        if resample:
            self.resample = Upsample(channels, False) if resample == "up" else Downsample(channels, False)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels), nn.SiLU(), nn.Identity(), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        # The Identity has the index of the dropout in guided-diffusion, which has no weights and is off at inference.
        nn.init.zeros_(self.out_layers[3].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.out_layers[3].bias)  # type: ignore[arg-type]
        self.skip_connection: nn.Module = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.recompute = True

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = norm_silu(self.in_layers[0], x, recompute=self.recompute)  # type: ignore[arg-type]
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = convolve(self.in_layers[2], h, self.recompute)  # type: ignore[arg-type]
        shift = self.emb_layers(emb)
        scale = None
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = norm_silu(self.out_layers[0], h, 1 + scale, shift, self.recompute)  # type: ignore[arg-type]
        else:
            h = norm_silu(self.out_layers[0], h + shift.to(h.dtype)[:, :, None, None], recompute=self.recompute)  # type: ignore[arg-type]
        h = convolve(self.out_layers[3], h, self.recompute)  # type: ignore[arg-type]
        if not isinstance(self.skip_connection, nn.Identity):
            x = convolve(self.skip_connection, x, self.recompute)  # type: ignore[arg-type]
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions.

    ``new_order``: the 3·C channels of qkv are laid out as (3, heads, C/heads), else as (heads, 3, C/heads).
    """

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads = heads
        self.new_order = new_order
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        if self.proj_out.bias is not None:
            nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, T, C]
        qkv = F.linear(tokens, self.qkv.weight.squeeze(-1), self.qkv.bias)
        if self.new_order:
            q, k, v = qkv.view(b, -1, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = qkv.view(b, -1, self.heads, 3, c // self.heads).permute(3, 0, 2, 1, 4)
        # On transposed views SDPA uses its slow math backend without a warning; contiguous operands keep the fused one.
        h = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        h = h.transpose(1, 2).reshape(b, -1, c)
        h = F.linear(h, self.proj_out.weight.squeeze(-1), self.proj_out.bias).transpose(1, 2).reshape(b, c, height, width)
        # h is laid out channels last. Every later activation would take over this layout, and each convolution would convert its weights to it.
        return x + (h.contiguous() if x.is_contiguous() else h)


class Stage(nn.Sequential):
    """Layers in sequence; residual blocks receive the time embedding too."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """The network of an ADM checkpoint, which predicts ε, v or x0.

    Args:
        config: the architecture.

    Attributes:
        compute_dtype: of convolutions and attention between the first and the last layer (:meth:`set_compute_dtype`). Normalization, embeddings and
            the output head stay in float32.
        gradient_checkpointing: computes the activations of each block again in the backward pass, for less memory.
        recompute: keeps less for the backward pass (:meth:`set_recompute`).

    There is no dropout, so training mode and evaluation mode are the same.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.gradient_checkpointing = False
        self.recompute = True
        mc, emb = config.model_channels, 4 * config.model_channels
        norm, updown = config.use_scale_shift_norm, config.resblock_updown

        def attention(channels: int, upsample: bool = False) -> AttentionBlock:
            return AttentionBlock(channels, config.heads(channels, upsample), config.use_new_attention_order)

        self.time_embed = nn.Sequential(nn.Linear(mc, emb), nn.SiLU(), nn.Linear(emb, emb))
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, emb)

        levels = [int(m * mc) for m in config.channel_mult]
        channels = levels[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, channels, 3, padding=1))])
        skips = [channels]
        scale = 1
        for level, width in enumerate(levels):
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [ResBlock(channels, emb, width, norm)]
                channels = width
                if scale in config.attention_downsampling:
                    layers.append(attention(channels))
                self.input_blocks.append(Stage(*layers))
                skips.append(channels)
            if level < len(levels) - 1:
                down: nn.Module = ResBlock(channels, emb, channels, norm, "down") if updown else Downsample(channels, config.conv_resample)
                self.input_blocks.append(Stage(down))
                skips.append(channels)
                scale *= 2

        self.middle_block = Stage(ResBlock(channels, emb, channels, norm), attention(channels), ResBlock(channels, emb, channels, norm))

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(levels))):
            for i in range(config.num_res_blocks + 1):
                layers = [ResBlock(channels + skips.pop(), emb, width, norm)]
                channels = width
                if scale in config.attention_downsampling:
                    layers.append(attention(channels, upsample=True))
                if level and i == config.num_res_blocks:
                    layers.append(ResBlock(channels, emb, channels, norm, "up") if updown else Upsample(channels, config.conv_resample))
                    scale //= 2
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, config.out_channels, 3, padding=1))
        nn.init.zeros_(self.out[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.out[2].bias)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        c = self.config
        classes = f", {c.num_classes} classes" if c.num_classes is not None else ""
        mult = ", ".join(f"{m:g}" for m in c.channel_mult)
        return f"UNet({c.image_size} px, {c.model_channels} channels × ({mult}), {c.in_channels} → {c.out_channels}{classes}, {self.compute_dtype})"

    def rewire(self, config: UNetConfig) -> UNet:
        """Sets the number of heads and the order of qkv, which do not change the weights; returns self.

        Raises:
            BlendedError: if the heads do not divide the channels of a block. The network is not changed then.
        """
        blocks = [
            (module, half is self.output_blocks)
            for half in (self.input_blocks, self.middle_block, self.output_blocks)
            for module in half.modules()
            if isinstance(module, AttentionBlock)
        ]
        heads = [config.heads(block.qkv.in_channels, upsample) for block, upsample in blocks]
        for (block, _), count in zip(blocks, heads, strict=True):
            block.heads, block.new_order = count, config.use_new_attention_order
        self.config = config
        return self

    def set_compute_dtype(self, dtype: torch.dtype) -> UNet:
        """Sets :attr:`compute_dtype` to float32, bfloat16 or float16; returns self."""
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise BlendedError(f"the UNet computes in float32, bfloat16 or float16, not {dtype}.", option="dtype")
        self.compute_dtype = dtype
        for stage in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in stage.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.to(dtype)
        return self

    def set_recompute(self, recompute: bool) -> UNet:
        """Whether normalizations are computed again in the backward pass (:mod:`~blended_core.adm.recompute`), the default; returns self."""
        for module in self.modules():
            if isinstance(module, (UNet, ResBlock, Upsample, Downsample)):
                module.recompute = recompute
        return self

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The output for noisy images.

        Args:
            x: [B, C, H, W], images in −1..1 with noise added.
            timesteps: [B], in the units that the network was trained with.
            y: class indices [B], −1 for no class, or a class embedding [B, 4·model_channels] that is added as it is (zeros: no class).

        Returns:
            [B, out_channels, H, W] float32.

        Raises:
            BlendedError: if H or W is not a multiple of ``config.downsampling``, or if labels are missing or not expected.
        """
        step = self.config.downsampling
        if x.shape[2] % step or x.shape[3] % step:
            raise BlendedError(f"the model needs images whose sides are multiples of {step}, not {x.shape[3]}×{x.shape[2]}.")
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels))
        if self.config.num_classes is None:
            if y is not None:
                raise BlendedError("the model is unconditional, but class labels were given.")
        elif y is None:
            raise BlendedError(f"the model has {self.config.num_classes} classes; give a label for each image.")
        else:
            emb = emb + (y if y.ndim == 2 else self.label_emb(y.clamp(min=0)) * (y >= 0)[:, None])

        run: Callable[[nn.Module, Tensor, Tensor], Tensor] = _checkpointed if self.gradient_checkpointing else _direct
        h = x.to(self.compute_dtype)
        skips = []
        for stage in self.input_blocks:
            h = run(stage, h, emb)
            skips.append(h)
        h = run(self.middle_block, h, emb)
        for stage in self.output_blocks:
            h = run(stage, torch.cat([h, skips.pop()], dim=1), emb)
        h = norm_silu(self.out[0], h.float(), recompute=self.recompute)  # type: ignore[arg-type]
        return convolve(self.out[2], h, self.recompute)  # type: ignore[arg-type]


def _direct(stage: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    out: Tensor = stage(h, emb)
    return out


def _checkpointed(stage: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _direct(stage, h, emb)
    out: Tensor = checkpoint(stage, h, emb, use_reentrant=False)
    return out
