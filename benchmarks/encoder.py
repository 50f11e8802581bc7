"""The image encoder of CLIP against open_clip's: forward and backward pass to the images, as guidance needs them."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import nn

from blended_core.device import DeviceContext

from .measure import Work, one_thread, ratio, time_by_operation, time_interleaved
from .networks import VIT_B_16, VIT_B_32, computes_bfloat16, own_encoder, random_clip
from .step import Log, largest_shares

CPU = DeviceContext()
ENCODERS = {"ViT-B/16": VIT_B_16, "ViT-B/32": VIT_B_32}
BATCHES = (8, 16)
ENCODER_TARGET = (0.70, "most")
"""Float32 / open_clip."""


def measure_encoder(rounds: int, log: Log, batches: tuple[int, ...] = BATCHES, encoders: dict[str, Any] = ENCODERS) -> dict[str, Any]:
    """Seconds of the processor, with one thread, and ratios to open_clip in float32, in which it is faster than in bfloat16 on a CPU.

    bfloat16 is measured where the processor computes with it.
    """
    half = computes_bfloat16(CPU.device)
    results: dict[str, Any] = {"bfloat16": half, "encoders": []}
    with one_thread():
        for name, config in encoders.items():
            theirs = random_clip(config).visual.train(False).requires_grad_(False)  # type: ignore[union-attr]
            encoders_by_name = {"open_clip": theirs, "float32": own_encoder(theirs)}
            if half:
                encoders_by_name["bfloat16"] = own_encoder(theirs).to(torch.bfloat16)
            for batch in batches:
                log(f"{name}, batch {batch}: {', '.join(encoders_by_name)}, {rounds} rounds")
                side = int(config["vision_cfg"]["image_size"])
                images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(4))
                variants: dict[str, Work] = {n: partial(both_passes, encoder, images) for n, encoder in encoders_by_name.items()}
                seconds = time_interleaved(variants, rounds, CPU.device, clock=time.process_time)
                results["encoders"].append({
                    "network": f"{name}, batch {batch}",
                    "seconds": seconds,
                    "ratios": {f"{n} / open_clip": vars(ratio(s, seconds["open_clip"])) for n, s in seconds.items() if n != "open_clip"},
                    "operations": {n: largest_shares(time_by_operation(work, CPU.device, 1)) for n, work in variants.items()},
                })  # fmt: skip
    return results


def both_passes(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The gradient of the sum of the embeddings with respect to the images [B, 3, S, S], in float32."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        embeddings = encoder(leaf.to(next(encoder.parameters()).dtype))
        return torch.autograd.grad(embeddings.float().sum(), leaf)[0]
