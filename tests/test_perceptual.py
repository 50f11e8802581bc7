"""LPIPS: the user's backbone where there is one, else the embedded one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from blended_core import BlendedError, DeviceContext, load_perceptual
from blended_core.losses import background_loss
from blended_core.perceptual import BACKBONES

CONTEXT = DeviceContext.choose("cpu")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def pictures() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_embedded_distance_grows_with_noise_and_is_zero_of_itself(hub: Path) -> None:
    perceptual = load_perceptual(CONTEXT)
    assert perceptual.name == "embedded"
    x = torch.nn.functional.interpolate(pictures()[:, :, :8, :8], size=64, mode="bicubic")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    distances = [perceptual(x, x + level * noise) for level in (0.0, 0.05, 0.2, 0.6)]
    assert distances[0].abs().max() < 1e-6
    assert all((a < b).all() for a, b in itertools.pairwise(distances))
    assert distances[0].shape == (3,)


def test_the_users_backbone_is_taken_from_torchs_cache(hub: Path) -> None:
    torch.manual_seed(3)
    weights = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(weights, hub / BACKBONES["squeeze"])
    found = load_perceptual(CONTEXT)
    assert found.name == "squeeze"
    a, b = pictures()[:1], pictures()[1:2]
    assert not torch.allclose(found(a, b), load_perceptual(CONTEXT, "embedded")(a, b))
    named = load_perceptual(CONTEXT, "squeeze", hub / BACKBONES["squeeze"])
    assert torch.equal(found(a, b), named(a, b))


def test_absent_and_foreign_backbones_give_sentences(hub: Path) -> None:
    with pytest.raises(BlendedError, match=r"needs vgg16-397923af\.pth"):
        load_perceptual(CONTEXT, "vgg")
    with pytest.raises(BlendedError, match="unknown LPIPS network 'resnet'"):
        load_perceptual(CONTEXT, "resnet")
    for content in (torch.zeros(3), {"features.0.weight": torch.zeros(1)}):
        torch.save(content, hub / BACKBONES["squeeze"])
        with pytest.raises(BlendedError, match="does not hold the weights"):
            load_perceptual(CONTEXT, "squeeze")
    (hub / BACKBONES["squeeze"]).write_bytes(b"no weights at all")
    with pytest.raises(BlendedError, match="does not hold the weights"):
        load_perceptual(CONTEXT, "squeeze")


def test_background_loss_has_a_gradient_outside_the_mask_alone(hub: Path) -> None:
    perceptual = load_perceptual(CONTEXT, "embedded")
    source, mask = pictures()[:1], torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    x = (source + 0.1).requires_grad_()
    background_loss(x, source, mask, perceptual).sum().backward()
    assert x.grad is not None
    assert (x.grad * mask).abs().max() == 0
    assert (x.grad * (1 - mask)).abs().max() > 0
