"""Where networks run: device, precision and memory layout. No other module names a device."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BlendedError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _present() -> str:
    """The devices of this computer, as advice. The errors of torch about a device advise how to build torch, so they are not shown."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [f"cuda:{number}" for number in range(count)] + (["mps"] if torch.backends.mps.is_available() else []) + ["cpu"]
    return f"use {', '.join(found[:-1])} or cpu" if len(found) > 1 else "use cpu, the only one"


@dataclass(frozen=True)
class DeviceContext:
    """Device, precision and memory layout of the networks.

    Samples, losses and gradients are float32 in every context; ``dtype`` is that of the inner layers of the UNet. ``cuda_graphs``: an edit records
    the UNet once and replays it (:mod:`~blended_core.graphs`); without effect on devices other than CUDA.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    cuda_graphs: bool = False

    @classmethod
    def choose(cls, device: str = "auto", dtype: str = "auto", cuda_graphs: bool = False) -> DeviceContext:
        """A context by name.

        Args:
            device: 'auto' (CUDA if there is one, else the CPU) or any name of a device in torch, such as 'cuda:1' or 'mps'. MPS is never
                chosen automatically: before torch 2.13 it lacks the backward pass of the warps that guidance needs.
            dtype: 'fp32', 'bf16', 'fp16' or 'auto': float32 on CPU and MPS, on CUDA what :func:`fast_precision` says.
            cuda_graphs: as :attr:`cuda_graphs`.

        Raises:
            BlendedError: if the device does not exist here.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            chosen = torch.device(device)
            torch.zeros(1, device=chosen).item()
        except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError):
            cpu_build = device.startswith("cuda") and not (torch.version.cuda or torch.version.hip)
            why = ", because PyTorch was installed without CUDA" if cpu_build else ""
            raise BlendedError(f"the device {device!r} cannot be used on this computer{why}; {_present()}.", option="device") from None
        if dtype != "auto" and dtype not in DTYPES:
            raise BlendedError(f"unknown precision {dtype!r}; known are auto, {', '.join(DTYPES)}.", option="dtype")
        automatic = fast_precision(chosen) if chosen.type == "cuda" else torch.float32
        precision = automatic if dtype == "auto" else DTYPES[dtype]
        return cls(chosen, precision, prefers_channels_last(chosen, precision), cuda_graphs and chosen.type == "cuda")

    def place(self, network: nn.Module) -> nn.Module:
        """Moves a network to the device, in this layout; frozen, in evaluation mode."""
        network = network.to(self.device).train(False).requires_grad_(False)
        return network.to(memory_format=torch.channels_last) if self.channels_last else network

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor on the device, as float32 if it is floating."""
        return tensor.to(self.device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    def release(self) -> None:
        """Returns unused memory to the device."""
        gc.collect()
        backend: Any = getattr(torch, self.device.type, None)  # torch.cuda, torch.mps, torch.xpu; torch.cpu has no cache
        if hasattr(backend, "empty_cache"):
            backend.empty_cache()

    def free_bytes(self) -> int | None:
        """Memory that new tensors can take on the device; None where it is unknown, as on a CPU, which shares it with everything else."""
        backend: Any = getattr(torch, self.device.type, None)
        if self.device.type not in ("cuda", "xpu") or not hasattr(backend, "mem_get_info"):
            return None
        free, _ = backend.mem_get_info(self.device)
        # What the allocator of torch holds without a tensor in it is free too.
        return int(free + backend.memory_reserved(self.device) - backend.memory_allocated(self.device))

    def make_room(self) -> bool:
        """Unloads networks that others keep on the device; whether there was one. This context knows of none."""
        return False

    @contextlib.contextmanager
    def autograd(self) -> Iterator[None]:
        """The scope in which networks are used: outside of inference mode, gradients off until a function enables them."""
        with torch.inference_mode(False), torch.no_grad():
            yield


def fast_precision(device: torch.device) -> torch.dtype:
    """The precision in which a device multiplies matrices fastest.

    CUDA: bfloat16 where the hardware has it (compute capability 8.0), else float16 where it has matrix units for it (7.0), else float32. The GTX 16
    series reports 7.5, has no such units, and is known for NaN in float16: float32. CPU: bfloat16 with AVX512_BF16 or AMX, else float32. Others:
    float32.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):  # the question below is about the current device
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.bfloat16
        matrix_units = torch.cuda.get_device_capability(device) >= (7, 0) and "GTX 16" not in torch.cuda.get_device_name(device)
        return torch.float16 if matrix_units else torch.float32
    # torch has no public question for this. Where the names are missing, float32 is the answer that is always right.
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if device.type == "cpu" and any(bool(ask()) for ask in asked if ask is not None) else torch.float32


def prefers_channels_last(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the networks are laid out channels last: in half precision on CUDA, whose convolutions on matrix units read that layout."""
    return device.type == "cuda" and dtype != torch.float32


def normalizes_groups(device: torch.device) -> bool:
    """Whether torch has the kernels of group normalization that :mod:`~blended_core.adm.recompute` calls; elsewhere the plain layers run."""
    return device.type in ("cpu", "cuda")


def pull_back(output: Tensor, x: Tensor, cotangent: Tensor, keep_graph: bool = False) -> Tensor:
    """The gradient of ⟨output, cotangent⟩ with respect to x, from which ``output`` was computed; ``cotangent`` has the shape of ``output``.

    ``keep_graph``: for another call.

    It is equal in every bit to that of torch.autograd.grad with the cotangent as an argument, for which torch imports sympy: more CPU time than the
    first step of a small edit.
    """
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad((output * cotangent).sum(), x, retain_graph=keep_graph)
    return gradient


def gradient_through(output: Tensor, x: Tensor, cotangent: Tensor, keep_graph: bool = False) -> Tensor:
    """The gradient of ⟨output, cotangent⟩ with respect to x; the cotangent of each row is scaled to what half precision can hold.

    In float16 values below 6e-8 are lost, and the gradient of a mean over many pixels is of that size. It is scaled so that its largest value is
    about 1 before the network, and back afterward, by powers of two, which round nothing.

    Args:
        output: [B, …], computed from x [B, …]; cotangent: float32, of the shape of the output. keep_graph: for another call.
    """
    largest = cotangent.flatten(1).abs().amax(1)
    exponent = torch.where(largest.isfinite() & (largest > 0), largest.log2().ceil(), 0.0).clamp(-100, 100)
    gradient = pull_back(output, x, cotangent * torch.exp2(-exponent).view(-1, *[1] * (cotangent.ndim - 1)), keep_graph)
    return gradient * torch.exp2(exponent).view(-1, *[1] * (x.ndim - 1))


def upload(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, in another precision if one is given.

    On CUDA the copy is queued behind the work in progress: a plain ``to`` would wait until the device has finished everything before it. Queued
    copies need pinned memory, which torch keeps until they are done.
    """
    dtype = dtype or tensor.dtype
    if tensor.device.type == "cpu" and copies_in_queue(device):
        return tensor.to(dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)


def copies_in_queue(device: torch.device) -> bool:
    """Whether copies to a device are queued: on CUDA. On MPS, torch does not keep the source of a queued copy."""
    return device.type == "cuda"
