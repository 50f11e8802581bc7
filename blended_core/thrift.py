"""What to do when memory runs out in a guided step: the same with less at once.

First fewer images, then fewer views through CLIP, then the UNet's activations are made again instead of kept. All that changes memory and
time; the picture stays the same, as far as sums in another order are. Only the gradient at x̂0 is another picture, and is taken only
where the options allow it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from .context import DeviceContext
from .errors import BlendedError, BlendedWarning
from .guidance import GuidanceOptions

Result = TypeVar("Result")

SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
"""How CUDA, MPS and the CPU's allocator say it, where they have no exception of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is why something failed."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


@dataclass
class Thrift:
    """How little a guided step takes at once; learned by failing, and kept with the model.

    Attributes:
        rows: images at once, or None for the whole batch; view_chunk: views at once, or None for what the options say.
        checkpointing: make activations again on the way back. x0: the gradient stops at x̂0.
    """

    rows: int | None = None
    view_chunk: int | None = None
    checkpointing: bool = False
    x0: bool = False

    def applied(self, options: GuidanceOptions) -> GuidanceOptions:
        """The options of a step under these limits."""
        if self.view_chunk is not None:
            options = replace(options, view_chunk=min(self.view_chunk, options.view_chunk or self.view_chunk))
        return replace(options, gradient="x0") if self.x0 else options

    def less(self, batch: int, options: GuidanceOptions, network: nn.Module, guided: bool) -> str:
        """Takes the next measure and says which; nothing left is ''.

        Args:
            batch: images of the step that failed; options: as the person gave them; network: the UNet.
            guided: whether CLIP takes part.
        """
        rows = min(batch, self.rows or batch)
        now = self.applied(options)
        # The reference code's background loss averages over the batch, whose images must stay together.
        together = guided and options.needs_perceptual and options.background_loss == "reference"
        if rows > 1 and not together:
            self.rows = rows // 2
            return f"going on with {self.rows} of {batch} images at once"
        chunk = min(now.view_chunk or now.views, now.views)
        if guided and options.scale > 0 and chunk > 1:
            self.view_chunk = chunk // 2
            return f"going on with {self.view_chunk} of {now.views} views at once"
        through_unet = guided and now.gradient == "unet"
        if through_unet and not self.checkpointing and getattr(network, "gradient_checkpointing", None) is False:
            self.checkpointing = True
            return "going on with gradient checkpointing, a third slower"
        if through_unet and options.x0_if_needed:
            self.x0 = True
            return "going on with the gradient at x̂0, as you allowed; from here on the picture is another one"
        return ""

    @contextmanager
    def checkpoints(self, network: nn.Module) -> Iterator[None]:
        """The network with checkpointing where that was decided."""
        if not self.checkpointing:
            yield
            return
        network.gradient_checkpointing = True  # type: ignore[assignment]
        try:
            yield
        finally:
            network.gradient_checkpointing = False  # type: ignore[assignment]


def sparing(
    work: Callable[[int, GuidanceOptions], list[Result]],
    batch: int,
    options: GuidanceOptions,
    thrift: Thrift,
    network: nn.Module,
    context: DeviceContext,
    guided: bool,
) -> list[Result]:
    """Does ``work(rows, options)``, again with less where memory runs out.

    Warns (BlendedWarning) with one line for each measure. Raises BlendedError when there is none left.
    """
    while True:
        try:
            with thrift.checkpoints(network):
                return work(min(batch, thrift.rows or batch), thrift.applied(options))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            measure = thrift.less(batch, options, network, guided)
            if not measure:
                raise BlendedError(nothing_left(error, options, guided)) from None
        # Outside of the handler, where the failed step's tensors are let go of.
        context.release()
        warnings.warn(f"memory ran out; {measure}.", BlendedWarning, stacklevel=2)


def nothing_left(error: BaseException, options: GuidanceOptions, guided: bool) -> str:
    """The sentence when not even one image and one view fit."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if guided and options.gradient == "unet" and not options.x0_if_needed:
        advice = "allow the gradient at x̂0 (--gradient x0), which needs a fraction of it, or"
    else:
        advice = "try half precision (--dtype bf16 or fp16), or"
    return f"memory ran out even with one image and one view at a time ({first}); {advice} close other programs, or run on --device cpu."
