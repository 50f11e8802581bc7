"""The encoders of CLIP: a vision transformer for images and a causal transformer for texts (Radford et al. 2021).

Their tensors have the names of open_clip's. The image encoder gives the same embeddings as open_clip's in less time, because guidance needs only the
embedding: the last block computes nothing but the class token, queries, keys and values reach attention as contiguous tensors, and its weights need no
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..weights.tensors import SkipInitialization
from .operations import Linear, attention, linear, quick_gelu


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in the approximation by tanh."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}


@dataclass(frozen=True)
class BlockConfig:
    """The shape of a transformer's blocks.

    Attributes:
        layers: their number. width: of a token. heads: of attention. mlp_width: of the hidden layer.
        activation: a key of :data:`ACTIVATIONS`.
        layer_scale: each branch of a block has learned factors.
        eps: of the layer norms.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int
    activation: str = "gelu"
    layer_scale: bool = False
    eps: float = 1e-5


@dataclass(frozen=True)
class VisionConfig:
    """The shape of an image encoder.

    Attributes:
        image_size, patch_size: in pixels. blocks: the transformer. output_dim: of the embedding.
        pool: 'tok', the class token, or 'avg', the mean of the others.
        norm_first: a layer norm precedes the first block. norm_last: the last layer norm follows pooling.
    """

    image_size: int
    patch_size: int
    blocks: BlockConfig
    output_dim: int
    pool: str = "tok"
    norm_first: bool = True
    norm_last: bool = False


@dataclass(frozen=True)
class TextConfig:
    """The shape of a text encoder: number of tokens of a text and of the vocabulary, the transformer, and the size of the embedding."""

    context_length: int
    vocabulary: int
    blocks: BlockConfig
    output_dim: int


class Attention(nn.Module):
    """Parameters of self-attention, named as in ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor, queries: int, causal: bool = False) -> Tensor:
        """Tokens [B, N, W] → the first ``queries`` of them after attention to all, or with ``causal`` to those up to themselves; [B, queries, W]."""
        batch, count, width = x.shape
        if queries == count:
            q, k, v = self._heads(x, self.in_proj_weight, self.in_proj_bias, 3)
        else:
            (q,) = self._heads(x[:, :queries], self.in_proj_weight[:width], self.in_proj_bias[:width], 1)
            k, v = self._heads(x, self.in_proj_weight[width:], self.in_proj_bias[width:], 2)
        attended = attention(q, k, v, causal).transpose(1, 2).reshape(batch, queries, width)
        out: Tensor = self.out_proj(attended)
        return out

    def _heads(self, x: Tensor, weight: Tensor, bias: Tensor, parts: int) -> tuple[Tensor, ...]:
        """``parts`` projections [B, heads, N, W / heads] of tokens [B, N, W], each contiguous."""
        batch, count, width = x.shape
        projected = linear(x, weight, bias).view(batch, count, parts, self.heads, width // self.heads)
        return projected.permute(2, 0, 3, 1, 4).contiguous().unbind(0)


class Scale(nn.Module):
    """Learned factors of a branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """x·γ."""
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.c_fc = Linear(width, hidden)
        self.c_proj = Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, W] → the same shape."""
        out: Tensor = self.c_proj(self.activation(self.c_fc(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each on normalized tokens and added to its input."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        width = config.width
        self.ln_1, self.ln_2 = nn.LayerNorm(width, config.eps), nn.LayerNorm(width, config.eps)
        self.attn = Attention(width, config.heads)
        self.mlp = Mlp(width, config.mlp_width, ACTIVATIONS[config.activation])
        self.ls_1: nn.Module = Scale(width) if config.layer_scale else nn.Identity()
        self.ls_2: nn.Module = Scale(width) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, queries: int, causal: bool = False) -> Tensor:
        """Tokens [B, N, W] → the first ``queries`` of them [B, queries, W]."""
        x = x[:, :queries] + self.ls_1(self.attn(self.ln_1(x), queries, causal))
        out: Tensor = x + self.ls_2(self.mlp(self.ln_2(x)))
        return out


class Transformer(nn.Module):
    """The blocks, under the name that open_clip gives them."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config) for _ in range(config.layers))


class VisionTransformer(nn.Module):
    """Images [B, 3, S, S], normalized with mean and deviation of the training images → embeddings [B, D], not normalized."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, patch, eps = config.blocks.width, config.patch_size, config.blocks.eps
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((config.image_size // patch) ** 2 + 1, width))
        self.ln_pre: nn.Module = nn.LayerNorm(width, eps) if config.norm_first else nn.Identity()
        self.transformer = Transformer(config.blocks)
        self.ln_post = nn.LayerNorm(width, eps)
        self.proj = nn.Parameter(torch.empty(width, config.output_dim))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] → embeddings [B, D]."""
        patches = linear(self._patches(images), self.conv1.weight.flatten(1))
        first = self.class_embedding.expand(len(images), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x, x.shape[1])
        by_class = self.config.pool == "tok"
        x = last(x, 1 if by_class else x.shape[1])
        if not self.config.norm_last:
            x = self.ln_post(x)
        pooled = x[:, 0] if by_class else x[:, 1:].mean(1)
        if self.config.norm_last:
            pooled = self.ln_post(pooled)
        out: Tensor = pooled @ self.proj
        return out

    def _patches(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] → the pixels of every patch [B, N, 3·P·P]; a whole patch at most, as a convolution with stride P reads them."""
        size = self.config.patch_size
        side = images.shape[-1] // size
        cut = images[..., : side * size, : side * size].reshape(len(images), 3, side, size, side, size)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(len(images), side * side, 3 * size * size)


class Clip(nn.Module):
    """Both encoders, with the names of open_clip's ``CLIP``. The token of the end of a text has the highest id."""

    def __init__(self, vision: VisionConfig, text: TextConfig) -> None:
        super().__init__()
        width = text.blocks.width
        self.visual = VisionTransformer(vision)
        self.token_embedding = nn.Embedding(text.vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, width))
        self.transformer = Transformer(text.blocks)
        self.ln_final = nn.LayerNorm(width, text.blocks.eps)
        self.text_projection = nn.Parameter(torch.empty(width, text.output_dim))
        self.logit_scale = nn.Parameter(torch.empty([]))

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] → embeddings [B, D], not normalized."""
        out: Tensor = self.visual(images)
        return out

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [P, context_length] → embeddings [P, D], not normalized: the projection of the token of the end."""
        x = self.token_embedding(tokens) + self.positional_embedding
        for block in self.transformer.resblocks:
            x = block(x, x.shape[1], causal=True)
        ends = self.ln_final(x[torch.arange(len(x), device=x.device), tokens.argmax(-1)])
        out: Tensor = ends @ self.text_projection
        return out


def clip_of(config: dict[str, Any]) -> Clip:
    """The encoders that a configuration in open_clip's form describes, on the meta device: ``embed_dim``, ``vision_cfg`` and ``text_cfg``."""
    vision, text, dim = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    images = BlockConfig(vision["layers"], vision["width"], vision["width"] // vision["head_width"], 4 * vision["width"])
    texts = BlockConfig(text["layers"], text["width"], text["heads"], 4 * text["width"])
    with torch.device("meta"), SkipInitialization():
        return Clip(
            VisionConfig(vision["image_size"], vision["patch_size"], images, dim),
            TextConfig(text["context_length"], text["vocab_size"], texts, dim),
        )


def vision_transformer(visual: Any) -> VisionTransformer | None:
    """The same encoder as a ``VisionTransformer`` of open_clip, sharing its weights; None for an encoder of another structure.

    Whether the structure is the same is decided by what the encoder is made of: its options and the names and shapes of its tensors.
    """
    config = config_of(visual)
    if config is None:
        return None
    with torch.device("meta"), SkipInitialization():
        own = VisionTransformer(config)
    weights = visual.state_dict()
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in own.state_dict().items()}:
        return None
    own.load_state_dict(weights, assign=True)
    for parameter, given in zip(own.parameters(), visual.parameters(), strict=True):
        parameter.requires_grad_(given.requires_grad)
    return own.train(visual.training)


def config_of(visual: Any) -> VisionConfig | None:
    """The configuration of a ``VisionTransformer`` of open_clip; None for another structure."""
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if not blocks or getattr(visual, "attn_pool", None) is not None or getattr(visual, "output_tokens", False):
        return None
    first = blocks[0]
    activation = activation_name(getattr(first.mlp, "gelu", None))
    square = len(set(visual.image_size)) == 1 and len(set(visual.patch_size)) == 1
    if activation is None or not square or type(first.attn) is not nn.MultiheadAttention or visual.pool_type not in ("tok", "avg"):
        return None
    shape = BlockConfig(
        len(blocks), visual.conv1.out_channels, first.attn.num_heads, first.mlp.c_fc.out_features, activation,
        not isinstance(first.ls_1, nn.Identity), first.ln_1.eps,
    )  # fmt: skip
    return VisionConfig(
        visual.image_size[0], visual.patch_size[0], shape, visual.output_dim, visual.pool_type, isinstance(visual.ln_pre, nn.LayerNorm),
        visual.final_ln_after_pool,
    )  # fmt: skip


def activation_name(module: nn.Module | None) -> str | None:
    """The key of :data:`ACTIVATIONS` for a module of open_clip, or None."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return "quick_gelu" if type(module).__name__ == "QuickGELU" else None
