"""CLIP Guidance (MODEL) with core's samplers, networks and memory manager, in ComfyUI's own Python (tests/guided_model.py)."""

from __future__ import annotations

from typing import Any

import pytest

from blended_core.shift import SAMPLERS

from .server import needs_comfyui, observed, part

pytestmark = [needs_comfyui, pytest.mark.slow]
Told = dict[str, Any]


@pytest.fixture(scope="module")
def told() -> Told:
    """The observations of one run."""
    return observed("guided_model.py", 1800)


def test_patch_post_cfg_function_and_guider_give_one_picture(told: Told) -> None:
    found = part(told, "hooks")
    assert len(found) == 8
    for case, (function, guider, moved) in found.items():
        assert function and guider and moved > 0.05, case


def test_every_sampler_of_core_is_known_and_guided(told: Told) -> None:
    found = part(told, "all_samplers")
    assert set(found["samplers"]) == set(SAMPLERS), "the table is that of the installed ComfyUI"
    for name, answer in found["samplers"].items():
        assert not isinstance(answer, str), answer
        known, eta, moved, through, outside, finite = answer
        assert known and eta == SAMPLERS[name].eta, name
        assert moved > 0.05 and through > 0.05 and outside == 0 and finite, name
    assert found["notes"] == []


def test_the_kind_of_a_sampler_decides_how_far_guidance_moves_it(told: Told) -> None:
    found = part(told, "kinds")
    assert {name.removesuffix(", auto"): tuple(found[name]) for name in found if name.endswith("auto")} == {
        "euler": (2.0, 0), "ancestral": (1.0, 0), "ancestral, eta 0": (2.0, 0), "2m sde, eta 0.5": (1.6, 0), "adaptive": (1.0, 0),
        "unknown": (1.0, 1), "no function": (1.0, 1),
    }  # fmt: skip
    assert {strength for name, (strength, _) in found.items() if name.endswith("ode")} == {2.0}
    assert {strength for name, (strength, _) in found.items() if name.endswith("sde")} == {1.0}
    assert not any(notes for name, (_, notes) in found.items() if not name.endswith("auto"))


def test_every_type_of_model_of_core_has_its_units(told: Told) -> None:
    found = part(told, "parameterizations")
    flows = {name for name, answer in found.items() if answer == [True, 1.0]}
    refused = {name for name, answer in found.items() if isinstance(answer, str)}
    assert flows >= {"FLOW", "FLUX"} and refused == {name for name in found if name.startswith("IMG_TO_IMG")}
    assert found["EPS"] == found["V_PREDICTION"] == [False, 1.0] and found["EDM"] == [False, 0.5]
    assert all("without noise levels" in found[name] for name in refused)


def test_two_patches_add_up(told: Told) -> None:
    found = part(told, "two")
    assert found["order"] and found["sum"] < 1e-6 and min(found["moved"]) > 5e-5
    assert found["halves"] == 0, "two masks: each half has its own prompt"
    assert (found["parts"], found["before"], found["models"]) == (2, 1, 1)


def test_it_stacks_with_other_patches(told: Told) -> None:
    found = part(told, "stacks")
    names = {name.split(", ")[0] for name in found}
    assert names >= {"cfg 7", "weight patch", "perturbed attention", "differential diffusion", "control"} and len(found) == 2 * len(names)
    for name, (guided, patched, either_order, finite) in found.items():
        assert guided > 0.05 and patched > 0.05 and either_order and finite, name


def test_two_estimates_of_a_guider_are_shifted_alike(told: Told) -> None:
    found = part(told, "tuples")
    assert found["types"] == ["tuple"] * 3 and found["calls"] == 3, "CLIP is asked once a call"
    assert max(found["alike"]) < 1e-4 < min(found["moved"])


def test_nothing_is_left_after_a_run(told: Told) -> None:
    found = part(told, "state")
    assert found["branches"][:3] == [True] * 3 and found["branches"][3] > 0.05
    assert found["after a run"] and found["failed"] == "RuntimeError: of the test"
    assert found["after a failure"] == [True] * 3 and found["after an interrupt"] == [True] * 2


def test_an_interrupt_stops_within_a_step(told: Told) -> None:
    found = part(told, "state")
    assert found["interrupted"] == "InterruptProcessingException" and found["calls"] == 2
    assert found["callbacks"] == 3, "of previews"


def test_the_manager_knows_clip_and_the_decoder(told: Told) -> None:
    found = part(told, "memory")
    whole = {"clip": True, "vae": True, "model": True}
    assert found["loaded"] == found["loaded again"] == whole and found["runs again"] and found["kept"]
    assert found["after"] == dict.fromkeys(whole, False)
    estimate = found["estimate"]
    assert estimate > found["decoder"] > 0
    assert ["load", estimate] in found["asked"] and ["free", estimate] in found["asked"]


def test_weights_of_loader_nodes_are_healed_without_harm(told: Told) -> None:
    found = part(told, "healed")
    assert found["frozen"] == [True, True] and found["after"] == [False, False]
    assert found["decoded"] and found["plain"] and found["weights"] and not found["gradients"]


def test_clip_sees_what_the_nodes_of_core_show(told: Told) -> None:
    found = part(told, "decoders")
    assert found["full"] < 1e-4 and found["size"] == [2, 3, 64, 64], "VAE Decode"
    assert found["rough"] <= 1, "the preview"
    assert found["pixels"], "a pixel-space MODEL is guided alike with its VAE and without"
    assert min(*found["moved"], *found["flow"], *found["flux"][:2]) > 0.05 and found["finite"] and found["flux"][2] is False


def test_masks(told: Told) -> None:
    found = part(told, "masks")
    assert min(found["none"]) > 0
    for name in ("mask", "large", "small", "soft", "noise mask", "both"):
        middle, border, other_middle, other_border = found[name]
        assert middle > 0 == border and other_middle > 0 == other_border, name
        assert found[name] == found["mask"], name
    assert [value > 0 for value in found["two"]] == [True, False, False, True]
    assert "the MASK is empty" in found["faint"] and "3 masks were given for 2 images" in found["three"]
    assert "a different aspect ratio" in found["aspect"]


def test_guidance_options(told: Told) -> None:
    found = part(told, "options")
    assert found["node's scale"] and found["scale"] > 0 and found["default"] and found["zero"] and found["no prompt"]
    assert found["gradient"] == [True, False], "the node's gradient replaces that of the options"
    assert found["recommended"] == 3000.0, "of the embedded model"
    assert 0 < found["half"] < 3 and found["background"] > 0
    assert "clip_input 'mixed' needs the noise schedule" in found["mixed"] and "the LATENT is empty" in found["empty"]


def test_a_video_model_with_a_single_frame_makes_images(told: Told) -> None:
    found = part(told, "frames")
    assert min(found["moved"]) > 0.05 and found["shape"] == [2, 4, 1, 8, 8] and found["masked"]


WRONG = {
    "conditioning": "the prompt is a list; connect Encode Prompt",
    "core's clip": "connect Load CLIP (open_clip). ComfyUI's own CLIP does not fit",
    "vae of pixels": "the VAE is for latents of 3 channels and the MODEL has 4 (SDXL)",
    "vae of latents": "the VAE is for latents of 4 channels and the MODEL has 3",
    "vae of another factor": "4×4 image pixels for the VAE and 8×8 for the MODEL",
    "vae of audio": "the VAE makes no RGB images",
    "no vae": "the VAE is empty, because the checkpoint contains none",
    "no colors": "so CLIP cannot see them; connect the vae",
    "audio model": "the MODEL makes audio",
    "streamed": "--disable-dynamic-vram",
    "video": "the LATENT is a video of 3 latent frames",
    "audio": "the LATENT has shape 1×4×64",
    "latent of a pixel model": "the LATENT has 3 channels and the MODEL takes 4 (SDXL)",
    "nested": "the LATENT holds 2 streams",
    "no levels": "without noise levels, so there is nothing to guide",
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_gets_a_sentence(told: Told, case: str) -> None:
    found = part(told, "wrong")
    assert set(found) == set(WRONG)
    assert found[case].startswith("BlendedError: ") and WRONG[case] in found[case]
