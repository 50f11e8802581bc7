"""LPIPS (Zhang et al. 2018) with the user's backbone where there is one, else the embedded one."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from .device import DeviceContext
from .errors import BlendedError
from .toy.models import LPIPS

# File names under which torchvision keeps the backbones that lpips was published with.
BACKBONES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}


class Perceptual:
    """A perceptual distance: ``perceptual(a, b)`` of two [B, 3, H, W] in −1..1 → [B] float32, differentiable.

    ``name`` says which network it is.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        self.network = network
        self.name = name

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        distance: Tensor = self.network(a.float(), b.float())
        return distance.flatten()


def hub_folder() -> Path:
    """Where torch.hub keeps downloaded weights."""
    return (
        Path(os.environ.get("TORCH_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch")).expanduser()
        / "hub"
        / "checkpoints"
    )


def load_perceptual(context: DeviceContext, net: str = "auto", backbone: Path | None = None) -> Perceptual:
    """An LPIPS network on the context's device. Nothing is downloaded.

    Args:
        context: where it runs.
        net: 'vgg', 'alex', 'squeeze' (their heads come with the lpips package), 'embedded', or 'auto': vgg, else alex,
            else squeeze if its weights are in torch's cache, else embedded.
        backbone: a file of the backbone's weights in torchvision's layout, instead of torch's cache.

    Raises:
        BlendedError: if the weights asked for are not there or do not fit.
    """
    if net not in (*BACKBONES, "embedded", "auto"):
        raise BlendedError(f"unknown LPIPS network {net!r}; known are auto, embedded, {', '.join(BACKBONES)}.")
    if net == "auto":
        present = [n for n in BACKBONES if (hub_folder() / BACKBONES[n]).is_file()]
        net = present[0] if present and backbone is None else "embedded" if backbone is None else "vgg"
    with context.autograd():
        return _embedded(context) if net == "embedded" else _published(context, net, backbone)


def _published(context: DeviceContext, net: str, backbone: Path | None) -> Perceptual:
    path = backbone or hub_folder() / BACKBONES[net]
    if not path.is_file():
        raise BlendedError(
            f"LPIPS '{net}' needs {BACKBONES[net]} in {path.parent}, and it is not there; put it there or use --lpips embedded."
        )
    network = _network(net)
    misfit = BlendedError(f"{path} does not hold the weights of torchvision's {net} backbone for LPIPS; fetch {BACKBONES[net]} again.")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged or foreign file makes torch raise almost anything
        raise misfit from None
    if not isinstance(weights, dict):
        raise misfit
    features = [v for k, v in weights.items() if str(k).startswith("features.")]
    ours = list(network.get_submodule("net").parameters())
    if len(features) != len(ours) or any(a.shape != b.shape for a, b in zip(features, ours, strict=True)):
        raise misfit
    with torch.no_grad():
        for value, parameter in zip(features, ours, strict=True):
            parameter.copy_(value)
    return Perceptual(context.place(network), net)


def _network(net: str, heads: bool = True) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's notes on argument names that lpips still uses
        import lpips

        network: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, pretrained=heads, verbose=False)
    return network


def _embedded(context: DeviceContext) -> Perceptual:
    from safetensors.torch import load_file

    network = _network("squeeze", heads=False)
    network.load_state_dict({k: v.float() for k, v in load_file(LPIPS).items()})
    return Perceptual(context.place(network), "embedded")
