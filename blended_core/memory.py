"""How much memory a guided step needs, and what happens when it runs out: the same work in smaller parts.

First the memory of other networks is released, then that of CUDA graphs. Then fewer images are processed at once, then fewer views, then with gradient
checkpointing. All of that changes memory and time; the result stays the same up to rounding. Only the gradient at x̂0 changes the result, and it is
taken only where the options allow it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from .clip.model import ClipModel
from .denoiser import DiffusionModel
from .device import DeviceContext, normalizes_groups
from .errors import BlendedWarning, OutOfMemoryError
from .graphs import GraphedNetwork
from .options import GuidanceOptions

Result = TypeVar("Result")

OUT_OF_MEMORY_TEXTS = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "not enough gpu video memory", "alloc_failed",
)  # fmt: skip
"""In messages of CUDA, MPS and the CPU allocator, where they have no exception of their own."""
BACKWARD_BYTES_PER_PIXEL, FORWARD_BYTES_PER_PIXEL = {4: 128, 2: 88}, {4: 48, 2: 62}
"""Bytes that a UNet keeps per pixel and unit of width, with and without a backward pass, by the size of a value in bytes. The width is the
square root of the sum of the convolutions' output channels. Half precision needs more than half, because normalization and the last layers
run in float32. Measured (benchmarks.measure.peak_bytes): 110 and 43 at 64 px and 64 channels, 120 and 32 at 128 px and 128 channels, in half
precision 80 and 57 at 64 px; twice as much for a backward pass by plain autograd."""
VIT_VALUES_PER_TOKEN = 17
"""Values that a vision transformer keeps per token, unit of width and layer. Measured: 17 in a tiny one, 11 in ViT-B/16."""
RESNET_VALUES_PER_PIXEL = 500
"""Values that another image encoder keeps per pixel of its input. Counted for a ResNet-50."""
USUAL_BATCH = 4
"""Candidates at once where free memory is unknown; the default of the option."""
SHARE_OF_FREE_MEMORY = 0.8
"""The part of free memory that a batch is chosen for. The rest is for workspaces of libraries and for gaps between tensors."""
MOST_FITTING = 32
"""Candidates at once that are chosen at most; more are not faster."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY_TEXTS)


@dataclass
class MemoryLimits:
    """How much a guided step may process at once; lowered when memory runs out, and kept for the further steps of an edit.

    Attributes:
        rows: images at once, or None for the whole batch. view_chunk: views at once, or None for what the options say.
        checkpointing: recompute activations in the backward pass. x0: take the gradient at x̂0.
        scored: pictures that are scored at once, or None for the whole batch.
    """

    rows: int | None = None
    view_chunk: int | None = None
    checkpointing: bool = False
    x0: bool = False
    scored: int | None = None

    def reset(self) -> None:
        """Removes all limits: what did not fit in one edit may fit in the next, when another program has ended."""
        self.rows, self.view_chunk, self.checkpointing, self.x0, self.scored = None, None, False, False, None

    def applied(self, options: GuidanceOptions) -> GuidanceOptions:
        """The options of a step under these limits."""
        if self.view_chunk is not None:
            options = replace(options, view_chunk=min(self.view_chunk, options.view_chunk or self.view_chunk))
        return replace(options, gradient="x0") if self.x0 and options.x0_if_needed else options

    def lower(self, work: GuidedWork) -> str:
        """Lowers the next limit and says which; '' if none is left."""
        if work.graphs is not None and work.graphs.give_up():
            return "continuing without CUDA graphs, which keep memory"
        options = self.applied(work.options)
        rows = min(work.batch, self.rows or work.batch)
        if rows > 1 and not work.whole_batch:
            self.rows = rows // 2
            return f"continuing with {self.rows} of {work.batch} images at once"
        chunk = min(options.view_chunk or options.views, options.views)
        if work.views and chunk > 1:
            self.view_chunk = chunk // 2
            return f"continuing with {self.view_chunk} of {options.views} views at once"
        through_network = work.guided and options.gradient == "unet"
        if through_network and not self.checkpointing and getattr(work.network, "gradient_checkpointing", None) is False:
            # Views were not what did not fit; their limit is found again if they are.
            self.checkpointing, self.view_chunk = True, None
            return "continuing with gradient checkpointing, which is slower"
        if through_network and options.x0_if_needed:
            self.x0, self.view_chunk = True, None
            return "continuing with the gradient at x̂0, as the options allow; the result will differ"
        return ""

    @contextmanager
    def checkpoints(self, network: nn.Module) -> Iterator[None]:
        """The network with gradient checkpointing where these limits ask for it."""
        if not self.checkpointing:
            yield
            return
        before = network.gradient_checkpointing
        network.gradient_checkpointing = True  # type: ignore[assignment]
        try:
            yield
        finally:
            network.gradient_checkpointing = before


@dataclass(frozen=True, eq=False)
class GuidedWork:
    """A guided step as far as memory is concerned.

    Attributes:
        batch: number of images. options: as the user gave them. network: the UNet.
        guided: whether a gradient is taken. views: whether CLIP takes part. whole_batch: whether the images must not be processed apart.
        graphs: the network as CUDA graphs, if it is used so.
    """

    batch: int
    options: GuidanceOptions
    network: nn.Module
    guided: bool
    views: bool
    whole_batch: bool = False
    graphs: GraphedNetwork | None = None


def run_within_memory(
    work: Callable[[int, GuidanceOptions], list[Result]], description: GuidedWork, limits: MemoryLimits, context: DeviceContext
) -> list[Result]:
    """Runs ``work(rows, options)``, and again under lower limits each time that memory runs out.

    Warns:
        BlendedWarning: for each limit that is lowered.

    Raises:
        OutOfMemoryError: when no limit is left to lower.
    """
    while True:
        try:
            with limits.checkpoints(description.network):
                rows = description.batch if description.whole_batch else min(description.batch, limits.rows or description.batch)
                return work(rows, limits.applied(description.options))
        except (RuntimeError, MemoryError) as error:
            reason = _reason(error)
        # Outside of the handler, where the tensors of the failed step are released.
        if _others_make_room(context):
            continue
        measure = limits.lower(description)
        if not measure:
            raise _nothing_left(reason, description, context)
        warnings.warn(BlendedWarning(f"memory ran out; {measure}."), stacklevel=2)


def run_in_parts(
    work: Callable[[int], Result], rows: int, context: DeviceContext, what: str, graphs: GraphedNetwork | None = None
) -> tuple[Result, int]:
    """``work(rows)`` with as many rows at once as memory allows, at most ``rows``, and that number; the result must not depend on it.

    ``what`` names the work ('pictures are scored'). ``graphs`` are given up before the number is lowered.

    Warns:
        BlendedWarning: each time that the number is halved.

    Raises:
        OutOfMemoryError: when one row alone does not fit.
    """
    while True:
        try:
            return work(rows), rows
        except (RuntimeError, MemoryError) as error:
            reason = _reason(error)
        if _others_make_room(context) or (graphs is not None and graphs.give_up()):
            continue
        if rows <= 1:
            raise OutOfMemoryError(
                f"memory ran out while {what}, one at a time ({reason}); close other programs, or run on the CPU.", option="device"
            )
        rows //= 2
        warnings.warn(BlendedWarning(f"memory ran out; {what}, {rows} at once."), stacklevel=2)


def _reason(error: RuntimeError | MemoryError) -> str:
    """The first line of an error about memory; any other error is raised again."""
    if not is_out_of_memory(error):
        raise error
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _others_make_room(context: DeviceContext) -> bool:
    context.release()
    if not context.make_room():
        return False
    warnings.warn(BlendedWarning("memory ran out; networks that this step does not need were unloaded."), stacklevel=3)
    return True


def _nothing_left(reason: str, work: GuidedWork, context: DeviceContext) -> OutOfMemoryError:
    """The error when not even the smallest unit fits, with what the user can still do."""
    advice: list[tuple[str, str]] = []
    if work.whole_batch and work.batch > 1:
        unit = f"a batch of {work.batch}, which the reference code's background loss does not allow to split,"
        advice.append(("use a batch of 1", "batch"))
    else:
        unit = "one image and one view at a time" if work.views else "one image at a time"
    if work.guided and work.options.gradient == "unet" and not work.options.x0_if_needed:
        advice.append(("take the gradient at x̂0, which needs a fraction of it", "gradient"))
    if context.dtype == torch.float32:
        advice.append(("use half precision", "dtype"))
    if context.device.type != "cpu":
        advice.append(("run on the CPU", "device"))
    texts = [text for text, _ in advice] + ["close other programs"]
    return OutOfMemoryError(f"memory ran out even with {unit} ({reason}); {', or '.join(texts)}.", option=[name for _, name in advice])


def memory_needed(
    ddpm: DiffusionModel, clip: ClipModel | None, pixels: int, options: GuidanceOptions | None, itemsize: int, device: torch.device
) -> int:
    """Estimate, rather too high than too low, of the bytes that a step on ``pixels`` pixels needs in addition to the weights.

    Args:
        ddpm, clip: the networks; None for no guidance by CLIP. options: of guidance.
        itemsize: bytes of a value in the UNet. device: where the step runs.
    """
    options = options or GuidanceOptions()
    guided = clip is not None and options.uses_clip
    backward = clip is not None and options.gradient == "unet" and options.has_losses
    width = sum(p.shape[0] for p in ddpm.network.parameters() if p.ndim == 4) ** 0.5
    backward_bytes = BACKWARD_BYTES_PER_PIXEL[itemsize] * (1 if normalizes_groups(device) else 2)
    needed = pixels * width * (backward_bytes if backward else FORWARD_BYTES_PER_PIXEL[itemsize])
    if guided and clip is not None:
        images = pixels / ddpm.image_size**2
        most_views = max(options.views, options.early_views)
        needed += images * min(options.view_chunk or most_views, most_views) * clip.image_dtype.itemsize * values_per_image(clip)
    return int(needed)


def values_per_image(clip: ClipModel) -> int:
    """Values that CLIP's image encoder keeps of one image for the backward pass."""
    visual: Any = getattr(clip.model, "visual", clip.model)
    blocks, positions = getattr(getattr(visual, "transformer", None), "resblocks", None), getattr(visual, "positional_embedding", None)
    if blocks is None or positions is None:
        return RESNET_VALUES_PER_PIXEL * clip.image_size**2
    return int(VIT_VALUES_PER_TOKEN * positions.numel() * len(blocks))


def fitting_batch(free: int | None, image_bytes: int, candidates: int) -> int:
    """Candidates at once for ``free`` bytes, None: unknown, where each needs ``image_bytes``; all batches of an edit have about the same size."""
    most = USUAL_BATCH if free is None else min(MOST_FITTING, int(SHARE_OF_FREE_MEMORY * free) // max(1, image_bytes))
    batches = -(-candidates // max(1, min(most, candidates)))
    return -(-candidates // batches)
