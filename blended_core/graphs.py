"""CUDA graphs: the kernels of a network recorded once and started together.

A UNet starts some thousand kernels in a forward and backward pass, each from Python. Where the pictures are few or small, the device waits for Python.
A recorded network starts all of them with one call and computes the same. It needs neither a compiler nor Triton, and recording takes as long as two
calls of the network. In return, the memory of its intermediate results stays taken until it is cleared.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import BlendedWarning

MOST_RECORDINGS = 4
"""Kinds of inputs that are recorded at a time: full batches and a smaller last one, with and without a gradient."""
WARM_UP_CALLS = 2
"""Calls before a recording, on its own stream: libraries allocate their workspaces and choose their kernels."""

RECORDED_ON = "cuda"
"""The kind of device that has these graphs."""

Call = Callable[..., Tensor]


class GraphedNetwork:
    """A frozen network on a CUDA device that is recorded when it is called the second time with inputs of one kind, and replayed from then on.

    A recording reads the weights where they were. It is made again when a weight has moved: ComfyUI moves networks to the CPU and back. Changed
    values in the same place need nothing. Inputs of another shape, precision or layout, with or without a gradient, have recordings of their own.

    Where a recording is impossible, the network is called as it is: on other devices, with weights that need a gradient, with hooks, with gradient
    checkpointing, under autocast, and after a recording has failed.

    One edit uses one object from one thread; it ends with :meth:`clear`.

    Args:
        network: maps (x_t [B, C, H, W], timesteps [B], labels or None) to a tensor.

    Warns:
        BlendedWarning: once, when a recording fails.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.refused = False
        self._recordings: dict[Hashable, Call] = {}
        self._seen: set[Hashable] = set()
        self._weights: tuple[int, ...] = ()
        self._device = torch.device("cpu")

    def __call__(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """The output of the network, in memory of its own."""
        inputs = (x, timesteps) if labels is None else (x, timesteps, labels)
        if self.refused or x.device.type != RECORDED_ON:
            return self._plain(inputs)
        weights = tuple(tensor.data_ptr() for tensor in (*self.network.parameters(), *self.network.buffers()))
        if weights != self._weights:
            self.clear()
            self._weights = weights
        kind = kind_of(self.network, inputs)
        if kind not in self._seen:
            # The first call is not recorded: it may be the only one of its kind.
            self._seen.add(kind)
            return self._plain(inputs)
        if kind not in self._recordings and not (can_record(self.network, inputs) and self._record(kind, inputs)):
            return self._plain(inputs)
        # The output of a recording is overwritten by its next replay.
        return self._recordings[kind](*inputs).clone()

    def _plain(self, inputs: tuple[Tensor, ...]) -> Tensor:
        out: Tensor = self.network(*inputs)
        return out

    def _record(self, kind: Hashable, inputs: tuple[Tensor, ...]) -> bool:
        """Records a kind of inputs; whether that succeeded."""
        if len(self._recordings) >= MOST_RECORDINGS:
            # All at once: recordings of one device share workspaces of libraries.
            self.clear()
        self._device = inputs[0].device
        try:
            self._recordings[kind] = record(self.network, inputs)
        except (RuntimeError, AssertionError) as error:  # torch has no class of its own for it
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        else:
            return True
        # Outside of the handler, where the tensors of the failed attempt are released.
        self.give_up()
        warnings.warn(
            BlendedWarning(f"the diffusion model could not be recorded as a CUDA graph ({reason}); it runs without.", option="cuda_graphs"),
            stacklevel=2,
        )
        return False

    def give_up(self) -> bool:
        """Clears the recordings and makes no more; whether that frees memory."""
        had, self.refused = bool(self._recordings), True
        self.clear()
        return had

    def clear(self) -> None:
        """Releases the recordings and their memory."""
        had = bool(self._recordings)
        if had and torch.cuda.is_available():
            torch.cuda.synchronize(self._device)  # the last replay may still run
        self._recordings.clear()
        self._seen.clear()
        if had:
            gc.collect()  # in some versions of torch a recording refers to itself


def can_record(network: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether replaying a network would do what calling it does."""
    # Checkpointing saves the state of random numbers, which is not allowed while recording. A compiled network records itself if it is asked to.
    if getattr(network, "gradient_checkpointing", False) or getattr(network, "_compiled_call_impl", None) is not None:
        return False
    if torch.is_autocast_enabled(RECORDED_ON) or any(value.device != inputs[0].device for value in (*inputs, *network.parameters())):
        return False
    if any(value.requires_grad for value in (*inputs[1:], *network.parameters())):
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in network.modules())


def kind_of(network: nn.Module, inputs: tuple[Tensor, ...]) -> Hashable:
    """What a recording depends on beside the values of its inputs and weights."""
    layout = tuple((value.shape, value.stride(), value.dtype, value.device, value.requires_grad) for value in inputs)
    settings = tuple(getattr(network, name, None) for name in ("compute_dtype", "recompute", "training", "gradient_checkpointing"))
    return layout, settings, needs_gradient(inputs), torch.is_autocast_enabled(RECORDED_ON)


def needs_gradient(inputs: tuple[Tensor, ...]) -> bool:
    """Whether a backward pass to x may follow."""
    return torch.is_grad_enabled() and inputs[0].requires_grad


def record(network: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    """A function that computes the network's output for inputs like these, differentiable in x if x needs a gradient.

    Each call overwrites the output of the one before, and the backward pass of a call must come before the next call.
    """
    device, differentiable = inputs[0].device, needs_gradient(inputs)
    places = tuple(value.detach().clone() for value in inputs)  # where the replay reads its inputs
    places[0].requires_grad_(differentiable)

    def call(*values: Tensor) -> Tensor:
        out: Tensor = network(*values)
        return out

    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device)
        try:
            made: Any = torch.cuda.make_graphed_callables(call, places, num_warmup_iters=WARM_UP_CALLS)
        finally:
            # A recording that fails may leave its own stream as the current one.
            torch.cuda.set_stream(stream)
    return cast(Call, made)
