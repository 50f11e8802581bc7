"""Ways to take one guided step: ours, the floor beneath it, and the structure of the reference code, on the same networks and draws."""

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
from blended_core.diffusion import ddpm_step
from blended_core.losses import ClipLoss, masked_view, prompt_distance, range_loss
from blended_core.options import EditOptions, GuidanceOptions
from blended_core.random import SeededRandom
from blended_core.sample import Models, guided_step
from blended_core.schedule import Schedule

from .networks import Size, clip_model, diffusion_model, random_prompt

INDEX = 50  # of 100: the middle


@dataclass(frozen=True)
class Setting:
    """Everything that a step is given."""

    size: Size
    context: DeviceContext
    model: DiffusionModel
    clip: ClipModel
    prompt: Prompt
    x: Tensor
    mask: Tensor
    schedule: Schedule
    random: SeededRandom

    @classmethod
    def build(cls, size: Size, context: DeviceContext, clip: ClipModel | None = None) -> Setting:
        """Networks of a size with a batch of noise; a CLIP may be shared with another setting."""
        model = diffusion_model(size, context)
        side = size.unet.image_size
        mask = torch.zeros(1, 1, side, side)
        mask[..., side // 6 : -side // 6, side // 6 : -side // 6] = 1
        x = torch.randn(size.batch, 3, side, side, generator=torch.Generator().manual_seed(3))
        clip = clip or clip_model(size, context)
        return cls(
            size, context, model, clip, random_prompt(size, context), context.put(x), context.put(mask),
            model.config.respaced("100"), SeededRandom(0),
        )  # fmt: skip

    @property
    def models(self) -> Models:
        """For the engine."""
        return Models(self.model, self.clip, None, self.context)

    @property
    def images(self) -> range:
        """The candidates that the batch stands for."""
        return range(self.size.batch)

    @property
    def views(self) -> ViewParameters | None:
        """How CLIP's views are warped."""
        if self.size.views == 1:
            return None
        return self.random.views(INDEX, self.images, self.size.views - 1, self.clip.image_size, True)

    def with_batch(self, batch: int, views: int) -> Setting:
        """The same networks with another batch and number of views."""
        x = torch.randn(batch, 3, *self.x.shape[-2:], generator=torch.Generator().manual_seed(3))
        return replace(self, size=replace(self.size, batch=batch, views=views), x=self.context.put(x))


Result = tuple[Tensor, Tensor]
"""(x_{t−1}, gradient), [B, 3, H, W] each."""


def library_step(setting: Setting, gradient: str = "unet", view_chunk: int = 0) -> Result:
    """The engine's own step."""
    options = EditOptions(guidance=GuidanceOptions(gradient=gradient, views=setting.size.views, view_chunk=view_chunk))
    step = guided_step(
        setting.models, setting.x, INDEX, setting.schedule, options, setting.prompt, setting.mask, setting.random, setting.images
    )
    if step.gradient is None:
        raise RuntimeError("the step was not guided.")
    return step.x, step.gradient


def reference_step(setting: Setting) -> Result:
    """What the reference code does for the same numbers, written anew.

    A forward for the prediction; a second one, recorded, for the gradient; attention by explicit matrices, which are forgotten and
    made again on the way back, as are the gradients of its norm, qkv and projection weights, which nothing uses; every view through CLIP
    at once (docs/method.md, row 13).
    """
    options, clip, batch = GuidanceOptions(), setting.clip, setting.size.batch
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
            loss = options.scale * distance.view(-1, batch).mean(0).sum() + options.range_scale * range_loss(x0).sum()
            input_gradient = torch.autograd.grad(loss, [x, *unused])[0]
    gradient = -input_gradient * (x.shape[-1] * x.shape[-2] / options.reference_size**2)
    noise = setting.random.noise("step", INDEX, setting.images, tuple(x.shape[1:])).to(x)
    return ddpm_step(prediction, INDEX, noise, gradient), gradient


@contextlib.contextmanager
def _plain_autograd(network: nn.Module) -> Iterator[None]:
    """The network as plain autograd runs it, which keeps the input of every operation."""
    if not isinstance(network, UNet):
        raise TypeError("only an ADM network is measured.")
    network.set_recompute(False)
    try:
        yield
    finally:
        network.set_recompute(True)


@contextlib.contextmanager
def _reference_attention(network: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The attention blocks as the reference computes them, and their weights, which ask for gradients meanwhile."""
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
    """Attention by the matrix of all weights; the same numbers as the block's own."""
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
    """The least that an exact step has to do: the network forward, CLIP forward and back, and the network back to its input; by plain autograd.

    In this order, for what the network keeps for its way back has to wait while CLIP is asked.
    """
    with _plain_autograd(setting.model.network), torch.enable_grad():
        x = setting.x.detach().requires_grad_()
        out = setting.model.network(x, timesteps(setting))
        clip_pass(setting)
        torch.autograd.grad(out.sum(), x)


def forward(setting: Setting) -> None:
    """A bare forward of the diffusion network."""
    with _plain_autograd(setting.model.network), torch.no_grad():
        setting.model.network(setting.x, timesteps(setting))


def timesteps(setting: Setting) -> Tensor:
    """One for each image, from the middle."""
    return torch.full((setting.size.batch,), 500.0, device=setting.x.device)


def clip_gradient(setting: Setting, view_chunk: int) -> None:
    """The gradient of our guidance at CLIP's input, by so many views at once."""
    side = setting.clip.image_size
    pooled = torch.zeros(setting.size.batch, 3, side, side, device=setting.x.device)
    ClipLoss(setting.clip, setting.prompt, views=setting.size.views, chunk=view_chunk).pooled_gradient(pooled, setting.views)


def clip_pass(setting: Setting) -> None:
    """CLIP forward and back on all views at once."""
    side, rows = setting.clip.image_size, setting.size.batch * setting.size.views
    with torch.enable_grad():
        pictures = torch.zeros(rows, 3, side, side, device=setting.x.device).requires_grad_()
        torch.autograd.grad(setting.clip.encode_normalized(pictures).sum(), pictures)


def checkpointed(setting: Setting) -> Callable[[], Result]:
    """Our step with gradient checkpointing in the UNet."""
    network = setting.model.network

    def work() -> Result:
        if not isinstance(network, UNet):
            raise TypeError("only an ADM network checkpoints.")
        network.gradient_checkpointing = True
        try:
            return library_step(setting)
        finally:
            network.gradient_checkpointing = False

    return work


def plain_attention(setting: Setting) -> Callable[[], Result]:
    """Our step with attention by explicit matrices, as torch's own fallback has it."""

    def work() -> Result:
        with sdpa_kernel(SDPBackend.MATH):
            return library_step(setting)

    return work


def compiled(setting: Setting, graphs: bool) -> Callable[[], Result]:
    """Our step with the UNet compiled; ``graphs``: replayed as CUDA graphs too. The setting's network stays compiled."""
    setting.model.network.compile(mode="reduce-overhead" if graphs else "default")

    def work() -> Result:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return library_step(setting)

    return work
