"""Networks in ComfyUI's memory manager."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..blended_core.clip.model import ClipModel, Prompt
from ..blended_core.denoiser import DiffusionModel
from ..blended_core.device import DTYPES, DeviceContext, prefers_channels_last
from ..blended_core.memory import MemoryLimits, memory_needed, values_per_image
from ..blended_core.options import GuidanceOptions
from ..blended_core.perceptual import Perceptual, load_perceptual
from ..blended_core.sample import Models

ALL_BYTES = 1e32
"""More bytes than any device has: asks the manager to free everything."""


@dataclass(frozen=True, eq=False)
class LoadedDDPM:
    """The value of a BLENDED_DDPM socket."""

    model: DiffusionModel
    patcher: ModelPatcher
    context: DeviceContext
    limits: MemoryLimits = field(default_factory=MemoryLimits)


@dataclass(frozen=True, eq=False)
class LoadedCLIP:
    """The value of a BLENDED_CLIP socket."""

    model: ClipModel
    patcher: ModelPatcher


@dataclass(frozen=True, eq=False)
class LoadedPrompt:
    """The value of a BLENDED_PROMPT socket: a prompt, and the CLIP that encoded it."""

    prompt: Prompt
    clip: LoadedCLIP


@dataclass(frozen=True, eq=False)
class LoadedPerceptual:
    """An LPIPS network."""

    model: Perceptual
    patcher: ModelPatcher


@dataclass(frozen=True, eq=False)
class LoadedGuidance:
    """The value of a BLENDED_GUIDANCE socket: options, and the LPIPS network if they need one."""

    options: GuidanceOptions
    perceptual: LoadedPerceptual | None


@dataclass(frozen=True)
class ManagedContext(DeviceContext):
    """A device that is shared with ComfyUI's other networks; ``patchers`` are those in use now."""

    patchers: tuple[ModelPatcher, ...] = ()

    def free_bytes(self) -> int | None:
        """Memory that new tensors can take, as ComfyUI counts it; None on a CPU."""
        return None if self.device.type == "cpu" else int(mm.get_free_memory(self.device))

    def make_room(self) -> bool:
        """Unloads the networks that are not in use; whether that freed memory."""
        # An unloaded network stays in the same memory on the CPU, and with --highvram on a GPU.
        if self.device.type == "cpu":
            return False
        before = mm.get_free_memory(self.device)
        return unload_others(self.device, self.patchers) and mm.get_free_memory(self.device) > before


def with_patchers(context: DeviceContext, patchers: Sequence[ModelPatcher]) -> ManagedContext:
    """The context while these networks are in use."""
    return ManagedContext(context.device, context.dtype, context.channels_last, context.cuda_graphs, tuple(patchers))


def unload_others(device: torch.device, patchers: Sequence[ModelPatcher]) -> bool:
    """Unloads every network except these; whether there was one."""
    in_use = [loaded for loaded in mm.current_loaded_models if any(loaded.model.is_clone(patcher) for patcher in patchers)]
    return bool(mm.free_memory(ALL_BYTES, device, keep_loaded=in_use))


def device_context(dtype: str = "auto") -> DeviceContext:
    """ComfyUI's device, with a precision by name; 'auto' follows ComfyUI's choice for UNets."""
    device = mm.get_torch_device()
    precision = mm.unet_dtype(device, supported_dtypes=[torch.bfloat16, torch.float16, torch.float32]) if dtype == "auto" else DTYPES[dtype]
    if precision not in DTYPES.values():  # float8 or float64, set by a command-line option of ComfyUI
        precision = torch.float32
    return ManagedContext(device, precision, prefers_channels_last(device, precision))


def offload_context(context: DeviceContext) -> DeviceContext:
    """The same on ComfyUI's offload device, where networks are loaded before the manager moves them."""
    return DeviceContext(mm.unet_offload_device(), context.dtype, context.channels_last)


def probe_context(context: DeviceContext, path: Path) -> DeviceContext:
    """The context for probing a checkpoint: frees memory on the compute device for a network of the file's size."""
    mm.free_memory(2 * path.stat().st_size + 2**30, context.device)
    return context


def manage(network: nn.Module) -> ModelPatcher:
    """Registers a network with ComfyUI's memory manager."""
    # Not the dynamic patcher: it streams weights through one buffer, which is overwritten before the backward pass reads it.
    return ModelPatcher(network, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


def load_managed_perceptual() -> LoadedPerceptual:
    """The LPIPS network: with the backbone that the user installed, else the embedded one."""
    perceptual = load_perceptual(offload_context(device_context("fp32")))
    return LoadedPerceptual(perceptual, manage(perceptual.network))


def load_to_device(
    ddpm: LoadedDDPM | None,
    clip: LoadedCLIP | None,
    perceptual: LoadedPerceptual | None = None,
    pixels: int = 0,
    options: GuidanceOptions | None = None,
    images_per_pass: int = 0,
) -> ManagedContext:
    """Moves whole networks to ComfyUI's device, and tells the manager how much memory a step needs. Call it inside ``library_scope``.

    Args:
        ddpm, clip, perceptual: the networks; None for those that are not used.
        pixels: number of pixels of a batch; options: the guidance of the step.
        images_per_pass: images that CLIP encodes at once; used if ``ddpm`` is None.
    """
    context = ddpm.context if ddpm is not None else device_context("fp32")
    if ddpm is not None:
        needed = memory_needed(ddpm.model, clip.model if clip else None, pixels, options, context.dtype.itemsize, context.device)
    else:
        needed = images_per_pass * 4 * values_per_image(clip.model) if clip is not None else 0
    patchers = [network.patcher for network in (ddpm, clip, perceptual) if network is not None]
    mm.load_models_gpu(patchers, memory_required=needed, force_full_load=True)
    for patcher in patchers:
        load_rest(patcher)
    return with_patchers(context, patchers)


def load_rest(patcher: ModelPatcher) -> None:
    """Moves what the manager left on the offload device after it loaded a network.

    With --novram it leaves weights there, or moves a part of them back, for layers that fetch their weights at each call. The layers of these networks
    do not. (partially_load takes a network for whole after a part of it was moved back.)
    """
    if patcher.loaded_size() < patcher.model_size():
        try:
            patcher.patch_model(patcher.load_device)
        except Exception:
            patcher.detach()
            raise


def heal(network: nn.Module) -> None:
    """Replaces weights that were made in ComfyUI's inference mode by copies that gradients can pass. Call it outside of inference mode."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_inference():
                module._parameters[name] = nn.Parameter(weight.detach().clone(), requires_grad=False)
        for name, values in module._buffers.items():
            if values is not None and values.is_inference():
                module._buffers[name] = values.clone()


def edit_models(ddpm: LoadedDDPM, clip: LoadedCLIP | None, perceptual: LoadedPerceptual | None, context: ManagedContext) -> Models:
    """The library's bundle of loaded networks; ``context`` from :func:`load_to_device`."""
    return Models(ddpm.model, clip.model if clip else None, perceptual.model if perceptual else None, context, ddpm.limits)
