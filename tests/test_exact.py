"""Paths that save time or memory, against the plain one: x_{t−1} equal to 1e-4, its gradient to 1e-3 of its largest value."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import peak_bytes
from blended_core.adm import recompute
from blended_core.adm.unet import ResBlock, UNet, UNetConfig
from blended_core.device import DeviceContext, gradient_through
from blended_core.memory import MemoryLimits
from blended_core.options import preset
from blended_core.random import SeededRandom
from blended_core.sample import Models, Step, guided_step

from . import tiny

SIZE = tiny.SIZE
IMAGES = range(4)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"))]


def step(models: Models, chunk: int = 0) -> Step:
    """One step in the middle of a process, guided through the UNet."""
    options = preset("best", steps="10", gradient="unet", views=6, view_chunk=chunk, batch=len(IMAGES))
    schedule = models.ddpm.config.respaced(options.steps)
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 3:13, 3:13] = 1
    x = torch.randn(len(IMAGES), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    assert models.clip is not None
    put = models.context.put
    return guided_step(models, put(x), 5, schedule, options, models.clip.prompt("a tree"), put(mask), SeededRandom(0), IMAGES)


def on(device: str, **changes: object) -> Models:
    """The tiny networks there."""
    context = DeviceContext(torch.device(device), **changes)  # type: ignore[arg-type]
    models = tiny.tiny_models()
    assert models.clip is not None
    context.place(models.ddpm.network)
    context.place(models.clip.model)
    return replace(models, context=context)


def plain_network(device: str) -> Models:
    models = on(device)
    assert isinstance(models.ddpm.network, UNet)
    models.ddpm.network.set_recompute(False)
    return models


def compiled(device: str) -> Models:
    models = on(device)
    # On a processor the kernels that inductor writes take minutes to build: only where they are asked for.
    inductor = device != "cpu" or os.environ.get("BLENDED_INDUCTOR") == "1"
    models.ddpm.network.compile(backend="inductor" if inductor else "aot_eager")  # type: ignore[no-untyped-call]
    return models


def checkpointed(device: str) -> Models:
    models = on(device)
    models.ddpm.network.gradient_checkpointing = True  # type: ignore[assignment]
    return models


Path = tuple[Callable[[str], Models], int, AbstractContextManager[None]]
FAST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def path(name: str) -> Path:
    """(networks on a device, views at once, the attention kernels allowed)."""
    paths: dict[str, Path] = {
        "fused attention": (on, 0, sdpa_kernel(FAST)),
        "little kept": (on, 0, sdpa_kernel(SDPBackend.MATH)),
        "channels_last": (lambda device: on(device, channels_last=True), 0, nullcontext()),
        "compile": (compiled, 0, nullcontext()),
        "one view at a time": (on, 1, nullcontext()),
        "uneven chunks of views": (on, 4, nullcontext()),
        "checkpointing": (checkpointed, 0, nullcontext()),
        "batch split": (lambda device: replace(on(device), limits=MemoryLimits(rows=1)), 0, nullcontext()),
        "batch split unevenly": (lambda device: replace(on(device), limits=MemoryLimits(rows=3)), 0, nullcontext()),
    }
    return paths[name]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name",
    ["fused attention", "little kept", "channels_last", "one view at a time", "uneven chunks of views", "checkpointing", "batch split",
     "batch split unevenly", pytest.param("compile", marks=pytest.mark.slow)],
)  # fmt: skip
def test_equal_to_the_plain_path(name: str, device: str) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        plain = step(plain_network(device))
    build, chunk, kernels = path(name)
    with kernels:
        found = step(build(device), chunk)
    assert plain.gradient is not None and found.gradient is not None
    assert float((found.x - plain.x).abs().max()) <= 1e-4
    assert float((found.gradient - plain.gradient).abs().max()) <= 1e-3 * float(plain.gradient.abs().max())
    assert plain.shift > 0.01, "guidance must have done something to compare"


# --- what is kept for the way back ------------------------------------------------------------------------------------


LAYERS: dict[str, UNetConfig] = {
    "convolutions resample": replace(tiny.CONFIG, conv_resample=True, use_scale_shift_norm=False),
    "pooling resamples": replace(tiny.CONFIG, conv_resample=False, use_scale_shift_norm=True),
    "blocks resample": replace(tiny.CONFIG, resblock_updown=True, use_scale_shift_norm=True),
    "classes": replace(tiny.CONFIG, num_classes=3),
}


def unet_of(config: UNetConfig, dtype: torch.dtype = torch.float32) -> UNet:
    """A frozen network in which every layer does something."""
    torch.manual_seed(5)
    unet = UNet(config)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    return unet.set_compute_dtype(dtype).eval().requires_grad_(False)


def there_and_back(unet: UNet) -> tuple[Tensor, Tensor]:
    """(the network's answer, the gradient at its input)."""
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(6)).requires_grad_()
    labels = None if unet.config.num_classes is None else torch.tensor([0, 2])
    output = unet(x, torch.tensor([30.0, 700.0]), labels)
    (gradient,) = torch.autograd.grad(output, x, torch.randn(output.shape, generator=torch.Generator().manual_seed(7)))
    return output.detach(), gradient


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_made_again_is_what_was_there(name: str) -> None:
    unet = unet_of(LAYERS[name])
    little, plain = there_and_back(unet), there_and_back(unet.set_recompute(False))
    for found, wanted in zip(little, plain, strict=True):
        assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_as_near_to_the_truth(dtype: torch.dtype) -> None:
    unet, exact = unet_of(LAYERS["blocks resample"], dtype), there_and_back(unet_of(LAYERS["blocks resample"]))
    little, plain = there_and_back(unet), there_and_back(unet.set_recompute(False))
    for found, wanted, truth in zip(little, plain, exact, strict=True):
        assert float((found - truth).norm()) <= 1.2 * float((wanted - truth).norm()) + 1e-3 * float(truth.norm())


def test_half_is_kept() -> None:
    unet, cpu = unet_of(tiny.CONFIG), torch.device("cpu")
    little = peak_bytes(lambda: there_and_back(unet), cpu)
    unet.set_recompute(False)
    assert little < 0.55 * peak_bytes(lambda: there_and_back(unet), cpu)


def test_where_a_kernel_is_missing_the_plain_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unet_of(LAYERS["blocks resample"])
    plain = there_and_back(unet.set_recompute(False))
    unet.set_recompute(True)
    assert not torch.equal(there_and_back(unet)[1], plain[1]), "scale and shift are summed in another order, which tells the two apart"
    monkeypatch.setattr(recompute, "normalizes_groups", lambda _device: False)
    for found, wanted in zip(there_and_back(unet), plain, strict=True):
        assert torch.equal(found, wanted)


TRAINED = {
    "everything": "",
    "time": "time_embed",
    "conditioning": "emb_layers",
    "biases": ".bias",
    "one bias": "input_blocks.1.0.out_layers.3.bias",
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("layers", ["blocks resample", "convolutions resample"])
def test_weights_that_are_trained_get_their_gradients(name: str, layers: str) -> None:
    found = []
    for enabled in (True, False):
        unet = unet_of(LAYERS[layers]).set_recompute(enabled)
        trained = [p.requires_grad_() for key, p in unet.named_parameters() if TRAINED[name] in key]
        output = unet(torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(6)), torch.tensor([30.0]))
        found.append(torch.autograd.grad(output.square().sum(), trained))
    for little, plain in zip(*found, strict=True):
        assert plain.any() and float((little - plain).abs().max()) <= 1e-4 * float(plain.abs().max())


def test_a_class_embedding_that_is_searched_for_gets_its_gradient() -> None:
    found = []
    for enabled in (True, False):
        unet = unet_of(LAYERS["classes"]).set_recompute(enabled)
        label = torch.zeros(1, 4 * unet.config.model_channels).requires_grad_()
        output = unet(torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(6)), torch.tensor([30.0]), label)
        found.append(torch.autograd.grad(output.square().sum(), label)[0])
    assert found[1].any() and torch.allclose(*found, rtol=1e-4)


def changed_layer(unet: UNet, change: str) -> None:
    """What other code does to a network that it was given."""
    block = next(m for m in unet.modules() if isinstance(m, ResBlock))
    norm, convolution = block.out_layers[0], block.out_layers[3]  # those of in_layers are followed by a normalisation, which hides much
    if change == "hooked convolution":
        convolution.register_forward_hook(lambda _layer, _args, output: 2 * output)
    elif change == "hooked normalisation":
        norm.register_forward_hook(lambda _layer, _args, output: 2 * output)
    elif change == "circular padding":  # how people make tiles
        convolution.padding_mode, convolution._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    else:
        block.out_layers[3] = Doubled(convolution)


class Doubled(torch.nn.Module):
    """A layer in the place of another."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize("change", ["hooked convolution", "hooked normalisation", "circular padding", "a wrapper"])
def test_a_layer_that_somebody_changed_does_what_it_was_changed_to(change: str) -> None:
    unet = unet_of(tiny.CONFIG)
    before = there_and_back(unet)
    changed_layer(unet, change)
    little, plain = there_and_back(unet), there_and_back(unet.set_recompute(False))
    for found, wanted, old in zip(little, plain, before, strict=True):
        assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())
        assert float((old - wanted).abs().max()) > 1e-3 * float(wanted.abs().max())


def test_under_autocast_the_plain_layers_run() -> None:
    unet = unet_of(tiny.CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        little, plain = there_and_back(unet), there_and_back(unet.set_recompute(False))
    assert torch.equal(little[0], plain[0]) and torch.equal(little[1], plain[1])


def test_a_way_back_of_the_way_back_is_refused() -> None:
    unet = unet_of(tiny.CONFIG)
    x = torch.randn(1, 3, SIZE, SIZE).requires_grad_()
    (gradient,) = torch.autograd.grad(unet(x, torch.tensor([30.0])).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- float16 ----------------------------------------------------------------------------------------------------------


def through(dtype: torch.dtype, size: float, plainly: bool = False) -> Tensor:
    """The gradient through the tiny UNet of a loss whose gradient at its output is of that size."""
    unet = tiny.tiny_unet().set_compute_dtype(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, SIZE, SIZE, generator=generator).requires_grad_()
    cotangent = size * torch.randn(2, 3, SIZE, SIZE, generator=generator)
    output = unet(x, torch.full((2,), 500.0))[:, :3].float()
    return torch.autograd.grad(output, x, cotangent)[0] if plainly else gradient_through(output, x, cotangent)


@pytest.mark.parametrize("size", [1e-12, 1e-7, 1.0, 1e5])
def test_half_precision_keeps_gradients_of_any_size(size: float) -> None:
    exact, half = through(torch.float32, size), through(torch.float16, size)
    assert half.isfinite().all()
    assert float((half - exact).norm()) <= 0.01 * float(exact.norm())


@pytest.mark.parametrize("size", [1e-7, 1e5])
def test_half_precision_loses_them_without_a_scale(size: float) -> None:
    exact, half = through(torch.float32, size), through(torch.float16, size, plainly=True)
    assert not half.isfinite().all() or float((half - exact).norm()) > 0.05 * float(exact.norm())


def test_the_scale_changes_nothing_in_float32() -> None:
    assert torch.equal(through(torch.float32, 0.01), through(torch.float32, 0.01, plainly=True))


def test_an_image_without_a_gradient_or_with_a_broken_one_leaves_the_others_alone() -> None:
    unet = tiny.tiny_unet()
    x = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    cotangent = torch.ones(3, 3, SIZE, SIZE)
    cotangent[1], cotangent[2] = 0, torch.nan
    gradient = gradient_through(unet(x, torch.full((3,), 500.0))[:, :3], x, cotangent)
    assert gradient[0].isfinite().all() and gradient[0].any() and not gradient[1].any() and gradient[2].isnan().any()
