"""All of ComfyUI that the pack touches: memory manager, progress, interrupt, folders, tensors in and out."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import folder_paths
import numpy as np
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar
from comfy_api.latest import io
from PIL import Image
from server import PromptServer
from torch import Tensor, nn

from ..blended_core.adm.load import may_be_checkpoint
from ..blended_core.adm.recompute import works_on
from ..blended_core.clip.model import ClipModel, Prompt
from ..blended_core.denoiser import DiffusionModel
from ..blended_core.device import DTYPES, DeviceContext
from ..blended_core.errors import BlendedError, BlendedWarning
from ..blended_core.memory import MemoryLimits
from ..blended_core.options import GuidanceOptions
from ..blended_core.perceptual import Perceptual, load_perceptual
from ..blended_core.sample import Models
from .latent import four_dimensional, shape_of

CATEGORY = "Blended Diffusion"
DDPM_FOLDER, CLIP_FOLDER = "ddpm", "open_clip"
EXTENSIONS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin"}

DDPM = io.Custom("BLENDED_DDPM")
CLIP = io.Custom("BLENDED_CLIP")
PROMPT = io.Custom("BLENDED_PROMPT")
GUIDANCE = io.Custom("BLENDED_GUIDANCE")


# --- networks in the memory manager -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LoadedDDPM:
    """What BLENDED_DDPM carries; ``thrift`` is of the edit that runs."""

    model: DiffusionModel
    patcher: ModelPatcher
    context: DeviceContext
    limits: MemoryLimits = field(default_factory=MemoryLimits)


@dataclass(frozen=True, eq=False)
class LoadedCLIP:
    """What BLENDED_CLIP carries."""

    model: ClipModel
    patcher: ModelPatcher


@dataclass(frozen=True, eq=False)
class LoadedPrompt:
    """What BLENDED_PROMPT carries: texts, and the CLIP that they are in the words of."""

    prompt: Prompt
    clip: LoadedCLIP


@dataclass(frozen=True, eq=False)
class LoadedGuidance:
    """What BLENDED_GUIDANCE carries: options, and the LPIPS network if they ask for one."""

    options: GuidanceOptions
    perceptual: LoadedPerceptual | None


@dataclass(frozen=True, eq=False)
class LoadedPerceptual:
    """An LPIPS network in the memory manager."""

    model: Perceptual
    patcher: ModelPatcher


@dataclass(frozen=True)
class ManagedContext(DeviceContext):
    """A context whose device is shared with ComfyUI's other networks; ``patchers`` are those in use now."""

    patchers: tuple[ModelPatcher, ...] = ()

    def make_room(self) -> bool:
        # On the processor a network that is unloaded stays where it is, as on a GPU that keeps everything (--highvram).
        if self.device.type == "cpu":
            return False
        before = mm.get_free_memory(self.device)
        return unload_others(self.device, self.patchers) and mm.get_free_memory(self.device) > before


def with_patchers(context: DeviceContext, patchers: Sequence[ModelPatcher]) -> ManagedContext:
    """The context while these are in use."""
    return ManagedContext(context.device, context.dtype, context.channels_last, tuple(patchers))


def unload_others(device: torch.device, patchers: Sequence[ModelPatcher]) -> bool:
    """Has the manager unload every network but these; whether there was one."""
    kept = [loaded for loaded in mm.current_loaded_models if any(loaded.model is patcher for patcher in patchers)]
    return bool(mm.free_memory(ALL, device, keep_loaded=kept))


def device_context(dtype: str = "auto") -> DeviceContext:
    """Where ComfyUI computes, in a precision by name; 'auto' follows ComfyUI's own choice."""
    device = mm.get_torch_device()
    precision = mm.unet_dtype(device, supported_dtypes=[torch.bfloat16, torch.float16, torch.float32]) if dtype == "auto" else DTYPES[dtype]
    if precision not in DTYPES.values():  # asked for by a flag of ComfyUI's for other networks: float8, float64
        precision = torch.float32
    return ManagedContext(device, precision, channels_last=device.type == "cuda")


def offload_context(context: DeviceContext) -> DeviceContext:
    """The same where ComfyUI keeps networks that are not in use; networks are loaded there and moved by its manager."""
    return DeviceContext(mm.unet_offload_device(), context.dtype, context.channels_last)


def probe_context(context: DeviceContext, path: Path) -> DeviceContext:
    """Where a network of that file's size can be tried out: on the device that computes, with room made for it."""
    size = path.stat().st_size
    mm.free_memory(2 * size + 2**30, context.device)
    return context


def show_text(node: str, text: str) -> None:
    """Shows text on a node in the page."""
    if PromptServer.instance is not None:
        PromptServer.instance.send_progress_text(text, node)


def manage(network: nn.Module) -> ModelPatcher:
    """Hands a network to ComfyUI's memory manager."""
    # The plain patcher: the dynamic one streams weights through one buffer, which a backward pass would find overwritten.
    return ModelPatcher(network, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


def managed_perceptual() -> LoadedPerceptual:
    """The LPIPS network of this computer: the user's backbone, else the embedded one."""
    perceptual = load_perceptual(offload_context(device_context("fp32")))
    return LoadedPerceptual(perceptual, manage(perceptual.network))


def on_device(
    ddpm: LoadedDDPM | None,
    clip: LoadedCLIP | None,
    perceptual: LoadedPerceptual | None = None,
    pixels: int = 0,
    options: GuidanceOptions | None = None,
    images_per_pass: int = 0,
) -> ManagedContext:
    """Brings networks to ComfyUI's device, whole; inside :func:`engine`.

    ``pixels``: of all rows of a batch together; ``options``: how they are guided; ``images_per_pass``: without a diffusion model, the pictures that CLIP
    sees at once. The memory that a step needs is told to the manager.
    """
    context = ddpm.context if ddpm is not None else device_context("fp32")
    if ddpm is not None:
        needed = memory_needed(ddpm.model, clip.model if clip else None, pixels, options, context.dtype.itemsize)
    else:
        needed = images_per_pass * 4 * values_of_a_view(clip.model) if clip is not None else 0
    patchers = managed(ddpm, clip, perceptual)
    mm.load_models_gpu(patchers, memory_required=needed, force_full_load=True)
    for patcher in patchers:
        # With --novram the manager leaves weights where they are, or takes a part of them away, for layers that fetch their own at each call;
        # these do not. (Its own way to load the rest, partially_load, believes a network whole of which a part was taken away.)
        if patcher.loaded_size() < patcher.model_size():
            try:
                patcher.patch_model(patcher.load_device)
            except Exception:
                patcher.detach()
                raise
    return with_patchers(context, patchers)


ALL = 1e32
"""Bytes: more than any network has."""


BACKWARD, FORWARD = {4: 128, 2: 88}, {4: 48, 2: 62}
"""Bytes that a UNet keeps for each pixel and unit of width, with and without the way back, by the size of its numbers. Width: the root of its
convolutions' outputs. Half precision takes more than half, for normalisation and the last layers are float32 beside it.
Measured (benchmarks.measure.peak_bytes): 110 and 43 at 64 px and 64 channels, 120 and 32 at 128 px and 128 channels, in half precision 80 and 57
at 64 px; twice as many with the way back by plain autograd."""
CLIP_VALUES = 17
"""Values that a vision transformer keeps for each token, unit of width and layer. Measured: 17 in a tiny one, 11 in ViT-B/16."""
OTHER_CLIP = 500
"""The same of another kind of CLIP, for each pixel that it sees; of a ResNet-50, counted."""


def memory_needed(ddpm: DiffusionModel, clip: ClipModel | None, pixels: int, options: GuidanceOptions | None, itemsize: int) -> int:
    """Bytes that a step takes beside the weights, roughly and not too few; of ``pixels`` pixels of all rows together."""
    options = options or GuidanceOptions()
    guided = clip is not None and options.scale > 0
    backward = clip is not None and options.gradient == "unet" and (guided or options.range_scale > 0 or options.needs_perceptual)
    width = sum(p.shape[0] for p in ddpm.network.parameters() if p.ndim == 4) ** 0.5
    kept = BACKWARD[itemsize] * (1 if works_on(mm.get_torch_device()) else 2)
    needed = pixels * width * (kept if backward else FORWARD[itemsize])
    if guided and clip is not None:
        rows = pixels / ddpm.image_size**2
        most = max(options.views, options.early_views)
        views = min(options.view_chunk or most, most)
        needed += rows * views * 4 * values_of_a_view(clip)
    return int(needed)


def values_of_a_view(clip: ClipModel) -> int:
    """What CLIP keeps of one picture on its way back."""
    visual = clip.model.visual
    blocks, grid = getattr(getattr(visual, "transformer", None), "resblocks", None), getattr(visual, "grid_size", None)
    if blocks is None or grid is None:
        return OTHER_CLIP * clip.image_size**2
    return CLIP_VALUES * (grid[0] * grid[1] + 1) * visual.conv1.out_channels * len(blocks)


def managed(*parts: LoadedDDPM | LoadedCLIP | LoadedPerceptual | None) -> list[ModelPatcher]:
    """What the memory manager knows of loaded networks."""
    return [part.patcher for part in parts if part is not None]


def models(ddpm: LoadedDDPM, clip: LoadedCLIP | None, perceptual: LoadedPerceptual | None) -> Models:
    """The engine's view of loaded networks; after :func:`on_device`."""
    context = with_patchers(ddpm.context, managed(ddpm, clip, perceptual))
    return Models(ddpm.model, clip.model if clip else None, perceptual.model if perceptual else None, context, ddpm.limits)


# --- progress, preview, interrupt ---------------------------------------------------------------------------------------


class Progress:
    """A node's bar, its live preview as the person set it, and the check whether the person pressed Cancel."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.bar = ProgressBar(total)

    def update(self, done: int, preview: Tensor | None = None) -> None:
        """``done`` of ``total``; ``preview`` [B, 3, H, W] in −1..1, of which the first row is shown.

        Raises ComfyUI's InterruptProcessingException after Cancel.
        """
        mm.throw_exception_if_processing_interrupted()
        shown = None
        if preview is not None and args.preview_method != LatentPreviewMethod.NoPreviews:
            pixels = ((preview[0].float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
            shown = ("JPEG", enlarged(Image.fromarray(pixels.permute(1, 2, 0).numpy())), args.preview_size)
        self.bar.update_absolute(done, self.total, shown)


def enlarged(picture: Image.Image, least: int = 256) -> Image.Image:
    """Small pictures at a whole multiple of their size: a preview of 64 pixels is hardly seen."""
    factor = -(-least // max(picture.size))
    return picture if factor <= 1 else picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


@contextlib.contextmanager
def engine() -> Iterator[None]:
    """The scope in which a node calls the engine.

    Out of ComfyUI's inference mode, whose tensors no gradient can use; warnings go to ComfyUI's log, and errors speak of inputs
    instead of the terminal's options.
    """
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("always", BlendedWarning)
            otherwise = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
                if issubclass(category, BlendedWarning):
                    logging.warning("Blended Diffusion: %s", in_words_of_nodes(str(message)))
                else:
                    otherwise(message, category, *where, **more)

            warnings.showwarning = show
            yield
    except BlendedError as error:
        raise BlendedError(in_words_of_nodes(str(error))) from None


def in_words_of_nodes(sentence: str) -> str:
    """'use --invert-mask' → 'use “invert mask”'."""
    return re.sub(r"--([a-z][a-z0-9-]*)", lambda match: f"“{match[1].replace('-', ' ')}”", sentence)


# --- folders ------------------------------------------------------------------------------------------------------------


def register_folders() -> None:
    """models/ddpm and models/open_clip, unless another pack or extra_model_paths.yaml named them already."""
    for name in (DDPM_FOLDER, CLIP_FOLDER):
        paths, extensions = folder_paths.folder_names_and_paths.get(name, ([], set()))
        own = str(Path(folder_paths.models_dir) / name)
        folder_paths.folder_names_and_paths[name] = (paths if own in paths else [*paths, own], set(extensions) | EXTENSIONS)


def files_in(folder: str) -> list[str]:
    """Names of the files in a folder of models; of diffusion models only those that may be one."""
    names = folder_paths.get_filename_list(folder)
    return [name for name in names if folder != DDPM_FOLDER or _may_be_checkpoint(name)]


def _may_be_checkpoint(name: str) -> bool:
    path = folder_paths.get_full_path(DDPM_FOLDER, name)
    return path is not None and _looked_at(path, stamp(Path(path)))


@lru_cache(maxsize=4096)
def _looked_at(path: str, _stamp: str) -> bool:
    """A file is looked into once, and again when it has changed: the page asks for the list often."""
    return may_be_checkpoint(Path(path))


def folder_of(folder: str) -> Path:
    """Where files of a kind lie, the first place if there are several."""
    return Path(folder_paths.folder_names_and_paths[folder][0][0])


def path_of(folder: str, name: str) -> Path:
    """Where a listed file is; an error names the folder where it should lie."""
    found = folder_paths.get_full_path(folder, name)
    if found is None:
        raise BlendedError(
            f"there is no {name!r} in {folder_of(folder)} any more; put the file there and press R to refresh, or choose another."
        )
    return Path(found)


def is_there(folder: str, name: str) -> bool | str:
    """True, or a sentence for ComfyUI's check before a run."""
    try:
        return path_of(folder, name).is_file()
    except BlendedError as error:
        return str(error)


def stamp(*paths: Path) -> str:
    """Changes when a file is overwritten, so that a node which loads it runs again."""
    return "/".join(f"{s.st_mtime_ns}.{s.st_size}" for s in (p.stat() for p in paths if p.is_file()))


# --- tensors ------------------------------------------------------------------------------------------------------------


def pictures(image: Tensor, what: str = "IMAGE") -> tuple[Tensor, Tensor | None]:
    """IMAGE [B, H, W, 3 or 4] → (colours [B, 3, H, W] float32 in 0..1, alpha [B, 1, H, W] or None), copies on the CPU."""
    if image.ndim != 4 or image.shape[-1] not in (3, 4):
        raise BlendedError(f"the {what} has the shape {shape_of(image)}; give pictures [batch, height, width, 3 (RGB) or 4 (RGBA)].")
    values = image.detach().to("cpu", torch.float32).permute(0, 3, 1, 2)
    parts = [values[:, :3], values[:, 3:]][: image.shape[-1] - 2]
    colours, *alpha = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return colours, alpha[0] if alpha else None


def masks(mask: Tensor, what: str = "MASK") -> Tensor:
    """MASK [B, H, W] → [B, 1, H, W] float32 on the CPU, a copy; an empty one is an error that says how to draw one."""
    values = four_dimensional(mask).clone()
    if not bool((values > 0).any()):
        raise BlendedError(
            f"the {what} is empty ({shape_of(mask)}, all 0): nothing would be edited. Paint white where the picture should change: "
            "right-click Load Image, Open in MaskEditor. (Load Image gives an empty mask for a picture without transparency.)"
        )
    return values


def optional_masks(mask: Tensor | None) -> Tensor | None:
    """The same of an input that may not be wired."""
    return None if mask is None else masks(mask)


def image(values: Tensor, alpha: Tensor | None = None) -> Tensor:
    """[B, 3, H, W] in 0..1 → IMAGE, with alpha where the picture had one."""
    if alpha is not None:
        values = torch.cat([values, alpha.expand(len(values), -1, -1, -1).to(values)], 1)
    return values.permute(0, 2, 3, 1).contiguous().to(mm.intermediate_device())


def as_image(x: Tensor) -> Tensor:
    """[B, 3, H, W] in −1..1 → IMAGE, clamped."""
    return image(((x.float() + 1) / 2).clamp(0, 1))


def to_intermediate(x: Tensor) -> Tensor:
    """Samples as a LATENT holds them: float32, where ComfyUI keeps what travels between nodes."""
    return x.detach().to(mm.intermediate_device(), torch.float32)


def text(value: Any) -> str:
    """A number for a person's eyes."""
    return f"{value:.3f}" if isinstance(value, (float, np.floating)) else "–" if value is None else str(value)
