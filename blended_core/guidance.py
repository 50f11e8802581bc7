"""Guidance: one prediction of the network and the gradient of all losses, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .denoiser import DiffusionModel
from .device import gradient_through
from .diffusion import Prediction
from .errors import BlendedError
from .losses import Loss, LossTerm, StepInput


@dataclass(frozen=True, repr=False)
class GuidedPrediction:
    """A prediction and where guidance moves it.

    Attributes:
        prediction: of the network; nothing in it is guided.
        gradient: of minus the sum of the losses [B, C, H, W], or None without guidance.
        values: the unweighted value of each loss per image [B], by its name.
        broken: number of images whose gradient was not finite and was replaced by zero; on a device a tensor, so that nothing waits for it.
    """

    prediction: Prediction
    gradient: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    broken: int | Tensor = 0

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {float(value.mean()):.4g}" for name, value in self.values.items())
        return f"GuidedPrediction({len(self.prediction.x0)} images, mean losses: {means or 'none'})"


class LossGradient(NamedTuple):
    """Of minus the sum of the losses [B, C, H, W]; ``values`` and ``broken`` as in :class:`GuidedPrediction`."""

    gradient: Tensor
    values: dict[str, Tensor]
    broken: Tensor


@dataclass(frozen=True, eq=False)
class Guidance:
    """Losses, where their gradient is taken, and how x̂0 becomes the image that they see.

    Attributes:
        losses: their gradients add. None at all: no guidance.
        through_network: take the gradient with respect to x_t, through the network, instead of x̂0.
        decode: x̂0 → image, differentiable; None for models whose x̂0 is an image.
        reference_size: picture side that the weights refer to. The losses are means over a picture, so their gradient at one pixel falls with the
            number of pixels; it is scaled to what it would be at this size. 0: unscaled.
        cell: side, in pixels of the picture, of one value of x̂0: 1, or the downscale factor of a latent model.
        clamp: largest root mean square of the gradient of one image, or None.

    Raises:
        BlendedError: if a loss has no name, or two losses have the same one.
    """

    losses: tuple[Loss, ...] = ()
    through_network: bool = False
    decode: Callable[[Tensor], Tensor] | None = None
    reference_size: int = 0
    clamp: float | None = None
    cell: int = 1

    def __post_init__(self) -> None:
        names = [getattr(loss, "name", None) for loss in self.losses]
        for name, loss in zip(names, self.losses, strict=True):
            if not isinstance(name, str):
                raise BlendedError(f"the loss {loss!r:.80} has no name; give it an attribute name with a text.")
            if names.count(name) > 1:
                raise BlendedError(
                    f"two losses are named {name!r}; give each its own name (those of the options are clip, range and background)."
                )

    def __call__(self, model: DiffusionModel, step: StepInput, labels: Tensor | None = None) -> GuidedPrediction:
        """Predicts x_{t−1} and the gradient of minus the losses with one forward pass of the network."""
        with torch.set_grad_enabled(self.through_network and bool(self.losses)):
            x = step.x.detach()
            if self.through_network:
                x = x.requires_grad_()
            prediction = model.predict(x, step.index, step.levels, labels)
        if not self.losses:
            return GuidedPrediction(prediction.detach())
        found = self.gradient(prediction.x0, step, x if self.through_network else None)
        return GuidedPrediction(prediction.detach(), found.gradient, found.values, found.broken)

    def gradient(self, x0: Tensor, step: StepInput, x: Tensor | None = None, keep_graph: bool = False) -> LossGradient:
        """The gradient of minus the losses, scaled and limited as the attributes say.

        Args:
            x0: x̂0 [B, C, H, W].
            step: what it was predicted from.
            x: the leaf from which ``x0`` was computed with gradients; the gradient is then with respect to it, else with respect to ``x0``.
            keep_graph: from ``x`` to ``x0``, for another call.
        """
        # In two parts: down to x̂0, and from there through the network, which may compute in half precision.
        terms, gradient = self._at_estimate(x0.detach(), step)
        if x is not None:
            gradient = gradient_through(x0, x, gradient, keep_graph)
            gradient = sum((term.direct for term in terms.values() if term.direct is not None), start=gradient)
        gradient = -gradient
        if self.reference_size:
            gradient = gradient * (x0.shape[-1] * x0.shape[-2] * self.cell**2 / self.reference_size**2)
        gradient, broken = zero_broken_rows(gradient)
        if self.clamp is not None:
            gradient = clamp_rows(gradient, self.clamp)
        return LossGradient(gradient, {name: term.value for name, term in terms.items()}, broken)

    def _at_estimate(self, x0: Tensor, step: StepInput) -> tuple[dict[str, LossTerm], Tensor]:
        """The losses by name, and the gradient of their sum with respect to x̂0."""
        with torch.enable_grad():
            leaf = x0.requires_grad_()
            image = leaf if self.decode is None else self.decode(leaf)
        terms = {loss.name: loss(image.detach(), step) for loss in self.losses}
        first, *others = (term.gradient for term in terms.values())
        gradient = sum(others, start=first)
        if self.decode is not None:
            gradient = gradient_through(image, leaf, gradient)
        return terms, gradient


def zero_broken_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient with zero for every image that has a NaN or Inf, and the number of such images, a tensor with one value."""
    finite = gradient.isfinite().flatten(1).all(1)
    return torch.where(finite.view(-1, *[1] * (gradient.ndim - 1)), gradient, 0.0), (~finite).sum()


def clamp_rows(gradient: Tensor, limit: float) -> Tensor:
    """Scales down the gradient of every image whose root mean square exceeds ``limit``."""
    rms = gradient.flatten(1).square().mean(1).sqrt().clamp(min=1e-20)
    return gradient * (limit / rms).clamp(max=1.0).view(-1, *[1] * (gradient.ndim - 1))
