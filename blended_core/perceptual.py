"""LPIPS (Zhang et al. 2018) with a published backbone if its weights are present, else with the embedded network."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .device import DeviceContext
from .errors import BlendedError
from .toy.models import LPIPS
from .weights.open import file_errors, open_weights
from .weights.tensors import copy_finite

BACKBONES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}
"""Backbone → file name of its weights in torchvision."""


class Perceptual:
    """A perceptual distance: ``perceptual(a, b)`` of two [B, 3, H, W] in −1..1 → [B] float32, differentiable.

    ``name``: 'vgg', 'alex', 'squeeze' or 'embedded'.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        self.network = network
        self.name = name

    def __repr__(self) -> str:
        return f"Perceptual({self.name!r})"

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        distance: Tensor = self.network(a.float(), b.float())
        return distance.flatten()


def hub_folder() -> Path:
    """The folder of weights that torch.hub has downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def load_perceptual(context: DeviceContext, net: str = "auto", backbone: Path | None = None) -> Perceptual:
    """An LPIPS network on the device of the context. Nothing is downloaded.

    Args:
        context: where it runs.
        net: 'vgg', 'alex', 'squeeze' (their linear layers are part of the lpips package), 'embedded', or 'auto': the first of vgg, alex and squeeze
            whose weights are in torch's cache, else embedded.
        backbone: a file with the weights of the backbone in torchvision's layout, in place of torch's cache.

    Raises:
        BlendedError: if the weights are absent or belong to another network.
    """
    if net not in (*BACKBONES, "embedded", "auto"):
        raise BlendedError(f"unknown LPIPS network {net!r}; known are auto, embedded, {', '.join(BACKBONES)}.", option="lpips")
    if net == "auto":
        present = [n for n in BACKBONES if (hub_folder() / BACKBONES[n]).is_file()]
        net = present[0] if present and backbone is None else "embedded" if backbone is None else "vgg"
    with context.autograd():
        return _embedded(context) if net == "embedded" else _published(context, net, backbone)


def _published(context: DeviceContext, net: str, backbone: Path | None) -> Perceptual:
    path = backbone or hub_folder() / BACKBONES[net]
    if not path.is_file():
        raise BlendedError(
            f"LPIPS '{net}' needs the file {BACKBONES[net]} in {path.parent}; put it there or use 'embedded'.", option="lpips"
        )
    network = _network(net)
    with file_errors(path, "lpips"):
        file = open_weights(path)
        features = [name for name in file.shapes if name.startswith("features.")]
        parameters = list(network.get_submodule("net").parameters())
        if [file.shapes[name] for name in features] != [tuple(parameter.shape) for parameter in parameters]:
            raise BlendedError(f"it does not hold the weights of torchvision's {net} backbone; download {BACKBONES[net]} again.")
        with torch.no_grad():
            for name, parameter in zip(features, parameters, strict=True):
                parameter.copy_(copy_finite(file.take(name), name, torch.float32, channels_last=False))
    return Perceptual(context.place(network), net)


def _network(net: str, heads: bool = True) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision deprecates argument names that lpips uses
        import lpips

        network: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, pretrained=heads, verbose=False)
    return network


def _embedded(context: DeviceContext) -> Perceptual:
    network = _network("squeeze", heads=False)
    network.load_state_dict({k: v.float() for k, v in load_file(LPIPS).items()})
    return Perceptual(context.place(network), "embedded")
