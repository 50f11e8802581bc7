"""Device, precision and memory layout of networks."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import BlendedError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DeviceContext:
    """Where networks run, in which precision and memory layout.

    Samples, losses and gradients are float32 in every context; ``dtype`` is that of convolutions and attention in the UNet.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @classmethod
    def choose(cls, device: str = "auto", dtype: str = "auto") -> DeviceContext:
        """A context by name.

        Args:
            device: 'auto' (CUDA if present, else the CPU) or any name of a device in torch, such as 'cuda:1' or 'mps'. 'auto' never chooses MPS,
                which before torch 2.13 lacks the backward pass of warping that guidance needs.
            dtype: 'fp32', 'bf16', 'fp16' or 'auto': float32 on CPU and MPS; on CUDA bfloat16 where it is native, else float16.

        Raises:
            BlendedError: if the device cannot be used on this computer, or the precision is unknown.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            chosen = torch.device(device)
            torch.zeros(1, device=chosen)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            first = str(error).strip().splitlines()[0]
            raise BlendedError(f"the device {device!r} cannot be used here ({first}); use cpu.", option="device") from None
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
        """Moves a network to the device, in the memory layout of the context; frozen and in evaluation mode."""
        network = network.to(self.device).eval().requires_grad_(False)
        return network.to(memory_format=torch.channels_last) if self.channels_last else network

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor on the device; floating-point tensors become float32."""
        return tensor.to(self.device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    def release(self) -> None:
        """Returns unused memory of torch's allocator to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def make_room(self) -> bool:
        """Frees memory of other networks on the device, in contexts that manage them; whether any was freed."""
        return False

    @contextlib.contextmanager
    def autograd(self) -> Iterator[None]:
        """The scope in which networks are used: no inference mode, and gradients only where a function enables them."""
        with torch.inference_mode(False), torch.no_grad():
            yield
