"""Makes the images of the README with the embedded models: ``uv run python docs/make_images.py``. Takes some minutes on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from blended_core import DeviceContext, Models, edit_picture, load_clip, load_ddpm, preset, to_uint8
from blended_core.io.contact_sheet import contact_sheet
from blended_core.toy.models import GUIDANCE_SCALE
from blended_core.toy.world import demo_scene

HERE = Path(__file__).parent / "images"
HERO = ("an apple", "a mushroom", "a pumpkin", "a cat", "a tree", "a balloon")
BACKGROUND, SEED, CANDIDATES = "meadow", 0, 4


def hero(models: Models) -> None:
    """Writes a contact sheet of six edits of one scene with one mask: the best-ranked candidate for each prompt."""
    source, mask_pixels = demo_scene(BACKGROUND, SEED)
    picture = torch.from_numpy(source).permute(2, 0, 1)[None].float() / 255
    mask = torch.from_numpy(mask_pixels[..., 0].copy())[None, None].float() / 255
    tiles = []
    for text in HERO:
        assert models.clip is not None
        result = edit_picture(
            picture,
            mask,
            models.clip.prompt(text),
            models,
            preset("best", steps="20", candidates=CANDIDATES, batch=4, seed=SEED, scale=GUIDANCE_SCALE),
        )
        best = result.candidates[0]
        tiles.append(
            (to_uint8(result.picture(best)), f"“{text}”", f"best of {CANDIDATES} by CLIP, distance {best.score.clip_distance:.3f}")
        )
        print(text, best.score)
    contact_sheet(
        HERE / "hero.png",
        source,
        mask,
        tiles,
        "Blended diffusion",
        "one picture, one mask, six prompts, the embedded models",
        highlight=False,
    )


def main() -> None:
    """Writes all images."""
    context = DeviceContext.choose()
    hero(Models(load_ddpm(context), load_clip(context), context=context))


if __name__ == "__main__":
    main()
