"""What to do when memory runs out in a guided step: the same with less at once.

First the room that others would give up, then fewer images, then fewer views through CLIP, then the UNet's activations are made again instead of kept. All that changes memory and
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

from .device import DeviceContext
from .errors import BlendedWarning, OutOfMemoryError
from .options import GuidanceOptions

Result = TypeVar("Result")

SIGNS = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "not enough gpu video memory", "alloc_failed",
)  # fmt: skip
"""How CUDA, MPS and the CPU's allocator say it, where they have no exception of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is why something failed."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


@dataclass
class MemoryLimits:
    """How little a guided step takes at once; learned by failing, and kept for an edit's further steps.

    Attributes:
        rows: images at once, or None for the whole batch; view_chunk: views at once, or None for what the options say.
        checkpointing: make activations again on the way back. x0: the gradient stops at x̂0.
        scored: pictures that are scored at once, or None for the whole batch.
    """

    rows: int | None = None
    view_chunk: int | None = None
    checkpointing: bool = False
    x0: bool = False
    scored: int | None = None

    def forget(self) -> None:
        """Begins anew: what was too much for one edit may fit the next, when another program has ended."""
        self.rows, self.view_chunk, self.checkpointing, self.x0, self.scored = None, None, False, False, None

    def applied(self, options: GuidanceOptions) -> GuidanceOptions:
        """The options of a step under these limits."""
        if self.view_chunk is not None:
            options = replace(options, view_chunk=min(self.view_chunk, options.view_chunk or self.view_chunk))
        return replace(options, gradient="x0") if self.x0 and options.x0_if_needed else options

    def rows_of(self, batch: int, options: GuidanceOptions, guided: bool) -> int:
        """How many images of a batch go at once."""
        return batch if together(options, guided) else min(batch, self.rows or batch)

    def less(self, batch: int, options: GuidanceOptions, network: nn.Module, guided: bool) -> str:
        """Takes the next measure and says which; nothing left is ''.

        Args:
            batch: images of the step that failed; options: as the person gave them; network: the UNet.
            guided: whether CLIP takes part.
        """
        rows = self.rows_of(batch, options, guided)
        now = self.applied(options)
        if rows > 1 and not together(options, guided):
            self.rows = rows // 2
            return f"going on with {self.rows} of {batch} images at once"
        chunk = min(now.view_chunk or now.views, now.views)
        if guided and options.scale > 0 and chunk > 1:
            self.view_chunk = chunk // 2
            return f"going on with {self.view_chunk} of {now.views} views at once"
        through_unet = guided and now.gradient == "unet"
        if through_unet and not self.checkpointing and getattr(network, "gradient_checkpointing", None) is False:
            # Views were not what did not fit; they are learned again if they are.
            self.checkpointing, self.view_chunk = True, None
            return "going on with gradient checkpointing, which is slower"
        if through_unet and options.x0_if_needed:
            self.x0, self.view_chunk = True, None
            return "going on with the gradient at x̂0, as you allowed; from here on the picture is another one"
        return ""

    @contextmanager
    def checkpoints(self, network: nn.Module) -> Iterator[None]:
        """The network with checkpointing where that was decided."""
        if not self.checkpointing:
            yield
            return
        before = network.gradient_checkpointing
        network.gradient_checkpointing = True  # type: ignore[assignment]
        try:
            yield
        finally:
            network.gradient_checkpointing = before


def run_within_memory(
    work: Callable[[int, GuidanceOptions], list[Result]],
    batch: int,
    options: GuidanceOptions,
    limits: MemoryLimits,
    network: nn.Module,
    context: DeviceContext,
    guided: bool,
) -> list[Result]:
    """Does ``work(rows, options)``, again with less where memory runs out.

    Warns (BlendedWarning) with one line for each measure. Raises OutOfMemoryError when there is none left.
    """
    while True:
        try:
            with limits.checkpoints(network):
                return work(limits.rows_of(batch, options, guided), limits.applied(options))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        # Outside of the handler, where the failed step's tensors are let go of.
        context.release()
        if context.make_room():
            warnings.warn("memory ran out; networks that this step does not need were unloaded.", BlendedWarning, stacklevel=2)
            continue
        measure = limits.less(batch, options, network, guided)
        if not measure:
            raise OutOfMemoryError(nothing_left(reason, batch, options, context, guided))
        warnings.warn(f"memory ran out; {measure}.", BlendedWarning, stacklevel=2)


def fewer_at_once(work: Callable[[int], Result], rows: int, context: DeviceContext, what: str) -> tuple[Result, int]:
    """``work(rows)`` for as many rows at once as memory allows, beginning with ``rows``, and how many that was; the result must not depend on it.

    Warns (BlendedWarning) with one line for each halving; ``what`` is what goes on ('pictures are scored'). Raises OutOfMemoryError when one alone does not fit.
    """
    while True:
        try:
            return work(rows), rows
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        context.release()
        if context.make_room():
            warnings.warn("memory ran out; networks that are not needed were unloaded.", BlendedWarning, stacklevel=2)
            continue
        if rows <= 1:
            raise OutOfMemoryError(f"memory ran out while {what}, one at a time ({reason}); close other programs, or run on --device cpu.")
        rows //= 2
        warnings.warn(f"memory ran out; {what}, {rows} at once.", BlendedWarning, stacklevel=2)


def together(options: GuidanceOptions, guided: bool) -> bool:
    """Whether the images of a batch must not be split: the reference code's background loss averages over them."""
    return guided and options.needs_perceptual and options.background_loss == "reference"


def nothing_left(reason: str, batch: int, options: GuidanceOptions, context: DeviceContext, guided: bool) -> str:
    """The sentence when not even the least fits, with what could still be done."""
    advice = []
    if together(options, guided) and batch > 1:
        least, advice = f"a batch of {batch}, which the reference code's background loss keeps together,", ["use --batch 1"]
    else:
        least = "one image and one view at a time" if guided else "one image at a time"
    if guided and options.gradient == "unet" and not options.x0_if_needed:
        advice.append("take the gradient at x̂0 (--gradient x0), which needs a fraction of it")
    if context.dtype == torch.float32:
        advice.append("try half precision (--dtype bf16 or fp16)")
    if context.device.type != "cpu":
        advice.append("run on --device cpu")
    return f"memory ran out even with {least} ({reason.rstrip('.')}); {', or '.join([*advice, 'close other programs'])}."
