"""One guided prediction: one forward of the UNet, the gradient of the losses, both returned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import ViewParameters, warp_views
from .clip.model import ClipModel, Prompt
from .diffusion import DiffusionModel, Prediction
from .errors import BlendedError
from .losses import PerceptualDistance, clamp_rows, d_background, d_background_reference, d_clip, finite_rows, range_loss
from .options import GuidanceOptions
from .schedule import Schedule


@dataclass(frozen=True)
class GuidedPrediction:
    """A prediction and where guidance wants it.

    ``gradient`` [B, C, H, W] is that of minus the loss, or None without guidance; ``clip_distance`` [B] the mean distance
    of the views, or None; ``broken`` counts images whose gradient was not finite and was replaced by zero.
    """

    prediction: Prediction
    gradient: Tensor | None
    clip_distance: Tensor | None = None
    broken: int = 0


def prompt_distance(embeddings: Tensor, prompt: Prompt, distance: str) -> Tensor:
    """Weighted sum of the distances to all texts of a prompt; [N, D] → [N]."""
    total = torch.zeros(len(embeddings), device=embeddings.device)
    for text, weight in zip(prompt.embeddings.to(embeddings), prompt.weights, strict=True):
        total = total + weight * d_clip(embeddings, text, distance)
    return total


def seen_by_clip(x: Tensor, mask: Tensor, clip_size: int) -> Tensor:
    """The masked picture, grey (0) outside, average-pooled to CLIP's size; [B, 3, H, W] → [B, 3, S, S]."""
    return F.adaptive_avg_pool2d(x * mask, (clip_size, clip_size))


def mixed_estimate(x0: Tensor, x_t: Tensor, index: int, schedule: Schedule) -> Tensor:
    """x̂0·f + x_t·(1−f) with f = √(1−ᾱ): what CLIP sees in the reference code (METHOD row 3)."""
    share = float(schedule.sqrt_one_minus_alphas_cumprod[index])
    return x0 * share + x_t * (1 - share)


def clip_gradient(
    pooled: Tensor, clip: ClipModel, prompt: Prompt, views: ViewParameters | None, options: GuidanceOptions
) -> tuple[Tensor, Tensor]:
    """Gradient of scale · mean distance over the views, accumulated chunk by chunk.

    Args:
        pooled: [B, 3, S, S] in −1..1, what the un-warped view shows.
        clip, prompt, options: what is asked.
        views: parameters of the (N − 1)·B warped rows; None if N is 1.

    Returns:
        (gradient [B, 3, S, S], mean distance of each image [B]).
    """
    batch, count = len(pooled), options.views
    chunk = options.view_chunk or count
    leaf = pooled.detach().requires_grad_()
    gradient, distances = torch.zeros_like(leaf), torch.zeros(batch, device=pooled.device)
    for start in range(0, count, chunk):
        # In a function of its own, so that nothing of a chunk is alive while the next one is looked at.
        part, distance = _chunk_gradient(leaf, start, min(start + chunk, count), clip, prompt, views, options.distance)
        gradient += part.mul_(options.scale / count)
        distances += distance / count
        del part
    return gradient, distances


def _chunk_gradient(
    leaf: Tensor, start: int, stop: int, clip: ClipModel, prompt: Prompt, views: ViewParameters | None, distance: str
) -> tuple[Tensor, Tensor]:
    """Gradient [B, 3, S, S] and sum [B] of the distances of the views from ``start`` up to ``stop``; view 0 is not warped."""
    batch = len(leaf)

    def look() -> Tensor:
        rows = leaf.repeat(stop - start, 1, 1, 1)
        if views is None:
            return rows
        if start > 0:
            return warp_views(rows, views.rows((start - 1) * batch, (stop - 1) * batch))
        return torch.cat([rows[:batch], warp_views(rows[batch:], views.rows(0, (stop - 1) * batch))]) if stop > 1 else rows

    with torch.no_grad():
        seen = look().requires_grad_()
    with torch.enable_grad():
        far = prompt_distance(clip.encode_image(seen), prompt, distance)
        (towards,) = torch.autograd.grad(far.sum(), seen)
    far = far.detach().view(stop - start, batch).sum(0)
    # The views are made a second time for their own way back, which is cheap, and so are not kept while CLIP needs the memory.
    del seen
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(look(), leaf, towards)
    return gradient, far


def backward_to_input(output: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
    """The gradient of ⟨output, cotangent⟩ with respect to x, each image's brought to a size that half precision can hold on the way.

    In float16 what is below 6e-8 is lost. A gradient of a mean over many pixels is of that size, so it is scaled to 1 at its largest
    before the network, and back behind it; by powers of two, which round nothing.

    Args:
        output: [B, C, H, W], computed from x [B, C, H, W]; cotangent: [B, C, H, W] float32.
    """
    largest = cotangent.flatten(1).abs().amax(1)
    exponent = torch.where(largest.isfinite() & (largest > 0), largest.log2().ceil(), 0.0).clamp(-100, 100)[:, None, None, None]
    (gradient,) = torch.autograd.grad(output, x, cotangent * torch.exp2(-exponent))
    return gradient * torch.exp2(exponent)


def guided_prediction(
    model: DiffusionModel,
    x_t: Tensor,
    index: int,
    schedule: Schedule,
    options: GuidanceOptions,
    *,
    clip: ClipModel | None,
    prompt: Prompt | None,
    mask: Tensor,
    source: Tensor | None = None,
    perceptual: PerceptualDistance | None = None,
    views: ViewParameters | None = None,
    labels: Tensor | None = None,
) -> GuidedPrediction:
    """Predicts x_{t−1} and the gradient of minus the loss in one forward of the network.

    loss = scale · D_CLIP + range_scale · range + background_scale · D_bg, summed over the images; its gradient is brought to
    ``reference_size``. Without a prompt there
    is no guidance (removal), and the gradient is None.

    Args:
        model, x_t, index, schedule, labels: the step; x_t is [B, C, H, W].
        options: the losses and the kind of gradient.
        clip, prompt: needed unless the prompt is empty.
        mask: [B or 1, 1, H, W], what CLIP sees.
        source: [B or 1, C, H, W], needed for D_bg, as is ``perceptual``.
        views: (N − 1)·B warped views for CLIP.

    Raises:
        BlendedError: if something needed is missing.
    """
    if prompt is None or not len(prompt):
        with torch.no_grad():
            return GuidedPrediction(model.predict(x_t, index, schedule, labels), None)
    if clip is None:
        raise BlendedError("a prompt was given without a CLIP model to judge it.")
    if options.scale > 0 and options.views > 1 and (views is None or len(views) != (options.views - 1) * len(x_t)):
        given = 0 if views is None else len(views)
        raise BlendedError(
            f"{options.views} views of {len(x_t)} images need {(options.views - 1) * len(x_t)} warped rows; {given} were given."
        )
    through_unet = options.gradient == "unet"
    with torch.set_grad_enabled(through_unet):
        x = x_t.detach()
        if through_unet:
            x = x.requires_grad_()
        prediction = model.predict(x, index, schedule, labels)
    # In two parts: down to x̂0, and from there through the UNet, which may compute in half precision.
    with torch.enable_grad():
        x0 = prediction.x0.detach().requires_grad_()
        x_direct = x_t.detach().requires_grad_(through_unet and options.clip_input == "mixed")
        x_in = mixed_estimate(x0, x_direct, index, schedule) if options.clip_input == "mixed" else x0
        outputs: list[Tensor] = []
        cotangents: list[Tensor | None] = []
        distances = None
        if options.scale > 0:
            pooled = seen_by_clip(x_in, mask, clip.image_size)
            cotangent, distances = clip_gradient(pooled, clip, prompt, views, options)
            outputs.append(pooled)
            cotangents.append(cotangent)
        rest = torch.zeros((), device=x.device)
        if options.range_scale > 0:
            rest = rest + options.range_scale * range_loss(x0).sum()
        if options.needs_perceptual:
            if source is None or perceptual is None:
                raise BlendedError("background preservation needs the source picture and an LPIPS network.")
            if options.background_loss == "paper":
                rest = rest + options.background_scale * d_background(x_in, source, mask, perceptual).sum()
            else:
                rest = rest + d_background_reference(x_in, source, mask, perceptual, options.lpips_scale, options.l2_scale)
        if rest.requires_grad:
            outputs.append(rest)
            cotangents.append(None)
        gradient = None
        if outputs:
            wanted = [x0, x_direct] if x_direct.requires_grad else [x0]
            gradient, *direct = torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True)
            if through_unet:
                gradient = backward_to_input(prediction.x0, x, gradient)
            gradient = -sum(direct, start=gradient)
    prediction = Prediction(*(getattr(prediction, f).detach() for f in ("x0", "mean", "variance", "log_variance")))
    if gradient is None:
        return GuidedPrediction(prediction, None)
    if options.reference_size:
        gradient = gradient * (x_t.shape[-1] * x_t.shape[-2] / options.reference_size**2)
    gradient, broken = finite_rows(gradient)
    if options.clamp is not None:
        gradient = clamp_rows(gradient, options.clamp)
    return GuidedPrediction(prediction, gradient, distances, broken)
