"""Run by ComfyUI's own Python (tests/test_core_region.py): Cut Region and Paste Region with core's nodes. Prints the observations as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
from core_noise import SIZE, Core, sentence, told
from torch import Tensor

WIDTH, HEIGHT = 150, 110


def images(count: int = 1, channels: int = 3) -> Tensor:
    """IMAGEs of random values, which are no multiples of 1/255."""
    return torch.rand(count, HEIGHT, WIDTH, channels, generator=torch.Generator().manual_seed(count))


def masks(count: int = 1) -> Tensor:
    """MASKs of boxes, each elsewhere."""
    mask = torch.zeros(count, HEIGHT, WIDTH)
    for i in range(count):
        mask[i, 20 + i : 60 + i, 30 + 3 * i : 70 + 3 * i] = 1
    return mask


def cut(core: Core, *args: Any, **options: Any) -> Any:
    """Cut Region."""
    return core.region.CutRegion.execute(*args, **{"size": 64, "multiple": 8, **options}).result


def paste(core: Core, *args: Any, **options: Any) -> Tensor:
    """Paste Region."""
    result: Tensor = core.region.PasteRegion.execute(*args, **options).result[0]
    return result


def latent_model(image: Tensor) -> Tensor:
    """An edit by core's nodes that a latent model's path resembles: an eighth of the size and back, and other colors."""
    import nodes

    small = nodes.ImageScale().upscale(image, "area", image.shape[2] // 8, image.shape[1] // 8, "disabled")[0]
    return nodes.ImageInvert().invert(nodes.ImageScale().upscale(small, "bicubic", image.shape[2], image.shape[1], "disabled")[0])[0]  # type: ignore[no-any-return]


def changed(result: Tensor, original: Tensor, mask: Tensor) -> list[int]:
    """Pixels changed outside the mask, and inside, any channel, bit by bit."""
    different = (result.contiguous().view(torch.int32) != original.contiguous().view(torch.int32)).any(-1)
    inside = (mask > 0).expand(len(result), -1, -1)
    return [int((different & ~inside).sum()), int((different & inside).sum())]


def pastes(core: Core) -> dict[str, Any]:
    """Batches of every kind, alpha channels, masks of other sizes."""
    found: dict[str, Any] = {}
    for name, count, channels, many in (
        ("one", 1, 3, 1),
        ("RGBA", 1, 4, 1),
        ("frames", 16, 4, 16),
        ("one mask", 16, 3, 1),
        ("one picture", 1, 3, 16),
    ):
        image, mask = images(count, channels), masks(many)
        image_before, mask_before = image.clone(), mask.clone()
        made, area, region, latent = cut(core, image, mask)
        result = paste(core, latent_model(made), image, region)
        union = mask.amax(0, keepdim=True) if name == "one picture" else mask
        found[name] = {
            "shapes": [list(t.shape) for t in (made, area, latent["samples"], latent["noise_mask"], result)],
            "changed": changed(result, image.expand_as(result), union),
            "latent": float((latent["samples"].movedim(1, -1) - (made * 2 - 1)).abs().max()),
            "inputs": torch.equal(image, image_before) and torch.equal(mask, mask_before),
        }
    image, mask = images(), masks()
    made, area, region, _ = cut(core, image, mask[:, ::2, ::2].contiguous(), shape="as the mask")
    found["half mask"] = changed(paste(core, latent_model(made), image, region, feather=3, tone_match=True), image, mask)
    edit = latent_model(made)
    found["mask of the cut"] = changed(paste(core, edit, image, region, area.clone()), image, mask)
    found["larger edit"] = changed(paste(core, edit.repeat_interleave(2, 1).repeat_interleave(2, 2), image, region), image, mask)
    chained = paste(core, edit, paste(core, edit, image, region), region)
    found["chained"] = changed(chained, image, mask)
    return found


def sampled(core: Core) -> dict[str, Any]:
    """Cut Region → KSampler with a MODEL of pixels → Paste Region, and the LATENT of a clean run."""
    ddpm = core.ddpm(core.diffusion.DiffusionConfig(variance="fixed_small"))
    model = core.node(core.model.DDPMAsModel.execute(ddpm).result[0])
    image, mask = images(), masks()
    made, _, region, latent = cut(core, image, mask, ddpm, size=512, shape="as the mask")
    noise = torch.randn(3, *latent["samples"].shape[1:], generator=torch.Generator().manual_seed(0))
    repeated = {key: value.repeat(3, 1, 1, 1) for key, value in latent.items()}
    samples = core.sampled(model, repeated, noise, steps=4)
    result = paste(core, (samples.movedim(1, -1) + 1) / 2, image, region)
    return {
        "size": [list(made.shape), SIZE],
        "results": list(result.shape),
        "changed": changed(result, image.expand_as(result), mask),
        "edit": float((samples - repeated["samples"]).abs().mean()),
    }


def blueprint(core: Core) -> dict[str, Any]:
    """The nodes of the blueprint *Cut, Sample, Paste*, on a MODEL of pixels whose VAE loses nothing."""
    from comfy_extras.nodes_mask import GrowMask

    import nodes

    made = core.model.DDPMAsModel.execute(core.ddpm(core.diffusion.DiffusionConfig(variance="fixed_small"))).result
    model, positive, negative, vae = made[:4]
    image, mask = images(2, 4), masks(2)
    pixels, area, region, _ = cut(core, image, mask, size=96, shape="as the mask")
    latent = nodes.SetLatentNoiseMask().set_mask(nodes.VAEEncode().encode(vae, pixels)[0], GrowMask.execute(area, 8, True).result[0])[0]
    sampler = nodes.KSampler()
    results = {}
    for name, which in (("blended", core.node(model, -1)), ("plain", model)):
        samples = sampler.sample(which, 3, 12, 1.0, "dpmpp_2m", "normal", positive, negative, latent, denoise=0.8)[0]
        results[name] = paste(core, nodes.VAEDecode().decode(vae, samples)[0], image, region, feather=2, tone_match=True)
    return {"changed": changed(results["blended"], image, mask), "noise": float((results["blended"] - results["plain"]).abs().max())}


def wrong_use(core: Core) -> dict[str, Any]:
    """Sentences."""
    image, mask = images(), masks()
    made, _, region, _ = cut(core, image, mask)

    square = images()[:, :64, :64].contiguous()
    with told() as lines:
        for corner in (torch.ones(1, 64, 64), torch.nn.functional.pad(torch.ones(1, 10, 10), (0, 54, 0, 54))):
            own = cut(core, square, corner)
            paste(core, own[0], square, own[2], corner)
    return {
        "empty": sentence(lambda: cut(core, image, torch.zeros(1, 64, 64))),
        "another aspect": sentence(lambda: cut(core, image, torch.ones(1, 64, 64))),
        "masks": sentence(lambda: cut(core, images(3), masks(2))),
        "one empty": sentence(lambda: cut(core, images(2), torch.cat([masks(), torch.zeros(1, HEIGHT, WIDTH)]))),
        "context": sentence(lambda: cut(core, image, mask, context=0.2)),
        "whole picture": sentence(lambda: paste(core, image, image, region)),
        "other original": sentence(lambda: paste(core, made, images()[:, :100], region)),
        "edits": sentence(lambda: paste(core, made.repeat(3, 1, 1, 1), images(2), region)),
        "not finite": sentence(lambda: paste(core, made * float("nan"), image, region)),
        "far mask": sentence(
            lambda: paste(core, made, image, region, torch.nn.functional.pad(torch.ones(1, 5, 5), (WIDTH - 5, 0, HEIGHT - 5, 0)))
        ),
        "no region": sentence(lambda: paste(core, made, image, "region")),
        "one size": lines,
    }


if __name__ == "__main__":
    core = Core()
    print(json.dumps({check.__name__: check(core) for check in (pastes, sampled, blueprint, wrong_use)}))
