"""DDPM as MODEL: core's samplers with the pack's diffusion models, in ComfyUI's own Python (tests/core_model.py)."""

from __future__ import annotations

from typing import Any

import pytest

from .server import needs_comfyui, observed, part

pytestmark = [needs_comfyui, pytest.mark.slow]
Told = dict[str, Any]


@pytest.fixture(scope="module")
def told() -> Told:
    """The observations of one run."""
    return observed("core_model.py")


def test_ksampler_is_the_packs_own_loop(told: Told) -> None:
    """Objectives × schedules × variances × {euler: DDIM with η 0, ddpm: DDPM with fixed_small}, and the embedded model."""
    found = part(told, "equalities")
    assert len(found) == 3 * 4 * 2 * 2 + 2
    for case, (distance, same_timesteps, calls, changed) in found.items():
        assert distance < 5e-5 and same_timesteps and calls == 30 and changed > 0.5, (case, distance)


def test_the_levels_are_the_steps_of_the_process(told: Told) -> None:
    found = part(told, "levels")
    assert max(found["normal"]) < 1e-6, "scheduler normal is the pack's respacing"
    assert max(found["percent"]) < 1e-6 and found["ends"] == [999999999.9, 0.0]
    assert len(found["schedulers"]) >= 4 * 9 and all(found["schedulers"].values())


def test_every_sampler_runs_and_leaves_black_pixels_alone(told: Told) -> None:
    found = part(told, "all_samplers")
    failed = {name: answer for name, answer in found.items() if isinstance(answer, str)}
    assert failed == {} and len(found) > 40
    for name, (outside, inside, finite) in found.items():
        assert outside == 0 and inside > 0.01 and finite, name


def test_masks_of_core(told: Told) -> None:
    found = part(told, "masks")
    ramp, black = found["ramp"], found["black"]
    assert 0 < black < 8 and not any(ramp[:black]), "black pixels stay, with Differential Diffusion too"
    assert sum(ramp[-4:]) > 3 * sum(ramp[black:8]) > 0
    assert found["last sigma"] == 0, "uni_pc writes to its sigmas, which a scheduler node keeps for the next run"
    assert found["noise left outside"] > 0.1, "a LATENT that is still noisy is noisy outside of the mask too"


def test_classes_travel_in_the_conditioning(told: Told) -> None:
    found = part(told, "classes")
    labels = [call[1] for call in found["calls"]]
    assert labels == [[3, 3], [-1, -1], [-1, -1, 3, 3], [-1, -1]], "CFG in one pass, and a text has no effect"
    assert found["moved"] > 0.01 and found["cfg"] < 1e-4 and found["text"] == 0 and max(found["own"]) < 5e-5
    assert found["too high"] == "BlendedError: class 5 does not exist; the model has classes 0 to 4 (input “class_choice”)."
    for word in ("cat", "random"):
        said = found["a word" if word == "cat" else word]
        assert said == f"BlendedError: class_choice is '{word}'; give 'zero' or the number of a class (input “class_choice”)."
    assert found["of another model"] == "BlendedError: class 3 does not exist; the model has classes 0 to 1."
    assert found["unconditional"] == 0


def test_sizes_precisions_pictures(told: Told) -> None:
    found = part(told, "precisions")
    assert found["bf16"][0] < 0.5 and found["bf16"][1] == "torch.float32"
    assert found["wide"] == [1, 3, 12, 40] and found["empty"] == [1, 3, 16, 16] and found["size"] == 16
    assert found["encoded"] == [[2, 3, 16, 16], 0.0] and found["decoded"] < 1e-6 and found["vae dtype"] == "torch.float32"
    assert found["levels"] == [0.0, 0], "the levels of 8-bit images come back, and SaveImage, which rounds down, writes them"
    assert found["preview"] < 1, "a preview is the picture, rounded down to 8 bit"


def test_what_others_do_to_a_model(told: Told) -> None:
    found = part(told, "others")
    assert found["names"] and found["lora"] > 50, "the weights have the names of the published checkpoints"
    assert found["merged"] == found["not merged"] == 0, "a merge of one MODEL is not seen by another"
    assert found["wrapped"] == [0.0, 3] and found["cached"] and found["RenormCFG"]
    assert found["control"][0] == 0 and found["control"][1] == 3
    assert found["ranges"] == 0


def test_one_network_in_two_sockets(told: Told) -> None:
    found = part(told, "memory")
    assert found["state"] and found["left on it"] == []
    assert found["patch"] > 0.01 and found["restored"] and found["inference"] == 0
    assert found["entries"] == 1 and found["bytes"][0] == found["bytes"][1], "the memory is held once"
    assert found["either order"][:2] == [True, True] and found["either order"][2] > 0 and found["as before"]
    assert found["unloaded"] == [0, 0, True] and found["inference after /free"] == 0
    assert found["alive"] == [False] * 4, "nothing keeps the network when its sockets are gone"
    for mode, (whole, apart, whole_again, same) in found["without a GPU"].items():
        assert whole and apart and whole_again and same, mode


def test_cancel_stops_within_a_step(told: Told) -> None:
    assert part(told, "interrupted") == {"stopped": "InterruptProcessingException", "calls": 1, "finished": True}


def test_wrong_latents_get_a_sentence(told: Told) -> None:
    found = part(told, "wrong")
    assert found.pop("another size") == (
        "BlendedError: the LATENT is 24×18, and this MODEL needs sides that are multiples of 4; scale the image before VAE Encode, best to 16×16, the "
        "size that it was trained at."
    )
    assert len(found) == 5
    for name, text in found.items():
        assert text.startswith("BlendedError: the LATENT has shape ") and text.endswith(
            "this MODEL works on pixels, [batch, 3, height, width]; make the LATENT with VAE Encode and the vae of DDPM as MODEL."
        ), name
