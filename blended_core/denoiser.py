"""A network together with its diffusion process: x_t and a level → prediction."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .diffusion import DiffusionConfig, Prediction, log_variance, posterior_mean, predict_x0
from .errors import BlendedError, short_repr
from .graphs import GraphedNetwork
from .schedule import Schedule

NO_CLASS = -1
"""The label of an image without a class, for a class-conditional network."""


class DiffusionModel:
    """A network together with the process it was trained on.

    Args:
        network: maps (x_t [B, C, H, W], timesteps [B], labels or None) to [B, C or 2C, H, W].
        config: the process. Its variance is 'learned_range' if and only if the network has 2C outputs.
        image_size: side in pixels that the network was trained at. Other sizes work if they are multiples of ``multiple_of``.
        num_classes: None for an unconditional network.
        label_dim: size of a class embedding that the network accepts in place of class indices; 0 if it accepts none.
        guidance_scale: the guidance scale that its checkpoint recommends (:meth:`GuidanceOptions.scale_for`), or None.

    Attributes:
        graphs: the network as CUDA graphs, which :meth:`predict` then calls; None: it calls the network (:meth:`recorded`).
    """

    def __init__(
        self, network: nn.Module, config: DiffusionConfig, image_size: int, num_classes: int | None = None,
        multiple_of: int = 1, label_dim: int = 0, guidance_scale: float | None = None,
    ) -> None:  # fmt: skip
        self.network = network
        self.config = config
        self.image_size = image_size
        self.num_classes = num_classes
        self.multiple_of = multiple_of
        self.label_dim = label_dim
        self.guidance_scale = guidance_scale
        self.graphs: GraphedNetwork | None = None

    def __repr__(self) -> str:
        classes = f", {self.num_classes} classes" if self.num_classes is not None else ""
        return f"DiffusionModel({type(self.network).__name__}, {self.image_size} px{classes}, {self.config})"

    @classmethod
    def from_unet(cls, unet: Any, config: DiffusionConfig, guidance_scale: float | None = None) -> DiffusionModel:
        """A model from a :class:`~blended_core.adm.unet.UNet`; BlendedError if the variance does not fit its outputs."""
        if unet.config.learn_sigma != (config.variance == "learned_range"):
            predicts = "predicts a variance" if unet.config.learn_sigma else "predicts no variance"
            raise BlendedError(f"variance is {config.variance!r}, but the network {predicts}.")
        return cls(
            unet, config, unet.config.image_size, unet.config.num_classes, unet.config.downsampling,
            4 * unet.config.model_channels, guidance_scale,
        )  # fmt: skip

    def recorded(self) -> DiffusionModel:
        """The same model with its network as CUDA graphs; end it with ``graphs.clear()``."""
        model = copy.copy(self)
        model.graphs = GraphedNetwork(self.network)
        return model

    def class_index(self, choice: str | int) -> int:
        """The label for a class by its number, :data:`NO_CLASS` for 'zero'.

        Raises:
            BlendedError: if the model does not have that class, or none at all, or for any other word.
        """
        if choice == "zero":
            return NO_CLASS
        if not isinstance(choice, int):
            raise BlendedError(f"class_choice is {short_repr(choice)}; give 'zero' or the number of a class.", option="class_choice")
        if self.num_classes is None:
            raise BlendedError(f"class {short_repr(choice)} does not exist; the model has no classes: give 'zero'.", option="class_choice")
        if not 0 <= choice < self.num_classes:
            raise BlendedError(
                f"class {short_repr(choice)} does not exist; the model has classes 0 to {self.num_classes - 1}.", option="class_choice"
            )
        return choice

    def output(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the network predicts, as ``config.objective`` says, in one forward pass; a learned variance is left out.

        Args:
            x_t: [B, C, H, W].
            timesteps: [B], steps of the whole process; fractions are allowed.
            labels: class indices [B], :data:`NO_CLASS` for none; None for an unconditional network.

        Returns:
            [B, C, H, W] float32.
        """
        unit = 1000 / self.config.steps if self.config.rescale_timesteps else 1
        out: Tensor = self.network(x_t, timesteps * unit, labels)
        return out.chunk(2, dim=1)[0] if self.config.variance == "learned_range" else out

    def predict(self, x_t: Tensor, index: int | Tensor, schedule: Schedule, labels: Tensor | None = None) -> Prediction:
        """One forward pass: x̂0, and mean and variance of p(x_{t−1} | x_t).

        Args:
            x_t: [B, C, H, W].
            index: level of the schedule, for the batch or [B].
            labels: class indices [B], or class embeddings [B, label_dim]; None for an unconditional network.
        """
        if isinstance(index, int):
            timesteps = torch.full((x_t.shape[0],), schedule.model_timestep(index), device=x_t.device)
        else:
            timesteps = torch.tensor([schedule.model_timestep(int(i)) for i in index], device=x_t.device)
        output = (self.graphs or self.network)(x_t, timesteps, labels)
        fraction = None
        if self.config.variance == "learned_range":
            output, fraction = output.chunk(2, dim=1)
        x0 = predict_x0(x_t, output, index, schedule, self.config.objective)
        variance, log = log_variance(fraction, index, schedule, self.config.variance, x_t)
        return Prediction(x0, posterior_mean(x0, x_t, index, schedule), variance, log)
