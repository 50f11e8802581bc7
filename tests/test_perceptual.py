"""LPIPS with a backbone of the user, else with the embedded network."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from blended_core import BlendedError, DeviceContext, load_perceptual
from blended_core.losses import d_background
from blended_core.perceptual import BACKBONES

CONTEXT = DeviceContext.choose("cpu")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def pictures() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_embedded_distance_grows_with_noise_and_is_zero_between_equal_images(hub: Path) -> None:
    perceptual = load_perceptual(CONTEXT)
    assert perceptual.name == "embedded" and repr(perceptual) == "Perceptual('embedded')"
    x = torch.nn.functional.interpolate(pictures()[:, :, :8, :8], size=64, mode="bicubic")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    distances = [perceptual(x, x + level * noise) for level in (0.0, 0.05, 0.2, 0.6)]
    assert distances[0].abs().max() < 1e-6
    assert all((a < b).all() for a, b in itertools.pairwise(distances))
    assert distances[0].shape == (3,)


def test_a_backbone_in_the_cache_of_torch_is_used(hub: Path) -> None:
    torch.manual_seed(3)
    weights = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(weights, hub / BACKBONES["squeeze"])
    found = load_perceptual(CONTEXT)
    assert found.name == "squeeze"
    a, b = pictures()[:1], pictures()[1:2]
    assert not torch.allclose(found(a, b), load_perceptual(CONTEXT, "embedded")(a, b))
    named = load_perceptual(CONTEXT, "squeeze", hub / BACKBONES["squeeze"])
    assert torch.equal(found(a, b), named(a, b))


def test_absent_and_foreign_backbones_give_an_error(hub: Path) -> None:
    with pytest.raises(BlendedError, match=r"needs the file vgg16-397923af\.pth") as caught:
        load_perceptual(CONTEXT, "vgg")
    assert caught.value.options == ("lpips",)
    with pytest.raises(BlendedError, match="unknown LPIPS network 'resnet'"):
        load_perceptual(CONTEXT, "resnet")
    for content in (torch.zeros(3), {"features.0.weight": torch.zeros(1)}):
        torch.save(content, hub / BACKBONES["squeeze"])
        with pytest.raises(BlendedError, match="does not hold the weights"):
            load_perceptual(CONTEXT, "squeeze")
    (hub / BACKBONES["squeeze"]).write_bytes(b"no weights at all")
    with pytest.raises(BlendedError, match=r"squeezenet.*not a complete PyTorch checkpoint") as caught:
        load_perceptual(CONTEXT, "squeeze")
    assert caught.value.options == ("lpips",)


def test_the_background_loss_has_a_gradient_only_outside_the_mask(hub: Path) -> None:
    perceptual = load_perceptual(CONTEXT, "embedded")
    source, mask = pictures()[:1], torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    x = (source + 0.1).requires_grad_()
    d_background(x, source, mask, perceptual).sum().backward()
    assert x.grad is not None
    assert (x.grad * mask).abs().max() == 0
    assert (x.grad * (1 - mask)).abs().max() > 0
