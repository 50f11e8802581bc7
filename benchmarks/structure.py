"""Variants of one guided step with the same networks and random numbers: the library, the floor, and the structure of the reference code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from blended_core.adm.unet import AttentionBlock, UNet
from blended_core.augment import ViewParameters, warp_views
from blended_core.clip.model import ClipModel, Prompt
from blended_core.denoiser import DiffusionModel
from blended_core.device import DeviceContext
from blended_core.diffusion import DiffusionConfig, ddpm_step
from blended_core.losses import ClipLoss, masked_view, prompt_distance, range_loss
from blended_core.options import EditOptions, GuidanceOptions
from blended_core.random import SeededRandom
from blended_core.sample import Models, guided_step
from blended_core.schedule import Schedule

from .networks import Size, clip_models, random_prompt, random_unet

INDEX = 50  # level of 100


@dataclass(frozen=True)
class Setting:
    """Networks and inputs of a step. ``clip`` has the library's image encoder and ``open_clip`` that of open_clip, with the same weights."""

    size: Size
    context: DeviceContext
    model: DiffusionModel
    clip: ClipModel
    open_clip: ClipModel
    prompt: Prompt
    x: Tensor
    mask: Tensor
    schedule: Schedule
    random: SeededRandom

    @classmethod
    def build(cls, size: Size, context: DeviceContext, clips: tuple[ClipModel, ClipModel] | None = None) -> Setting:
        """Networks of a size with a batch of noise. ``clips`` can be those of another setting."""
        network = random_unet(size.unet).set_compute_dtype(context.dtype)
        return cls.of(size, context, network, *(clips or clip_models(size, context)))

    @classmethod
    def of(cls, size: Size, context: DeviceContext, unet: UNet, clip: ClipModel, open_clip: ClipModel | None = None) -> Setting:
        """Given networks with a batch of noise; the UNet is moved to the device. Without ``open_clip`` its variants use ``clip``."""
        context.place(unet)
        model = DiffusionModel.from_unet(unet, DiffusionConfig())
        side = size.unet.image_size
        mask = torch.zeros(1, 1, side, side)
        mask[..., side // 6 : -side // 6, side // 6 : -side // 6] = 1
        x = torch.randn(size.batch, 3, side, side, generator=torch.Generator().manual_seed(3))
        return cls(
            size, context, model, clip, open_clip or clip, random_prompt(size, context), context.put(x), context.put(mask),
            model.config.respaced("100"), SeededRandom(0),
        )  # fmt: skip

    @property
    def models(self) -> Models:
        """The networks as the library takes them."""
        return Models(self.model, self.clip, None, self.context)

    @property
    def images(self) -> range:
        """The image indices of the batch."""
        return range(self.size.batch)

    @property
    def views(self) -> ViewParameters | None:
        """The warps of the views."""
        if self.size.views == 1:
            return None
        return self.random.views(INDEX, self.images, self.size.views - 1, self.clip.image_size, True)

    def with_batch(self, batch: int, views: int) -> Setting:
        """The same networks with another batch size and number of views."""
        x = torch.randn(batch, 3, *self.x.shape[-2:], generator=torch.Generator().manual_seed(3))
        return replace(self, size=replace(self.size, batch=batch, views=views), x=self.context.put(x))


Result = tuple[Tensor, Tensor]
"""(x_{t−1}, gradient), [B, 3, H, W] each."""


def library_step(setting: Setting, gradient: str = "unet", view_chunk: int = 0) -> Result:
    """The step of the library."""
    options = EditOptions(sampler="ddpm", guidance=GuidanceOptions(gradient=gradient, views=setting.size.views, view_chunk=view_chunk))
    step = guided_step(
        setting.models, setting.x, INDEX, setting.schedule, options, setting.prompt, setting.mask, setting.random, setting.images
    )
    if step.gradient is None:
        raise RuntimeError("the step has no gradient.")
    return step.x, step.gradient


def reference_step(setting: Setting) -> Result:
    """A reimplementation of the step of the reference code, with the same result as the step of the library.

    It has one forward pass for the prediction and one for the gradient (docs/method.md, row 9). It recomputes attention with explicit
    matrices in the backward pass and computes unused gradients of the norm, qkv and projection weights (docs/method.md, row 13). It
    passes all views at once through CLIP as open_clip has it.
    """
    options, clip, batch = GuidanceOptions(), setting.open_clip, setting.size.batch
    with _plain_autograd(setting.model.network), _reference_attention(setting.model.network) as unused:
        with torch.no_grad():
            prediction = setting.model.predict(setting.x, INDEX, setting.schedule)
        with torch.enable_grad():
            x = setting.x.detach().requires_grad_()
            x0 = setting.model.predict(x, INDEX, setting.schedule).x0
            rows = masked_view(x0, setting.mask, clip.image_size).repeat(setting.size.views, 1, 1, 1)
            views = setting.views
            if views is not None:
                rows = torch.cat([rows[:batch], warp_views(rows[batch:], views)])
            distance = prompt_distance(clip.encode_image(rows), setting.prompt)
            loss = (
                options.scale_for(None, x.shape[-1]) * distance.view(-1, batch).mean(0).sum() + options.range_scale * range_loss(x0).sum()
            )
            input_gradient = torch.autograd.grad(loss, [x, *unused])[0]
    gradient = -input_gradient * (x.shape[-1] * x.shape[-2] / options.reference_size**2)
    noise = setting.random.noise("step", INDEX, setting.images, tuple(x.shape[1:])).to(x)
    return ddpm_step(prediction, INDEX, noise, gradient), gradient


@contextlib.contextmanager
def _plain_autograd(network: nn.Module) -> Iterator[None]:
    """Disables recomputation, so that autograd saves the input of every operation."""
    if not isinstance(network, UNet):
        raise TypeError("only an ADM network can be measured.")
    network.set_recompute(False)
    try:
        yield
    finally:
        network.set_recompute(True)


@contextlib.contextmanager
def _reference_attention(network: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Replaces attention by that of the reference code, and yields its weights, which require gradients meanwhile."""
    blocks = [m for m in network.modules() if isinstance(m, AttentionBlock)]
    weights = [p for block in blocks for part in (block.qkv, block.norm, block.proj_out) for p in part.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    for block in blocks:
        block.forward = partial(checkpoint, partial(explicit_attention, block), use_reentrant=False)  # type: ignore[method-assign]
    try:
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)
        for block in blocks:
            del block.forward


def explicit_attention(block: AttentionBlock, x: Tensor) -> Tensor:
    """Attention with an explicit weight matrix; the same result as that of the block."""
    b, c, height, width = x.shape
    qkv = block.qkv(block.norm(x).flatten(2))
    depth = c // block.heads
    if block.new_order:
        q, k, v = (part.reshape(b * block.heads, depth, -1) for part in qkv.chunk(3, dim=1))
    else:
        q, k, v = qkv.reshape(b * block.heads, 3 * depth, -1).split(depth, dim=1)
    scale = depth**-0.25
    weights = torch.einsum("bct,bcs->bts", q * scale, k * scale).float().softmax(-1).to(x.dtype)
    h = torch.einsum("bts,bcs->bct", weights, v).reshape(b, c, -1)
    out: Tensor = x + block.proj_out(h).reshape(b, c, height, width)
    return out


def floor(setting: Setting) -> None:
    """The minimum of an exact step: forward and backward passes of the UNet and of CLIP, with plain autograd.

    The passes of CLIP run between those of the UNet, so that the saved activations of the UNet count in the peak memory.
    """
    with _plain_autograd(setting.model.network), torch.enable_grad():
        x = setting.x.detach().requires_grad_()
        out = setting.model.network(x, timesteps(setting))
        clip_pass(setting)
        torch.autograd.grad(out.sum(), x)


def forward(setting: Setting) -> None:
    """A forward pass of the UNet without gradients."""
    with _plain_autograd(setting.model.network), torch.no_grad():
        setting.model.network(setting.x, timesteps(setting))


def timesteps(setting: Setting) -> Tensor:
    """The same middle timestep for every image."""
    return torch.full((setting.size.batch,), 500.0, device=setting.x.device)


def clip_views(setting: Setting, view_chunk: int) -> None:
    """The gradient of the CLIP loss with respect to the pooled image, ``view_chunk`` views at once."""
    side = setting.clip.image_size
    pooled = torch.zeros(setting.size.batch, 3, side, side, device=setting.x.device)
    ClipLoss(setting.clip, setting.prompt, views=setting.size.views, chunk=view_chunk).pooled_gradient(pooled, setting.views)


def clip_pass(setting: Setting) -> None:
    """Forward and backward pass of CLIP on all views at once."""
    side, rows = setting.clip.image_size, setting.size.batch * setting.size.views
    with torch.enable_grad():
        pictures = torch.zeros(rows, 3, side, side, device=setting.x.device).requires_grad_()
        torch.autograd.grad(setting.clip.encode_normalized(pictures).sum(), pictures)


def checkpointed(setting: Setting) -> Callable[[], Result]:
    """The step of the library with gradient checkpointing in the UNet."""
    network = setting.model.network

    def work() -> Result:
        if not isinstance(network, UNet):
            raise TypeError("only an ADM network supports gradient checkpointing.")
        network.gradient_checkpointing = True
        try:
            return library_step(setting)
        finally:
            network.gradient_checkpointing = False

    return work


def plain_attention(setting: Setting) -> Callable[[], Result]:
    """The step of the library with the fallback implementation of attention in torch."""

    def work() -> Result:
        with sdpa_kernel(SDPBackend.MATH):
            return library_step(setting)

    return work


def compiled(setting: Setting, graphs: bool, gradient: str = "unet", backend: str = "inductor") -> Callable[[], Result]:
    """The step of the library with the UNet compiled, and with ``graphs`` also CUDA graphs. The network of the setting stays compiled."""
    mode = {"mode": "reduce-overhead"} if graphs and backend == "inductor" else {}
    setting.model.network.compile(backend=backend, **mode)

    def work() -> Result:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return library_step(setting, gradient)

    return work
