"""Cut Region and Paste Region in ComfyUI's own process, with core's nodes and sampler between them."""

from __future__ import annotations

from typing import Any

import pytest

from .server import needs_comfyui, observed

pytestmark = [needs_comfyui, pytest.mark.slow]


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What tests/core_region.py saw."""
    return observed("core_region.py", 600)


def test_batches_of_every_kind_change_nothing_outside(told: dict[str, Any]) -> None:
    found = told["pastes"]
    cuts = {"one": 1, "RGBA": 1, "frames": 16, "one mask": 16, "one picture": 16}
    for name, count in cuts.items():
        image, area, samples, noise_mask, result = found[name]["shapes"]
        assert (
            image == [count, 64, 64, 3] and area == [count, 64, 64] and samples == [count, 3, 64, 64] and noise_mask == [count, 1, 64, 64]
        ), name
        assert result == [1 if name == "one picture" else count, 110, 150, 4 if name in ("RGBA", "frames") else 3], name
        outside, inside = found[name]["changed"]
        assert outside == 0 and inside >= 1600, name
        assert found[name]["inputs"] is True, f"{name}: an input was written to"
        assert found[name]["latent"] == 0
    for name in ("half mask", "mask of the cut", "larger edit", "chained"):
        assert found[name] == [0, 1600], name


def test_a_ksampler_between_them_changes_nothing_outside(told: dict[str, Any]) -> None:
    found = told["sampled"]
    size, side = found["size"]
    assert size == [1, side, side, 3], "the size of the connected model"
    assert found["results"] == [3, 110, 150, 3] and found["changed"] == [0, 4800] and found["edit"] > 0.01


def test_the_nodes_of_the_blueprint_run_and_change_nothing_outside(told: dict[str, Any]) -> None:
    outside, inside = told["blueprint"]["changed"]
    assert outside == 0 and inside == 2 * 1600 and told["blueprint"]["noise"] > 1e-5


def test_wrong_use_gets_a_sentence(told: dict[str, Any]) -> None:
    words = {
        "empty": "the MASK is empty (1×64×64, all 0)",
        "another aspect": "the mask is 64×64 and the image 150×110, a different aspect ratio",
        "masks": "2 masks were given for 3 pictures",
        "one empty": "mask 2 of 2 is empty",
        "context": "context is 0.2; give 1 (the mask alone) or more (default 1.6) (input “context”).",
        "whole picture": "the edited IMAGE is 150×110 and the cut was 64×64",
        "other original": "the original is 150×100, and the region was cut from 150×110",
        "edits": "2 originals were given for 3 edited images of 1 regions; give 1 or 3",
        "not finite": "edited image 1 of 1 has no finite value",
        "far mask": "nothing inside the region of cut 1",
        "no region": "connect the output “region” of Cut Region",
    }
    found = told["wrong_use"]
    for name, text in words.items():
        assert found[name].startswith("BlendedError: ") and text in found[name], name
    (line,) = found["one size"]
    assert (
        line == "Blended Diffusion: the cut and the original have one size; the mask at Paste Region is taken as drawn over the original."
    )
