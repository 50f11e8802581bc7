"""Run by ComfyUI's Python: which nodes copy a large IMAGE, and how often. Prints JSON: the node → the new tensors of half its size or more."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace
from typing import Any

import torch
from contract import NAME, pack
from torch.utils._python_dispatch import TorchDispatchMode

HEIGHT, WIDTH = 600, 900


class Large(TorchDispatchMode):
    """Notes operations whose result is a new tensor of at least half the size of the IMAGE."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_new = bool(returns) and returns[0].alias_info is None and isinstance(result, torch.Tensor)
        if is_new and result.numel() * result.element_size() >= HEIGHT * WIDTH * 3 * 4 / 2:
            self.found.append(f"{func} {tuple(result.shape)}")
        return result


def main() -> None:
    """Runs the nodes."""
    pack()
    steps, paste, latent = (importlib.import_module(f"{NAME}.nodes.{name}") for name in ("steps", "paste", "latent"))
    ddpm = SimpleNamespace(model=SimpleNamespace(image_size=16, config=steps.DiffusionConfig()))
    copies: dict[str, list[str]] = {}
    with torch.inference_mode():
        image = torch.rand(1, HEIGHT, WIDTH, 4, generator=torch.Generator().manual_seed(0))
        other = 1 - image[..., :3]
        mask = torch.zeros(1, HEIGHT, WIDTH)
        mask[:, 200:260, 300:380] = 1

        def call(name: str, node: Any, *given: Any) -> Any:
            with Large() as large:
                result = node.execute(*given).args[0]
            copies[name] = large.found
            return result

        values = {"mode": "start", "ddpm": ddpm, "steps": 10, "strength": 0.5, "seed": 0, "batch": 2, "mask": mask}
        noisy = call("Noise Background", steps.NoiseBackground, image, values)
        call("Blend Latents", steps.BlendLatents, noisy, noisy, mask)
        state = latent.unpack(noisy, "the test")
        pasted = call("Final Paste of a LATENT", paste.FinalPaste, state.at(-1, state.samples), image)
        inside = mask[0].bool()
        exact = all(bool(torch.equal(row[~inside], image[0][~inside])) for row in pasted) and bool((pasted[0] != image[0])[inside].any())
        exact = exact and bool(torch.equal(pasted[..., 3], image[..., 3].expand(2, -1, -1)))
        whole = call("Final Paste of an IMAGE", paste.FinalPaste, other, image, mask)
        exact = exact and bool(
            torch.equal(whole[0][inside][..., :3], other[0][inside]) and torch.equal(whole[0][~inside], image[0][~inside])
        )
    print(json.dumps({"copies": copies, "exact": exact}))


if __name__ == "__main__":
    main()
