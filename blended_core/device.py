"""Where networks run: device, precision and memory layout. No other module names a device."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field

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

    Samples, losses and gradients are float32 in every context; ``dtype`` is that of the inner layers of the UNet.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @classmethod
    def choose(cls, device: str = "auto", dtype: str = "auto") -> DeviceContext:
        """A context by name.

        Args:
            device: 'auto' (CUDA if there is one, else the CPU) or any name of a device in torch, such as 'cuda:1' or 'mps'. MPS is never
                chosen automatically: before torch 2.13 it lacks the backward pass of the warps that guidance needs.
            dtype: 'fp32', 'bf16', 'fp16' or 'auto': float32 on CPU and MPS; on CUDA bfloat16 where the hardware supports it, else float16.

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
        if dtype != "auto":
            precision = DTYPES[dtype]
        elif chosen.type == "cuda":
            precision = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        else:
            precision = torch.float32
        return cls(chosen, precision, channels_last=chosen.type == "cuda")

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
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def make_room(self) -> bool:
        """Unloads networks that others keep on the device; whether there was one. This context knows of none."""
        return False

    @contextlib.contextmanager
    def autograd(self) -> Iterator[None]:
        """The scope in which networks are used: outside of inference mode, gradients off until a function enables them."""
        with torch.inference_mode(False), torch.no_grad():
            yield


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 faster than those of float32: a CPU with AVX512_BF16 or AMX, or CUDA."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # torch has no public question for this. Where the names are missing, float32 is the answer that is always right.
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device.type == "cpu" and any(bool(ask()) for ask in asked if ask is not None)
